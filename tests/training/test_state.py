"""Which parameters a configuration trains, from which values, and what is kept frozen."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from anima_jax.adapters import modules
from anima_jax.config.load import load_config
from anima_jax.errors import NotFiniteError, UserError
from anima_jax.models.dit import DiTConfig
from anima_jax.models.quantised import Quantised
from anima_jax.training.command import overrides, parse_arguments
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


@pytest.fixture(scope="module")
def lora(files):
    return prepare(configured(files[0], "model.llm_adapter_lr=0", adapter="type = 'lora'\nrank = 4\nalpha = 8.0"))


def test_a_lora_trains_its_factors_alone_and_leaves_frozen_groups_out(files, lora):
    _, params = files
    assert {path for path in lora.frozen if not path.endswith(".lora_scale")} == params.keys()
    assert all(modules.is_factor(path) and path.startswith("blocks.") for path in lora.params)
    assert {tensor.name.split(".")[0] for tensor in lora.tensors} == {"diffusion_model"}


def test_a_lora_is_on_every_linear_layer_of_every_block(lora):
    assert len(lora.adapter_specs) == 16  # linear layers of a block
    assert {spec.ranks for spec in lora.adapter_specs.values()} == {(4, 4)}


def test_a_fresh_lora_starts_as_pefts_does(lora):
    for path, value in lora.params.items():
        if path.endswith("lora_b"):
            assert not np.any(value)
        else:
            # Uniform within 1/sqrt(features in).
            bound = 1 / np.sqrt(value.shape[1])
            assert 0.9 * bound < np.abs(value).max() <= bound


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


LORA = "type = 'lora'\nrank = 4"


@pytest.mark.parametrize("storage", ["float8", "float8_e5m2", "int8"])
def test_frozen_matrices_of_the_blocks_are_stored_in_eight_bits(files, storage):
    folder, params = files
    trained = prepare(configured(folder, f"model.transformer_dtype={storage}", adapter=LORA))
    small = {path for path, value in trained.frozen.items() if isinstance(value, Quantised)}
    # As in diffusion-pipe: what is not 1-D, but for x_embedder, t_embedder, t_embedding_norm and final_layer.
    assert small == {
        path
        for path in params
        if path.startswith(("blocks.", "llm_adapter.")) and path.endswith((".kernel", ".embedding"))
    }
    for path, expected in params.items():
        error = np.linalg.norm(np.asarray(trained.frozen[path]) - expected) / np.linalg.norm(expected)
        assert error < {"float8": 0.03, "float8_e5m2": 0.06, "int8": 0.01}[storage], path
        assert (error > 0) == (path in small), path


def test_another_float_dtype_is_for_frozen_matrices_only(files):
    folder, params = files
    trained = prepare(configured(folder, "model.transformer_dtype=bfloat16", "model.mlp_lr=0"))
    assert {p for p, v in trained.frozen.items() if v.dtype == jnp.bfloat16} == {
        p for p in params if p.startswith("blocks.mlp.")
    }
    assert {value.dtype for value in trained.params.values()} == {jnp.dtype(jnp.float32)}


def test_eight_bits_for_trained_weights_are_refused(files):
    folder, _ = files
    with pytest.raises(UserError, match=r"transformer_dtype = 'int8' is for frozen.* groups cross_attn.*trained"):
        prepare(configured(folder, "model.transformer_dtype=int8", "model.mlp_lr=0"))


def test_blocks_that_are_computed_again_together_divide_the_blocks(files):
    folder, _ = files
    with pytest.raises(UserError, match="remat_every = 3, expected a divisor of the transformer's 2 blocks: 1, 2"):
        prepare(configured(folder, "remat_every=3"))


def test_an_unknown_tensor_is_left_out_only_with_the_flag(files, tmp_path, capsys):
    folder, params = files
    odd = tmp_path / "odd.safetensors"
    extra = {"net.odd": np.zeros(2, np.float32), "net.pos_embedder.seq": np.zeros(2, np.float32)}
    save_file(load_file(folder / "base.safetensors") | extra, odd)
    file = f"model.transformer_path={odd}"
    with pytest.raises(UserError, match=r"1 unknown in the file: net\.odd; --allow_unused"):
        prepare(configured(folder, file))
    flag = overrides(parse_arguments(["--config", "main.toml", "--allow_unused"]))
    trained = prepare(configured(folder, file, *flag))
    assert trained.params.keys() == params.keys()
    printed = capsys.readouterr().out
    assert f"{odd}: skipped 1 harmless extra tensor: net.pos_embedder.seq" in printed
    assert f"{odd}: skipped 1 unknown tensor: net.odd" in printed


@pytest.mark.parametrize("storage", [None, "int8"])
def test_a_base_model_with_a_nan_is_named_with_its_tensor_before_anything_is_trained(files, tmp_path, storage):
    folder, _ = files
    tensors = load_file(folder / "base.safetensors")
    name = "net.blocks.1.mlp.layer1.weight"
    tensors[name][3, 5] = np.nan
    save_file(tensors, tmp_path / "broken.safetensors")
    overrides = [f"model.transformer_path={tmp_path / 'broken.safetensors'}"]
    overrides += [f"model.transformer_dtype={storage}"] if storage else []
    with pytest.raises(NotFiniteError) as error:
        prepare(configured(folder, *overrides, adapter=LORA))
    (line,) = error.value.messages
    assert line.startswith(f"{tmp_path}/broken.safetensors: NaN or infinite values in 1 tensor: {name} (1)")
    assert error.value.exit_code == 1


def test_an_adapter_with_an_infinite_value_is_named_with_its_tensor(files, lora, tmp_path):
    factors = {tensor.name: np.full(tensor.shape, 0.5, np.float32) for tensor in lora.tensors}
    name = min(factors)
    factors[name][0, 0] = np.inf
    save_file(factors, tmp_path / "lora.safetensors")
    existing = f"{LORA}\ninit_from_existing = '{tmp_path / 'lora.safetensors'}'"
    with pytest.raises(NotFiniteError, match=r"lora\.safetensors: NaN or infinite values in 1 tensor: ") as error:
        prepare(configured(files[0], "model.llm_adapter_lr=0", adapter=existing))
    assert name in str(error.value)
