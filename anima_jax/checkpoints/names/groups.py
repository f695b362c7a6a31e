"""Parameter groups, and which parameters have weight decay.

Both depend on names and shapes in the original files, as in diffusion-pipe's `CosmosPredict2Pipeline.get_param_groups`
and train.py.
"""

from collections.abc import Sequence

from anima_jax.adapters.kinds import MAGNITUDE
from anima_jax.checkpoints.names import FileTensor

CONTROL = "control"
"""Group of a control network, whose rate is that of the optimizer."""

GROUPS = (
    (CONTROL, "lllite_"),
    ("text_encoder", "text_encoder"),
    ("llm_adapter", "llm_adapter"),
    ("self_attn", ".self_attn"),
    ("cross_attn", ".cross_attn"),
    ("mlp", ".mlp"),
    ("mod", ".adaln_modulation"),
    ("base", ""),
)
"""(group, substring of its tensors' names); the first match applies. The configuration's key is `<group>_lr`.

diffusion-pipe has no group for the text encoder, which it does not train.
"""

NEVER_DECAYED = ("llm_adapter.embed", MAGNITUDE.part)
"""Substrings of the names of tensors without weight decay, although some have two axes in the file."""


def group_of(name: str) -> str:
    """Return the group of the tensor with this name in the file."""
    return next(group for group, part in GROUPS if part in name)


def groups_by_path(tensors: Sequence[FileTensor]) -> dict[str, str]:
    """Return parameter path → group. Raises LookupError if layers of a stacked parameter are in different groups."""
    found: dict[str, str] = {}
    for tensor in tensors:
        if found.setdefault(tensor.path, group_of(tensor.name)) != group_of(tensor.name):
            raise LookupError(f"the layers of {tensor.path} belong to different groups")
    return found


def is_decayed(tensor: FileTensor) -> bool:
    """Return whether weight decay applies: not to 1-D tensors, the LLM adapter's embedding or DoRA's magnitudes."""
    return len(tensor.shape) > 1 and not any(part in tensor.name for part in NEVER_DECAYED)
