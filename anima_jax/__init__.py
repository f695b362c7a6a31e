"""The Anima text-to-image model in JAX. Public names are imported on first use.

`AnimaPipeline` generates images. `load_dit`, `load_vae`, `load_text_encoder` and `load_control` load networks from
files, `save_dit` and `save_control` write them. `add_adapter`, `load_adapter` and `save_adapter` are for LoRAs and
the like, `Control`, `control_picture` and `add_control` for control networks, `ArrayDataset`, `make_train_step` and
`trained_model` for training in Python (docs/python.md).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anima_jax.adapters.on_model import add_adapter, load_adapter, save_adapter
    from anima_jax.checkpoints.control import load_control, save_control
    from anima_jax.checkpoints.models import load_dit, load_text_encoder, load_vae, save_dit
    from anima_jax.data.preprocessors import control_picture
    from anima_jax.errors import UserError
    from anima_jax.sampling.controls import Control
    from anima_jax.sampling.pipeline import AnimaPipeline
    from anima_jax.sampling.regions import Region
    from anima_jax.text.tokenizers import load_tokenizers
    from anima_jax.training.own_loop import ArrayDataset, add_control, make_train_step, trained_model

    __version__: str

__all__ = [
    "AnimaPipeline",
    "ArrayDataset",
    "Control",
    "Region",
    "UserError",
    "__version__",
    "add_adapter",
    "add_control",
    "control_picture",
    "load_adapter",
    "load_control",
    "load_dit",
    "load_text_encoder",
    "load_tokenizers",
    "load_vae",
    "make_train_step",
    "save_adapter",
    "save_control",
    "save_dit",
    "trained_model",
]

_MODULES = {
    "AnimaPipeline": "anima_jax.sampling.pipeline",
    "ArrayDataset": "anima_jax.training.own_loop",
    "Region": "anima_jax.sampling.regions",
    "Control": "anima_jax.sampling.controls",
    "UserError": "anima_jax.errors",
    "add_adapter": "anima_jax.adapters.on_model",
    "add_control": "anima_jax.training.own_loop",
    "control_picture": "anima_jax.data.preprocessors",
    "load_adapter": "anima_jax.adapters.on_model",
    "load_control": "anima_jax.checkpoints.control",
    "load_dit": "anima_jax.checkpoints.models",
    "load_text_encoder": "anima_jax.checkpoints.models",
    "load_tokenizers": "anima_jax.text.tokenizers",
    "load_vae": "anima_jax.checkpoints.models",
    "make_train_step": "anima_jax.training.own_loop",
    "save_adapter": "anima_jax.adapters.on_model",
    "save_control": "anima_jax.checkpoints.control",
    "save_dit": "anima_jax.checkpoints.models",
    "trained_model": "anima_jax.training.own_loop",
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
