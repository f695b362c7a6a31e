"""Meshes of eight devices, and a small transformer whose dimensions they divide."""

from anima_jax.models.dit import DiTConfig
from anima_jax.models.llm_adapter import LLMAdapterConfig
from anima_jax.parallel.rules import AXES

MESHES = [
    dict(zip(AXES, sizes, strict=True))
    for sizes in ((8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 4, 1, 2), (1, 2, 2, 2))
]

CONFIG = DiTConfig(64, 3, 8, 128, 32, 16, adapter=LLMAdapterConfig(32, 2, 4, 64, 64, 32, 512))


def name(sizes: dict[str, int]) -> str:
    """`2×2×2×1`."""
    return "×".join(str(sizes[axis]) for axis in AXES)
