"""What an adapter does to one weight, whatever dialect it came in, and its arithmetic on the host in float32.

Arrays are as in files: a weight W is (o, i), and an update ΔW likewise.

lora   ΔW = s · lora_B lora_A                                      lora_B (o, r), lora_A (r, i)
loha   ΔW = s · (hada_w1_a hada_w1_b) ⊙ (hada_w2_a hada_w2_b)      each pair (o, r), (r, i)
lokr   ΔW = s · lokr_w1 ⊗ lokr_w2                                  either one perhaps as a product _a _b
diff   ΔW = diff, of any shape; and `diff_b` for the bias

s is alpha / r, and 1 without alpha or without r. `dora_scale`, (o, 1) or (1, i), is the norm that W + ΔW is given along
the other axis (arXiv 2402.09353), as PEFT and LyCORIS train it. ComfyUI divides by ‖W‖ instead where it is (o, 1), so
that such a file does a little more or less there.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from anima_jax.adapters.kinds import TITLES, kind_of
from anima_jax.errors import UserError

FLOAT32 = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class Part:
    """One tensor of an adapter, read when it is needed. `key` is its name in its file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    key: str = ""

    @classmethod
    def of(cls, array: np.ndarray) -> "Part":
        """An array that is there already."""
        return cls(array.shape, array.dtype, lambda: array)

    def float32(self) -> np.ndarray:
        """Its values."""
        return self.read().astype(FLOAT32)


_FACTORED = {
    "lora": (("lora_B", "lora_A"),),
    "loha": (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")),
    "lokr": (("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b")),
}
"""Kind → the products (left, right) that its update is made of; LoKr may have a product's result instead."""

_OPTIONAL = {"alpha", "dora_scale", "diff_b"}


@dataclasses.dataclass(frozen=True)
class Patch:
    """The parts of one module's adapter. `fault` says whether they are one; all else holds only if they are."""

    parts: Mapping[str, Part]

    @property
    def kind(self) -> str:
        """lora, dora, loha, lokr or diff; a LoHa or LoKr may have a `dora_scale` too."""
        return kind_of(self.parts) or "diff"

    @property
    def _products(self) -> tuple[tuple[str, str], ...]:
        return _FACTORED.get("lora" if self.kind == "dora" else self.kind, ())

    @property
    def rank(self) -> int | None:
        """Rank of the last product; None if the update is made of none."""
        ranks = [self.parts[right].shape[0] for _, right in self._products if right in self.parts]
        return ranks[-1] if ranks else None

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        if "alpha" not in self.parts or self.rank is None:
            return 1.0
        return float(self.parts["alpha"].float32().reshape(())) / self.rank

    def fault(
        self, weight_shape: tuple[int, ...] | None = None, bias_shape: tuple[int, ...] | None = None
    ) -> str | None:
        """Why these parts are no adapter, or none for a weight and a bias of these shapes; None if they are one."""
        return self._incomplete() or next(self._misfits(weight_shape, bias_shape), None)

    def _misfits(self, weight_shape: tuple[int, ...] | None, bias_shape: tuple[int, ...] | None) -> Iterator[str]:
        """Whatever is of a wrong shape though it multiplies."""
        shapes, found = {name: part.shape for name, part in self.parts.items()}, self.update_shape
        if math.prod(shapes.get("alpha", ())) != 1:
            yield f"alpha is {shapes['alpha']}, expected one number"
        if found is None and self.kind != "diff":
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
        """What is missing, too much, or of a shape that does not multiply."""
        allowed = {*_OPTIONAL, "diff"}
        for left, right in self._products:
            whole = left.removesuffix("_a")
            if self.kind == "lokr" and whole in self.parts:
                allowed.add(whole)
                continue
            allowed |= {left, right}
            missing = [part for part in (left, right) if part not in self.parts]
            if missing:
                other = {left: right, right: left}[missing[0]]
                return f"has {other} but not {missing[0]}" if len(missing) == 1 else f"has no {whole}"
            shapes = [self.parts[part].shape for part in (left, right)]
            if not all(len(shape) == 2 and all(shape) for shape in shapes) or shapes[0][1] != shapes[1][0]:
                return f"{left} is {shapes[0]} and {right} {shapes[1]}, expected (out, rank) and (rank, in)"
        odd = sorted(self.parts.keys() - allowed)
        return f"has {odd[0]} beside a {TITLES[self.kind]}" if odd else None

    @property
    def update_shape(self) -> tuple[int, ...] | None:
        """Shape of ΔW; None if there is none but a bias's."""
        if self.kind == "diff":
            return self.parts["diff"].shape if "diff" in self.parts else None
        sides = [
            (self.parts[left].shape[0], self.parts[right].shape[1])
            if left in self.parts
            else self.parts[left.removesuffix("_a")].shape
            for left, right in self._products
        ]
        if self.kind == "lokr":
            (k, m), (q, p) = sides
            return k * q, m * p
        return sides[0] if all(side == sides[0] for side in sides) else None

    def update(self) -> np.ndarray:
        """ΔW in float32, without what `dora_scale` does."""
        if self.kind == "diff":
            return self.parts["diff"].float32()
        sides = [self._side(left, right) for left, right in self._products]
        if self.kind == "lokr":
            sides = [np.kron(*sides)]
        out = sides[0] * sides[1] if len(sides) > 1 else sides[0]
        out *= np.float32(self.scale)
        return out + self.parts["diff"].float32() if "diff" in self.parts else out

    def _side(self, left: str, right: str) -> np.ndarray:
        if left not in self.parts:
            return self.parts[left.removesuffix("_a")].float32()
        return self.parts[left].float32() @ self.parts[right].float32()

    def norm(self) -> float:
        """‖ΔW‖ (Frobenius). A LoRA's and a LoKr's product is not formed for it."""
        if self.kind in {"lora", "dora"} and "diff" not in self.parts:
            left, right = (self.parts[part].float32() for part in self._products[0])
            square = float(np.sum((left.T @ left) * (right @ right.T), dtype=np.float64))
            return abs(self.scale) * max(square, 0.0) ** 0.5
        if self.kind == "lokr" and "diff" not in self.parts:
            sides = [float(np.linalg.norm(self._side(left, right))) for left, right in self._products]
            return abs(self.scale) * sides[0] * sides[1]
        return float(np.linalg.norm(self.update())) if self.update_shape is not None else 0.0

    def applied(self, weight: np.ndarray, strength: float) -> np.ndarray:
        """The weight (float32) with this adapter at `strength`; a decomposed one goes that part of its way."""
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


def truncated(update: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The best factors (o, r), (r, i) of a matrix, float32, and the share of its energy ‖·‖² that they keep.

    Exact where a side is small; else a randomised SVD with power iterations (arXiv 0909.4061), whose error is within a
    fraction of a per cent of the best one's for the spectra that training leaves.
    """
    rank = min(rank, *update.shape)
    u, s, vt = _leading(update, rank)
    total = float(np.sum(np.square(update), dtype=np.float64))
    return *_balanced(u, s, vt), float(np.sum(np.square(s), dtype=np.float64)) / total if total else 1.0


_EXACT_BELOW, _OVERSAMPLE, _POWER_ITERATIONS = 512, 16, 4


def _leading(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first `rank` singular vectors and values."""
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
    """The patch as a LoRA of at most this rank, and the energy ‖ΔW‖² before and that which it kept.

    One that is a LoRA of no more than this rank stays as it is, and so do parts that are no product. The scale is
    multiplied in, so that there is no alpha. Raises UserError for a LoHa or LoKr with a `dora_scale`, which is no LoRA.
    """
    if patch.kind == "diff" or (patch.kind in {"lora", "dora"} and (patch.rank or 0) <= rank):
        energy = patch.norm() ** 2
        return patch, energy, energy
    if patch.kind not in {"lora", "dora"} and "dora_scale" in patch.parts:
        raise UserError(f"a {patch.kind} with dora_scale cannot become a LoRA")
    kept_parts = {name: part for name, part in patch.parts.items() if name in {"dora_scale", "diff", "diff_b"}}
    product = Patch({name: part for name, part in patch.parts.items() if name not in kept_parts})
    if product.kind == "lora":
        left, right = (product.parts[part].float32() for part in ("lora_B", "lora_A"))
        (q_left, r_left), (q_right, r_right) = np.linalg.qr(left), np.linalg.qr(right.T)
        u, s, vt = np.linalg.svd(r_left @ r_right.T * np.float32(product.scale), full_matrices=False)
        energy = np.square(s, dtype=np.float64)
        b, a = _balanced(q_left @ u[:, :rank], s[:rank], vt[:rank] @ q_right.T)
        total, kept = float(energy.sum()), float(energy[:rank].sum())
    else:
        update = product.update()
        b, a, share = truncated(update, rank)
        total = float(np.sum(np.square(update), dtype=np.float64))
        kept = share * total
    dtype = next(part.dtype for name, part in product.parts.items() if name != "alpha")
    factors = {"lora_A": Part.of(a.astype(dtype)), "lora_B": Part.of(b.astype(dtype))}
    return Patch({**factors, **kept_parts}), total, kept
