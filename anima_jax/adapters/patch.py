"""The change that an adapter makes to one weight, independent of dialects, computed on the host in float32.

Arrays have the layout of files: a weight W and an update ΔW are (out, in). The table of kinds (kinds.py) defines how ΔW
is formed. Factors of convolutions with a 1 × 1 kernel, (out, rank, 1, 1), count as matrices. `dora_scale`, (out, 1) or
(1, in), may accompany any kind with a scale. It is the norm of W + ΔW along the other axis (arXiv 2402.09353; dora.py).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from anima_jax.adapters.kinds import KINDS, AdapterKind, Product, kind_of
from anima_jax.errors import UserError, shell_command

FLOAT32 = np.dtype(np.float32)
_EPSILON = np.finfo(FLOAT32).eps

BIAS_PARTS = {"diff_b", "set_b"}
_BESIDE = {"alpha", *BIAS_PARTS}
"""Parts that may accompany those of any kind."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One tensor of an adapter, read on demand. `key` is its name in the file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    key: str = ""

    @classmethod
    def of(cls, array: np.ndarray) -> "Part":
        """Return a part with these values."""
        return cls(array.shape, array.dtype, lambda: array)

    def float32(self) -> np.ndarray:
        """Return a float32 copy of the values."""
        return self.read().astype(FLOAT32)

    @property
    def matrix(self) -> "Part":
        """The part with all axes after the first as one, or the part itself if it has fewer than three axes."""
        if len(self.shape) < 3:
            return self
        return self.reshaped((self.shape[0], math.prod(self.shape[1:])))

    def reshaped(self, shape: tuple[int, ...]) -> "Part":
        """Return the part in another shape."""
        return dataclasses.replace(self, shape=shape, read=lambda: self.read().reshape(shape))

    @property
    def transposed(self) -> "Part":
        """The transposed part."""
        return dataclasses.replace(self, shape=self.shape[::-1], read=lambda: self.read().T)


@dataclasses.dataclass(frozen=True)
class Patch:
    """The parts of one module's adapter. The other members are defined only if `error` returns None.

    Besides the parts of its kind, an adapter may have `alpha`, `dora_scale`, `inv_scale` (a factor on each input),
    parts for the bias, and, as a LoRA, `reshape_weight`. Parts of other kinds have no effect (`idle`). PEFT's settings
    may give a `factor` on ΔW where alpha does not count. With `norm_of_base` the `dora_scale` is for the norm of W.
    """

    parts: Mapping[str, Part]
    factor: float = 1.0
    norm_of_base: bool = False

    def with_parts(self, parts: Mapping[str, Part]) -> "Patch":
        """Return the patch with these parts in place of its own."""
        return dataclasses.replace(self, parts=parts)

    @functools.cached_property
    def kind(self) -> AdapterKind:
        """The row in the table of kinds."""
        return self._kind or KINDS["diff"]

    @functools.cached_property
    def _kind(self) -> AdapterKind | None:
        return kind_of(self.parts, {name: len(part.shape) for name, part in self.parts.items()})

    @functools.cached_property
    def chains(self) -> list[dict[str, Part]]:
        """For each matrix that ΔW is formed from, the matrices whose product it is, by part."""
        return [self._chain(product) for product in self.kind.products]

    def _chain(self, product: Product) -> dict[str, Part]:
        if product.matrix and product.matrix.part in self.parts:
            whole = self.parts[product.matrix.part]
            return {product.matrix.part: whole.matrix if product.factors else whole}
        first, *others = (factor.part for factor in product.factors or (product.matrix,) if factor)
        core = [product.core.part] if product.core and product.core.part in self.parts else []
        found = {name: self.parts[name].matrix for name in (first, *core, *others) if name in self.parts}
        if core and product.flipped and first in found:
            found[first] = found[first].transposed
        return found

    @functools.cached_property
    def _factors(self) -> dict[str, Part]:
        """The parts of a kind whose change depends on the weight; matrices, if they are named `….weight` in files."""
        rule = self.kind.on_weight
        factors = (*rule.factors, *rule.optional) if rule else ()
        present = {factor.part: factor for factor in factors if factor.part in self.parts}
        return {name: self.parts[name].matrix if one.suffix else self.parts[name] for name, one in present.items()}

    @property
    def _factor_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: part.shape for name, part in self._factors.items()}

    @property
    def idle(self) -> list[str]:
        """Parts without effect: those of other kinds than `kind`, as in ComfyUI."""
        if self._kind is None:
            return []
        used = {*_BESIDE, *self._factors, *itertools.chain.from_iterable(self.chains)}
        used |= {"reshape_weight"} if self._is_lora else set()
        used |= {"inv_scale", "dora_scale"} if self._is_product else {"dora_scale"} if self.kind.on_weight else set()
        return [name for name in self.parts if name not in used]

    @property
    def _is_lora(self) -> bool:
        return self.kind.products == KINDS["lora"].products

    @property
    def _is_product(self) -> bool:
        return any(product.factors for product in self.kind.products)

    @property
    def rank(self) -> int | None:
        """The divisor of alpha: the rank of the product (LoKr: of the last one), or None if there is no product."""
        if rule := self.kind.on_weight:
            return None if self._incomplete_on_weight() else rule.rank(self._factor_shapes)
        lasts = [product.factors[-1].part if product.factors else "" for product in self.kind.products]
        names = [last for last, chain in zip(lasts, self.chains, strict=True) if last in chain]
        shape = self.parts[names[0 if self.kind.elementwise else -1]].shape if names else ()
        return shape[0] if shape else None

    @property
    def product_shapes(self) -> list[tuple[int, int]]:
        """The shapes (out, in) of the matrices that ΔW is formed from."""
        chains = ([*chain.values()] for chain in self.chains)
        return [(chain[0].shape[0], chain[-1].shape[1]) for chain in chains]

    @functools.cached_property
    def alpha(self) -> float | None:
        """The number in the part of this name, or None."""
        part = self.parts.get("alpha")
        return float(part.read().astype(np.float64).reshape(())) if part and math.prod(part.shape) == 1 else None

    @property
    def scale(self) -> float:
        """The factor on the product: `factor`, times alpha / rank if there is an alpha and a rank."""
        return self.factor * (self.alpha / self.rank if self.alpha is not None and self.rank else 1.0)

    def with_alpha(self, alpha: float | None) -> "Patch":
        """Return the patch with this alpha, or unchanged if it is None."""
        part = Part.of(np.asarray(alpha, np.float64))
        return self if alpha is None else self.with_parts({**self.parts, "alpha": part})

    @property
    def without_factor(self) -> "Patch":
        """The patch with `factor` multiplied into its first matrix, in float32 unless its dtype has the products."""
        if self.factor == 1.0:
            return self
        (name, part), factor = next(iter(self.chains[0].items())), np.float32(self.factor)
        exact = part.dtype.name in ("float32", "bfloat16") and abs(math.frexp(self.factor)[0]) == 0.5
        dtype = part.dtype if exact else FLOAT32
        scaled = dataclasses.replace(part, dtype=dtype, read=lambda: (part.float32() * factor).astype(dtype))
        return dataclasses.replace(self, parts={**self.parts, name: scaled}, factor=1.0)

    def reshaped(self, weight_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the changed weight, which a LoRA may extend with zeros (`reshape_weight`)."""
        if not self._is_lora or "reshape_weight" not in self.parts:
            return weight_shape
        return tuple(int(size) for size in self.parts["reshape_weight"].read().reshape(-1))

    def extended(self, weight: np.ndarray) -> np.ndarray:
        """Return the weight (float32) in its new shape, with zeros at the ends of its axes."""
        if (target := self.reshaped(weight.shape)) == weight.shape:
            return weight
        out = np.zeros(target, FLOAT32)
        out[tuple(map(slice, weight.shape))] = weight
        return out

    def error(
        self, weight_shape: tuple[int, ...] | None = None, bias_shape: tuple[int, ...] | None = None
    ) -> str | None:
        """Return why these parts do not form an adapter or do not fit these shapes, or None if they do."""
        return self._incomplete() or next(self._misfits(weight_shape, bias_shape), None)

    def _misfits(self, weight_shape: tuple[int, ...] | None, bias_shape: tuple[int, ...] | None) -> Iterator[str]:
        """Yield errors about shapes that can be multiplied, but are wrong, and about the alpha."""
        shapes, found = {name: part.shape for name, part in self.parts.items()}, self.update_shape
        if math.prod(shapes.get("alpha", ())) != 1:
            yield f"alpha is {shapes['alpha']}, expected one number"
        if self.alpha is not None and not math.isfinite(self.alpha):
            yield f"alpha is {self.alpha}, expected a finite number"
        if found is None and not shapes.keys() & BIAS_PARTS:
            yield "has two products of different shapes"
        for name in sorted(BIAS_PARTS) if bias_shape is not None else ():
            if shapes.get(name, bias_shape) != bias_shape:
                yield f"changes a bias of shape {shapes[name]}, the model's is {bias_shape}"
        if "inv_scale" not in self.idle and shapes.get("inv_scale", (found or ())[-1:]) != (found or ())[-1:]:
            yield f"inv_scale is {shapes['inv_scale']}, and ΔW {_shown(found or ())}"
        if "reshape_weight" in shapes and self.parts["reshape_weight"].dtype.kind not in "iu":
            yield f"reshape_weight is {self.parts['reshape_weight'].dtype}, expected integers"
        if weight_shape is None or found is None:
            return
        target = self.reshaped(weight_shape)
        if len(target) != len(weight_shape) or any(map(int.__lt__, target, weight_shape)):
            yield f"reshape_weight is {target}, smaller than the weight {weight_shape}"
        if not _fits(found, target):
            yield f"changes a weight of shape {_shown(found)}, the model's is {target}"
        if self.kind.on_weight and self.rank is None and "dora_scale" in shapes:
            yield f"has dora_scale beside {self.kind.title}, which has no scale"
        norms = {target[:1], target[1:], (1, *target[1:])} if len(target) > 1 else {}
        if "dora_scale" in shapes and "dora_scale" not in self.idle and _stripped(shapes["dora_scale"]) not in norms:
            yield f"dora_scale is {shapes['dora_scale']}, the weight {target}"

    def _incomplete(self) -> str | None:
        """Return an error about a missing part or shapes that cannot be multiplied, or None."""
        if self._kind is None:
            beside = {*_BESIDE, "dora_scale", "inv_scale"}
            shapes = {name: part.shape for name, part in self.parts.items() if name not in beside}
            return f"has {', '.join(f'{name} {shape}' for name, shape in shapes.items())}, which is no adapter"
        for product, chain in zip(self.kind.products, self.chains, strict=True):
            names = [factor.part for factor in product.factors]
            if (product.matrix and product.matrix.part in chain) or not names:
                odd = [name for name in chain if names and len(chain[name].shape) != 2]
                if odd:
                    return f"{odd[0]} is {self.parts[odd[0]].shape}, expected (out, in)"
                continue
            found = [name for name in names if name in chain]
            if missing := [name for name in names if name not in chain]:
                return f"has {found[0]} but not {missing[0]}" if found else f"has no {names[0].removesuffix('_a')}"
            for left, right in itertools.pairwise(chain):
                shapes = chain[left].shape, chain[right].shape
                if not all(len(shape) == 2 and all(shape) for shape in shapes) or shapes[0][1] != shapes[1][0]:
                    return f"{left} is {shapes[0]} and {right} {shapes[1]}, expected (out, rank) and (rank, in)"
        return self._incomplete_on_weight()

    def _incomplete_on_weight(self) -> str | None:
        rule = self.kind.on_weight
        if not rule:
            return None
        if missing := [factor.part for factor in rule.factors if factor.part not in self.parts]:
            return f"has {next(iter(self._factors))} but not {missing[0]}"
        shapes = self._factor_shapes
        axes = {factor.part: factor.dims or 2 for factor in rule.factors}
        fitting = (all(shape) and len(shape) == axes.get(name, len(shape)) for name, shape in shapes.items())
        if all(fitting) and rule.shape(shapes):
            return None
        return f"has factors that do not fit together: {', '.join(f'{n} {shape}' for n, shape in shapes.items())}"

    @property
    def update_shape(self) -> tuple[int | None, ...] | None:
        """The shape of ΔW, with None for an arbitrary size, or None if the patch changes only the bias."""
        if self.kind.on_weight:
            return self.kind.on_weight.shape(self._factor_shapes)
        if not all(self.chains):
            return None
        if not all(product.factors for product in self.kind.products):
            return next(iter(self.chains[0].values())).shape
        return self.kind.combined_shape(self.product_shapes)

    def update(self, weight: np.ndarray | None = None, strength: float = 1.0) -> np.ndarray:
        """Return ΔW in float32, without the effect of `dora_scale`.

        Where ΔW depends on the weight (`kind.on_weight`), `weight` is required, and ΔW may depend on the strength,
        which is not multiplied in.
        """
        if self.kind.on_weight:
            assert weight is not None
            factors = {name: part.float32() for name, part in self._factors.items()}
            out = self.kind.on_weight.change(factors, weight, self.alpha or 0.0, strength)
        else:
            chains = ([part.float32() for part in chain.values()] for chain in self.chains)
            out = self.kind.combine(functools.reduce(np.matmul, chain) for chain in chains)
        if self.scale != 1.0:
            out *= np.float32(self.scale)
        has_inputs_scaled = "inv_scale" in self.parts and "inv_scale" not in self.idle
        return out * self.parts["inv_scale"].float32() if has_inputs_scaled else out

    def norm(self) -> float | None:
        """Return the Frobenius norm ‖ΔW‖, without forming ΔW where that can be avoided; None if it depends on W."""
        if self.kind.on_weight or self.kind.replaces:
            return None
        if self.update_shape is None:
            return 0.0
        if self.kind.elementwise or "inv_scale" in self.parts:
            return float(np.linalg.norm(self.update()))
        return abs(self.scale) * math.prod(_norm_of_product(list(chain.values())) for chain in self.chains)

    def applied(self, weight: np.ndarray, strength: float, *, comfyui_dora: bool = False) -> np.ndarray:
        """Return the weight (float32) with this adapter at `strength`, an interpolation if it has a `dora_scale`.

        With `comfyui_dora` a magnitude per output is a factor on W + ΔW divided by ‖W‖, as in ComfyUI.
        """
        if self.kind.replaces:
            return self.update().reshape(weight.shape)
        weight = self.extended(weight)
        update = self.update(weight, strength).reshape(weight.shape)
        if "dora_scale" not in self.parts or "dora_scale" in self.idle:
            update *= np.float32(strength)
            update += weight
            return update
        update += weight
        scale = self.parts["dora_scale"].matrix.float32()
        if scale.ndim == 1:
            scale = scale.reshape((-1, 1) if len(scale) == len(weight) else (1, -1))
        by_output = scale.shape[0] == weight.shape[0]
        of_base = by_output and (comfyui_dora or self.norm_of_base)
        update *= scale / norms(weight if of_base else update, int(by_output))
        return update if strength == 1.0 else weight + np.float32(strength) * (update - weight)

    def applied_to_bias(self, bias: np.ndarray, strength: float) -> np.ndarray:
        """Return the bias (float32) with this adapter at `strength`."""
        if "set_b" in self.parts:
            return self.parts["set_b"].float32()
        return bias + np.float32(strength) * self.parts["diff_b"].float32()


def norms(weight: np.ndarray, axis: int) -> np.ndarray:
    """Return the norms of a matrix along an axis, which stays, and a little more, as ComfyUI divides by."""
    return np.sqrt(np.sum(weight * weight, axis=axis, keepdims=True)) + _EPSILON


def _stripped(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape without ones at its end, as those of a column or of a 1 × 1 kernel."""
    return shape if len(shape) < 2 or shape[-1] != 1 else _stripped(shape[:-1])


def _fits(found: tuple[int | None, ...], shape: tuple[int, ...]) -> bool:
    """Return whether an update of the shape `found` changes weights of `shape`; axes of size 1 do not count."""
    if None in found:
        return found[0] == shape[0]
    return [size for size in found if size != 1] == [size for size in shape if size != 1]


def _shown(shape: tuple[int | None, ...]) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in shape)}{',' if len(shape) == 1 else ''})"


def _norm_of_product(parts: list[Part]) -> float:
    """Return ‖A₁ A₂ …‖ from (A₁ … Aₙ₋₁)ᵀ(A₁ … Aₙ₋₁) and Aₙ Aₙᵀ, which are small."""
    *left, right = (part.float32() for part in parts)
    if not left:
        return float(np.linalg.norm(right))
    matrix = functools.reduce(np.matmul, left)
    return max(float(np.sum((matrix.T @ matrix) * (right @ right.T), dtype=np.float64)), 0.0) ** 0.5


def truncated(update: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the best factors (o, r), (r, i) of a float32 matrix, and the fraction of its energy ‖·‖² that they keep.

    Exact if a side is small; otherwise a randomised SVD with power iterations (arXiv 0909.4061), whose error is within
    a fraction of a per cent of the best possible for the spectra of trained updates. Raises UserError for values that
    are not finite.
    """
    rank = min(rank, *update.shape)
    u, s, vt = _leading(update, rank)
    total = float(np.sum(np.square(update), dtype=np.float64))
    return *_balanced(u, s, vt), float(np.sum(np.square(s), dtype=np.float64)) / total if total else 1.0


_EXACT_BELOW, _OVERSAMPLE, _POWER_ITERATIONS = 512, 16, 4


def _leading(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the first `rank` singular vectors and values."""
    if min(matrix.shape) <= max(_EXACT_BELOW, 2 * rank):
        u, s, vt = _svd(matrix)
        return u[:, :rank], s[:rank], vt[:rank]
    start = np.random.default_rng(0).standard_normal((matrix.shape[1], rank + _OVERSAMPLE), FLOAT32)
    basis = np.linalg.qr(matrix @ start)[0]
    for _ in range(_POWER_ITERATIONS):
        basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
    u, s, vt = _svd(basis.T @ matrix)
    return basis @ u[:, :rank], s[:rank], vt[:rank]


def _svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return u, s and vt. Raises UserError for values that are not finite, with which LAPACK may never return."""
    if not np.isfinite(matrix).all():
        raise UserError("NaN or infinite values")
    return np.linalg.svd(matrix, full_matrices=False)


def _balanced(u: np.ndarray, s: np.ndarray, vt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    root = np.sqrt(s)
    return u * root, root[:, None] * vt


def resized(patch: Patch, rank: int) -> tuple[Patch, float, float]:
    """Return the patch as a LoRA of at most this rank, the energy ‖ΔW‖² before, and the energy that is kept.

    A LoRA of at most this rank is returned unchanged, as are parts that are not products. The scale is multiplied in,
    so the new LoRA has no alpha. Parts without effect are left out. Raises UserError for an adapter that cannot become
    a LoRA: one with `dora_scale` that is none, and one whose change depends on the weight.
    """
    patch = patch.with_parts({name: part for name, part in patch.parts.items() if name not in patch.idle})
    is_lora = patch.kind.products == KINDS["lora"].products
    energy = patch.norm()
    if patch.kind.on_weight:
        raise UserError(
            f"{patch.kind.title} cannot become a LoRA without the model, on whose weights its change depends: "
            f"`{shell_command('anima_jax.convert', 'merge')}` it, "
            f"then `{shell_command('anima_jax.convert', 'extract')}`"
        )
    if energy is not None and not math.isfinite(energy):
        raise UserError("has NaN or infinite values")
    if energy is None or patch.kind.name == "diff" or (is_lora and (patch.rank or 0) <= rank):
        return patch, (energy or 0.0) ** 2, (energy or 0.0) ** 2
    if not is_lora and "dora_scale" in patch.parts:
        raise UserError(f"{patch.kind.title} with dora_scale cannot become a LoRA")
    beside = {"dora_scale", "reshape_weight", *BIAS_PARTS}
    kept_parts = {name: part for name, part in patch.parts.items() if name in beside}
    product = patch.with_parts({name: part for name, part in patch.parts.items() if name not in kept_parts})
    is_plain = is_lora and product.parts.keys() <= {"lora_A", "lora_B", "alpha"}
    b, a, total, kept = _refactored(product, rank) if is_plain else _factored(product, rank)
    dtype = next(part.dtype for name, part in product.parts.items() if name not in {"alpha", "inv_scale"})
    dtype = FLOAT32 if dtype.kind in "iub" else dtype
    factors = {"lora_A": Part.of(a.astype(dtype)), "lora_B": Part.of(b.astype(dtype))}
    return dataclasses.replace(patch, parts={**factors, **kept_parts}, factor=1.0), total, kept


def _refactored(lora: Patch, rank: int) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Return B and A of a lower rank, exact and from the factors alone, ‖ΔW‖², and the energy that is kept."""
    left, right = (lora.parts[part].matrix.float32() for part in ("lora_B", "lora_A"))
    (q_left, r_left), (q_right, r_right) = np.linalg.qr(left), np.linalg.qr(right.T)
    with np.errstate(over="ignore", invalid="ignore"):
        middle = r_left @ r_right.T * np.float32(lora.scale)
    u, s, vt = _svd(middle)
    energy = np.square(s, dtype=np.float64)
    b, a = _balanced(q_left @ u[:, :rank], s[:rank], vt[:rank] @ q_right.T)
    return b, a, float(energy.sum()), float(energy[:rank].sum())


def _factored(patch: Patch, rank: int) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Return B and A of this rank for any ΔW, ‖ΔW‖², and the energy that is kept."""
    update = patch.update()
    b, a, share = truncated(update, rank)
    total = float(np.sum(np.square(update), dtype=np.float64))
    return b, a, total, share * total
