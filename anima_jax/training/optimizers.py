"""Parameter groups, learning rates and the optimizer.

Groups and the weight-decay test see the names and shapes of the original files, as diffusion-pipe's
`CosmosPredict2Pipeline.get_param_groups` and train.py do.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping

import jax.numpy as jnp
import optax

from anima_jax.checkpoints.names import FileTensor

GROUPS = (
    ("llm_adapter", "llm_adapter"),
    ("self_attn", ".self_attn"),
    ("cross_attn", ".cross_attn"),
    ("mlp", ".mlp"),
    ("mod", ".adaln_modulation"),
    ("base", ""),
)
"""(group, what its parameters' names contain): the first that fits. The configuration's key is `<group>_lr`."""

NEVER_DECAYED = "llm_adapter.embed"

COSINE_FLOOR = 1e-6
"""The learning rate, absolute, at which `cosine` ends."""

Schedule = optax.Schedule


def group_of(name: str) -> str:
    """The group of the tensor with this file name."""
    return next(group for group, part in GROUPS if part in name)


def groups_by_path(tensors: list[FileTensor]) -> dict[str, str]:
    """Parameter path → group. Raises LookupError if the layers of a stacked parameter fall into different groups."""
    found: dict[str, str] = {}
    for tensor in tensors:
        if found.setdefault(tensor.path, group_of(tensor.name)) != group_of(tensor.name):
            raise LookupError(f"the layers of {tensor.path} belong to different groups")
    return found


def decayed_paths(tensors: list[FileTensor]) -> set[str]:
    """Parameters that weight decay applies to: neither 1-D in the file nor the adapter's embedding table."""
    return {tensor.path for tensor in tensors if len(tensor.shape) > 1 and NEVER_DECAYED not in tensor.name}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW's hyper-parameters, and what shapes its learning rates over `total_steps`."""

    learning_rates: Mapping[str, float]
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    schedule: str = "constant"
    warmup_steps: int = 0
    total_steps: int = 1
    clip_norm: float = 1.0


def constant(rate: float, total_steps: int) -> Schedule:
    """The same rate at every step."""
    del total_steps
    return lambda step: jnp.full_like(step, rate, jnp.float32)


def linear(rate: float, total_steps: int) -> Schedule:
    """From the rate to 0."""
    return lambda step: rate * jnp.clip(1.0 - step / total_steps, min=0.0)


def cosine(rate: float, total_steps: int) -> Schedule:
    """From the rate to `COSINE_FLOOR` along half a cosine."""
    return lambda step: (
        COSINE_FLOOR + (rate - COSINE_FLOOR) * 0.5 * (1.0 + jnp.cos(math.pi * jnp.clip(step / total_steps, max=1.0)))
    )


SCHEDULES: dict[str, Callable[[float, int], Schedule]] = {"constant": constant, "linear": linear, "cosine": cosine}


def learning_rate(config: OptimizerConfig, group: str) -> Schedule:
    """The group's rate at each step: a linear warmup from 1 / `warmup_steps`, then the schedule from its beginning."""
    rate, warmup = config.learning_rates[group], config.warmup_steps
    main = SCHEDULES[config.schedule](rate, config.total_steps)
    if not warmup:
        return main

    def schedule(step):
        ramp = rate * (1.0 / warmup + (1.0 - 1.0 / warmup) * step / warmup)
        return jnp.where(step < warmup, ramp, main(jnp.maximum(step - warmup, 0)))

    return schedule


def build(config: OptimizerConfig, tensors: list[FileTensor]) -> optax.GradientTransformation:
    """AdamW with a rate for each group, after clipping the global norm; `tensors` are those of trained parameters."""
    groups, decayed = groups_by_path(tensors), decayed_paths(tensors)
    labels = {path: f"{group}{'' if path in decayed else ', no decay'}" for path, group in groups.items()}
    transforms: dict[Hashable, optax.GradientTransformation] = {
        label: optax.adamw(
            learning_rate(config, label.split(",")[0]),
            *config.betas,
            config.eps,
            weight_decay=0.0 if label.endswith("no decay") else config.weight_decay,
            mu_dtype=jnp.float32,
        )
        for label in sorted(set(labels.values()))
    }
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity()
    return optax.chain(clip, optax.partition(transforms, labels))
