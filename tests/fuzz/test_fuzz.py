"""Hostile inputs end in a result or one line: those that were once lost, and a short campaign of every format."""

import pytest

from tests.fuzz.__main__ import run
from tests.fuzz.campaign import lost
from tests.fuzz.formats import FORMATS, corpus

INPUTS = 40
"""For each format: a number, not a time, so that a busy machine tries the same."""


@pytest.mark.parametrize("name", FORMATS)
def test_inputs_that_were_once_lost_end_in_a_result_or_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [how for files in corpus(name) if (how := lost(FORMATS[name].read, tmp_path / "input", files)[0])] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_no_input_of_a_short_campaign_is_lost(name):
    counts = run(name, seconds=3600, most=INPUTS, seed=0)
    print(f"{name}: {counts.inputs} inputs, {counts.refused} of them refused")
    assert list(counts.lost) == []
    assert counts.results
