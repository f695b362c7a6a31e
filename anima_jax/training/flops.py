"""FLOPs of a training step: those of matrix products and attention, which are all that counts, from sizes alone."""

import re
from typing import Any, NamedTuple

from anima_jax.checkpoints.names.networks import TEXT_ENCODER
from anima_jax.models import parameters
from anima_jax.models.dit import AnimaDiT, DiTConfig
from anima_jax.models.parameters import MATRICES, Params

ATTENTION_BACKWARD = 4 / 2
"""Products in attention's backward to those of its forward; it computes the scores once more besides."""


class Workload(NamedTuple):
    """What the step of one tier takes: a batch of examples in so many micro-batches, and the rows of each example."""

    tier: str
    batch: int
    accumulation: int
    tokens: int
    grid: tuple[int, int, int]  # of the tier's largest size
    source_rows: int
    target_rows: int

    @property
    def micro_batch(self) -> int:
        return self.batch // self.accumulation


class Flops(NamedTuple):
    """FLOPs of one example: forward, backward, and what the backward computes again."""

    forward: float
    backward: float
    recomputed: float

    @property
    def model(self) -> float:
        """What the model itself asks for: the numerator of MFU."""
        return self.forward + self.backward


RECOMPUTED = {
    "none": (0, 0),
    "full": (1, 1),
    "dots": (0, 1),
    "attention": (1, 0),
    "offload": (1, 1),
}
"""Whether a remat policy computes a block's products with weights, and its attention, again."""

_ROWS_OF_TEXT = re.compile(r"(llm_adapter\.)?blocks\.cross_attn\.[kv]_proj\.")
_ROWS_OF_TIME = re.compile(r"t_embedder\.|.*adaln_modulation")
_INPUT_IS_DATA = re.compile(r"x_embedder|t_embedder\.linear_1|llm_adapter\.blocks\.cross_attn\.[kv]_proj")


_BEHIND_ANOTHER_FACTOR = (".lora_b", ".lokr_w1", ".lokr_w2_a")
"""Factors of adapters whose input is another factor's output."""


def flops(
    config: DiTConfig, trained: Params, work: Workload, remat: str, remat_every: int = 1, frozen: Params | None = None
) -> Flops:
    """FLOPs of one example of `work`. `trained` are the parameters that are trained, an adapter's factors among them.

    Of `frozen` the text encoder's count, which runs in the step if it has an adapter.
    """
    base = parameters.abstract(lambda rngs: AnimaDiT(config, rngs=rngs))[1]
    base |= {path: leaf for path, leaf in (frozen or {}).items() if path.startswith(TEXT_ENCODER)}
    adapts = any(path.startswith(("llm_adapter.", TEXT_ENCODER)) for path in trained)
    # Blocks that are computed again together are so once more than each alone.
    again_dense, again_attention = (times + (remat_every > 1) for times in RECOMPUTED[remat])
    forward = backward = recomputed = 0.0
    for path, leaf in {**base, **trained}.items():
        if not path.endswith(MATRICES) or path.endswith(".embedding"):
            continue
        in_adapter = path.startswith("llm_adapter.")
        product = _product(path, leaf, trained, _rows(path, work))
        forward += product
        backward += product * (path in trained)
        backward += product * _needs_input_gradient(path, adapts)
        if in_adapter:
            recomputed += product * (adapts and ".blocks." in path)
        elif path.startswith(TEXT_ENCODER):
            recomputed += product
        elif path.startswith("blocks."):
            recomputed += product * again_dense
    for in_adapter, product in _attention_products(config, work):
        forward += product
        if in_adapter and not adapts:
            continue
        backward += product * ATTENTION_BACKWARD
        recomputed += product / 2 + product * (1 if in_adapter else again_attention)
    return Flops(forward, backward, recomputed)


def _product(path: str, leaf: Any, trained: Params, rows: int) -> float:
    """FLOPs of the products of one example, of so many rows, in which the matrix at `path` takes part."""
    module, _, name = path.rpartition(".")
    if name.startswith(("lokr_w1_", "hada_w")) and name != "hada_w1_b":
        return 0.0  # with another factor it makes a matrix, which counts where it is multiplied

    def side(axis: int, *names: str) -> int:
        return next(trained[f"{module}.{one}"].shape[axis] for one in names if f"{module}.{one}" in trained)

    if name.startswith("lokr_w2"):
        rows *= side(-2, "lokr_w1", "lokr_w1_b")
    elif name == "lokr_w1":
        rows *= side(-1, "lokr_w2", "lokr_w2_a")
    elif name == "hada_w1_b":
        # Both products of factors are formed, and what they make is multiplied with the rows.
        width = side(-1, "hada_w1_a")
        return 2.0 * leaf.size * width * (2 + rows / leaf.shape[-1])
    elif name == "lora_a" and f"{module}.lora_magnitude" in trained:
        rows += side(-1, "lora_b")  # the norm takes its product with the frozen weights
    return 2.0 * leaf.size * rows


def _rows(path: str, work: Workload) -> int:
    """Rows of one example that the matrix at `path` is multiplied with."""
    if path.startswith(TEXT_ENCODER):
        return work.source_rows
    if _ROWS_OF_TEXT.match(path):
        return work.source_rows if path.startswith("llm_adapter.") else work.target_rows
    if path.startswith("llm_adapter."):
        return work.target_rows
    return 1 if _ROWS_OF_TIME.match(path) else work.tokens


def _needs_input_gradient(path: str, adapts: bool) -> bool:
    """Whether anything that is trained lies before the matrix at `path`. The scanned blocks are taken as one."""
    if _INPUT_IS_DATA.match(path):
        return path.endswith(_BEHIND_ANOTHER_FACTOR)
    if path.startswith("llm_adapter.") or _ROWS_OF_TEXT.match(path):
        return adapts or path.endswith(_BEHIND_ANOTHER_FACTOR)
    return True


def _attention_products(config: DiTConfig, work: Workload) -> list[tuple[bool, float]]:
    """(whether in the LLM adapter, FLOPs of q·kᵀ and of the weighted sum of values) of each kind of attention."""
    assert config.adapter is not None
    of_dit = 4.0 * config.blocks * config.width * work.tokens
    of_adapter = 4.0 * config.adapter.blocks * config.adapter.width * work.target_rows
    return [
        (False, of_dit * work.tokens),
        (False, of_dit * work.target_rows),
        (True, of_adapter * work.target_rows),
        (True, of_adapter * work.source_rows),
    ]
