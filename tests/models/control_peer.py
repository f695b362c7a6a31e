"""A control network (ControlNet-LLLite, "v2") in torch, from its formulas, on the tensors of its file, with gradients.

On diffusers' transformer (dit_peer.py) it changes the inputs of linear layers: `steered`.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping

from anima_jax.checkpoints.names.control import MODULES, TRUNK

PEER_LAYERS = {
    "self_attn_q_proj": "attn1.to_q",
    "self_attn_k_proj": "attn1.to_k",
    "self_attn_v_proj": "attn1.to_v",
    "cross_attn_q_proj": "attn2.to_q",
    "mlp_layer1": "ff.net.0.proj",
}
"""Layers that can have a module → diffusers' names in a block."""


def with_mask(image_bcyx, mask_b1yx, masked_input: bool):
    """The four channels of an inpainting network: an image in [−1, 1] and a mask in [0, 1]."""
    import torch

    mask = (mask_b1yx >= 0.5).float()
    return torch.cat([image_bcyx * (mask < 0.5) if masked_input else image_bcyx, 2 * mask - 1], dim=1)


def embedding(tensors: Mapping, image_bcyx, dilations: tuple[int, ...] = (1, 2, 4, 8)):
    """The embedding (b, l, e) of control images (b, 3 or 4, y, x) in [−1, 1]."""
    import torch
    from torch.nn import functional

    def conv(x, name, **options):
        return functional.conv2d(x, tensors[f"{TRUNK}{name}.weight"], tensors[f"{TRUNK}{name}.bias"], **options)

    def norm(x, name):
        groups = next(groups for groups in (8, 4, 2, 1) if x.shape[1] % groups == 0)
        return functional.group_norm(x, groups, tensors[f"{TRUNK}{name}.weight"], tensors[f"{TRUNK}{name}.bias"], 1e-5)

    def active(x, name):
        return functional.silu(norm(x, name))

    x = active(conv(image_bcyx, "conv1", stride=4), "norm1")
    x = active(conv(x, "conv2", padding=1), "norm2")
    x = active(conv(x, "conv3", stride=4), "norm3")
    for number in sorted({int(n) for name in tensors for n in re.findall(r"resblocks\.(\d+)\.", name)}):
        own = f"resblocks.{number}"
        hidden = conv(active(x, f"{own}.norm1"), f"{own}.conv1", padding=1)
        x = x + conv(active(hidden, f"{own}.norm2"), f"{own}.conv2", padding=1)
    if f"{TRUNK}aspp.proj.0.weight" in tensors:
        parts = []
        for number, dilation in enumerate(dilations):
            options = {} if dilation == 1 else {"padding": dilation, "dilation": dilation}
            own = f"aspp.branches.{number}"
            parts.append(active(conv(x, f"{own}.0", **options), f"{own}.1"))
        mean = active(conv(x.mean(dim=(2, 3), keepdim=True), "aspp.global_conv.0"), "aspp.global_conv.1")
        parts.append(mean.expand_as(x))
        x = active(conv(torch.cat(parts, dim=1), "aspp.proj.0"), "aspp.proj.1")
    flat = conv(x, "proj").flatten(2).transpose(1, 2)
    weight, bias = tensors[f"{TRUNK}out_norm.weight"], tensors[f"{TRUNK}out_norm.bias"]
    return functional.layer_norm(flat, flat.shape[-1:], weight, bias, 1e-5)


def changed(tensors: Mapping, module: str, x_bld, embedding_ble, strength: float):
    """What the linear layer of a module, such as `lllite_dit_blocks_0_mlp_layer1`, is given instead of x."""
    import torch
    from torch.nn import functional

    def linear(x, name):
        return functional.linear(x, tensors[f"{module}.{name}.weight"], tensors[f"{module}.{name}.bias"])

    key = embedding_ble + tensors[f"{module}.depth_embed"]
    gamma, beta = linear(key, "cond_to_film").chunk(2, dim=-1)
    hidden = linear(torch.cat([key, functional.silu(linear(x_bld, "down"))], dim=-1), "mid")
    return x_bld + strength * linear(functional.silu(hidden * (1 + gamma) + beta), "up")


@contextlib.contextmanager
def steered(peer, tensors: Mapping, embedding_ble, strength: float = 1.0) -> Iterator[None]:
    """Within the context, diffusers' transformer `peer` is steered by the network; several contexts add up in order.

    If the batch is a multiple of the embedding's, as with guidance, the embedding is repeated.
    """
    handles = []
    for module in {name.split(".")[0] for name in tensors if name.startswith(MODULES)}:
        block, layer = module.removeprefix(MODULES).split("_", 1)
        target = peer.get_submodule(f"transformer_blocks.{block}.{PEER_LAYERS[layer]}")

        def hook(_, inputs, module=module):
            x, *rest = inputs
            repeated = embedding_ble.repeat(len(x) // len(embedding_ble), 1, 1)
            return changed(tensors, module, x.flatten(1, -2), repeated, strength).reshape(x.shape), *rest

        handles.append(target.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
