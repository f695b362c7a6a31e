"""Say what a file is: which networks, under which prefix, how large, and whether every tensor has its place."""

import argparse
import collections
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any

from anima_jax.checkpoints.accounting import shorten
from anima_jax.checkpoints.models import OPENERS
from anima_jax.checkpoints.names.prefixes import ADAPTER, DIT, LOW_RANK, QWEN3, WAN_VAE, Network, locate, low_rank_kind
from anima_jax.checkpoints.safetensors import SafetensorsFile, Tensor
from anima_jax.errors import UserError
from anima_jax.models.dit import DiTConfig
from anima_jax.models.llm_adapter import AdapterConfig
from anima_jax.models.qwen3 import Qwen3Config
from anima_jax.models.wan_vae import WanVAEConfig

SUMMARY = "say what a file is"

Row = tuple[str, str]

METADATA_SHOWN = 20

LOW_RANK_DIALECTS = (
    ("diffusion_model.", "the trainer's and ComfyUI's"),
    ("lora_unet_", "kohya's sd-scripts"),
    ("transformer.", "diffusers'"),
    ("net.", "original names"),
)
_ANIMA_MODULE = re.compile(
    r"(llm_adapter[._])?(blocks[._]\d+[._](self_attn|cross_attn|mlp|adaln_modulation)|transformer_blocks\.\d+\.)"
)


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
    if low_rank_kind(file.tensors):
        yield from _low_rank(file)
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
        yield from (("problem", fault.removeprefix(f"{file.path}: ")) for fault in error.faults)
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


def _adapter_sizes(config: AdapterConfig) -> Iterator[Row]:
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


def _low_rank(file: SafetensorsFile) -> Iterator[Row]:
    """A LoRA, LoKr or LoHa: its dialect, ranks, and the modules that it changes."""
    kind = low_rank_kind(file.tensors)
    endings = [LOW_RANK[kind], re.compile(r"\.(alpha|dora_scale)$")] if kind else []
    modules: dict[str, list[Tensor]] = collections.defaultdict(list)
    unknown = []
    for key, tensor in file.tensors.items():
        match = next((match for ending in endings if (match := ending.search(key))), None)
        if match:
            modules[key[: match.start()]].append(tensor)
        else:
            unknown.append(key)
    prefix, dialect = next((row for row in LOW_RANK_DIALECTS if any(m.startswith(row[0]) for m in modules)), ("", ""))
    yield "kind", f"{kind} (adapter)"
    yield "prefix", f"{prefix} ({dialect} names)" if prefix else "none"
    ranks = sorted({min(t.shape) for tensors in modules.values() for t in tensors if _carries_rank(t)})
    yield "sizes", f"{len(modules)} modules, rank {', '.join(map(str, ranks)) or 'full'}, {_alpha(file.tensors)}"
    inside = sum("llm_adapter" in module or "text_conditioner" in module for module in modules)
    yield "changes", f"{len(modules) - inside} modules of the transformer, {inside} of the text adapter"
    unknown += [module for module in modules if not _ANIMA_MODULE.search(module)]
    if unknown:
        yield "unknown", f"{len(unknown)} names that are not Anima's: {shorten(unknown)}"


def _carries_rank(tensor: Tensor) -> bool:
    return len(tensor.shape) == 2 and not re.search(r"\.lokr_w[12]$|\.dora_scale$", tensor.name)


def _alpha(names: Iterable[str]) -> str:
    return "with alpha" if any(name.endswith(".alpha") for name in names) else "no alpha (scale 1)"


def _totals(tensors: Iterable[Tensor]) -> Iterator[Row]:
    tensors = list(tensors)
    yield "tensors", f"{len(tensors)}, {_size(sum(tensor.nbytes for tensor in tensors))}, {_dtypes(tensors)}"


def _dtypes(tensors: Iterable[Tensor]) -> str:
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
