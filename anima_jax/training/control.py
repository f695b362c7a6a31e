"""`[adapter] type = 'lllite'`: the control network that a run trains, beside a frozen transformer.

Its parameters are those of `AnimaDiT.control`, so their paths begin with `PREFIX`. Everything else is as with other
trained parameters: optimizer, moving average, sharding, checkpoints.
"""

import dataclasses
import re
from collections.abc import Mapping

import jax.numpy as jnp
from jax.sharding import Mesh

from anima_jax.adapters.base_model import base_mismatch
from anima_jax.adapters.planning import first_match, require_patterns_fit
from anima_jax.checkpoints.control import abstract_control, open_control
from anima_jax.checkpoints.names import FileTensor, file_tensors
from anima_jax.checkpoints.names.control import ATOMICS, metadata_of, present, rules
from anima_jax.config.adapter import AdapterConfig
from anima_jax.config.main import MainConfig
from anima_jax.errors import UserError
from anima_jax.models import parameters
from anima_jax.models.control import ControlConfig, ControlNetwork
from anima_jax.models.dit import DiTConfig
from anima_jax.models.parameters import Params
from anima_jax.parallel import rules as sharding_rules

PREFIX = "control."

TRUNK = "conditioning1"
"""The trunk's name in `lr_pattern`, as in files. Modules have their layers' names, such as `blocks.0.mlp.layer1`."""

_SIZES = {
    "channels": "cond_in_channels",
    "embedding_width": "cond_emb_dim",
    "trunk_width": "cond_dim",
    "resblocks": "cond_resblocks",
    "dilations": "use_aspp = true, aspp_dilations",
    "mlp_width": "mlp_dim",
}
"""Field of `ControlConfig` → key of `[adapter]`, after another one that it needs."""


def network_of(config: MainConfig, dit: DiTConfig) -> tuple[ControlConfig, dict[str, tuple[float, ...]]]:
    """Return the sizes of the network, and the relative learning rates of the parameters that have their own.

    A module with a rate of 0 is absent. Raises UserError for a pattern that matches no module, and if none is left.
    """
    adapter = config.adapter
    assert adapter is not None
    layers = tuple(layer for atomic in adapter.target_atomics for layer in ATOMICS[atomic])
    network = ControlConfig(
        channels=adapter.cond_in_channels,
        trunk_width=adapter.cond_dim,
        embedding_width=adapter.cond_emb_dim,
        mlp_width=adapter.mlp_dim,
        resblocks=adapter.cond_resblocks,
        dilations=adapter.aspp_dilations if adapter.use_aspp else (),
        layers=layers,
        blocks=dit.blocks,
        masked_input=adapter.inpaint_masked_input,
        width=dit.width,
    )
    rate = config.optimizer.lr if config.force_constant_lr is None else config.force_constant_lr
    if not rate:
        raise UserError(f"{config.path}: every learning rate is 0, so nothing would be trained")
    names = [TRUNK, *(_name(block, layer) for block in range(dit.blocks) for layer in layers)]
    require_patterns_fit(adapter.lr_pattern, names, f"{config.path}: adapter.lr_pattern: ")
    own = {name: first_match(adapter.lr_pattern, name, rate) / rate for name in names}
    absent = [(block, layer) for block in range(dit.blocks) for layer in layers if not own[_name(block, layer)]]
    if len(absent) == dit.blocks * len(layers):
        raise UserError(f"{config.path}: [adapter] leaves every module out, so nothing would be trained")
    network = dataclasses.replace(network, absent=tuple(f"{block}.{layer}" for block, layer in absent))
    by_module = {f"blocks.{layer}.": tuple(own[_name(block, layer)] for block in range(dit.blocks)) for layer in layers}
    rates = {"trunk.": (own[TRUNK],), **by_module}
    shapes = abstract_control(network)[1]
    return network, {
        PREFIX + path: rates[part]
        for path in shapes
        for part in rates
        if path.startswith(part) and set(rates[part]) != {1.0}
    }


def _name(block: int, layer: str) -> str:
    """Return a module's name, that of its linear layer in the transformer."""
    return f"blocks.{block}." + re.sub("(attn|mlp)_", r"\1.", layer)


def initial(network: ControlConfig, seed: int, mesh: Mesh) -> Params:
    """Return initial values with which the transformer is unchanged: sd-scripts', from the run's seed."""
    shapes = abstract_control(network)[1]
    placed = sharding_rules.shardings(shapes, shapes, mesh)
    values = parameters.initial(lambda rngs: ControlNetwork(network, rngs=rngs), seed, placed)[1]
    return {PREFIX + path: value for path, value in values.items()}


def existing(config: MainConfig, network: ControlConfig, fresh: Params, mesh: Mesh) -> tuple[Params, list[str]]:
    """Return the parameters that start from `init_from_existing` instead of `fresh` values, and messages about them.

    Raises UserError for a file of other sizes, or with modules that the run does not train.
    """
    adapter = config.adapter
    assert adapter is not None
    assert adapter.init_from_existing is not None
    with open_control(adapter.init_from_existing, blocks=network.blocks, width=network.width) as file:
        label, found = f"{config.path}: init_from_existing: {file.label}", file.config
        differ = [
            "use_aspp = false" if value == () else f"{key} = {_toml(value)}"
            for field, key in _SIZES.items()
            if (value := getattr(found, field)) != getattr(network, field)
        ]
        if differ:
            raise UserError(f"{label} has other sizes than [adapter]: expected {', '.join(differ)}")
        mine, theirs = present(network), present(found)
        if strangers := [_name(*module) for module in theirs if module not in mine]:
            raise UserError(f"{label} changes {len(strangers)} layers that are no target_layers, as {strangers[0]}")
        placed = sharding_rules.shardings(file.abstract, file.abstract, mesh)
        values = {PREFIX + path: value for path, value in file.load(jnp.float32, placed).items()}
    loaded: Params = {}
    for path, value in values.items():
        rows = [block for block, layer in theirs if path.startswith(f"{PREFIX}blocks.{layer}.")]
        loaded[path] = fresh[path].at[jnp.array(rows)].set(value[jnp.array(rows)]) if rows else value
    messages = [f"{len(theirs)} of {len(mine)} modules begin from {file.label}"]
    if found.masked_input != network.masked_input:
        messages.append(f"warning: {label} was trained with inpaint_masked_input = {_toml(found.masked_input)}")
    base = config.model.transformer_files
    if base is not None and (warning := base_mismatch(file.label, file.metadata, base)):
        messages.append(warning)
    return loaded, messages


def _toml(value: object) -> str:
    return str(list(value) if isinstance(value, tuple) else value).lower()


def tensors_of(network: ControlConfig, params: Params) -> list[FileTensor]:
    """Return the tensors of the network's parameters in its file."""
    own = {path.removeprefix(PREFIX): value for path, value in params.items()}
    return [dataclasses.replace(one, path=PREFIX + one.path) for one in file_tensors(rules(network), own)]


def network_with(network: ControlConfig, params: Params) -> ControlNetwork:
    """Return the network with the trained parameters."""
    own = {path.removeprefix(PREFIX): value for path, value in params.items() if path.startswith(PREFIX)}
    return parameters.merge(abstract_control(network)[0], own)


def metadata(adapter: AdapterConfig, network: ControlConfig) -> Mapping[str, str]:
    """Return the metadata of the network's file, with the layers as the user named them."""
    return metadata_of(network, ",".join(adapter.target_layers))
