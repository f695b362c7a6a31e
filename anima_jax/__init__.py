"""The Anima text-to-image model in JAX: what users import. Each name is loaded when it is first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anima_jax.checkpoints.models import load_dit, load_text_encoder, load_vae
    from anima_jax.sampling.pipeline import AnimaPipeline

__all__ = ["AnimaPipeline", "load_dit", "load_text_encoder", "load_vae"]

_HOMES = {
    "AnimaPipeline": "anima_jax.sampling.pipeline",
    "load_dit": "anima_jax.checkpoints.models",
    "load_text_encoder": "anima_jax.checkpoints.models",
    "load_vae": "anima_jax.checkpoints.models",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
