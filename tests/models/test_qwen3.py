"""The text encoder against the reference's numbers and transformers' Qwen3Model, with padding and without."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from anima_jax.checkpoints.models import load_text_encoder
from anima_jax.models import parameters
from anima_jax.models.qwen3 import Qwen3, Qwen3Config
from tests.golden_files import GOLDEN, VALUE_TOLERANCE, golden, relative_error
from tests.models.networks import quick_jit, random_model, randomise

SMALL = Qwen3Config(width=40, layers=3, heads=6, key_heads=2, head_size=16, mlp_width=56, vocabulary=90)
"""Heads that do not fill the width and share keys by three: neither follows from the other sizes."""


@quick_jit
def states(model, ids_bn, mask_bn=None):
    return model(ids_bn, mask_bn)


def captions(*lengths: int, padded_to: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Random ids and their mask, padded on the right with ids that are words elsewhere."""
    ids = np.random.default_rng(3).integers(0, vocabulary, (len(lengths), padded_to))
    return ids, np.arange(padded_to) < np.array(lengths)[:, None]


def test_states_equal_the_reference():
    model, io = load_text_encoder(GOLDEN / "qwen3.model.safetensors"), golden("qwen3.io")
    found = states(model, io["input_ids"], io["attention_mask"])
    assert relative_error(found, io["last_hidden_state"]) < VALUE_TOLERANCE
    assert np.all(np.asarray(found)[io["attention_mask"] == 0] == 0)


@pytest.mark.parametrize("lengths", [None, (11, 4, 1)])
def test_states_equal_transformers_at_other_sizes(tmp_path, lengths):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=SMALL.vocabulary,
        hidden_size=SMALL.width,
        intermediate_size=SMALL.mlp_width,
        num_hidden_layers=SMALL.layers,
        num_attention_heads=SMALL.heads,
        num_key_value_heads=SMALL.key_heads,
        head_dim=SMALL.head_size,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        attention_bias=False,
    )
    peer = randomise(transformers.Qwen3Model(config))
    file = tmp_path / "qwen3.safetensors"
    save_file({f"model.{name}": value.numpy() for name, value in peer.state_dict().items()}, file)
    model = load_text_encoder(file)
    assert model.config == SMALL

    ids, mask = captions(*(lengths or (11, 11)), padded_to=11, vocabulary=SMALL.vocabulary)
    if lengths is None:
        expected = peer(torch.from_numpy(ids)).last_hidden_state
        found = states(model, ids)
    else:
        expected = peer(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).last_hidden_state
        expected = expected * torch.from_numpy(mask)[..., None]  # transformers computes padded rows, Anima drops them
        found = states(model, ids, mask)
        assert np.all(np.asarray(found)[~mask] == 0)
    assert relative_error(found, expected.numpy()) < VALUE_TOLERANCE


def test_padding_changes_no_state():
    model = random_model(Qwen3, SMALL)
    ids, mask = captions(9, 5, padded_to=9, vocabulary=SMALL.vocabulary)
    together = states(model, ids, mask)
    assert relative_error(together[1:, :5], states(model, ids[1:, :5])) < VALUE_TOLERANCE


def test_a_caption_without_tokens_has_zero_states():
    ids, mask = captions(7, 0, padded_to=7, vocabulary=SMALL.vocabulary)
    found = np.asarray(states(random_model(Qwen3, SMALL), ids, mask))
    assert np.all(found[1] == 0)
    assert np.all(np.isfinite(found))


def test_bfloat16_stays_near_float32():
    model = random_model(Qwen3, SMALL)
    graphdef, params = parameters.split(model)
    rounded = parameters.merge(graphdef, {path: value.astype(jnp.bfloat16) for path, value in params.items()})
    ids, mask = captions(11, 6, padded_to=11, vocabulary=SMALL.vocabulary)
    found = states(rounded, ids, mask)
    assert found.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits, and some twenty roundings follow one another.
    assert relative_error(found.astype(jnp.float32), states(model, ids, mask)) < 2e-2
