"""Say what a file is: which networks, under which prefix, how large, and whether every tensor has its place."""

import argparse
import collections
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from anima_jax.adapters.dialects import DIALECTS, modules_by_spelling
from anima_jax.adapters.file import read_adapter
from anima_jax.adapters.kinds import TITLES, adapter_kind, split_key
from anima_jax.adapters.patch import Patch
from anima_jax.checkpoints.models import OPENERS
from anima_jax.checkpoints.names.networks import ADAPTER, DIT, QWEN3, TEXT_ENCODER, WAN_VAE, Network, locate
from anima_jax.checkpoints.safetensors import SafetensorsFile, TensorInfo
from anima_jax.errors import UserError, shorten
from anima_jax.models.dit import DiTConfig
from anima_jax.models.llm_adapter import LLMAdapterConfig
from anima_jax.models.qwen3 import Qwen3Config
from anima_jax.models.wan_vae import WanVAEConfig

SUMMARY = "say what a file is"

Row = tuple[str, str]

METADATA_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own flags."""
    parser.add_argument("file", metavar="FILE", help="a .safetensors file: local, gs:// or hf://owner/repo/file")


def run(arguments: argparse.Namespace) -> None:
    """Print what FILE is."""
    with SafetensorsFile(arguments.file) as file:
        rows = [("file", file.path), *_contents(file), *_totals(file.tensors.values()), *_metadata(file.metadata)]
    for label, text in rows:
        print(f"{label:<10}{text}")


def _contents(file: SafetensorsFile) -> Iterator[Row]:
    if adapter_kind(file.tensors):
        yield from _adapter(file)
        return
    networks = [network for network in OPENERS if locate(network, file.tensors)]
    if DIT in networks and ADAPTER in networks:
        networks.remove(ADAPTER)
    for network in networks:
        yield from _network(network, file)
    if not networks:
        yield "kind", "unknown"
        yield "unknown", f"{len(file.tensors)} tensors: {shorten(list(file.tensors))}"


def _network(network: Network, file: SafetensorsFile) -> Iterator[Row]:
    location = locate(network, file.tensors)
    assert location is not None
    yield "kind", network.title
    yield "prefix", location.prefix or "none"
    try:
        with OPENERS[network](file.path) as checkpoint:
            yield from SIZES[network](checkpoint.config)
            yield "check", f"all {len(checkpoint.tensors)} tensors have their place in the model"
            if checkpoint.elsewhere:
                yield "weights", _dtypes(source.tensor for source in checkpoint.sources.values())
    except UserError as error:
        yield from (("problem", fault.removeprefix(f"{file.path}: ")) for fault in error.messages)
    if location.skipped:
        yield "skipped", f"{len(location.skipped)} known extra buffers: {shorten(location.skipped)}"
    if location.unknown:
        yield "unknown", f"{len(location.unknown)} tensors: {shorten(location.unknown)}"


def _dit_sizes(config: DiTConfig) -> Iterator[Row]:
    yield (
        "sizes",
        (
            f"width {config.width}, {config.blocks} blocks, {config.heads} heads of {config.head_size}, "
            f"MLP {config.mlp_width}, context width {config.context_width}, AdaLN rank {config.adaln_rank}, "
            f"{config.latent_channels} latent channels"
        ),
    )
    if config.adapter is None:
        yield "adapter", "none"
    else:
        yield from (("adapter", text) for _, text in _adapter_sizes(config.adapter))


def _adapter_sizes(config: LLMAdapterConfig) -> Iterator[Row]:
    yield (
        "sizes",
        (
            f"width {config.width}, {config.blocks} blocks, {config.heads} heads, MLP {config.mlp_width}, "
            f"text states {config.source_width} -> context {config.target_width}, vocabulary {config.vocabulary}"
        ),
    )


def _qwen3_sizes(config: Qwen3Config) -> Iterator[Row]:
    yield (
        "sizes",
        (
            f"width {config.width}, {config.layers} layers, {config.heads} query and {config.key_heads} key heads of "
            f"{config.head_size}, MLP {config.mlp_width}, vocabulary {config.vocabulary}"
        ),
    )


def _vae_sizes(config: WanVAEConfig) -> Iterator[Row]:
    yield "sizes", f"widths {', '.join(map(str, config.widths))}, {config.latent_channels} latent channels"


SIZES: dict[Network, Any] = {DIT: _dit_sizes, ADAPTER: _adapter_sizes, QWEN3: _qwen3_sizes, WAN_VAE: _vae_sizes}


def _adapter(file: SafetensorsFile) -> Iterator[Row]:
    """An adapter: its kind, dialect and ranks, and how much it changes in each block."""
    adapter = read_adapter(file)
    kinds = collections.Counter(TITLES[patch.kind] for patch in adapter.patches.values())
    yield "kind", f"{' and '.join(kinds) or TITLES[adapter_kind(file.tensors) or 'lora']} (adapter)"
    yield "prefix", ", ".join(_dialects(file)) or "unknown"
    ranks = sorted({patch.rank for patch in adapter.patches.values() if patch.rank})
    scales = sorted({patch.scale for patch in adapter.patches.values()})
    alpha = "no alpha (scale 1)"
    if any("alpha" in patch.parts for patch in adapter.patches.values()):
        alpha = f"with alpha (scale {', '.join(f'{scale:g}' for scale in scales[:4])}{' …' if scales[4:] else ''})"
    yield "sizes", f"{len(adapter.patches)} modules, rank {', '.join(map(str, ranks)) or 'full'}, {alpha}"
    inside = sum(module.startswith("llm_adapter.") for module in adapter.patches)
    text = sum(module.startswith(TEXT_ENCODER) for module in adapter.patches)
    changed = f"{len(adapter.patches) - inside - text} modules of the transformer, {inside} of the text adapter"
    yield "changes", changed + (f", {text} of the text encoder" if text else "")
    faults = [f"{module} {fault}" for module, patch in adapter.patches.items() if (fault := patch.fault())]
    yield from (("problem", fault) for fault in faults)
    if adapter.unused:
        yield "unknown", f"{len(adapter.unused)} names that are not Anima's: {shorten(adapter.unused)}"
    if not faults:
        yield from _norms(adapter.patches)


def _dialects(file: SafetensorsFile) -> list[str]:
    """What the names begin with, and whose they are."""
    modules = modules_by_spelling(split[0] for key in file.tensors if (split := split_key(key)))
    found: dict[str, str] = {}
    for spelling, module in modules.items():
        prefix = re.match(r"(.*?)(transformer_)?(llm_adapter[._])?(blocks|layers)[._]\d", spelling)
        titles = [dialect.title for dialect in DIALECTS.values() if dialect.module(module) == spelling]
        if prefix:
            found[prefix[1]] = f" (names of {titles[0]})" if titles else ""
    return [f"{prefix or 'none'}{whose}" for prefix, whose in found.items()]


def _norms(patches: Mapping[str, Patch]) -> Iterator[Row]:
    """‖ΔW‖ of each block's modules together."""
    squares: dict[str, float] = collections.defaultdict(float)
    for module, patch in patches.items():
        squares[block_of(module)] += patch.norm() ** 2
    yield from (("norm", f"{block:<24} {square**0.5:.4g}") for block, square in squares.items())


def block_of(name: str) -> str:
    """The block that a module or a tensor belongs to, or the part of the network outside of blocks."""
    match = re.match(r"(.*?\b(blocks|layers)\.\d+)\.", name)
    return match[1] if match else name.split(".", maxsplit=1)[0]


def _totals(tensors: Iterable[TensorInfo]) -> Iterator[Row]:
    tensors = list(tensors)
    yield "tensors", f"{len(tensors)}, {_size(sum(tensor.nbytes for tensor in tensors))}, {_dtypes(tensors)}"


def _dtypes(tensors: Iterable[TensorInfo]) -> str:
    counts = collections.Counter(tensor.code for tensor in tensors)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{code} × {count}" for code, count in counts.most_common())


def _metadata(metadata: dict[str, str]) -> Iterator[Row]:
    for key, value in itertools.islice(metadata.items(), METADATA_SHOWN):
        yield "metadata", f"{shorten([key])} = {shorten([value])}{'…' if len(value) > 200 else ''}"
    if len(metadata) > METADATA_SHOWN:
        yield "metadata", f"and {len(metadata) - METADATA_SHOWN} more"
    if not metadata:
        yield "metadata", "none"


def _size(count: int) -> str:
    """Bytes in a unit that reads well (decimal)."""
    size, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}" if units[0] != "bytes" else f"{count} bytes"
