"""What `import anima_jax` offers, and that no module of the package needs more than it may to be imported."""

import importlib.metadata
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

import anima_jax
from anima_jax.convert.__main__ import parser as convert_parser
from anima_jax.errors import shell_command
from anima_jax.sampling.flags import parse_arguments as parse_generate
from anima_jax.serve import parse_arguments as parse_serve
from anima_jax.serving.starting.flags import parse_arguments as parse_start
from anima_jax.training.command import parse_arguments as parse_train

ROOT = pathlib.Path(anima_jax.__file__).parents[1]


def python(code: str) -> str:
    """What a fresh interpreter prints for this code."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_public_names_are_listed_before_they_are_loaded():
    listed = python("import anima_jax, sys; print(*dir(anima_jax)); print('jax' in sys.modules)").splitlines()
    assert set(anima_jax.__all__) <= set(listed[0].split())
    assert listed[1] == "False"


@pytest.mark.parametrize("name", anima_jax.__all__)
def test_every_public_name_is_the_one_of_its_module(name):
    value = getattr(anima_jax, name)
    if name != "__version__":
        assert value is getattr(sys.modules[value.__module__], name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'anima_jax' has no attribute 'load_lora'"):
        anima_jax.load_lora  # noqa: B018 - the access raises


def test_the_version_is_the_installed_packages(monkeypatch):
    monkeypatch.delitem(vars(anima_jax), "__version__", raising=False)
    monkeypatch.setattr(importlib.metadata, "version", {"anima-jax": "1.2.3"}.__getitem__)
    assert anima_jax.__version__ == "1.2.3"
    monkeypatch.delitem(vars(anima_jax), "__version__")


def test_a_checkout_that_is_not_installed_has_its_own_version(monkeypatch):
    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.delitem(vars(anima_jax), "__version__", raising=False)
    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert anima_jax.__version__ == f"{version}+checkout"
    monkeypatch.delitem(vars(anima_jax), "__version__")


def test_type_checkers_see_the_types_of_an_installed_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "py.typed" in settings["anima_jax"]
    assert (ROOT / "anima_jax" / "py.typed").is_file()


IMPORT_ALL = """
import ast, importlib, pathlib, pkgutil, sys
import anima_jax, convert

for package in (anima_jax, convert):
    for path in pathlib.Path(package.__path__[0]).rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            found = [node.module] if isinstance(node, ast.ImportFrom) else []
            found += [each.name for each in node.names] if isinstance(node, ast.Import) else []
            for name in found:
                if name.split(".")[0] not in ("anima_jax", "convert"):
                    importlib.import_module(name)  # other libraries may use what this system has

for name in ("fcntl", "grp", "posix", "pwd", "resource", "termios"):
    sys.modules[name] = None  # from now on importing it raises ImportError
for package in (anima_jax, convert):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
            print(module.name)
"""


def test_no_module_needs_unix_to_be_imported():
    assert {"anima_jax.train", "anima_jax.generate", "anima_jax.convert.inspect"} <= set(python(IMPORT_ALL).split())


# ---- what is built, and the commands of the documents ---------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path]:
    """Folders with the contents of the wheel and of the sdist, built from a copy of what git would commit."""
    folder = tmp_path_factory.mktemp("built")
    source, out = folder / "source", folder / "dist"
    left_out = shutil.ignore_patterns(
        ".git", ".venv", "venv", "runs", "data", "__pycache__", "*.egg-info", "build", "dist"
    )
    shutil.copytree(ROOT, source, ignore=left_out)
    # tests/data is a folder of tests; /data, of a user, is not in the repository.
    shutil.copytree(ROOT / "tests" / "data", source / "tests" / "data", ignore=left_out)
    shutil.copytree(ROOT / "anima_jax" / "data", source / "anima_jax" / "data", ignore=left_out)
    build = f"import setuptools.build_meta as b; b.build_wheel({str(out)!r}); b.build_sdist({str(out)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    zipfile.ZipFile(next(out.glob("*.whl"))).extractall(folder / "wheel")
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        archive.extractall(folder / "sdist", filter="data")
    return folder / "wheel", next((folder / "sdist").iterdir())


LOAD_SHIPPED = """
from anima_jax.config.load import load_config
config = load_config("shapes")
print(config.model.vae_path, config.model.tokenizer_path, config.dataset, *config.messages, sep="\\n")
"""


@pytest.mark.slow
def test_a_wheel_finds_its_own_configurations_and_documents_from_anywhere(built, tmp_path):
    wheel, _ = built
    (tmp_path / "convert.py").write_text("raise SystemExit('shadowed')")
    environment = os.environ | {"PYTHONPATH": f"{wheel}:."}
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    lines = subprocess.run([sys.executable, "-c", LOAD_SHIPPED], check=True, **run).stdout.splitlines()
    assert lines[-1].endswith(f"the one that comes with anima_jax: {wheel}/anima_jax/configs/shapes.toml")
    assert all(path.startswith(f"{wheel}/anima_jax/") and os.path.exists(path) for path in lines[:3])
    named = {f"docs/{page}" for path in wheel.rglob("*.py") for page in re.findall(r"docs/(\w+\.md)", path.read_text())}
    assert {page for page in named if not (wheel / "anima_jax" / page).is_file()} == set()
    script = "from anima_jax.launch import convert; convert()"  # as the script anima-convert does
    shown = subprocess.run([sys.executable, "-c", script, "--help"], check=True, **run).stdout
    assert "Inspect Anima files" in shown
    assert not (wheel / "convert").exists()


@pytest.mark.slow
def test_the_sdist_has_what_its_tests_need(built):
    _, sdist = built
    tests = ["tests/test_errors.py", "tests/test_house.py", "tests/config/test_shipped.py", "tests/test_docs.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    ended = subprocess.run(command, cwd=sdist, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    assert {path for path in files if not (sdist / path).exists()} == set()


def test_the_dockerfile_copies_what_is_there_and_installs_extras_that_exist():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = {source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]}
    assert {source for source in copied if not (ROOT / source).exists()} == set()
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == kept  # nothing else reaches the build
    (accepted,) = re.findall(r'case "\$ACCELERATOR" in ([\w|]+)\)', "\n".join(lines))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {*accepted.split("|")} - {"cpu"} <= project["optional-dependencies"].keys()
    python = next(line for line in lines if line.startswith("ARG PYTHON=")).partition("=")[2]
    assert f">={python}" >= project["requires-python"]


def commands(page: str) -> list[tuple[str, list[str]]]:
    """The commands of this project in a page: modules, and their arguments as a shell would pass them."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    pattern = r'python -m (anima_jax\.\w+|convert) ((?:[^>&"]|"[^>&"]*")*)'
    found = [re.search(pattern, line) for line in lines]
    # Variables of a shell stand for numbers here.
    return [(m[1], shlex.split(re.sub(r"\$(\w+|\{.*?\})", "1", m[2]), comments=True)) for m in found if m]


@pytest.mark.parametrize(
    "page", ["README.md", "docs/sampling.md", "docs/comfyui.md", "docs/multihost.md", "docs/serving.md"]
)
def test_the_commands_of_the_documents_are_valid(page):
    parsers = {
        "anima_jax.train": parse_train,
        "anima_jax.generate": parse_generate,
        "anima_jax.serve": parse_serve,
        "anima_jax.start": parse_start,
        "convert": convert_parser().parse_args,
    }
    found = commands(page)
    assert found
    for module, arguments in found:
        parsers[module](arguments)  # raises for a flag that does not exist


def test_printed_commands_name_this_python_and_are_quoted(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "my env" / "bin" / "python"))
    assert shell_command("x.y", "a b") == f"'{tmp_path}/my env/bin/python' -m x.y 'a b'"
    monkeypatch.chdir(tmp_path)
    assert shell_command("x.y") == "'my env/bin/python' -m x.y"
    monkeypatch.chdir(tmp_path.parent)
    assert shlex.split(shell_command("x.y"))[0] == os.path.join(tmp_path.name, "my env/bin/python")
