"""What `import anima_jax` offers, and that no module of the package needs more than it may to be imported."""

import importlib.metadata
import pathlib
import subprocess
import sys
import tomllib

import pytest

import anima_jax

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
