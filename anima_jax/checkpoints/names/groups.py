"""Parameter groups and the weight-decay test.

Both see the names and shapes of the original files, as diffusion-pipe's `CosmosPredict2Pipeline.get_param_groups` and
train.py do.
"""

from collections.abc import Sequence

from anima_jax.checkpoints.names import FileTensor

GROUPS = (
    ("text_encoder", "text_encoder"),
    ("llm_adapter", "llm_adapter"),
    ("self_attn", ".self_attn"),
    ("cross_attn", ".cross_attn"),
    ("mlp", ".mlp"),
    ("mod", ".adaln_modulation"),
    ("base", ""),
)
"""(group, what its parameters' names contain): the first that fits. The configuration's key is `<group>_lr`.

The text encoder's parameters are in no group of diffusion-pipe's, which does not train it.
"""

NEVER_DECAYED = ("llm_adapter.embed", "dora_scale")
"""Parts of the names of tensors without weight decay, although some files have them with two axes."""


def group_of(name: str) -> str:
    """The group of the tensor with this file name."""
    return next(group for group, part in GROUPS if part in name)


def groups_by_path(tensors: Sequence[FileTensor]) -> dict[str, str]:
    """Parameter path → group. Raises LookupError if the layers of a stacked parameter fall into different groups."""
    found: dict[str, str] = {}
    for tensor in tensors:
        if found.setdefault(tensor.path, group_of(tensor.name)) != group_of(tensor.name):
            raise LookupError(f"the layers of {tensor.path} belong to different groups")
    return found


def is_decayed(tensor: FileTensor) -> bool:
    """Whether weight decay applies to it: not where it is 1-D, nor the adapter's table, nor a DoRA's magnitudes."""
    return len(tensor.shape) > 1 and not any(part in tensor.name for part in NEVER_DECAYED)
