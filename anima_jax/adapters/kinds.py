"""The table of adapter kinds: the single source of everything that depends on an adapter's kind.

Names in files, shapes, sharding, initial values, arithmetic on devices and on the host, FLOPs, `[adapter] type` and
PEFT's settings are read from `KINDS`; adding a kind means adding a row. A row is enough if the axes of each factor are
(in, rank), (rank, out), or labels other than "in" and "out"; a vector other than `MAGNITUDE` must start at zero, have
a name that ends in `scale`, `bias` or `magnitude`, and have an entry in `NEVER_DECAYED` in checkpoints/names/groups.py.

In the layout of files, where W is (out, in):

lora   ΔW = s · B A (arXiv 2106.09685)
dora   W + ΔW = m ⊙ (W + s · B A) / ‖W + s · B A‖, one norm per output (2402.09353)
lokr   ΔW = s · w1 ⊗ w2, each a matrix or a product of two matrices (2212.10650, LyCORIS)
loha   ΔW = s · (w1_a w1_b) ⊙ (w2_a w2_b) (2108.06098)
glora  ΔW = s · (b1 b2 + W a1 a2) (2306.07967, LyCORIS; older files have the factors in the opposite order)
oft    ΔW = k (Rᵀ − 1) W, with one rotation R per block of outputs (2306.07280), k the strength
boft   ΔW = Rₘ … R₁ W − W, with butterfly permutations between the rotations (2311.06243)
diff   ΔW itself
set    W + ΔW itself

s is alpha / rank. The last five are in files only, and computed as ComfyUI does (comfy/weight_adapter). A module with
the parts of several kinds has the last one, or a LoKr rather than a LoHa, as in ComfyUI (comfy/lora.py). A model's
parameters are the transposed factors. This module must not import JAX, because the configuration reads the table too.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from anima_jax.adapters import glora, oft

Shapes = Mapping[str, tuple[int, ...]]
"""Factor name → shape of its parameter in one layer."""

SCALE = "lora_scale"
"""Last component of the path of s, which is one number per layer and is not trained."""


@dataclasses.dataclass(frozen=True)
class Factor:
    """A matrix or vector of an adapter.

    `name` is the last component of its parameter's path. `axes` are the axes of the parameter in one layer: "in" and
    "out" for the features of the adapted layer, "rank", or any other label. As in PEFT, a new factor is zero if `zero`,
    else random. In files the factor is called `part` (ComfyUI's name): keys are read if they end in `endings` (a
    regular expression), and written with the ending `.<part>` plus `suffix`. Two factors may have one `part` if they
    differ in `dims`, their number of axes in files (0 for any).
    """

    name: str
    axes: tuple[str, ...]
    zero: bool = False
    part: str = ""
    endings: str = ""
    suffix: str = ""
    dims: int = 0

    def __post_init__(self):
        object.__setattr__(self, "part", self.part or self.name)
        object.__setattr__(self, "endings", self.endings or rf"{self.part}(\.default)?")


class Product(NamedTuple):
    """A matrix that is stored either as the product of `factors`, the output side first, or as one `matrix`.

    Some files have a `core` after the first factor (Tucker decomposition). If `flipped`, the first factor is then
    stored as (rank, out).
    """

    factors: tuple[Factor, ...]
    matrix: Factor | None = None
    core: Factor | None = None
    flipped: bool = False


class Operations(NamedTuple):
    """Operations of the adapted layer that a kind's forward pass in JAX uses.

    `linear(x, kernel)` is the networks' matrix product. `scaled(h)` is s · h. `dropped(h, rescaled)` applies
    `rank_dropout`: it zeroes features of h and, if `rescaled`, scales the others up. `recomputed(function)` is the
    function with its intermediate results recomputed in the backward pass instead of stored.
    """

    linear: Callable[[Any, Any], Any]
    scaled: Callable[[Any], Any]
    dropped: Callable[[Any, bool], Any]
    recomputed: Callable[[Callable[..., Any]], Callable[..., Any]]


Factors = Mapping[str, Any]
"""Factor name → array of one layer."""


class OnWeight(NamedTuple):
    """The arithmetic, in files only, of a kind whose ΔW depends on the weight W. Arrays are float32.

    `shape(shapes)` returns the shape of the weights that factors of these shapes (part → shape) fit, with None for an
    arbitrary size, or None if the factors do not fit together. `rank(shapes)` returns the divisor of alpha, or None if
    alpha is no scale. `change(factors, weight, alpha, strength)` returns ΔW / s; the caller multiplies it by s and by
    the strength.
    """

    factors: tuple[Factor, ...]
    optional: tuple[Factor, ...]
    shape: Callable[[Shapes], tuple[int | None, ...] | None]
    change: Callable[[Mapping[str, np.ndarray], np.ndarray, float, float], np.ndarray]
    rank: Callable[[Shapes], int | None] = lambda _: None


@dataclasses.dataclass(frozen=True)
class AdapterKind:
    """A row of the table.

    ΔW is the Kronecker product of `products`, or the elementwise product if `elementwise`, or what `on_weight` says.
    With a `magnitude`, the weights of each output are then rescaled to a trained norm. If it `replaces`, the matrix is
    the new weight at any strength. `outranks` names later kinds that do not count for a module with both.

    `forward` returns s · ΔW x in JAX; a kind without it can be read from files, but not trained.

    `shapes(rank, in, out, decompose_factor)` returns the shapes of a new adapter. `rows(shapes, rows)` returns the
    number of rows that each factor multiplies when the layer's input has `rows` rows, in the order of the forward pass:
    the first factor multiplies the input, the others multiply another factor's output. A factor without an entry has no
    product of its own.

    `peft_type` is None for a kind that PEFT does not support; `peft_keys` are the keys of `[adapter]` that PEFT's
    settings have under the same name.
    """

    name: str
    title: str
    products: tuple[Product, ...] = ()
    on_weight: OnWeight | None = None
    elementwise: bool = False
    replaces: bool = False
    outranks: tuple[str, ...] = ()
    magnitude: Factor | None = None
    forward: Callable[[Operations, Any, Factors], Any] | None = None
    shapes: Callable[[int, int, int, int], Shapes] = lambda *_: {}
    rows: Callable[[Shapes, int], Mapping[str, float]] = lambda *_: {}
    peft_type: str | None = None
    peft_keys: tuple[str, ...] = ()

    @property
    def factors(self) -> tuple[Factor, ...]:
        """All factors, including the alternatives."""
        found = [factor for product in self.products for factor in (*product.factors, product.matrix) if factor]
        return (*found, *(self.on_weight.factors if self.on_weight else ()), *self.optional)

    @property
    def optional(self) -> tuple[Factor, ...]:
        """Factors that an adapter of this kind may lack."""
        cores = (product.core for product in self.products)
        own = self.on_weight.optional if self.on_weight else ()
        return tuple(factor for factor in (*cores, *own, self.magnitude) if factor)

    def combine(self, matrices: Iterable[np.ndarray]) -> np.ndarray:
        """Return ΔW / s from the products."""
        return functools.reduce(np.multiply if self.elementwise else np.kron, matrices)

    def combined_shape(self, shapes: list[tuple[int, ...]]) -> tuple[int, ...] | None:
        """Return the shape of ΔW for products of these shapes, or None if they do not fit together."""
        if self.elementwise:
            return shapes[0] if len(set(shapes)) == 1 else None
        return tuple(map(math.prod, zip(*shapes, strict=True)))


# ---- LoRA and DoRA -----------------------------------------------------------------------------------------------

_DEFAULT = r"(\.(?!bias$)\w+?)?(\.weight)?"  # PEFT puts the adapter's own name, "default", in between
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
    """Count rows as for LoRA, plus the product of A with the frozen weights, which the norm needs."""
    return {"lora_a": rows + shapes["lora_b"][1], "lora_b": rows}


LORA_MID = Factor("lora_mid", ("rank", "rank"), endings=r"lora_mid\.weight", suffix=".weight")
_LORA = Product((LORA_B, LORA_A), core=LORA_MID)

# ---- LoKr: in = m · p and out = k · q features, w1 is (m, k) and w2 is (p, q) -------------------------------------

_W1 = Factor("lokr_w1", ("m", "k"), zero=True)
_W1_A, _W1_B = Factor("lokr_w1_a", ("rank", "k"), zero=True), Factor("lokr_w1_b", ("m", "rank"))
_W2, _W2_A, _W2_B = (
    Factor("lokr_w2", ("p", "q")),
    Factor("lokr_w2_a", ("rank", "q")),
    Factor("lokr_w2_b", ("p", "rank")),
)
_T2 = Factor("lokr_t2", ("rank", "rank"))


def factorised(features: int, limit: int) -> tuple[int, int]:
    """Return two factors of `features`, chosen as in LyCORIS.

    The first is `limit` if that divides `features`. Otherwise it is the largest divisor that is not above the square
    root of `features` and not above `limit`, where −1 means no limit.
    """
    if limit > 0 and features % limit == 0:
        return limit, features // limit
    largest = features if limit == -1 else limit
    divisors = [n for n in range(1, math.isqrt(features) + 1) if features % n == 0 and n <= max(largest, 1)]
    return divisors[-1], features // divisors[-1]


def _lokr_shapes(rank: int, features_in: int, features_out: int, decompose_factor: int) -> Shapes:
    """Return the shapes that PEFT chooses: w2 is one matrix if the rank is at least half of its larger side."""
    (m, p), (k, q) = (factorised(features, decompose_factor) for features in (features_in, features_out))
    if rank >= max(p, q) / 2:
        return {"lokr_w1": (m, k), "lokr_w2": (p, q)}
    return {"lokr_w1": (m, k), "lokr_w2_a": (rank, q), "lokr_w2_b": (p, rank)}


def _lokr(ops: Operations, x: Any, factors: Factors) -> Any:
    """Apply one factor after the other, without forming the Kronecker product. As in PEFT, dropout does not rescale."""
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
_HADA_T1, _HADA_T2 = Factor("hada_t1", ("rank", "rank")), Factor("hada_t2", ("rank", "rank"))


def _loha_shapes(rank: int, features_in: int, features_out: int, _: int) -> Shapes:
    a, b = (rank, features_out), (features_in, rank)
    return {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}


def _loha(ops: Operations, x: Any, factors: Factors) -> Any:
    """Form ΔW, for one layer at a time, and multiply by it."""

    def product(x: Any, w1_b: Any, w1_a: Any, w2_b: Any, w2_a: Any) -> Any:
        return ops.linear(x, ops.linear(w1_b, w1_a) * ops.linear(w2_b, w2_a))

    names = ("hada_w1_b", "hada_w1_a", "hada_w2_b", "hada_w2_a")
    return ops.dropped(ops.scaled(ops.recomputed(product)(x, *(factors[name] for name in names))), True)


def _loha_rows(shapes: Shapes, rows: int) -> dict[str, float]:
    """Count the two products of factors and the product of the rows with ΔW, all of them under one factor."""
    rank, features_out = shapes["hada_w1_a"]
    return {"hada_w1_b": features_out * (2 + rows / rank)}


# ---- GLoRA, OFT and BOFT, which are read from files -----------------------------------------------------------------

_GLORA = tuple(Factor(name, (), suffix=".weight", endings=rf"{name}\.weight") for name in ("a1", "a2", "b1", "b2"))
_BLOCKS = {dims: Factor(f"oft_blocks_{dims}", (), part="oft_blocks", dims=dims) for dims in (3, 4)}
_RESCALE = Factor("rescale", ())


# ---- the table -----------------------------------------------------------------------------------------------------

DIFF = Factor("diff", ("in", "out"), endings="(diff|w_norm)")
SET = Factor("set_weight", ("in", "out"))

_ROWS = (
    AdapterKind(
        "lora",
        "LoRA",
        products=(_LORA,),
        forward=_lora,
        shapes=_lora_shapes,
        rows=lambda shapes, rows: {"lora_a": rows, "lora_b": rows},
        peft_type="LORA",
    ),
    AdapterKind(
        "dora",
        "DoRA",
        products=(_LORA,),
        magnitude=MAGNITUDE,
        forward=_lora,
        shapes=lambda *sizes: {**_lora_shapes(*sizes), "lora_magnitude": (sizes[2],)},
        rows=_dora_rows,
        peft_type="LORA",
    ),
    AdapterKind(
        "lokr",
        "LoKr",
        products=(Product((_W1_A, _W1_B), _W1), Product((_W2_A, _W2_B), _W2, _T2, flipped=True)),
        forward=_lokr,
        shapes=_lokr_shapes,
        rows=_lokr_rows,
        outranks=("loha",),
        peft_type="LOKR",
        peft_keys=("rank_dropout", "decompose_factor"),
    ),
    AdapterKind(
        "loha",
        "LoHa",
        products=(
            Product((_HADA_W1_A, _HADA_W1_B), core=_HADA_T1, flipped=True),
            Product((_HADA_W2_A, _HADA_W2_B), core=_HADA_T2, flipped=True),
        ),
        elementwise=True,
        forward=_loha,
        shapes=_loha_shapes,
        rows=_loha_rows,
        peft_type="LOHA",
        peft_keys=("rank_dropout",),
    ),
    AdapterKind("glora", "GLoRA", on_weight=OnWeight(_GLORA, (), glora.shape, glora.change, glora.rank)),
    AdapterKind("oft", "OFT", on_weight=OnWeight((_BLOCKS[3],), (_RESCALE,), oft.shape, oft.change)),
    AdapterKind("boft", "BOFT", on_weight=OnWeight((_BLOCKS[4],), (_RESCALE,), oft.shape, oft.butterfly)),
    AdapterKind("diff", "differences of weights", products=(Product((), DIFF),)),
    AdapterKind("set", "new weights", products=(Product((), SET),), replaces=True),
)

KINDS = {kind.name: kind for kind in _ROWS}
"""Name → kind."""

TRAINABLE = tuple(name for name, kind in KINDS.items() if kind.forward)
"""Values of `[adapter] type`."""

_CORES = {product.core.part for kind in KINDS.values() for product in kind.products if product.core}

FACTORS = {factor.name: factor for name in TRAINABLE for factor in KINDS[name].factors if factor.part not in _CORES}
"""Last component of a trained parameter's path → its factor."""

PARTS: Mapping[str, str] = {
    **{factor.part: factor.endings for kind in KINDS.values() for factor in kind.factors},
    "alpha": "alpha",
    "diff_b": "(diff_b|b_norm)",
    "set_b": r"bias\.set_weight",
    "reshape_weight": "reshape_weight",
    "inv_scale": "inv_scale",
}
"""Part of an adapter in a file → pattern for the endings of its keys.

`alpha` is a number. `diff_b` changes a bias, `set_b` replaces it. `reshape_weight` is the shape to which a LoRA extends
the weight with zeros. `inv_scale` multiplies each input of the adapter (anima_lora, networks/lora_modules).
"""

SUFFIXES: Mapping[str, str] = {
    **{part: f".{part}" for part in PARTS if part != "inv_scale"},
    **{factor.part: f".{factor.part}{factor.suffix}" for kind in KINDS.values() for factor in kind.factors},
    "set_b": ".bias.set_weight",
}
"""Part → ending of its key in ComfyUI's files, which have no `inv_scale`."""

_PART = re.compile(
    r"(?:\.|_(?=lora\.))(?:" + "|".join(f"(?P<{part}>{ending})" for part, ending in PARTS.items()) + ")$"
)


_UNSUPPORTED = {
    r"oft_R(\.\w+)*": "PEFT's OFT",
    r"boft_[Rs](\.\w+)*": "PEFT's BOFT",
    r"vera_(lambda_[bd]|[AB])(\.\w+)*": "VeRA",
    r"lora_E(\.\w+)*": "AdaLoRA",
    r"(ia3_l|on_input)(\.\w+)*": "(IA)³",
    r"oft_diag": "OFT of old LyCORIS",
    r"(S_[pq]|[PQ]_basis|lambda_layer|base_lambda)": "anima_lora's OrthoLoRA as it is trained",
    r"(learned_source|rotate_layer)\.(weight|bias)": "ReFT",
    r"lora_(ups|downs)\.\d+\.weight|lora_up_weight|router\.(weight|bias)": "anima_lora's Hydra (a router at run time)",
}
"""Pattern for the endings of keys → adapter that cannot be read."""


def unsupported(keys: Iterable[str]) -> str:
    """Return the names of the kinds of adapters with these keys that cannot be read, with that remark, or ""."""
    keys = list(keys)
    found = [title for ending, title in _UNSUPPORTED.items() if any(re.search(rf"\.({ending})$", key) for key in keys)]
    return f"{' and '.join(found)}, which cannot be read" if found else ""


def split_key(key: str) -> tuple[str, str] | None:
    """Split an adapter file's key into module name and part; return None if it does not end in a known part."""
    match = _PART.search(key)
    return (key[: match.start()], match.lastgroup) if match and match.lastgroup else None


def kind_of(parts: Iterable[str], dims: Mapping[str, int] | None = None) -> AdapterKind | None:
    """Return the kind of an adapter with these parts, or None if they do not belong to a kind.

    It is the last kind in the table with a part that no earlier kind has, except for kinds that an earlier one
    outranks. `dims` are the numbers of axes of the parts.
    """
    parts, best, explained = set(parts), None, set()
    for kind in KINDS.values():
        fitting = (f for f in kind.factors if not f.dims or (dims or {}).get(f.part, f.dims) == f.dims)
        own = parts & {factor.part for factor in fitting}
        is_there = own - {factor.part for factor in kind.optional} and not own <= explained
        if is_there and not (best and kind.name in best.outranks):
            best, explained = kind, explained | own
    return best or (KINDS["diff"] if parts & {"diff_b", "set_b"} else None)


def adapter_kind(keys: Iterable[str]) -> AdapterKind | None:
    """Return the kind of the adapter in a file with these keys, or None if there is no adapter."""
    return kind_of(split[1] for key in keys if (split := split_key(key)))
