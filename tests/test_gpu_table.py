"""The table of tests/benchmarks/gpu.py, its rows run small on a CPU: none may fail on the day a GPU is at hand."""

import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

HIDDEN = ("grain", "tensorflow_datasets", "array_record")
"""What the images of GPU machines may lack."""


def test_every_row_runs_without_the_libraries_of_the_data_pipeline(tmp_path):
    for name in HIDDEN:
        (tmp_path / f"{name}.py").write_text("raise ImportError")
    results = tmp_path / "RESULTS.md"
    results.write_text("# Before\n")
    root = pathlib.Path(__file__).parents[1]
    command = [sys.executable, "-m", "tests.benchmarks.gpu", "--small", "--results", str(results)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(root)))}
    out = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout

    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 16
    notes = {row[0].strip("| "): row[-1].strip(" |") for row in rows}
    assert not [note for note in notes.values() if note.startswith(("failed", "took", "no time"))], notes
    assert notes["cuDNN's attention against xla"] == "no GPU"
    measured = [row for row in rows if row[1]]
    assert len(measured) >= 11
    assert all(float(row[1]) > 0 and float(row[2]) > 0 for row in measured)
    text = results.read_text()
    assert text.startswith("# Before\n\n## cpu, jax ")
    assert all(" | ".join(row) in text for row in rows)
