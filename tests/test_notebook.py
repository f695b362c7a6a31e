"""notebooks/anima.ipynb: valid, without outputs, with commands that exist; and all of it run on the quick start."""

import ast
import json
import os
import pathlib
import re
import shutil
import socket
import sys

import pytest

from anima_jax.generate import main as _generate  # noqa: F401 - the modules that its commands name
from anima_jax.sampling.flags import parse_arguments as parse_generate
from anima_jax.serve import parse_arguments as parse_serve
from anima_jax.serving.starting.flags import parse_arguments as parse_start
from anima_jax.training.command import parse_arguments as parse_train

NOTEBOOK = pathlib.Path(__file__).parents[1] / "notebooks" / "anima.ipynb"


def code_cells() -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def test_it_is_a_valid_notebook_of_format_4_5_without_outputs():
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert [cell["outputs"] for cell in code_cells() if cell["outputs"] or cell["execution_count"]] == []


def test_its_cells_are_python_and_every_one_has_a_form_with_a_title():
    for cell in code_cells():
        ast.parse(source(cell))
        assert source(cell).startswith("# @title ")
    fields = re.findall(r"^(\w+) = .*# @param", source(code_cells()[0]), re.M)
    assigned = {target.id for node in ast.parse(source(code_cells()[0])).body for target in node.targets}
    assert assigned == set(fields)


def flags_of(module: str) -> set[str]:
    """The flags that cells give a module, in whatever order."""
    lists = re.findall(
        r"\[[^\[\]]*\"-m\"[^\[\]]*\]|\(sys\.executable, \"-m\"[^()]*\)", "\n".join(map(source, code_cells()))
    )
    return {flag for text in lists if f'"anima_jax.{module}"' in text for flag in re.findall(r'"(--\w+)"', text)}


def test_the_flags_of_its_commands_exist(tmp_path):
    path = tmp_path / "lora.toml"
    path.write_text("")
    parse_train(["--config", str(path), "--dry_run"])
    given = {"--pictures": "x", "--model": "shapes", "--trigger": "", "--output": "runs"}
    parse_start([word for pair in given.items() for word in pair] + ["--yes", "--no_train", "--no_page", "--fetch"])
    parse_generate(["--config", str(path), "--checkpoint", "x", "--prompt", "x", "--seed", "1", "-o", "x.png"])
    page = [
        "--run",
        "x",
        "--lora_dir",
        "x",
        "--page_lora",
        "x",
        "--page_prompt",
        "x",
        "--allow_host",
        "x.colab.dev",
        "--cors",
        "https://x.colab.dev",
    ]
    parse_serve(["--config", str(path), "--dataset", "x.toml", *page, "--port", "8000"])
    assert flags_of("train") <= {"--config", "--dry_run", "--set", "--resume"}
    assert flags_of("start") <= {
        *given,
        "--yes",
        "--no_train",
        "--no_page",
        "--fetch",
        "--caption",
        "--captions",
        "--steps",
    }
    assert flags_of("generate") <= {"--config", "--checkpoint", "--prompt", "--seed"}
    assert flags_of("serve") <= {"--config", "--dataset"}


@pytest.mark.slow
def test_all_of_it_runs_on_the_quick_start(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("starlette")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(NOTEBOOK.parents[1]), *sys.path[1:2]]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    settings = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    settings.source += '\nmodel, pictures, steps = "shapes", "demo", 2\n'
    with socket.socket() as listening:  # a port that is free
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    page = next(cell for cell in notebook.cells if "port = 8000" in cell.source)
    page.source = page.source.replace("port = 8000", f"port = {port}")
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text", "") for output in outputs)
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    assert f"the page: http://127.0.0.1:{port}" in text
    assert len(images) >= 2  # samples while training, and the drawn one
    assert re.search(r"pictures_on_shapes\.safetensors \d+ bytes|demo_on_shapes\.safetensors \d+ bytes", text)
    assert (tmp_path / "drawn.png").is_file()
    shutil.rmtree(tmp_path / "runs")
