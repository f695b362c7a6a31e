"""The compilation cache across processes, and traces of chosen steps."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from anima_jax.errors import UserError
from anima_jax.training.profiling import (
    MIN_COMPILE_TIME,
    Profiler,
    parse_steps,
    use_compilation_cache,
    user_cache_folder,
)

COMPILE = """
import sys
import jax, jax.numpy as jnp
from anima_jax.training.profiling import use_compilation_cache, watch_compilation

print(use_compilation_cache(None if sys.argv[1] == "default" else sys.argv[1]))
with watch_compilation() as found:
    jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8)))
print(found)
"""


def compiled(folder, **environment):
    """Compile one program in a new process; return the cache folder and the compilation as it prints them."""
    own = ("JAX_COMPILATION_CACHE_DIR", MIN_COMPILE_TIME.upper())
    clean = {name: value for name, value in os.environ.items() if name not in own}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, str(folder)],
        capture_output=True,
        text=True,
        check=True,
        env={**clean, **environment},
    )
    return result.stdout.splitlines()


def test_a_second_process_finds_a_program_of_the_first_however_short_its_compilation(tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    folder, first = compiled("default", **environment)
    assert folder == str(tmp_path / "anima_jax" / "xla")
    assert first.endswith("s (compilation cache: miss)")
    assert compiled("default", **environment)[1].endswith("s (compilation cache: hit)")


@pytest.fixture
def restored_cache():
    """The compilation cache as it was, after the test."""
    before = jax.config.jax_compilation_cache_dir
    yield
    use_compilation_cache(before or "")


@pytest.mark.parametrize("variable", [None, "relative"])
def test_the_default_cache_is_in_the_home_folder_unless_xdg_gives_an_absolute_path(monkeypatch, variable):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if variable:
        monkeypatch.setenv("XDG_CACHE_HOME", variable)
    assert user_cache_folder() == pathlib.Path.home() / ".cache" / "anima_jax" / "xla"


def test_a_given_cache_folder_becomes_jaxs_setting_and_the_default(tmp_path, restored_cache):
    assert use_compilation_cache(str(tmp_path / "programs")) == str(tmp_path / "programs")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "programs")
    assert use_compilation_cache(None) == str(tmp_path / "programs")


def test_an_empty_string_turns_the_cache_off(restored_cache):
    assert use_compilation_cache("") is None
    assert jax.config.jax_compilation_cache_dir is None


def test_only_a_given_folder_that_cannot_be_written_is_an_error(tmp_path, monkeypatch, restored_cache):
    use_compilation_cache("")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="compilation_cache_dir"):
        use_compilation_cache(str(tmp_path / "file" / "programs"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert use_compilation_cache(None) is None


def test_steps_to_profile_are_parsed_from_start_and_stop():
    assert list(parse_steps("10:13")) == [10, 11, 12]
    for text in ("10", "10:", "0:3", "5:5", "7:3", "a:b", "-1:3", "1:2:3"):
        with pytest.raises(UserError, match=f"--profile {text}: expected START:STOP"):
            parse_steps(text)


@pytest.mark.parametrize(("steps", "run"), [(range(2, 4), 5), (range(2, 9), 3)])
def test_a_trace_of_the_chosen_steps_is_written_even_if_the_run_ends_before_the_last(tmp_path, steps, run):
    double = jax.jit(lambda x: 2 * x)
    profiler = Profiler(steps, tmp_path / "profile")
    x, traced = jnp.ones(3), []
    for number in range(1, run + 1):
        x = profiler.run_step(number, double, x)
        traced.append(bool(list(tmp_path.rglob("*.xplane.pb"))))
    profiler.close()
    assert float(x[0]) == 2.0**run
    assert traced == [False] * (2 if run == 5 else 3) + [True] * (3 if run == 5 else 0)
    (trace,) = tmp_path.rglob("*.xplane.pb")
    marks = trace.read_bytes()
    assert b"train" in marks


def test_without_chosen_steps_no_trace_is_written(tmp_path):
    profiler = Profiler(None, tmp_path / "profile")
    assert profiler.run_step(1, lambda x: x + 1, 1) == 2
    profiler.close()
    assert not list(tmp_path.iterdir())
