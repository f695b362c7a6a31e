"""The change that an adapter makes to one weight, independent of dialects, computed on the host in float32.

Arrays have the layout of files: a weight W and an update ΔW are (out, in). The table of kinds (kinds.py) defines how ΔW
is formed. `dora_scale`, (out, 1) or (1, in), may accompany any kind in a file. It is the norm of W + ΔW along the other
axis (arXiv 2402.09353), as PEFT and LyCORIS train it. ComfyUI divides by ‖W‖ instead if it is (out, 1), so such a file
has a slightly different effect there.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from anima_jax.adapters.kinds import KINDS, AdapterKind, kind_of
from anima_jax.errors import UserError

FLOAT32 = np.dtype(np.float32)


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


@dataclasses.dataclass(frozen=True)
class Patch:
    """The parts of one module's adapter. The other members are defined only if `error` returns None.

    Besides the parts of its kind, an adapter may have `alpha`, `dora_scale`, `diff` (added to ΔW) and `diff_b` (added
    to the bias).
    """

    parts: Mapping[str, Part]

    @functools.cached_property
    def kind(self) -> AdapterKind:
        """The row in the table of kinds."""
        return kind_of(self.parts) or KINDS["diff"]

    @property
    def rank(self) -> int | None:
        """The rank of the last product, or None if there is no product."""
        products = [factors for factors, _ in self.kind.products if factors and factors[-1].part in self.parts]
        return self.parts[products[-1][-1].part].shape[0] if products else None

    @property
    def scale(self) -> float:
        """The factor on the product: alpha / rank, or 1 without an alpha or a rank."""
        if "alpha" not in self.parts or self.rank is None:
            return 1.0
        return float(self.parts["alpha"].float32().reshape(())) / self.rank

    def with_alpha(self, alpha: float | None) -> "Patch":
        """Return the patch with this alpha, or unchanged if it is None."""
        if alpha is None:
            return self
        return Patch({**self.parts, "alpha": Part.of(np.asarray(alpha, FLOAT32))})

    def error(
        self, weight_shape: tuple[int, ...] | None = None, bias_shape: tuple[int, ...] | None = None
    ) -> str | None:
        """Return why these parts do not form an adapter or do not fit these shapes, or None if they do."""
        return self._incomplete() or next(self._misfits(weight_shape, bias_shape), None)

    def _misfits(self, weight_shape: tuple[int, ...] | None, bias_shape: tuple[int, ...] | None) -> Iterator[str]:
        """Yield errors about shapes that can be multiplied, but are wrong."""
        shapes, found = {name: part.shape for name, part in self.parts.items()}, self.update_shape
        if math.prod(shapes.get("alpha", ())) != 1:
            yield f"alpha is {shapes['alpha']}, expected one number"
        if found is None and self.kind.name != "diff":
            yield "has two products of different shapes"
        if bias_shape is not None and shapes.get("diff_b", bias_shape) != bias_shape:
            yield f"changes a bias of shape {shapes['diff_b']}, the model's is {bias_shape}"
        if weight_shape is None or found is None:
            return
        if found != weight_shape:
            yield f"changes a weight of shape {found}, the model's is {weight_shape}"
        norms = {weight_shape[:1], (*weight_shape[:1], 1), (1, *weight_shape[1:])}
        if "dora_scale" in shapes and shapes["dora_scale"] not in norms:
            yield f"dora_scale is {shapes['dora_scale']}, the weight {weight_shape}"

    def _incomplete(self) -> str | None:
        """Return an error about a missing part, a superfluous part or shapes that cannot be multiplied, or None."""
        allowed = {"alpha", "dora_scale", "diff", "diff_b"}
        for factors, matrix in self.kind.products:
            if matrix and matrix.part in self.parts:
                allowed.add(matrix.part)
                shape = self.parts[matrix.part].shape
                if factors and len(shape) != 2:
                    return f"{matrix.part} is {shape}, expected (out, in)"
                continue
            names = [factor.part for factor in factors]
            found = [name for name in names if name in self.parts]
            if missing := [name for name in names if name not in self.parts]:
                return f"has {found[0]} but not {missing[0]}" if found else f"has no {names[0].removesuffix('_a')}"
            for left, right in itertools.pairwise(names):
                shapes = self.parts[left].shape, self.parts[right].shape
                if not all(len(shape) == 2 and all(shape) for shape in shapes) or shapes[0][1] != shapes[1][0]:
                    return f"{left} is {shapes[0]} and {right} {shapes[1]}, expected (out, rank) and (rank, in)"
            allowed |= set(names)
        odd = sorted(self.parts.keys() - allowed)
        return f"has {odd[0]} beside a {self.kind.title}" if odd else None

    @property
    def _matrices(self) -> list[list[Part]]:
        """For each matrix that ΔW is formed from, the parts whose product it is."""
        chosen = [
            (matrix,) if matrix and matrix.part in self.parts else factors for factors, matrix in self.kind.products
        ]
        return [[self.parts[factor.part] for factor in factors] for factors in chosen]

    @property
    def update_shape(self) -> tuple[int, ...] | None:
        """The shape of ΔW, or None if the patch changes only the bias."""
        if self.kind.name == "diff":
            return self.parts["diff"].shape if "diff" in self.parts else None
        return self.kind.combined_shape([(parts[0].shape[0], parts[-1].shape[1]) for parts in self._matrices])

    def update(self) -> np.ndarray:
        """Return ΔW in float32, without the effect of `dora_scale`."""
        out = self.kind.combine(
            functools.reduce(np.matmul, (part.float32() for part in parts)) for parts in self._matrices
        )
        if self.kind.name == "diff":
            return out
        out *= np.float32(self.scale)
        return out + self.parts["diff"].float32() if "diff" in self.parts else out

    def norm(self) -> float:
        """Return the Frobenius norm ‖ΔW‖, without forming ΔW where that can be avoided."""
        if self.update_shape is None:
            return 0.0
        if self.kind.elementwise or "diff" in self.parts:
            return float(np.linalg.norm(self.update()))
        return abs(self.scale) * math.prod(map(_norm_of_product, self._matrices))

    def applied(self, weight: np.ndarray, strength: float) -> np.ndarray:
        """Return the weight (float32) with this adapter at `strength`, an interpolation if it has a `dora_scale`."""
        update = self.update()
        if "dora_scale" not in self.parts:
            update *= np.float32(strength)
            update += weight
            return update
        update += weight
        scale = self.parts["dora_scale"].float32()
        scale = scale[:, None] if scale.ndim == 1 else scale
        axis = 1 if scale.shape[0] == weight.shape[0] else 0
        norms = np.sqrt(np.sum(update * update, axis=axis, keepdims=True))
        update *= scale / np.where(norms > 0, norms, 1.0)
        return update if strength == 1.0 else weight + np.float32(strength) * (update - weight)


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
    a fraction of a per cent of the best possible for the spectra of trained updates.
    """
    rank = min(rank, *update.shape)
    u, s, vt = _leading(update, rank)
    total = float(np.sum(np.square(update), dtype=np.float64))
    return *_balanced(u, s, vt), float(np.sum(np.square(s), dtype=np.float64)) / total if total else 1.0


_EXACT_BELOW, _OVERSAMPLE, _POWER_ITERATIONS = 512, 16, 4


def _leading(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the first `rank` singular vectors and values."""
    if min(matrix.shape) <= max(_EXACT_BELOW, 2 * rank):
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vt[:rank]
    start = np.random.default_rng(0).standard_normal((matrix.shape[1], rank + _OVERSAMPLE), FLOAT32)
    basis = np.linalg.qr(matrix @ start)[0]
    for _ in range(_POWER_ITERATIONS):
        basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
    u, s, vt = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u[:, :rank], s[:rank], vt[:rank]


def _balanced(u: np.ndarray, s: np.ndarray, vt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    root = np.sqrt(s)
    return u * root, root[:, None] * vt


def resized(patch: Patch, rank: int) -> tuple[Patch, float, float]:
    """Return the patch as a LoRA of at most this rank, the energy ‖ΔW‖² before, and the energy that is kept.

    A LoRA of at most this rank is returned unchanged, as are parts that are not products. The scale is multiplied in,
    so the new LoRA has no alpha. Raises UserError for a LoHa or LoKr with a `dora_scale`, which cannot become a LoRA.
    """
    is_lora = patch.kind.products == KINDS["lora"].products
    if patch.kind.name == "diff" or (is_lora and (patch.rank or 0) <= rank):
        energy = patch.norm() ** 2
        return patch, energy, energy
    if not is_lora and "dora_scale" in patch.parts:
        raise UserError(f"a {patch.kind.name} with dora_scale cannot become a LoRA")
    kept_parts = {name: part for name, part in patch.parts.items() if name in {"dora_scale", "diff", "diff_b"}}
    product = Patch({name: part for name, part in patch.parts.items() if name not in kept_parts})
    b, a, total, kept = _refactored(product, rank) if is_lora else _factored(product, rank)
    dtype = next(part.dtype for name, part in product.parts.items() if name != "alpha")
    factors = {"lora_A": Part.of(a.astype(dtype)), "lora_B": Part.of(b.astype(dtype))}
    return Patch({**factors, **kept_parts}), total, kept


def _refactored(lora: Patch, rank: int) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Return B and A of a lower rank, exact and from the factors alone, ‖ΔW‖², and the energy that is kept."""
    left, right = (lora.parts[part].float32() for part in ("lora_B", "lora_A"))
    (q_left, r_left), (q_right, r_right) = np.linalg.qr(left), np.linalg.qr(right.T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T * np.float32(lora.scale), full_matrices=False)
    energy = np.square(s, dtype=np.float64)
    b, a = _balanced(q_left @ u[:, :rank], s[:rank], vt[:rank] @ q_right.T)
    return b, a, float(energy.sum()), float(energy[:rank].sum())


def _factored(patch: Patch, rank: int) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Return B and A of this rank for any ΔW, ‖ΔW‖², and the energy that is kept."""
    update = patch.update()
    b, a, share = truncated(update, rank)
    total = float(np.sum(np.square(update), dtype=np.float64))
    return b, a, total, share * total
