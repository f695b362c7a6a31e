"""The kinds of adapters: one table, from which everything that depends on an adapter's kind follows.

Names in files, shapes, sharding, starting values, arithmetic on devices and on the host, FLOPs, `[adapter] type` and
PEFT's settings are read from `KINDS`; to add a kind is to add a row. In the layout of files, where W is (out, in):

lora   ΔW = s · B A (arXiv 2106.09685)
dora   W + ΔW = m ⊙ (W + s · B A) / ‖W + s · B A‖, a norm for each output (2402.09353)
lokr   ΔW = s · w1 ⊗ w2, each a matrix or a product of two (2212.10650, LyCORIS)
loha   ΔW = s · (w1_a w1_b) ⊙ (w2_a w2_b) (2108.06098)
diff   ΔW itself, in files only

s is alpha / rank. Parameters are a file's factors transposed. Nothing is imported here that would import JAX: the
configuration reads the table too.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

Shapes = Mapping[str, tuple[int, ...]]
"""Factor → shape of its parameter in one layer."""

SCALE = "lora_scale"
"""Last word of the path of s, one number for each layer, which is not trained."""


@dataclasses.dataclass(frozen=True)
class Factor:
    """A matrix or a vector that an adapter consists of.

    `name` is the last word of its parameter's path and `axes` are the parameter's in one layer: "in" and "out" for the
    features of the adapted layer, "rank", or any other word. A fresh factor is zero or drawn, as PEFT does it. In files
    it is called `part` (ComfyUI's name), keys end in one of `endings` (a regular expression), and we write `.<part>`
    and `suffix`.
    """

    name: str
    axes: tuple[str, ...]
    zero: bool = False
    part: str = ""
    endings: str = ""
    suffix: str = ""

    def __post_init__(self):
        object.__setattr__(self, "part", self.part or self.name)
        object.__setattr__(self, "endings", self.endings or rf"{self.part}(\.default)?")


class Product(NamedTuple):
    """A matrix that is the product of `factors`, the output's first, or in place of it one `matrix`."""

    factors: tuple[Factor, ...]
    matrix: Factor | None = None


class Operations(NamedTuple):
    """What a kind's forward in JAX uses of the layer that it belongs to.

    `linear(x, kernel)` is the networks' matrix product. `scaled(h)` is s · h. `dropped(h, rescaled)` leaves features of
    h out, as `rank_dropout` asks for, and enlarges the others if `rescaled`. `recomputed(function)` is the function
    whose intermediate results the backward computes again instead of keeping them.
    """

    linear: Callable[[Any, Any], Any]
    scaled: Callable[[Any], Any]
    dropped: Callable[[Any, bool], Any]
    recomputed: Callable[[Callable[..., Any]], Callable[..., Any]]


Factors = Mapping[str, Any]
"""Factor → array of one layer."""


@dataclasses.dataclass(frozen=True)
class AdapterKind:
    """A row of the table.

    `products` are what ΔW consists of: their Kronecker product, or the elementwise one if `elementwise`. With a
    `magnitude` each output's weights then get a trained norm.

    `forward` is s · ΔW x in JAX; without it the kind is found in files, but cannot be trained.

    `shapes(rank, in, out, decompose_factor)` are a fresh adapter's. `rows(shapes, rows)` are the rows that each factor
    is multiplied with when the layer's input has `rows`, in the order of the forward: the first takes that input, the
    others another factor's output; one that is left out has no product of its own.

    `peft_type` is None for a kind that PEFT does not have; `peft_keys` are keys of `[adapter]` that its settings have
    by the same name.
    """

    name: str
    title: str
    products: tuple[Product, ...]
    elementwise: bool = False
    magnitude: Factor | None = None
    forward: Callable[[Operations, Any, Factors], Any] | None = None
    shapes: Callable[[int, int, int, int], Shapes] = lambda *_: {}
    rows: Callable[[Shapes, int], Mapping[str, float]] = lambda *_: {}
    peft_type: str | None = None
    peft_keys: tuple[str, ...] = ()

    @property
    def factors(self) -> tuple[Factor, ...]:
        """All of them, alternatives too."""
        found = [factor for factors, matrix in self.products for factor in (*factors, matrix) if factor]
        return (*found, self.magnitude) if self.magnitude else tuple(found)

    def combine(self, matrices: Iterable[np.ndarray]) -> np.ndarray:
        """ΔW / s from the products."""
        return functools.reduce(np.multiply if self.elementwise else np.kron, matrices)

    def combined_shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...] | None:
        """Shape of ΔW for products of these shapes; None if they do not fit together."""
        if self.elementwise:
            return shapes[0] if len(set(shapes)) == 1 else None
        return tuple(map(math.prod, zip(*shapes, strict=True)))


# ---- LoRA and DoRA -----------------------------------------------------------------------------------------------

_DEFAULT = r"(\.default)?(\.weight)?"
LORA_A = Factor(
    "lora_a",
    ("in", "rank"),
    part="lora_A",
    endings=rf"(lora_A|lora_down|lora\.down|lora_linear_layer\.down){_DEFAULT}",
    suffix=".weight",
)
LORA_B = Factor(
    "lora_b",
    ("rank", "out"),
    zero=True,
    part="lora_B",
    endings=rf"(lora_B|lora_up|lora\.up|lora_linear_layer\.up){_DEFAULT}",
    suffix=".weight",
)
MAGNITUDE = Factor(
    "lora_magnitude", ("out",), part="dora_scale", endings=rf"(dora_scale|lora_magnitude_vector){_DEFAULT}"
)


def _lora_shapes(rank: int, features_in: int, features_out: int, _: int) -> Shapes:
    return {"lora_a": (features_in, rank), "lora_b": (rank, features_out)}


def _lora(ops: Operations, x: Any, factors: Factors) -> Any:
    return ops.linear(ops.scaled(ops.dropped(ops.linear(x, factors["lora_a"]), True)), factors["lora_b"])


def _dora_rows(shapes: Shapes, rows: int) -> dict[str, float]:
    """The norm takes the product of A with the frozen weights."""
    return {"lora_a": rows + shapes["lora_b"][1], "lora_b": rows}


# ---- LoKr: features in are m · p, features out k · q, w1 is (m, k) and w2 (p, q) -------------------------------------

_W1 = Factor("lokr_w1", ("m", "k"), zero=True)
_W1_A, _W1_B = Factor("lokr_w1_a", ("rank", "k"), zero=True), Factor("lokr_w1_b", ("m", "rank"))
_W2, _W2_A, _W2_B = (
    Factor("lokr_w2", ("p", "q")),
    Factor("lokr_w2_a", ("rank", "q")),
    Factor("lokr_w2_b", ("p", "rank")),
)


def factorised(features: int, limit: int) -> tuple[int, int]:
    """`features` as a product of two, the first not the larger: LyCORIS' choice.

    A `limit` that divides it is the first factor. Else that is the largest divisor up to the limit, if there is one
    (not −1), for which the factors' sum falls with each divisor before it.
    """
    if limit > 0 and features % limit == 0:
        return limit, features // limit
    largest = features if limit == -1 else limit
    divisors = [n for n in range(1, math.isqrt(features) + 1) if features % n == 0 and n <= max(largest, 1)]
    return divisors[-1], features // divisors[-1]


def _lokr_shapes(rank: int, features_in: int, features_out: int, decompose_factor: int) -> Shapes:
    """As PEFT chooses them: a second factor whose rank is no restriction is one matrix."""
    (m, p), (k, q) = (factorised(features, decompose_factor) for features in (features_in, features_out))
    if rank >= max(p, q) / 2:
        return {"lokr_w1": (m, k), "lokr_w2": (p, q)}
    return {"lokr_w1": (m, k), "lokr_w2_a": (rank, q), "lokr_w2_b": (p, rank)}


def _lokr(ops: Operations, x: Any, factors: Factors) -> Any:
    """One factor after the other; their Kronecker product is never formed. PEFT's dropout enlarges nothing here."""
    out = x.reshape(*x.shape[:-1], factors["lokr_w1"].shape[0], -1)
    for name in ("lokr_w2",) if "lokr_w2" in factors else ("lokr_w2_b", "lokr_w2_a"):
        out = ops.linear(out, factors[name])
    out_qk = ops.linear(out.swapaxes(-1, -2), factors["lokr_w1"])
    return ops.dropped(ops.scaled(out_qk.swapaxes(-1, -2).reshape(*x.shape[:-1], -1)), False)


def _lokr_rows(shapes: Shapes, rows: int) -> dict[str, float]:
    first = {name: rows * shapes["lokr_w1"][0] for name in ("lokr_w2", "lokr_w2_b", "lokr_w2_a") if name in shapes}
    q = shapes["lokr_w2" if "lokr_w2" in shapes else "lokr_w2_a"][1]
    return {**first, "lokr_w1": rows * q}


# ---- LoHa ----------------------------------------------------------------------------------------------------------

_HADA_W1_A, _HADA_W1_B = Factor("hada_w1_a", ("rank", "out")), Factor("hada_w1_b", ("in", "rank"))
_HADA_W2_A, _HADA_W2_B = Factor("hada_w2_a", ("rank", "out")), Factor("hada_w2_b", ("in", "rank"), zero=True)


def _loha_shapes(rank: int, features_in: int, features_out: int, _: int) -> Shapes:
    a, b = (rank, features_out), (features_in, rank)
    return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}


def _loha(ops: Operations, x: Any, factors: Factors) -> Any:
    """ΔW is formed, one layer's at a time."""

    def product(x: Any, w1_b: Any, w1_a: Any, w2_b: Any, w2_a: Any) -> Any:
        return ops.linear(x, ops.linear(w1_b, w1_a) * ops.linear(w2_b, w2_a))

    names = ("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a")
    return ops.dropped(ops.scaled(ops.recomputed(product)(x, *(factors[name] for name in names))), True)


def _loha_rows(shapes: Shapes, rows: int) -> dict[str, float]:
    """Both products of factors are formed, and ΔW is multiplied with the rows: all of it is counted for one factor."""
    rank, features_out = shapes["hada_w1_a"]
    return {"hada_w1_b": features_out * (2 + rows / rank)}


# ---- the table -----------------------------------------------------------------------------------------------------

DIFF = Factor("diff", ("in", "out"), endings="(diff|w_norm)")

_ROWS = (
    AdapterKind(
        "lora",
        "LoRA",
        products=(Product((LORA_B, LORA_A)),),
        forward=_lora,
        shapes=_lora_shapes,
        rows=lambda shapes, rows: {"lora_a": rows, "lora_b": rows},
        peft_type="LORA",
    ),
    AdapterKind(
        "dora",
        "DoRA",
        products=(Product((LORA_B, LORA_A)),),
        magnitude=MAGNITUDE,
        forward=_lora,
        shapes=lambda *sizes: {**_lora_shapes(*sizes), "lora_magnitude": (sizes[2],)},
        rows=_dora_rows,
        peft_type="LORA",
    ),
    AdapterKind(
        "lokr",
        "LoKr",
        products=(Product((_W1_A, _W1_B), _W1), Product((_W2_A, _W2_B), _W2)),
        forward=_lokr,
        shapes=_lokr_shapes,
        rows=_lokr_rows,
        peft_type="LOKR",
        peft_keys=("rank_dropout", "decompose_factor"),
    ),
    AdapterKind(
        "loha",
        "LoHa",
        products=(Product((_HADA_W1_A, _HADA_W1_B)), Product((_HADA_W2_A, _HADA_W2_B))),
        elementwise=True,
        forward=_loha,
        shapes=_loha_shapes,
        rows=_loha_rows,
        peft_type="LOHA",
        peft_keys=("rank_dropout",),
    ),
    AdapterKind("diff", "differences of weights", products=(Product((), DIFF),)),
)

KINDS = {kind.name: kind for kind in _ROWS}
"""Every kind by its name."""

TRAINABLE = tuple(name for name, kind in KINDS.items() if kind.forward)
"""The values of `[adapter] type`."""

FACTORS = {factor.name: factor for name in TRAINABLE for factor in KINDS[name].factors}
"""Every trained parameter by the last word of its path."""

PARTS: Mapping[str, str] = {
    **{factor.part: factor.endings for kind in KINDS.values() for factor in kind.factors},
    "alpha": "alpha",
    "diff_b": "(diff_b|b_norm)",
}
"""Part of an adapter in a file → how keys end that hold it. `alpha` is a number, `diff_b` is added to a bias."""

_PART = re.compile(r"\.(?:" + "|".join(f"(?P<{part}>{ending})" for part, ending in PARTS.items()) + ")$")


def split_key(key: str) -> tuple[str, str] | None:
    """The module's spelling and the part in an adapter file's key; None if it ends in no known part."""
    match = _PART.search(key)
    return (key[: match.start()], match.lastgroup) if match and match.lastgroup else None


def kind_of(parts: Iterable[str]) -> AdapterKind | None:
    """The kind that these parts make up; None if they make up none.

    It is the first in the table of which there is a matrix, or a later one that has all that this one has, and more.
    """
    parts, best, explained = set(parts), None, set()
    for kind in KINDS.values():
        own = parts & {factor.part for factor in kind.factors}
        is_there = own - ({kind.magnitude.part} if kind.magnitude else set())
        if is_there and (best is None or own > explained):
            best, explained = kind, own
    return best or (KINDS["diff"] if "diff_b" in parts else None)


def adapter_kind(keys: Iterable[str]) -> AdapterKind | None:
    """The kind of the adapter in a file with these keys; None if it is no adapter."""
    return kind_of(split[1] for key in keys if (split := split_key(key)))
