"""Describe a file: its networks, their prefix and sizes, and whether every tensor belongs to the model; or a folder."""

import argparse
import collections
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping

from anima_jax.adapters.dialects import DIALECTS, modules_by_spelling
from anima_jax.adapters.file import Adapter, read_adapter
from anima_jax.adapters.kinds import adapter_kind, split_key, unsupported
from anima_jax.adapters.patch import BIAS_PARTS, Patch
from anima_jax.checkpoints import accounting
from anima_jax.checkpoints.accounting import StoredTensor
from anima_jax.checkpoints.control import fit_control, is_control
from anima_jax.checkpoints.folders import ModelFiles, is_network, model_files
from anima_jax.checkpoints.joined import open_model
from anima_jax.checkpoints.locations import files_in, is_remote
from anima_jax.checkpoints.models import Checkpoint, open_network
from anima_jax.checkpoints.names import dit
from anima_jax.checkpoints.names.control import MODULES, present
from anima_jax.checkpoints.names.networks import DIT, TEXT_ENCODER, Network, locate
from anima_jax.checkpoints.quantised.parts import QuantisationError
from anima_jax.checkpoints.safetensors import EXPECTED, ForeignFileError, SafetensorsFile
from anima_jax.checkpoints.tensor_files import TensorFile
from anima_jax.checkpoints.values import ValueCheck, check_values
from anima_jax.convert import folders, outputs
from anima_jax.errors import UserError, counted, one_line, plural, shorten, size_text

SUMMARY = "describe a file, or every file in a folder"

Row = tuple[str, str]

METADATA_SHOWN = 20

_LOOKS = "it looks like: "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument(
        "file",
        metavar="FILE",
        help="a file, local, gs:// or hf://owner/repo/file; a network's folder, or a repository; or any other folder, "
        "for a table of its files",
    )
    outputs.add_variant(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the description of FILE. A file that is no model or adapter is named as well as possible."""
    names = files_in(arguments.file)
    if names is not None and not (arguments.variant or is_remote(arguments.file) or is_network(names)):
        for line in folders.table(arguments.file, summary):
            print(line)
        return
    for label, text in _rows(model_files(arguments.file, variant=arguments.variant)):
        print(f"{label:<10}{text}")


def _rows(path: ModelFiles) -> list[Row]:
    try:
        with open_model(path) as file:
            values = check_values(file)
            return [
                ("file", one_line(file.path)),
                *([("files", str(len(path.files)))] if len(path.files) > 1 else []),
                *_contents(file, values, path),
                *_totals(file),
                *_metadata(file.metadata),
            ]
    except QuantisationError as error:  # what the weights would be can be said all the same
        with SafetensorsFile(path.files[0]) as file:
            what = accounting.looks_like(file.tensors, file.metadata).removeprefix(_LOOKS)
        problem = str(error).removeprefix(f"{path}: ")
        return [("file", one_line(str(path))), ("kind", what), ("problem", problem)]
    except ForeignFileError as error:
        return [("file", one_line(str(path))), ("kind", str(error).removeprefix(f"{path}: is ").replace(EXPECTED, ""))]


def summary(path: str) -> str:
    """Return what a file or the files of an index contain, in one line. Raises UserError if they cannot be read."""
    with open_model(files := model_files(path)) as file:
        rows = list(_contents(file, check_values(file), files))
    shown = [text for label, text in rows if label in ("kind", "sizes", "changes")]
    shown += [f"quantised: {text}" for label, text in rows if label == "quantised"]
    return "; ".join(shown + [f"problem: {text}" for label, text in rows if label == "problem"])


def _contents(file: TensorFile, values: ValueCheck, files: ModelFiles) -> Iterator[Row]:
    if is_control(file.tensors):
        yield from _control(file, values)
        return
    if adapter_kind(file.tensors):
        yield from _adapter(file, values)
        return
    networks = accounting.networks_in(file.tensors)
    for network in networks:
        yield from _network(network, file, files)
    if not networks:
        found = accounting.looks_like(file.tensors, file.metadata)
        foreign = f"{found.removeprefix(_LOOKS)}, not Anima's" if found.startswith(_LOOKS) else "unknown"
        yield "kind", unsupported(file.tensors) or foreign
        yield "unknown", f"{plural(len(file.tensors), 'tensor')}: {shorten(list(file.tensors))}"
    if values.problem:
        yield "problem", values.problem
    if networks and values.zero:
        yield "zeros", f"{plural(len(values.zero), 'tensor')} of zeros only: {shorten(values.zero)}"


def _network(network: Network, file: TensorFile, files: ModelFiles) -> Iterator[Row]:
    """Yield rows about one network: its prefix, its sizes, and whether it is complete."""
    located = locate(network, file.tensors)
    assert located is not None
    yield "kind", network.title
    yield "prefix", located.prefix or "none"
    try:
        with open_network(network, files) as checkpoint:
            yield "sizes", str(checkpoint.config)
            if network is DIT:
                yield "adapter", str(checkpoint.config.adapter or "none")
            yield "check", f"all {len(checkpoint.tensors)} tensors belong to the model"
            if located.elsewhere:
                yield "weights", _dtypes((source.file, source.key) for source in checkpoint.sources.values())
            yield from _quantisation(network, checkpoint)
    except UserError as error:
        yield from (("problem", message.removeprefix(f"{file.path}: ")) for message in error.messages)
    if located.skipped:
        yield "skipped", f"{plural(len(located.skipped), 'harmless extra tensor')}: {shorten(located.skipped)}"
    if connector := [key for key in located.elsewhere if dit.CONNECTOR in key]:
        yield (
            "connector",
            f"{plural(len(connector), 'tensor')} of Anima-3.8B v1.1's semantic connector, which is not used",
        )
    if located.unknown:
        yield "unknown", f"{plural(len(located.unknown), 'tensor')}: {shorten(located.unknown)}"


def _control(file: TensorFile, values: ValueCheck) -> Iterator[Row]:
    """Yield rows about a control network: its images, its sizes, its modules' places, and whether it is complete."""
    try:
        checkpoint = fit_control(file)
    except UserError as error:
        yield "kind", "ControlNet-LLLite (control network)"
        yield from (("problem", message.removeprefix(f"{file.path}: ")) for message in error.messages)
        return
    config, modules = checkpoint.config, present(checkpoint.config)
    kind = "for inpainting (4 channels: image and mask)" if config.channels == 4 else "for control images (3 channels)"
    hidden = ", colours hidden under the mask" if config.masked_input else ""
    yield "kind", f"ControlNet-LLLite v2 (control network) {kind}{hidden}"
    yield "sizes", str(config)
    layers: dict[str, list[str]] = {}
    for layer in config.layers:
        layers.setdefault(_ranges([block for block, own in modules if own == layer]), []).append(layer)
    yield "changes", "; ".join(f"inputs of {', '.join(own)} in blocks {blocks}" for blocks, own in layers.items())
    yield "check", f"all {len(checkpoint.tensors)} tensors belong to the network"
    if values.problem:
        yield "problem", values.problem
    ends = {f"{MODULES}{block}_{layer}.up.{part}" for block, layer in modules for part in ("weight", "bias")}
    if ends <= set(values.zero):
        yield "problem", "it changes nothing: every up is zero"
    elif values.zero:
        yield "zeros", f"{plural(len(values.zero), 'tensor')} of zeros only: {shorten(values.zero)}"


def _ranges(numbers: Iterable[int]) -> str:
    """Return sorted numbers as text: "0-27", or "0-3, 5"."""
    groups = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in group] for _, group in groups]
    return ", ".join(f"{run[0]}-{run[-1]}" if run[1:] else str(run[0]) for run in runs)


def _adapter(file: TensorFile, values: ValueCheck) -> Iterator[Row]:
    """Yield rows about an adapter: its kind, dialect and ranks, and how much it changes each block."""
    adapter = read_adapter(file)
    kinds = collections.Counter(patch.kind.title for patch in adapter.patches.values())
    if adapter.patches:
        yield "kind", f"{' and '.join(kinds)} (adapter)"
    else:
        yield "kind", f"{accounting.looks_like(file.tensors, file.metadata).removeprefix(_LOOKS)}, not Anima's"
    if values.problem:
        yield "problem", values.problem
    if adapter.patches:
        yield from _modules(file, adapter, finite=not values.not_finite)
    else:
        yield "unknown", f"{plural(len(adapter.unused), 'name')}: {shorten(adapter.unused)}"


def _modules(file: TensorFile, adapter: Adapter, *, finite: bool) -> Iterator[Row]:
    """Yield rows about the modules that an adapter changes, with norms if all values are `finite`."""
    yield "prefix", ", ".join(_dialects(file)) or "unknown"
    yield "sizes", _ranks(adapter.patches)
    yield "changes", _changes(adapter.patches)
    problems = [f"{module} {problem}" for module, patch in adapter.patches.items() if (problem := patch.error())]
    yield from (("problem", problem) for problem in problems)
    yield from (("remark", remark) for remark in adapter.warnings())
    if adapter.unused:
        yield "unknown", f"{len(adapter.unused)} names that are not Anima's: {shorten(adapter.unused)}"
    if problems or not finite:
        return
    norms = {module: patch.norm() for module, patch in adapter.patches.items() if patch.parts.keys() - BIAS_PARTS}
    idle = [module for module, norm in norms.items() if norm == 0.0]
    if idle and len(idle) == len(norms):
        yield "problem", "it changes nothing: every update is zero"
    elif idle:
        yield "zeros", f"{plural(len(idle), 'module')} with an update of zero: {shorten(idle)}"
    yield from _norms(norms, adapter.patches)


def _ranks(patches: Mapping[str, Patch]) -> str:
    """Describe the modules: their number, ranks and scales."""
    ranks = sorted({patch.rank for patch in patches.values() if patch.rank})
    scales = [f"{scale:g}" for scale in sorted({patch.scale for patch in patches.values()})]
    alpha = "no alpha (scale 1)"
    if any("alpha" in patch.parts for patch in patches.values()):
        alpha = f"with alpha (scale {', '.join(scales[:4])}{' …' if scales[4:] else ''})"
    return f"{plural(len(patches), 'module')}, rank {', '.join(map(str, ranks)) or 'full'}, {alpha}"


def _changes(patches: Mapping[str, Patch]) -> str:
    """Describe how many modules of each network the adapter changes."""
    of_adapter = sum(module.startswith(dit.ADAPTER) for module in patches)
    of_text = sum(module.startswith(TEXT_ENCODER) for module in patches)
    of_transformer = plural(len(patches) - of_adapter - of_text, "module of the transformer")
    return f"{of_transformer}, {of_adapter} of the text adapter" + (
        f", {of_text} of the text encoder" if of_text else ""
    )


def _dialects(file: TensorFile) -> list[str]:
    """Return the prefixes of the names, each with the tool that uses it."""
    modules = modules_by_spelling(split[0] for key in file.tensors if (split := split_key(key)))
    found: dict[str, str] = {}
    for spelling, module in modules.items():
        prefix = re.match(r"(.*?)(transformer_)?(llm_adapter[._])?(blocks|layers)[._]\d", spelling)
        titles = [dialect.title for dialect in DIALECTS.values() if dialect.module(module) == spelling]
        if prefix:
            found[prefix[1]] = f" (names of {titles[0]})" if titles else ""
    return [f"{prefix or 'none'}{whose}" for prefix, whose in found.items()]


def _norms(norms: Mapping[str, float | None], patches: Mapping[str, Patch]) -> Iterator[Row]:
    """Yield a row per block with ‖ΔW‖ of all its modules together, without those for which it depends on the model."""
    squares: dict[str, float] = collections.defaultdict(float)
    dependent = collections.Counter[str]()
    for module, norm in norms.items():
        if norm is None:
            dependent[patches[module].kind.title] += 1
        else:
            squares[block_of(module)] += norm**2
    for title, count in dependent.items():
        yield "norm", f"{title}: depends on the model's weights ({plural(count, 'module')})"
    yield from (("norm", f"{block:<24} {square**0.5:.4g}") for block, square in squares.items())


def block_of(name: str) -> str:
    """Return the block that contains a module or tensor or, outside the blocks, the part of the network."""
    match = re.match(r"(.*?\b(blocks|layers)\.\d+)\.", name)
    return match[1] if match else name.split(".", maxsplit=1)[0]


def _quantisation(network: Network, checkpoint: Checkpoint) -> Iterator[Row]:
    """Yield rows about a network with quantised weights: formats, bits per weight, and the parts that are not."""
    sources = checkpoint.sources
    quantised = {name: source for name, source in sources.items() if source.storage}
    if not quantised:
        return
    formats = collections.Counter(source.storage or "" for source in quantised.values())
    values = sum(math.prod(source.info.shape) for source in quantised.values())
    bits = 8 * sum(source.nbytes for source in quantised.values()) / values
    everything = sum(math.prod(source.info.shape) for source in sources.values())
    overall = 8 * sum(source.nbytes for source in sources.values()) / everything
    yield "quantised", f"{counted(formats)}, {bits:.2f} bits per weight, {overall:.2f} in all of the {network.title}"
    plain = [name for name, source in sources.items() if not source.storage and len(source.info.shape) > 1]
    parts = dict.fromkeys(map(_part_of, plain))
    whole = [part for part in parts if not any(_part_of(name) == part for name in quantised)]
    others = [name for name in plain if _part_of(name) not in whole]
    rest = f"{plural(len(others), 'weight of other parts')}: {shorten(others)}" if others else ""
    yield "kept", "; ".join(filter(None, (shorten(whole, 12), rest))) or "only vectors are not quantised"


def _part_of(name: str) -> str:
    return dit.ADAPTER.rstrip(".") if name.startswith(dit.ADAPTER) else block_of(name)


def _totals(file: TensorFile) -> Iterator[Row]:
    size = sum(StoredTensor(file, key).nbytes for key in file.tensors)
    yield "tensors", f"{len(file.tensors)}, {size_text(size)}, {_dtypes((file, key) for key in file.tensors)}"


def _dtypes(tensors: Iterable[tuple[TensorFile, str]]) -> str:
    counts = collections.Counter(file.storage(key) or file.tensors[key].code for file, key in tensors)
    return next(iter(counts)) if len(counts) == 1 else counted(dict(counts.most_common()))


def _metadata(metadata: dict[str, str]) -> Iterator[Row]:
    for key, value in itertools.islice(metadata.items(), METADATA_SHOWN):
        yield "metadata", f"{shorten([key])} = {shorten([value])}{'…' if len(value) > 200 else ''}"
    if len(metadata) > METADATA_SHOWN:
        yield "metadata", f"and {len(metadata) - METADATA_SHOWN} more"
    if not metadata:
        yield "metadata", "none"
