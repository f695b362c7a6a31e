"""What is said about files that cannot be used: each once, however often it is met."""

import concurrent.futures

import pytest

from anima_jax.data.problems import Problems
from anima_jax.errors import UserError


def test_a_file_skipped_twice_is_reported_and_counted_once(caplog):
    problems = Problems()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(problems.skip, ["a.png: broken", UserError("b.png:\nbroken")] * 50))
    assert sorted(caplog.messages) == ["skipped: a.png: broken", "skipped: b.png: broken"]
    assert problems.count == 2
    assert problems.summary() == "2 files were skipped, named above (--strict_data makes that an error)"


def test_the_summary_agrees_in_number():
    problems = Problems()
    assert problems.summary() == ""
    problems.skip("a.png: broken")
    assert problems.summary() == "1 file was skipped, named above (--strict_data makes that an error)"


def test_with_strict_the_first_is_an_error():
    with pytest.raises(UserError, match=r"^a\.png: broken$"):
        Problems(strict=True).skip("a.png: broken", "b.png: broken")
