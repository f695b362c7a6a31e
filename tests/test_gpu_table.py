"""The rows of tests/benchmarks/gpu.py, run small on a CPU, so that none fails when a GPU becomes available."""

import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

HIDDEN = ("grain", "tensorflow_datasets", "array_record")
"""Libraries that GPU machines may not have."""


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> tuple[list[list[str]], str]:
    """The rows that the benchmark prints, split into cells, and the text that it leaves in RESULTS.md."""
    folder = tmp_path_factory.mktemp("gpu")
    for name in HIDDEN:
        (folder / f"{name}.py").write_text("raise ImportError")
    results = folder / "RESULTS.md"
    results.write_text("# Before\n")
    root = pathlib.Path(__file__).parents[1]
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--small", "--results", str(results)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(folder), str(root)))}
    out = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout
    return [line.split(" | ") for line in out.splitlines() if line.startswith("| ")][1:], results.read_text()


def test_every_row_runs_without_the_libraries_of_the_data_pipeline(table):
    rows, _ = table
    notes = {row[0].strip("| "): row[-1].strip(" |") for row in rows}
    assert len(rows) == 16
    assert not [note for note in notes.values() if note.startswith(("failed", "took", "no time"))], notes
    assert notes["cuDNN's attention against xla"] == "no GPU"


def test_what_was_measured_is_positive(table):
    measured = [row for row in table[0] if row[1]]
    assert len(measured) >= 11
    assert all(float(row[1]) > 0 and float(row[2]) > 0 for row in measured)


def test_the_table_is_appended_to_the_results(table):
    rows, text = table
    assert text.startswith("# Before\n\n## cpu, jax ")
    assert all(" | ".join(row) in text for row in rows)
