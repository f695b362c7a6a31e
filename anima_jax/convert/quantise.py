"""Write a model with quantised weights, and report what each kind of layer loses.

Which tensors keep their dtype (`KEEP`) is what the quantisers of the community keep for Anima; source: `ModelAnima` in
ComfyUI-GGUF's tools. Embeddings, which are looked up and not multiplied, keep theirs in ComfyUI's formats always.
"""

import argparse
import collections
import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from anima_jax.checkpoints import safetensors
from anima_jax.checkpoints.accounting import BFLOAT16, StoredTensor
from anima_jax.checkpoints.quantised import comfyui_write, ggml_encode
from anima_jax.checkpoints.quantised.quantiser import Parts, QuantisationLoss, Quantiser, quantise
from anima_jax.checkpoints.safetensors import TensorInfo
from anima_jax.convert import copies, gguf
from anima_jax.errors import UserError, counted, plural, shorten, size_text

QUANTISERS = comfyui_write.QUANTISERS | {f"gguf:{name}": row for name, row in ggml_encode.QUANTISERS.items()}
"""--dtype → how to quantise."""

KEEP = (
    *("llm_adapter", "x_embedder", "t_embedder", "pos_embedder", "final_layer"),
    *("blocks.0.", "blocks.1.adaln_modulation", "embed_tokens"),
)
"""Parts of the names of tensors that are not quantised unless the user chooses others."""

_EMBEDDING = re.compile(r"(^|\.)embed(_tokens)?\.weight$")
_NUMBER = re.compile(r"(?<=blocks\.|layers\.)\d+")
_WORST = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --keep."""
    parser.add_argument(
        "--keep",
        metavar="NAMES",
        type=lambda text: () if text == "none" else tuple(filter(None, text.split(","))),
        default=KEEP,
        help="with a quantised --dtype: parts of the names of tensors that keep their own dtype, separated by commas, "
        f"or none (default: {','.join(KEEP)})",
    )


class Plan(NamedTuple):
    """A file to write: its tensors by name without `prefix`, of which the `chosen` are quantised."""

    target: str
    stored: Mapping[str, StoredTensor]
    chosen: Collection[str]
    dtype: str
    report: "Report"
    prefix: str
    metadata: Mapping[str, str]


def write(
    target: str,
    stored: Mapping[str, StoredTensor],
    dtype: str,
    keep: Sequence[str],
    prefix: str,
    metadata: Mapping[str, str],
) -> Iterator[str]:
    """Write the tensors (by name without `prefix`) with their matrices as `dtype`; then yield the lines of the report.

    Raises UserError if no tensor is left to quantise, or if one has NaN or infinite values.
    """
    chosen, misfits = _chosen(target, stored, keep, QUANTISERS[dtype])
    quantised = {name: tensor.storage for name, tensor in stored.items() if tensor.storage}
    if quantised.keys() == chosen and set(quantised.values()) == {_storage(dtype)}:
        path = next(iter(stored.values())).file.path
        raise UserError(f"{path}: its weights are {dtype} already; without --dtype they are copied as they are")
    report = Report()
    size = WRITERS[dtype.rpartition(":")[0]](Plan(target, stored, chosen, dtype, report, prefix, metadata))
    before = sum(tensor.nbytes for tensor in stored.values())
    yield (
        f"{dtype}: {len(chosen)} of {plural(len(stored), 'tensor')}, {size_text(before)} -> {size_text(size)} "
        f"({size / before:.0%})"
    )
    if quantised:
        formats = collections.Counter(quantised.values())
        yield f"IN is quantised already ({counted(formats)}): its errors add to these"
    unit = " × ".join(map(str, QUANTISERS[dtype].multiple))
    for kind, count in collections.Counter(map(_kind, misfits)).items():
        yield f"kept, no multiples of {unit}: {count} of {kind}"
    yield from report.lines()


def _storage(dtype: str) -> str:
    """Return the key of FORMATS, or of `ggml.BLOCK_FORMATS`, under which weights of a --dtype are read."""
    return dtype.rpartition(":")[2].removesuffix("_tensorwise")


def _kind(name: str) -> str:
    """Return a layer's name without its number."""
    return _NUMBER.sub("N", name).removesuffix(".weight")


def _to_safetensors(plan: Plan) -> int:
    """Write a safetensors file as ComfyUI reads it; return the bytes of its tensors."""
    quantiser = QUANTISERS[plan.dtype]
    infos: list[TensorInfo] = []
    arrays: dict[str, Callable[[], np.ndarray]] = {}

    def add(name: str, dtype: np.dtype[Any], shape: tuple[int, ...], read: Callable[[], np.ndarray]) -> None:
        infos.append(TensorInfo(plan.prefix + name, dtype, shape))
        arrays[plan.prefix + name] = read

    latest = _Latest(lambda name: plan.report.quantised(name, plan.stored[name], quantiser))
    for name, tensor in plan.stored.items():
        shape = tensor.info.shape
        if name not in plan.chosen:
            # A mere cast to 8 bits, too: beside weights with scales, readers expect scales of all float8.
            dtype = BFLOAT16 if tensor.info.dtype.itemsize == 1 else tensor.written_dtype
            add(name, dtype, shape, functools.partial(copies.values, tensor, dtype))
            continue
        layer = name.removesuffix("weight")
        for part, (dtype, shape_of) in quantiser.parts.items():
            add(layer + part, dtype, shape_of(*shape), functools.partial(latest.part, name, part))
        for part, array in quantiser.constants(shape).items():
            add(layer + part, array.dtype, array.shape, functools.partial(np.asarray, array))
    safetensors.write(plan.target, infos, lambda key: arrays[key](), plan.metadata, mixed=True)
    return sum(info.nbytes for info in infos)


def _to_gguf(plan: Plan) -> int:
    """Write a GGUF file; return the bytes of its tensors."""
    latest = _Latest(lambda name: plan.report.quantised(name, plan.stored[name], QUANTISERS[plan.dtype]))
    type_ = plan.dtype.removeprefix("gguf:")
    return gguf.write(
        plan.target, plan.stored, plan.chosen, type_, lambda name: latest.part(name, "blocks"), plan.metadata
    )


WRITERS = {"": _to_safetensors, "gguf": _to_gguf}
"""What precedes the colon of a --dtype → what writes the file and returns its size."""


def _chosen(
    target: str, stored: Mapping[str, StoredTensor], keep: Sequence[str], quantiser: Quantiser
) -> tuple[set[str], list[str]]:
    """Return the matrices of linear layers to quantise, and those whose shapes the format cannot represent."""
    for text in keep if keep is not KEEP else ():
        if not any(text in name for name in stored):
            raise UserError(f"--keep {text}: is in no name of {target}'s tensors, such as {shorten(list(stored), 1)}")
    chosen = [
        name
        for name, tensor in stored.items()
        if len(tensor.info.shape) == 2 and 0 not in tensor.info.shape and name.endswith(".weight")
        if quantiser.embeddings or not _EMBEDDING.search(name)
        if not any(text in name for text in keep)
    ]
    misfits = [
        name
        for name in chosen
        if any(size % unit for size, unit in zip(stored[name].info.shape, quantiser.multiple, strict=True))
    ]
    if len(chosen) == len(misfits):
        reason = f": no matrix is a multiple of {quantiser.multiple}" if chosen else ": --keep names every matrix"
        raise UserError(f"{target}: nothing to quantise{reason}")
    return set(chosen) - set(misfits), misfits


class _Latest:
    """The parts of the weight that was asked for last, because a weight's parts are written one after the other."""

    def __init__(self, parts_of: Callable[[str], Parts]):
        self._parts_of = parts_of
        self._name, self._parts = "", {}

    def part(self, name: str, part: str) -> np.ndarray:
        if name != self._name:
            self._name, self._parts = name, {}  # the former ones are gone before there are others
            self._parts = self._parts_of(name)
        return self._parts[part]


class Report:
    """What quantising loses, as a table of the kinds of layers."""

    def __init__(self):
        self._losses: dict[str, QuantisationLoss] = {}

    def quantised(self, name: str, tensor: StoredTensor, quantiser: Quantiser) -> Parts:
        """Quantise a tensor and keep its loss for the report."""
        try:
            parts, self._losses[name] = quantise(tensor.read(), quantiser)
        except ValueError as error:
            raise UserError(f"{tensor.file.path}: {tensor.key}: {error}") from error
        return parts

    def lines(self) -> Iterator[str]:
        """Yield the table: for each kind of layer, ‖ŵ − w‖ / ‖w‖ of all its weights and of the worst one."""
        kinds: dict[str, list[QuantisationLoss]] = collections.defaultdict(list)
        for name, loss in self._losses.items():
            kinds[_kind(name)].append(loss)
        width = max(map(len, kinds))
        yield f"{'layers':<{width}}  weights  error ‖ŵ−w‖/‖w‖   largest"
        for kind, losses in kinds.items():
            yield f"{kind:<{width}}  {len(losses):>7}  {_relative(losses):>16.2e}  {max(map(_ratio, losses)):.2e}"
        total = _relative(self._losses.values())
        decibels = f"SNR {-20 * math.log10(total):.1f} dB" if total else "no error"
        yield f"{'all':<{width}}  {len(self._losses):>7}  {total:>16.2e}  {decibels}"
        worst = sorted(self._losses, key=lambda name: -_ratio(self._losses[name]))[:_WORST]
        yield from (f"worst: {name.removesuffix('.weight')} {_ratio(self._losses[name]):.2e}" for name in worst)


def _relative(losses: Iterable[QuantisationLoss]) -> float:
    losses = list(losses)
    return _ratio(QuantisationLoss(sum(loss.error for loss in losses), sum(loss.size for loss in losses)))


def _ratio(loss: QuantisationLoss) -> float:
    return math.sqrt(loss.error / loss.size) if loss.size else 0.0
