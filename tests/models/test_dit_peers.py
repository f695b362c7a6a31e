"""The transformer and its adapter against diffusers' on random weights of other sizes than the goldens'.

Weights go through files under the original names, both ways: the table of names is thereby tested too.
"""

import dataclasses
import re
from collections.abc import Iterable

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from anima_jax.checkpoints.models import load_dit, save_dit
from anima_jax.models import parameters
from anima_jax.models.dit import AnimaDiT, DiTConfig
from anima_jax.models.llm_adapter import AdapterConfig
from tests.golden_files import VALUE_TOLERANCE, channel_last, relative_error
from tests.models.networks import adapter_context, normal, random_model, randomise, velocity

PEER_TO_ORIGINAL = (
    (r"transformer_blocks\.", "blocks."),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_([qkv])\.", r".\1_proj."),
    (r"\.to_out\.0\.", ".output_proj."),
    (r"\.norm_([qk])\.", r".\1_norm."),
    (r"\.ff\.net\.0\.proj\.", ".mlp.layer1."),
    (r"\.ff\.net\.2\.", ".mlp.layer2."),
    (r"\.norm1\.linear_", ".adaln_modulation_self_attn."),
    (r"\.norm2\.linear_", ".adaln_modulation_cross_attn."),
    (r"\.norm3\.linear_", ".adaln_modulation_mlp."),
    (r"^norm_out\.linear_", "final_layer.adaln_modulation."),
    (r"^proj_out\.", "final_layer.linear."),
    (r"^time_embed\.t_embedder\.", "t_embedder.1."),
    (r"^time_embed\.norm\.", "t_embedding_norm."),
    (r"^patch_embed\.proj\.", "x_embedder.proj.1."),
)
"""Parts of diffusers' parameter names and what they are in the original files."""


def original_names(peer_names: Iterable[str]) -> dict[str, str]:
    """Each of diffusers' names → the original one."""
    names = {}
    for peer_name in peer_names:
        name = peer_name
        for pattern, replacement in PEER_TO_ORIGINAL:
            name = re.sub(pattern, replacement, name)
        names[peer_name] = name
    return names


ADAPTER = AdapterConfig(width=36, blocks=2, heads=3, mlp_width=72, source_width=20, target_width=28, vocabulary=60)


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, and the latents' frames, rows and columns. The scales are Cosmos-Predict2's, by the channels."""

    config: DiTConfig
    grid: tuple[int, int, int]

    @property
    def rope_scale(self) -> tuple[float, float, float]:
        return (1.0, 3.0, 3.0) if self.config.latent_channels == 17 else (1.0, 4.0, 4.0)


CASES = {
    "image": Case(DiTConfig(60, 3, 3, 240, 28, 12, adapter=None), (1, 6, 10)),
    "video": Case(DiTConfig(64, 2, 2, 128, 36, 24, adapter=None), (3, 8, 4)),
    "17 channels": Case(DiTConfig(48, 1, 4, 96, 20, 8, latent_channels=17, adapter=None), (2, 4, 6)),
}


def transformer_peer(case: Case):
    diffusers = pytest.importorskip("diffusers")
    config = case.config
    peer = diffusers.CosmosTransformer3DModel(
        in_channels=config.latent_channels + 1,  # the padding mask comes as a channel of its own, without torchvision
        out_channels=16,
        num_attention_heads=config.heads,
        attention_head_dim=config.head_size,
        num_layers=config.blocks,
        mlp_ratio=config.mlp_width / config.width,
        text_embed_dim=config.context_width,
        adaln_lora_dim=config.adaln_rank,
        rope_scale=case.rope_scale,
        concat_padding_mask=False,
        extra_pos_embed_type=None,
    )
    return randomise(peer)


def inputs(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latents (b, c, t, y, x), a time for each frame, context rows."""
    return (
        normal(2, case.config.latent_channels, *case.grid),
        np.random.default_rng(1).uniform(size=(2, case.grid[0])).astype(np.float32),
        normal(2, 9, case.config.context_width, seed=2),
    )


def peer_velocity(peer, latents_bctyx, times, context_bnd) -> np.ndarray:
    """Diffusers' velocity, channels last. `times` is (b,) or (b, t)."""
    import torch

    latents, times, context = (torch.from_numpy(x) for x in (latents_bctyx, times, context_bnd))
    if times.ndim == 2:
        times = times[:, None, :, None, None]
    padding_mask = torch.zeros_like(latents[:, :1])
    return channel_last(peer(latents, times, context, condition_mask=padding_mask, return_dict=False)[0].numpy())


@pytest.fixture(scope="module", params=CASES, ids=str)
def pair(request, tmp_path_factory):
    """(case, diffusers' transformer, ours with its weights, the file between them)."""
    case = CASES[request.param]
    peer = transformer_peer(case)
    state = peer.state_dict()
    names = original_names(state)
    path = tmp_path_factory.mktemp("dit") / "model.safetensors"
    save_file({f"net.{names[name]}": value.numpy() for name, value in state.items()}, path)
    return case, peer, load_dit(path), path


def test_sizes_are_read_from_diffusers_weights(pair):
    case, _, model, _ = pair
    assert model.config == case.config


def test_velocity_equals_diffusers(pair):
    case, peer, model, _ = pair
    latents, times, context = inputs(case)
    expected = peer_velocity(peer, latents, times[:, 0], context)
    assert relative_error(velocity(model, channel_last(latents), times[:, 0], context), expected) < VALUE_TOLERANCE


def test_velocity_with_a_time_for_each_frame_equals_diffusers(pair):
    case, peer, model, _ = pair
    latents, times, context = inputs(case)
    expected = peer_velocity(peer, latents, times, context)
    assert relative_error(velocity(model, channel_last(latents), times, context), expected) < VALUE_TOLERANCE


def test_weights_return_to_diffusers_unchanged(pair, tmp_path):
    _, peer, model, path = pair
    _, params = parameters.split(model)
    save_dit(tmp_path / "back.safetensors", params)
    written, expected = load_file(tmp_path / "back.safetensors"), load_file(path)
    assert written.keys() == expected.keys()
    for name, peer_name in (
        (f"net.{name}", peer_name) for peer_name, name in original_names(peer.state_dict()).items()
    ):
        np.testing.assert_array_equal(written[name], peer.state_dict()[peer_name].numpy(), err_msg=name)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """(diffusers' conditioner, a transformer of ours with its weights as adapter)."""
    diffusers = pytest.importorskip("diffusers")
    peer = randomise(
        diffusers.AnimaTextConditioner(
            source_dim=ADAPTER.source_width,
            target_dim=ADAPTER.target_width,
            model_dim=ADAPTER.width,
            num_layers=ADAPTER.blocks,
            num_attention_heads=ADAPTER.heads,
            mlp_ratio=ADAPTER.mlp_width / ADAPTER.width,
            target_vocab_size=ADAPTER.vocabulary,
            min_sequence_length=16,
        )
    )
    folder = tmp_path_factory.mktemp("adapter")
    case = CASES["image"]
    save_dit(folder / "dit.safetensors", parameters.split(random_model(AnimaDiT, case.config))[1])
    weights = {f"net.llm_adapter.{name}": value.numpy() for name, value in peer.state_dict().items()}
    save_file(weights, folder / "adapter.safetensors")
    return peer, load_dit(folder / "dit.safetensors", adapter_path=folder / "adapter.safetensors"), weights


TEXT_LENGTHS = {"whole captions": (13, 13, 11, 11), "padded captions": (13, 5, 4, 11), "an empty one": (0, 13, 1, 11)}
"""Real source tokens of two captions, then real target tokens, of 13 and 11."""


@pytest.mark.parametrize("lengths", TEXT_LENGTHS.values(), ids=TEXT_LENGTHS)
def test_context_equals_diffusers(adapters, lengths):
    torch = pytest.importorskip("torch")
    peer, model, _ = adapters
    assert model.llm_adapter.config == ADAPTER
    source, ids = normal(2, 13, ADAPTER.source_width), np.random.default_rng(4).integers(0, ADAPTER.vocabulary, (2, 11))
    source_mask = np.arange(13) < np.array(lengths[:2])[:, None]
    target_mask = np.arange(11) < np.array(lengths[2:])[:, None]
    masked = not (source_mask.all() and target_mask.all())
    peer_masks = (torch.from_numpy(target_mask), torch.from_numpy(source_mask)) if masked else ()
    expected = peer(torch.from_numpy(source), torch.from_numpy(ids), *peer_masks).numpy()
    found = adapter_context(model, source, ids, *((source_mask, target_mask) if masked else ()))
    assert np.all(expected[:, 11:] == 0)  # diffusers appends the rows of zeros itself
    assert relative_error(found, expected[:, :11]) < VALUE_TOLERANCE


def test_the_adapters_weights_return_to_diffusers_unchanged(adapters, tmp_path):
    _, model, weights = adapters
    save_dit(tmp_path / "back.safetensors", parameters.split(model)[1])
    written = load_file(tmp_path / "back.safetensors")
    assert {name for name in written if ".llm_adapter." in name} == set(weights)
    for name, values in weights.items():
        np.testing.assert_array_equal(written[name], values, err_msg=name)
