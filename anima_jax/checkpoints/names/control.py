"""Names of a control network in its file (ControlNet-LLLite for Anima, "v2"), and its config read from one.

Source: sd-scripts' networks/control_net_lllite_anima.py, `save_lllite_model`. All sizes follow from the shapes. Only
the dilations of the ASPP and whether colours are hidden under the mask are in the metadata, which may be missing.
"""

import re
from collections.abc import Iterable, Mapping

from anima_jax.checkpoints.names import LINEAR, FileLayout, Rule
from anima_jax.errors import UserError, shorten
from anima_jax.models.control import CELLS, LAYERS, PATCH, ControlConfig

TRUNK = "lllite_conditioning1."
MODULES = "lllite_dit_blocks_"

LLLITE = "lllite"
"""The type of adapter that is a control network: ControlNet-LLLite."""

BLOCKS = "lllite.blocks"
"""Our own metadata key: blocks of the transformer, of which the last ones may have no module. Others ignore it."""

DILATIONS = (1, 2, 4, 8)
"""sd-scripts' default for an ASPP."""

ATOMICS: Mapping[str, tuple[str, ...]] = {
    "self_attn_q_pre": ("self_attn_q_proj",),
    "self_attn_kv_pre": ("self_attn_k_proj", "self_attn_v_proj"),
    "cross_attn_q_pre": ("cross_attn_q_proj",),
    "mlp_fc1_pre": ("mlp_layer1",),
}
"""sd-scripts' names of places (`ATOMIC_SPECIFIERS`) → layers with a module."""

DILATION_LIMIT = 10**4
"""No dilation is as large."""

_MOST_BLOCKS = 512  # all of them are stacked, with or without modules

_MODULE = re.compile(rf"{MODULES}(\d{{1,9}})_({'|'.join(LAYERS)})\..+")


def _convolution(size: int) -> FileLayout:
    """Return the layout of a kernel that is a matrix here, with rows in the order (y, x, channel)."""
    return FileLayout(
        lambda file: file.transpose(2, 3, 1, 0).reshape(-1, file.shape[0]),
        lambda model: model.reshape(size, size, -1, model.shape[1]).transpose(3, 2, 0, 1),
    )


def rules(config: ControlConfig) -> list[Rule]:
    """Return the table of a network's names."""
    convolutions = (
        (r"(conv[13])", r"\1", PATCH // CELLS),
        (r"conv2", "conv2", 3),
        (r"proj", "proj", 1),
        (r"resblock_(\d+)\.(conv\d)", r"resblocks.\1.\2", 3),
        (r"aspp\.(global_conv|proj)", r"aspp.\1.0", 1),
        *((rf"aspp\.conv_{n}", f"aspp.branches.{n}.0", 1 if d == 1 else 3) for n, d in enumerate(config.dilations)),
    )
    norms = (
        (r"(norm\d|out_norm)", r"\1"),
        (r"resblock_(\d+)\.(norm\d)", r"resblocks.\1.\2"),
        (r"aspp\.norm_(\d+)", r"aspp.branches.\1.1"),
        (r"aspp\.global_norm", "aspp.global_conv.1"),
        (r"aspp\.norm", "aspp.proj.1"),
    )
    names = (*((path, name) for path, name, _ in convolutions), *norms)
    return [
        *(Rule(rf"trunk\.{path}\.kernel", f"{TRUNK}{name}.weight", _convolution(k)) for path, name, k in convolutions),
        *(Rule(rf"trunk\.{path}\.scale", f"{TRUNK}{name}.weight") for path, name in norms),
        *(Rule(rf"trunk\.{path}\.bias", f"{TRUNK}{name}.bias") for path, name in names),
        Rule(r"blocks\.(\w+)\.(\w+)\.kernel", rf"{MODULES}{{layer}}_\1.\2.weight", LINEAR),
        Rule(r"blocks\.(\w+)\.(\w+)\.bias", rf"{MODULES}{{layer}}_\1.\2.bias"),
        Rule(r"blocks\.(\w+)\.depth_bias", rf"{MODULES}{{layer}}_\1.depth_embed"),
    ]


def layers_in(names: Iterable[str]) -> list[tuple[int, str]]:
    """Return block and layer of each module in a file with these names, sorted."""
    matches = (match for name in names if (match := _MODULE.fullmatch(name)))
    return sorted({(int(match[1]), match[2]) for match in matches})


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> ControlConfig:
    """Return the config of a network whose tensors have these `shapes`, with as many blocks as the last with a module.

    Raises KeyError with the first name that is needed and missing, and UserError for sizes that no network has.
    """
    half, channels, *_ = _shape(shapes, f"{TRUNK}conv1.weight", 4)
    width_of_trunk, embedding = (_shape(shapes, f"{TRUNK}{name}.weight", 4)[0] for name in ("conv3", "proj"))
    if channels not in (3, 4):
        raise UserError(f"{TRUNK}conv1 reads {channels} channels, expected 3, or 4 with an inpainting mask")
    if width_of_trunk // 2 != half:
        raise UserError(f"{TRUNK}conv3 has {width_of_trunk} channels, expected {2 * half}: twice those of conv1")
    there = layers_in(shapes)
    if not there:
        raise UserError(f"has no module of a layer, such as {MODULES}0_{LAYERS[0]}")
    hidden, width = _shape(shapes, f"{MODULES}{there[0][0]}_{there[0][1]}.down.weight", 2)
    blocks, layers = 1 + there[-1][0], tuple(layer for layer in LAYERS if any(layer == own for _, own in there))
    if blocks > _MOST_BLOCKS:
        raise UserError(f"has a module in block {blocks - 1}; no model has so many blocks")
    every = {(block, layer) for block in range(blocks) for layer in layers}
    return ControlConfig(
        channels=channels,
        trunk_width=width_of_trunk,
        embedding_width=embedding,
        mlp_width=hidden,
        resblocks=_count(shapes, "resblocks."),
        dilations=_dilations(_count(shapes, "aspp.branches."), shapes, metadata),
        layers=layers,
        blocks=blocks,
        masked_input=channels == 4 and metadata.get("lllite.inpaint_masked_input", "").lower() == "true",
        width=width,
        absent=tuple(f"{block}.{layer}" for block, layer in sorted(every - set(there))),
    )


def blocks_in(metadata: Mapping[str, str], least: int) -> int | None:
    """Return the number of blocks of the transformer that a file was made for, None if it does not say."""
    found = metadata.get(BLOCKS, "")
    blocks = int(found) if re.fullmatch(r"[0-9]{1,9}", found) else 0
    return blocks if least <= blocks <= _MOST_BLOCKS else None


def present(config: ControlConfig) -> list[tuple[int, str]]:
    """Return block and layer of each module of a network."""
    every = ((block, layer) for block in range(config.blocks) for layer in config.layers)
    absent = set(config.absent)
    return [(block, layer) for block, layer in every if f"{block}.{layer}" not in absent]


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str, axes: int) -> tuple[int, ...]:
    """Return a tensor's shape. Raises UserError unless it has this number of axes, none of them empty."""
    if len(shapes[name]) != axes or not all(shapes[name]):
        raise UserError(f"{name} is {shapes[name]}, expected {axes} axes")
    return shapes[name]


def _count(names: Iterable[str], part: str) -> int:
    """Return how many of a numbered part the trunk has. Raises UserError if a number is missing."""
    pattern = re.compile(re.escape(TRUNK + part) + r"(\d{1,9})\.")
    found = sorted({int(match[1]) for name in names if (match := pattern.match(name))})
    if found and found[-1] >= len(found):
        missing = next(number for number in range(len(found)) if number not in found)
        raise UserError(f"has {TRUNK}{part}{found[-1]}, but no {TRUNK}{part}{missing}")
    return len(found)


def _dilations(branches: int, names: Iterable[str], metadata: Mapping[str, str]) -> tuple[int, ...]:
    """Return the dilations of the ASPP's branches, or () without one."""
    if not any(name.startswith(f"{TRUNK}aspp.") for name in names):
        return ()
    stored = metadata.get("lllite.aspp_dilations", ",".join(map(str, DILATIONS)))
    found = [part.strip() for part in stored.strip("[]() ").split(",") if part.strip()]
    if not all(part.isdecimal() and 0 < int(part[:9]) < DILATION_LIMIT for part in found):
        raise UserError(f"lllite.aspp_dilations = {shorten([stored])}, expected numbers from 1, such as 1,2,4,8")
    if len(found) != branches:
        raise UserError(f"has {branches} ASPP branches for {len(found)} dilations, lllite.aspp_dilations = {stored}")
    return tuple(map(int, found))


def metadata_of(config: ControlConfig, target_layers: str = "") -> dict[str, str]:
    """Return the metadata of a network's file. `target_layers` are sd-scripts' names as the user wrote them."""
    atomics = ",".join(name for name, layers in ATOMICS.items() if set(layers) & set(config.layers))
    return {
        "modelspec.architecture": "anima-preview/control-net-lllite",
        "lllite.version": "2",
        BLOCKS: str(config.blocks),
        "lllite.cond_in_channels": str(config.channels),
        "lllite.inpaint_masked_input": str(config.masked_input).lower(),
        "lllite.cond_emb_dim": str(config.embedding_width),
        "lllite.cond_dim": str(config.trunk_width),
        "lllite.cond_resblocks": str(config.resblocks),
        "lllite.use_aspp": str(bool(config.dilations)).lower(),
        **({"lllite.aspp_dilations": ",".join(map(str, config.dilations))} if config.dilations else {}),
        "lllite.mlp_dim": str(config.mlp_width),
        "lllite.target_layers": target_layers or atomics,
        "lllite.target_atomics": atomics,
    }
