"""The transformer and its adapter against diffusers' on random weights of other sizes than the goldens'.

Weights go through files under the original names, both ways: the table of names is thereby tested too.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from anima_jax.checkpoints.models import load_dit, save_dit
from anima_jax.models import parameters
from anima_jax.models.dit import AnimaDiT, DiTConfig
from anima_jax.models.llm_adapter import LLMAdapterConfig
from tests.golden_files import VALUE_TOLERANCE, channel_last, relative_error
from tests.models import dit_peer
from tests.models.networks import adapter_context, normal, random_model, randomise, velocity

ADAPTER = LLMAdapterConfig(width=36, blocks=2, heads=3, mlp_width=72, source_width=20, target_width=28, vocabulary=60)


class Case(NamedTuple):
    """Sizes, and the latents' frames, rows and columns."""

    config: DiTConfig
    grid: tuple[int, int, int]


CASES = {
    "image": Case(DiTConfig(60, 3, 3, 240, 28, 12, adapter=None), (1, 6, 10)),
    "video": Case(DiTConfig(64, 2, 2, 128, 36, 24, adapter=None), (3, 8, 4)),
    "17 channels": Case(DiTConfig(48, 1, 4, 96, 20, 8, latent_channels=17, adapter=None), (2, 4, 6)),
}


def inputs(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latents (b, c, t, y, x), a time for each frame, context rows."""
    return (
        normal(2, case.config.latent_channels, *case.grid),
        np.random.default_rng(1).uniform(size=(2, case.grid[0])).astype(np.float32),
        normal(2, 9, case.config.context_width, seed=2),
    )


@pytest.fixture(scope="module", params=CASES, ids=str)
def pair(request, tmp_path_factory):
    """(case, diffusers' transformer, ours with its weights, the file between them)."""
    case = CASES[request.param]
    pytest.importorskip("diffusers")
    peer = randomise(dit_peer.transformer(case.config))
    state = peer.state_dict()
    names = dit_peer.original_names(state)
    path = tmp_path_factory.mktemp("dit") / "model.safetensors"
    save_file({f"net.{names[name]}": value.numpy() for name, value in state.items()}, path)
    return case, peer, load_dit(path), path


def test_sizes_are_read_from_diffusers_weights(pair):
    case, _, model, _ = pair
    assert model.config == case.config


def test_velocity_equals_diffusers(pair):
    case, peer, model, _ = pair
    latents, times, context = inputs(case)
    expected = dit_peer.velocity(peer, latents, times[:, 0], context)
    assert relative_error(velocity(model, channel_last(latents), times[:, 0], context), expected) < VALUE_TOLERANCE


def test_velocity_with_a_time_for_each_frame_equals_diffusers(pair):
    case, peer, model, _ = pair
    latents, times, context = inputs(case)
    expected = dit_peer.velocity(peer, latents, times, context)
    assert relative_error(velocity(model, channel_last(latents), times, context), expected) < VALUE_TOLERANCE


def test_weights_saved_for_diffusers_are_unchanged(pair, tmp_path):
    _, peer, model, path = pair
    _, params = parameters.split(model)
    save_dit(tmp_path / "back.safetensors", params)
    written, expected = load_file(tmp_path / "back.safetensors"), load_file(path)
    assert written.keys() == expected.keys()
    for name, peer_name in (
        (f"net.{name}", peer_name) for peer_name, name in dit_peer.original_names(peer.state_dict()).items()
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


def test_bfloat16_stays_near_float32_eight_blocks_deep():
    config = DiTConfig(width=256, blocks=8, heads=4, mlp_width=1024, context_width=64, adaln_rank=32, adapter=None)
    model = random_model(AnimaDiT, config)
    graphdef, params = parameters.split(model)
    rounded = parameters.merge(graphdef, parameters.cast_to_compute(params, jnp.bfloat16))
    latents, times, context = jnp.asarray(normal(2, 1, 16, 16, 16)), np.array([0.3, 0.8]), normal(2, 32, 64, seed=2)
    expected = np.asarray(velocity(model, latents, times, context))
    found = np.asarray(velocity(rounded, latents.astype(jnp.bfloat16), times, context))
    # Rounding the weights to bfloat16's 8 bits costs 0.4 %; the roundings of three sums a block add up like noise.
    assert relative_error(found, expected) < 2e-2
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 2e-2


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


def test_the_adapters_weights_saved_for_diffusers_are_unchanged(adapters, tmp_path):
    _, model, weights = adapters
    save_dit(tmp_path / "back.safetensors", parameters.split(model)[1])
    written = load_file(tmp_path / "back.safetensors")
    assert {name for name in written if ".llm_adapter." in name} == set(weights)
    for name, values in weights.items():
        np.testing.assert_array_equal(written[name], values, err_msg=name)
