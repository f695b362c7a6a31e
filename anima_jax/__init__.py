"""The Anima text-to-image model in JAX. Public names are imported on first use.

`AnimaPipeline` generates images; `load_dit`, `load_vae` and `load_text_encoder` load individual networks from files.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anima_jax.checkpoints.models import load_dit, load_text_encoder, load_vae
    from anima_jax.errors import UserError
    from anima_jax.sampling.pipeline import AnimaPipeline

    __version__: str

__all__ = ["AnimaPipeline", "UserError", "__version__", "load_dit", "load_text_encoder", "load_vae"]

_MODULES = {
    "AnimaPipeline": "anima_jax.sampling.pipeline",
    "UserError": "anima_jax.errors",
    "load_dit": "anima_jax.checkpoints.models",
    "load_text_encoder": "anima_jax.checkpoints.models",
    "load_vae": "anima_jax.checkpoints.models",
}
"""Public name → module that defines it."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = _version()
    elif name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """Return the version of the installed package, or `<version>+checkout` for a checkout that is not installed."""
    import pathlib
    import tomllib
    from importlib import metadata

    try:
        return metadata.version("anima-jax")
    except metadata.PackageNotFoundError:
        pyproject = pathlib.Path(__file__).parents[1] / "pyproject.toml"
        return tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["version"] + "+checkout"
