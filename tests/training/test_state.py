"""Which parameters a configuration trains, from which values, and what is kept frozen."""

import jax.numpy as jnp
import numpy as np
import pytest

from anima_jax.config.load import load_config
from anima_jax.errors import UserError
from anima_jax.models import lora
from anima_jax.models.dit import DiTConfig
from anima_jax.training.state import prepare
from tests.small_run import CONFIG, write_config, write_transformer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("state")
    (folder / "pictures").mkdir()
    return folder, write_transformer(folder / "base.safetensors")


def configured(folder, *overrides, **tables):
    return load_config(write_config(folder, folder / "pictures", "epochs = 1", **tables), overrides)


def test_a_full_fine_tune_trains_every_parameter_in_float32_from_the_file(files):
    folder, params = files
    trained = prepare(configured(folder, "model.dtype=bfloat16"))
    assert trained.config == CONFIG
    assert not trained.frozen
    assert trained.params.keys() == params.keys()
    for path, value in trained.params.items():
        assert value.dtype == jnp.float32
        np.testing.assert_array_equal(value, params[path])


def test_a_rate_of_zero_freezes_a_group_in_the_compute_dtype(files):
    folder, params = files
    trained = prepare(configured(folder, "model.dtype=bfloat16", "model.llm_adapter_lr=0", "model.mlp_lr=0"))
    assert set(trained.frozen) == {p for p in params if p.startswith("llm_adapter.") or ".mlp." in p}
    assert {value.dtype for value in trained.frozen.values()} == {jnp.dtype(jnp.bfloat16)}
    assert set(trained.groups.values()) == {"self_attn", "cross_attn", "mod", "base"}


def test_a_lora_trains_its_factors_alone_and_leaves_frozen_groups_out(files):
    folder, params = files
    trained = prepare(configured(folder, "model.llm_adapter_lr=0", adapter="type = 'lora'\nrank = 4\nalpha = 8.0"))
    assert trained.frozen.keys() == params.keys()
    assert all(lora.is_lora(path) and path.startswith("blocks.") for path in trained.params)
    assert len(trained.ranks) == 16  # linear layers of a block (ECOSYSTEM 1.4)
    assert set(trained.ranks.values()) == {(4, 4)}
    for path, value in trained.params.items():
        if path.endswith("lora_b"):
            assert not np.any(value)
        else:
            # PEFT's start: uniform within 1/sqrt(features in).
            bound = 1 / np.sqrt(value.shape[1])
            assert 0.9 * bound < np.abs(value).max() <= bound
    assert {tensor.name.split(".")[0] for tensor in trained.tensors} == {"diffusion_model"}


def test_a_fresh_transformer_has_the_configured_sizes_and_starts_with_no_velocity(files):
    folder, _ = files
    path = write_config(folder, folder / "pictures", "epochs = 1")
    sizes = "config = {width = 32, blocks = 3, heads = 2, context_width = 16, adaln_rank = 4, adapter = {blocks = 1}}"
    lines = [sizes if line.startswith("transformer_path") else line for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines))
    trained = prepare(load_config(path))
    assert (trained.config.width, trained.config.blocks, trained.config.mlp_width) == (32, 3, 128)
    assert trained.params["blocks.mlp.layer1.kernel"].shape == (3, 32, 128)
    assert not np.any(trained.params["final_layer.linear.kernel"])
    assert isinstance(trained.config, DiTConfig)


def test_nothing_to_train_is_an_error(files):
    folder, _ = files
    zero = [f"model.{group}_lr=0" for group in ("self_attn", "cross_attn", "mlp", "mod", "llm_adapter")]
    with pytest.raises(UserError, match="nothing would be trained"):
        prepare(configured(folder, "optimizer.lr=0", *zero))
