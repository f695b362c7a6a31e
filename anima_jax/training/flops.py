"""FLOPs of a training step, computed from sizes. Only matmuls and attention count; the rest is negligible."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from anima_jax.adapters.kinds import FACTORS, kind_of
from anima_jax.checkpoints.names.networks import TEXT_ENCODER
from anima_jax.models import parameters
from anima_jax.models.control import CELLS
from anima_jax.models.dit import AnimaDiT, DiTConfig
from anima_jax.models.parameters import Params

ATTENTION_BACKWARD = 4 / 2
"""Matmuls in attention's backward pass per matmul in its forward pass, without recomputing the scores."""


class Workload(NamedTuple):
    """The step of one tier: examples in a batch, micro-batches, and the tokens and text rows of an example."""

    tier: str
    batch: int
    accumulation: int
    tokens: int
    grid: tuple[int, int, int]  # of the tier's largest size
    source_rows: int
    target_rows: int
    full: bool = False  # no example has padding tokens
    control_channels: int = 0  # of control pictures

    @property
    def micro_batch(self) -> int:
        return self.batch // self.accumulation


class Flops(NamedTuple):
    """FLOPs of one example in the forward pass, in the backward pass, and in recomputation."""

    forward: float
    backward: float
    recomputed: float

    @property
    def model(self) -> float:
        """FLOPs without recomputation: the numerator of MFU."""
        return self.forward + self.backward


RECOMPUTED = {
    "none": (0, 0),
    "full": (1, 1),
    "dots": (0, 1),
    "attention": (1, 0),
    "offload": (1, 1),
}
"""Remat policy → how often it recomputes the weight matmuls of a block, and its attention."""

_ROWS_OF_TEXT = re.compile(r"(llm_adapter\.)?blocks\.cross_attn\.[kv]_proj\.")
_ONE_ROW = re.compile(r"t_embedder\.|.*adaln_modulation|control\.trunk\.aspp\.global_conv")
_CELLS = ("control.trunk.conv1.", "control.trunk.conv2.")
"""Convolutions of a control network's trunk that run on `CELLS`² cells of a token."""
_INPUT_IS_DATA = re.compile(
    r"x_embedder|t_embedder\.linear_1|control\.trunk\.conv1|llm_adapter\.blocks\.cross_attn\.[kv]_proj"
)


def flops(
    config: DiTConfig, trained: Params, work: Workload, remat: str, remat_every: int = 1, frozen: Params | None = None
) -> Flops:
    """Return the FLOPs of one example of `work`; `trained` includes the factors of an adapter.

    Of `frozen`, only the text encoder's parameters count: it runs inside the step if it has an adapter.
    """
    base = parameters.abstract(lambda rngs: AnimaDiT(config, rngs=rngs))[1]
    base |= {path: leaf for path, leaf in (frozen or {}).items() if path.startswith(TEXT_ENCODER)}
    adapts = any(path.startswith(("llm_adapter.", TEXT_ENCODER)) for path in trained)
    # Blocks recomputed together are recomputed once more than blocks recomputed one by one.
    again_dense, again_attention = (times + (remat_every > 1) for times in RECOMPUTED[remat])
    parts = []
    for path, product, is_behind in [*_kernel_products(base | trained, work), *_factor_products(trained, work)]:
        backward = product * ((path in trained) + (is_behind or _needs_input_gradient(path, adapts)))
        parts.append(Flops(product, backward, product * _recomputed(path, adapts, again_dense)))
    for in_adapter, product in _attention_products(config, work):
        if in_adapter and not adapts:
            parts.append(Flops(product, 0.0, 0.0))
        else:
            again = 1 if in_adapter else again_attention
            parts.append(Flops(product, product * ATTENTION_BACKWARD, product / 2 + product * again))
    return Flops(*map(sum, zip(*parts, strict=True)))


def _recomputed(path: str, adapts: bool, again: int) -> int:
    """Return how often the matmul with the matrix at `path` is recomputed: `again` times in the main blocks."""
    if path.startswith("llm_adapter."):
        return int(adapts and ".blocks." in path)
    if path.startswith(TEXT_ENCODER):
        return 1
    return again if path.startswith(("blocks.", "control.blocks.")) else 0


def _kernel_products(params: Params, work: Workload) -> Iterator[tuple[str, float, bool]]:
    """Yield for each kernel its path, the FLOPs of its matmul for one example, and False.

    As in `_factor_products`, the last item says whether its input is the output of a factor.
    """
    for path, leaf in params.items():
        if path.endswith(".kernel"):
            yield path, 2.0 * leaf.size * _rows(path, work), False


def _factor_products(trained: Params, work: Workload) -> Iterator[tuple[str, float, bool]]:
    """Yield for each factor its path, its matmul's FLOPs for one example, and whether its input is another's output."""
    modules: dict[str, dict[str, Any]] = {}
    for path, leaf in trained.items():
        module, _, name = path.rpartition(".")
        if name in FACTORS:
            modules.setdefault(module, {})[name] = leaf
    for module, factors in modules.items():
        kind = kind_of(FACTORS[name].part for name in factors)
        assert kind is not None
        rows = kind.rows({name: leaf.shape[1:] for name, leaf in factors.items()}, _rows(f"{module}.", work))
        for number, (name, own_rows) in enumerate(rows.items()):
            yield f"{module}.{name}", 2.0 * factors[name].size * own_rows, number > 0


def _rows(path: str, work: Workload) -> int:
    """Return how many rows of one example are multiplied by a matrix of the module at `path`."""
    if path.startswith(TEXT_ENCODER):
        return work.source_rows
    if _ROWS_OF_TEXT.match(path):
        return work.source_rows if path.startswith("llm_adapter.") else work.target_rows
    if path.startswith("llm_adapter."):
        return work.target_rows
    if path.startswith(_CELLS):
        return CELLS**2 * work.tokens
    return 1 if _ONE_ROW.match(path) else work.tokens


def _needs_input_gradient(path: str, adapts: bool) -> bool:
    """Return whether a trained parameter comes before the matrix at `path`. The scanned blocks count as one."""
    if _INPUT_IS_DATA.match(path):
        return False
    return adapts or not (path.startswith("llm_adapter.") or _ROWS_OF_TEXT.match(path))


def _attention_products(config: DiTConfig, work: Workload) -> list[tuple[bool, float]]:
    """Return, per kind of attention, whether it is in the LLM adapter, and the FLOPs of q·kᵀ and of weights·v."""
    assert config.adapter is not None
    of_dit = 4.0 * config.blocks * config.width * work.tokens
    of_adapter = 4.0 * config.adapter.blocks * config.adapter.width * work.target_rows
    return [
        (False, of_dit * work.tokens),
        (False, of_dit * work.target_rows),
        (True, of_adapter * work.target_rows),
        (True, of_adapter * work.source_rows),
    ]
