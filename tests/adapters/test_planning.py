"""`[adapter]` on a network: which modules, ranks and rates; what is written, read again, and trained on."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from anima_jax.adapters import modules, planning
from anima_jax.adapters.base_model import identify
from anima_jax.adapters.dialects import module_names
from anima_jax.adapters.file import open_adapter
from anima_jax.adapters.kinds import TRAINABLE
from anima_jax.checkpoints.locations import file_sha256 as sha256
from anima_jax.checkpoints.models import load_dit, load_text_encoder
from anima_jax.config.load import load_config
from anima_jax.errors import UserError
from anima_jax.models import parameters
from anima_jax.models.dit import AnimaDiT
from anima_jax.models.llm_adapter import Text
from anima_jax.training.export import about_adapter, export
from anima_jax.training.state import build_optimizer, prepare
from anima_jax.training.step import StepConfig, TrainBatch, example_losses
from tests.adapters.adapter_files import merged, rank_axes
from tests.models.networks import normal, quick_jit
from tests.small_run import ASSETS, CONFIG, write_config, write_transformer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    (folder / "pictures").mkdir()
    write_transformer(folder / "base.safetensors")
    return folder


def configured(folder, adapter, *overrides, **tables):
    keys = "epochs = 1\nsave_every_n_epochs = 1"
    return load_config(write_config(folder, folder / "pictures", keys, adapter=adapter, **tables), overrides)


def prepared(folder, adapter, *overrides, **tables):
    return prepare(configured(folder, adapter, *overrides, **tables))


@functools.cache
def targets() -> dict[str, tuple[int, ...]]:
    return modules.target_shapes(nnx.eval_shape(lambda: AnimaDiT(CONFIG, rngs=nnx.Rngs(0))))


def planned(folder, adapter, *overrides):
    """Specs, relative rates and scales, without drawing anything."""
    config = configured(folder, adapter, *overrides)
    specs, rates = planning.plan(config, targets())
    return specs, rates, planning.scales(config, specs)


def names(specs) -> dict[str, int]:
    """Name in files → rank of every module that has an adapter."""
    found = module_names({path: len(spec.ranks) for path, spec in specs.items()})
    ranks = {name: specs[path].ranks[layer] for name, (path, layer) in found.items()}
    return {name: rank for name, rank in ranks.items() if rank}


# ---- which modules, ranks and rates ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRAINABLE)
def test_every_linear_of_the_blocks_and_of_the_adapters_blocks_gets_one(folder, kind):
    found = names(planned(folder, f"type = '{kind}'\nrank = 2")[0])
    # As in diffusion-pipe: 16 a block of the transformer, 10 a block of the LLM adapter, and nothing else.
    assert len(found) == 16 * CONFIG.blocks + 10 * CONFIG.adapter.blocks
    assert {name.split(".")[0] for name in found} == {"blocks", "llm_adapter"}
    assert not any(part in name for name in found for part in ("norm", "embed"))


@pytest.fixture(scope="module")
def patterned(folder):
    """A run whose patterns choose some modules, with their own ranks and rates."""
    return prepared(
        folder,
        r"""
        type = 'lora'
        rank = 4
        target_modules = ['self_attn.[qkv]_proj', 'cross_attn', 'blocks\.1\.mlp\.layer1']
        exclude_modules = ['llm_adapter', 'cross_attn\.[qk]_proj', 'cross_attn.output_proj']
        rank_pattern = { 'cross_attn\.v_proj' = 0, 'blocks\.0\..*' = 2 }
        lr_pattern = { 'blocks\.1\.self_attn\.q_proj' = 5e-4, 'blocks\.1\.self_attn\.k_proj' = 0 }
        """,
    )


def test_patterns_choose_modules_and_ranks(patterned):
    expected = {f"blocks.{n}.self_attn.{x}_proj": 4 if n else 2 for n in range(2) for x in "qkv"}
    del expected["blocks.1.self_attn.k_proj"]
    assert names(patterned.adapter_specs) == expected | {"blocks.1.mlp.layer1": 4}


def test_patterns_choose_rates(patterned):
    assert patterned.rates == {f"blocks.self_attn.q_proj.lora_{x}": (1.0, 0.5) for x in "ab"}


def test_exactly_the_factors_are_trained(patterned):
    assert all(modules.is_factor(path) for path in patterned.params)
    assert not any(modules.is_factor(path) for path in patterned.frozen)


def test_layers_of_less_rank_or_none_are_zero_beyond_it(patterned):
    assert patterned.params["blocks.self_attn.q_proj.lora_a"].shape == (2, 64, 4)
    assert not np.any(patterned.params["blocks.self_attn.q_proj.lora_a"][0, :, 2:])
    assert not np.any(patterned.params["blocks.mlp.layer1.lora_a"][0])
    np.testing.assert_array_equal(patterned.frozen["blocks.mlp.layer1.lora_scale"], [0.0, 1.0])


def test_exclude_modules_is_pefts(folder):
    """Against the modules that PEFT itself chooses for the same pattern and list."""
    peft = pytest.importorskip("peft")
    everything = names(planned(folder, "type = 'lora'\nrank = 2")[0])
    for given in (r".*mlp.*", [r"mlp.layer1", "mlp.2"], r".*\.blocks\.0\.self_attn\..*"):
        quoted = f"'{given}'" if isinstance(given, str) else "[" + ", ".join(f"'{one}'" for one in given) + "]"
        found = names(planned(folder, f"type = 'lora'\nrank = 2\nexclude_modules = {quoted}")[0])
        config = peft.LoraConfig(r=2, target_modules=list(everything), exclude_modules=given)
        peer = peft.inject_adapter_in_model(config, peer_with(dict.fromkeys(everything, (2, 2))))
        assert set(found) == adapted_by_peft(peer)


def peer_with(modules):
    """A torch module with linear layers of these names and shapes (out, in)."""
    torch = pytest.importorskip("torch")
    peer = torch.nn.Module()
    for name, shape in modules.items():
        parent = peer
        *parents, last = name.split(".")
        for part in parents:
            parent.add_module(part, getattr(parent, part, torch.nn.Module()))
            parent = getattr(parent, part)
        parent.add_module(last, torch.nn.Linear(*shape[::-1], bias=False))
    return peer


def adapted_by_peft(peer) -> set[str]:
    return {name for name, module in peer.named_modules() if hasattr(module, "base_layer")}


def test_an_exclusion_that_excludes_nothing_is_told(folder):
    keys = "type = 'lora'\nrank = 2\nexclude_modules = ['self_atn', 'v_proj', 'llm_adapter']"
    (note,) = planning.idle_exclusions(configured(folder, keys, "model.llm_adapter_lr=0"), targets())
    assert note.endswith("adapter.exclude_modules: 'self_atn' fits no module (did you mean 'self_attn'?)")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("target_modules = 'blocks.9.*'", r"adapter.target_modules: 'blocks.9.\*' fits none of the 42 modules"),
        ("rank_pattern = { 'self_atn.*' = 8 }", r"adapter.rank_pattern: 'self_atn.\*' fits none .*mean 'self_attn'\?"),
        ("exclude_modules = '.*'", "leaves every module out, so nothing would be trained"),
        (
            "rank_pattern = { '.*' = 2147483647 }",
            r"adapter.rank = 2147483647: blocks\S+ would have .* at most \d+, that of",
        ),
        ("text_encoder_lr = 1e-4", "states of a trained text encoder cannot be cached"),
    ],
)
def test_what_cannot_be_trained_is_refused(folder, keys, message):
    with pytest.raises(UserError, match=message):
        planned(folder, f"type = 'lora'\nrank = 2\n{keys}")


@pytest.mark.parametrize(
    ("kind", "alpha", "scales"), [("lora", 3.0, (1.5, 0.375)), ("lokr", 3.0, (1.5, 1.0)), ("loha", None, (1.0, 1.0))]
)
def test_the_scale_is_alpha_over_the_modules_own_rank(folder, kind, alpha, scales):
    keys = f"type = '{kind}'\nrank = 2\nrank_pattern = {{ 'mlp\\.layer1' = 8 }}" + (
        f"\nalpha = {alpha}" if alpha else ""
    )
    found = planned(folder, keys)[2]
    assert float(found["blocks.self_attn.q_proj.lora_scale"][0]) == scales[0]
    # Of LoKr's second factor at rank 8, (16, 8), PEFT makes a whole matrix: it has no rank, and alpha no meaning.
    assert float(found["blocks.mlp.layer1.lora_scale"][0]) == scales[1]


def test_a_layers_own_rate_is_the_groups_rate_times_its_share(folder):
    two = "type = 'lora'\nrank = 2\ntarget_modules = ['blocks.*self_attn.q_proj', 'blocks.*mlp.layer1']\n"
    config = configured(folder, f"{two}lr_pattern = {{ 'blocks\\.1\\.mlp' = 1e-4 }}")
    trained = prepare(config)
    build = build_optimizer(config, trained)
    plain = build_optimizer(config, dataclasses.replace(trained, rates={}))
    grads = {path: jnp.asarray(normal(*value.shape, seed=1)) for path, value in trained.params.items()}
    found, expected = (tx.update(grads, tx.init(trained.params), trained.params)[0] for tx in (build, plain))
    for path, update in expected.items():
        np.testing.assert_allclose(found[path][0], update[0], rtol=1e-6)
        np.testing.assert_allclose(
            found[path][1], update[1] * (0.1 if path.startswith("blocks.mlp.") else 1.0), rtol=1e-5
        )
    config = configured(folder, f"{two}lr_pattern = {{ 'mlp' = 1e-4 }}", "optimizer.type=schedule_free_adamw")
    trained = prepare(config)
    with pytest.raises(UserError, match="no \\[adapter\\] lr_pattern"):
        build_optimizer(config, trained)


def test_magnitudes_and_norms_have_no_weight_decay(folder):
    config = configured(folder, "type = 'dora'\nrank = 2\ntarget_modules = 'mlp.layer1'", "optimizer.weight_decay=0.5")
    trained = prepare(config)
    tx = build_optimizer(config, trained)
    zeros = jax.tree.map(jnp.zeros_like, trained.params)
    updates = tx.update(zeros, tx.init(trained.params), trained.params)[0]
    moved = {path.rpartition(".")[2] for path, update in updates.items() if np.any(update)}
    assert moved == {"lora_a"}  # B is zero still
    assert isinstance(tx, optax.GradientTransformation)


# ---- what is written, and read again ---------------------------------------------------------------------------------


def randomised(trained):
    """Values for the trained parameters, zero beyond each layer's rank."""
    values = {}
    for seed, (path, leaf) in enumerate(trained.params.items()):
        module, _, name = path.rpartition(".")
        value, axis = normal(*leaf.shape, seed=seed) * 0.3, next(iter(rank_axes(name)), None)
        for layer, rank in enumerate(trained.adapter_specs[module].ranks):
            keep = rank if axis is not None else (leaf.shape[1] if rank else 0)
            value[layer][(slice(keep, None),) if axis in {0, None} else (slice(None), slice(keep, None))] = 0.0
        values[path] = jnp.asarray(value)
    return values


@quick_jit
def velocity(model, x, t, context):
    return model(x, t, context)


def velocity_of(model):
    return velocity(model, jnp.asarray(normal(2, 1, 8, 8, 16)), jnp.array([0.2, 0.9]), jnp.asarray(normal(2, 6, 32)))


FEW = "target_modules = ['self_attn.q_proj', 'mlp.layer1', 'mlp.0', 'adaln_modulation_mlp']"
"""Kinds of modules enough: of each shape and group, and with a bias."""

EXPORTED = {
    "lora": FEW + "\nrank = 4\nalpha = 6.0\nrank_pattern = { 'blocks\\.0\\..*' = 2 }",
    "dora": FEW + "\nrank = 4\nexclude_modules = 'blocks\\.1\\.mlp.*'",
    "lokr": FEW + "\nrank = 2\nalpha = 3.0\nrank_pattern = { 'mlp\\.layer1' = 8 }",
    "loha": FEW + "\nrank = 2\nalpha = 1.0",
}


@pytest.mark.parametrize(
    "kind", ["lora", "lokr", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("dora", "loha"))]
)
def test_what_is_exported_does_what_was_trained_and_can_be_trained_on(folder, tmp_path, kind):
    config = configured(folder, f"type = '{kind}'\n{EXPORTED[kind]}", "save_dtype=float32")
    trained = prepare(config)
    params = randomised(trained)
    path = export(tmp_path / "step7", trained, params, "float32", about_adapter(config, trained, 7))
    model = merged(path, load_dit(folder / "base.safetensors"))
    expected = velocity_of(parameters.merge(trained.graphdef, trained.frozen | params))
    np.testing.assert_allclose(velocity_of(model), expected, rtol=1e-4, atol=1e-4)
    for given in (path, path.parent):
        again = prepare(configured(folder, f"type = '{kind}'\n{EXPORTED[kind]}\ninit_from_existing = '{given}'"))
        for name, value in params.items():
            np.testing.assert_allclose(again.params[name], value, rtol=1e-6, atol=0, err_msg=name)
    assert "modules begin from" in again.messages[0]


def test_the_files_are_diffusion_pipes_with_our_metadata(folder, tmp_path):
    config = configured(folder, "type = 'lora'\nrank = 4", "model.llm_adapter_lr=0")
    trained = prepare(config)
    path = export(tmp_path / "epoch1", trained, randomised(trained), "bfloat16", about_adapter(config, trained, 12))
    assert {file.name for file in path.parent.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    expected = {f"diffusion_model.{name}.lora_{x}.weight" for name in names(trained.adapter_specs) for x in "AB"}
    with safe_open(path, "np") as file:
        assert set(file.keys()) == expected  # no alpha, no llm_adapter, as in diffusion-pipe
        metadata = file.metadata()
        assert {file.get_slice(key).get_dtype() for key in expected} == {"BF16"}
    base = folder / "base.safetensors"
    assert metadata == {
        "format": "pt",
        "rank": "4",
        "alpha": "4",
        "step": "12",
        "version": metadata["version"],
        "base_model": "base.safetensors",
        "base_model_sha256": sha256(base).hex(),
    }
    assert metadata["version"].startswith("anima_jax ")
    assert not any("llm_adapter" in name for name in expected)


def test_alphas_are_written_only_where_they_say_something(folder, tmp_path):
    config = configured(folder, f"{FEW}\ntype = 'lora'\nrank = 4\nalpha = 2.0\nrank_pattern = {{ '.*mlp.*' = 2 }}")
    trained = prepare(config)
    path = export(tmp_path / "x", trained, randomised(trained), "float32", about_adapter(config, trained, 1))
    alphas = {key: float(array) for key, array in load_file(path).items() if key.endswith(".alpha")}
    assert alphas
    assert set(alphas.values()) == {2.0}
    assert {key.removesuffix(".alpha") for key in alphas} == {
        f"diffusion_model.{name}" for name, rank in names(trained.adapter_specs).items() if rank == 4
    }


@pytest.mark.parametrize("kind", EXPORTED)
def test_peft_reads_the_settings_and_the_weights_and_gives_the_same_update(folder, tmp_path, kind):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    # Without the LLM adapter's, for which PEFT would take the transformer's names by how they end.
    keys, overrides = f"type = '{kind}'\n{EXPORTED[kind]}", []
    if kind == "lora":
        keys, overrides = keys.replace("'mlp.0', ", ""), ["model.llm_adapter_lr=0"]
    config = configured(folder, keys, *overrides)
    trained = prepare(config)
    path = export(tmp_path / "step7", trained, randomised(trained), "float32", about_adapter(config, trained, 7))
    settings = peft.PeftConfig.from_pretrained(path.parent)
    base = {name.removeprefix("net."): array for name, array in load_file(folder / "base.safetensors").items()}
    weights = {
        name.removesuffix(".weight"): array
        for name, array in base.items()
        if name.endswith(".weight") and array.ndim == 2 and ".blocks" in f".{name}"
    }
    peer = peer_with({name: array.shape for name, array in weights.items()})
    for name, array in weights.items():
        peer.get_submodule(name).weight.data = torch.from_numpy(array.copy())
    with open_adapter(path) as adapter:
        assert set(settings.target_modules) == set(adapter.patches)
    peer = peft.inject_adapter_in_model(settings, peer)
    assert adapted_by_peft(peer) == set(settings.target_modules)
    state = {
        key.removeprefix("diffusion_model."): torch.from_numpy(a.copy())
        for key, a in load_file(path).items()
        if not key.endswith(".alpha")
    }
    state = {
        key.replace("dora_scale", "lora_magnitude_vector"): a.squeeze(-1) if "dora" in key else a
        for key, a in state.items()
    }
    result = peft.set_peft_model_state_dict(peer, state)
    assert not result.unexpected_keys
    with open_adapter(path) as adapter:
        patches = adapter.patches
        for name in list(patches)[::3]:
            module = peer.get_submodule(name)
            x = torch.eye(module.in_features)
            weight = base[f"{name}.weight"]
            expected = patches[name].applied(weight, 1.0)
            np.testing.assert_allclose(module(x).detach().T, expected, rtol=2e-4, atol=2e-5)


def test_going_on_from_a_file_of_another_dialect_and_scale_begins_with_the_same_function(folder, tmp_path):
    config = configured(folder, f"type = 'lora'\nrank = 4\n{FEW}")
    trained = prepare(config)
    params = randomised(trained)
    path = export(tmp_path / "first", trained, params, "float32", about_adapter(config, trained, 7))
    kohya = {}
    for key, array in load_file(path).items():
        name, part = key.removeprefix("diffusion_model.").removesuffix(".weight").rsplit(".lora_", 1)
        kohya[f"lora_unet_{name.replace('.', '_')}.lora_{'down' if part == 'A' else 'up'}.weight"] = array
        kohya[f"lora_unet_{name.replace('.', '_')}.alpha"] = np.array(1.0, np.float32)
    metadata = {"ss_new_sd_model_hash": "cd" * 32, "ss_sd_model_name": "anima-preview.safetensors"}
    save_file(kohya, tmp_path / "kohya.safetensors", metadata)
    again = prepared(
        folder, f"{FEW}\ntype = 'lora'\nrank = 4\nalpha = 8.0\ninit_from_existing = '{tmp_path}/kohya.safetensors'"
    )
    for name, value in params.items():
        factor = 0.125 if name.endswith("lora_b") else 1.0  # scale 1/4 in the file, 2 in the run
        np.testing.assert_allclose(again.params[name], factor * np.asarray(value), rtol=1e-6)
    assert again.messages[1].startswith(
        f"warning: {tmp_path}/kohya.safetensors: was trained on anima-preview.safetensors ("
    )
    assert str(identify(folder / "base.safetensors")) in again.messages[1]


def test_what_an_existing_adapter_leaves_out_begins_fresh(folder, tmp_path):
    keys = FEW + "\ntype = 'lora'\nrank = 2\nrank_pattern = { 'blocks\\.1' = 4, 'llm_adapter' = 0 }"
    config = configured(folder, keys)
    trained = prepare(config)
    params = randomised(trained)
    path = export(tmp_path / "first", trained, params, "float32", about_adapter(config, trained, 7))
    save_file({key: array for key, array in load_file(path).items() if ".blocks.0." in key}, path)
    again = prepared(folder, f"{keys}\ninit_from_existing = '{path}'")
    for name, value in params.items():
        np.testing.assert_array_equal(again.params[name][0], value[0])
        np.testing.assert_array_equal(again.params[name][1], trained.params[name][1])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("type = 'lora'\nrank = 8", "has rank 4, expected 8; .*resize"),
        ("type = 'dora'\nrank = 4", "is a LoRA, and type is 'dora'"),
        (
            "type = 'lora'\nrank = 4\nexclude_modules = '.*mlp.*'",
            "changes 7 modules that get no adapter in this run, as blocks.0.adaln_modulation_mlp.1",
        ),
    ],
)
def test_an_existing_adapter_that_is_another_one_is_refused(folder, tmp_path, keys, message):
    config = configured(folder, f"type = 'lora'\nrank = 4\n{FEW}")
    trained = prepare(config)
    path = export(tmp_path / "first", trained, randomised(trained), "float32", about_adapter(config, trained, 7))
    with pytest.raises(UserError, match=message):
        prepared(folder, f"{FEW}\n{keys}\ninit_from_existing = '{path}'")


@pytest.mark.parametrize(
    ("part", "shape", "title"),
    [
        ("oft_blocks", (16, 8, 8), "an OFT"),
        ("diff", (128, 64), "differences of weights"),
        ("set_weight", (128, 64), "new weights"),
    ],
)
def test_a_kind_that_is_only_read_cannot_be_trained_on(folder, tmp_path, part, shape, title):
    path = tmp_path / "adapter.safetensors"
    save_file({f"diffusion_model.blocks.0.mlp.layer1.{part}": np.zeros(shape, np.float32)}, path)
    with pytest.raises(UserError, match=f"is {title}, and type is 'lora'"):
        prepared(folder, f"{FEW}\ntype = 'lora'\nrank = 4\ninit_from_existing = '{path}'")


def test_a_folder_must_hold_one_adapter(folder, tmp_path):
    with pytest.raises(UserError, match=r"holds 0 .safetensors files, expected one adapter"):
        prepared(folder, f"type = 'lora'\nrank = 4\ninit_from_existing = '{tmp_path}'")


# ---- the text encoder ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_text_encoder(folder):
    """The configuration and the parameters of a run that trains the text encoder too."""
    keys = "type = 'lora'\nrank = 2\ntext_encoder_lr = 1e-3"
    config = configured(folder, keys, model="cache_text_embeddings = false\n")
    return config, prepare(config)


@pytest.mark.slow
def test_a_trained_text_encoder_is_a_group_of_its_own_and_needs_token_ids(with_text_encoder):
    _, trained = with_text_encoder
    assert {path for path in trained.params if path.startswith("text_encoder.")}
    assert trained.groups["text_encoder.layers.self_attn.q_proj.lora_a"] == "text_encoder"
    assert trained.text_ids
    assert json.dumps(trained.messages) == "[]"


@pytest.mark.slow
def test_a_trained_text_encoder_runs_in_the_step_and_all_that_is_trained_learns(folder, with_text_encoder):
    config, trained = with_text_encoder
    ids, mask = np.arange(14).reshape(2, 7) + 5, np.array([[1] * 7, [1] * 4 + [0] * 3])
    target = np.arange(10).reshape(2, 5)
    text = Text(ids, mask, target, np.ones((2, 5), np.int32))
    batch = TrainBatch(
        normal(2, 16, 64), np.array([[1, 4, 4]] * 2), np.zeros((2, 2), np.uint32), np.zeros(2, np.int32), text
    )
    settings, noise, times = StepConfig.of(config), jnp.asarray(normal(2, 16, 64, seed=1)), jnp.array([0.3, 0.8])

    @quick_jit
    def run(params, frozen):
        def loss(params):
            model = parameters.merge(trained.graphdef, params | frozen)
            return jnp.sum(example_losses(model, batch, noise, times, settings))

        return jax.value_and_grad(loss)(params)

    value, grads = run(randomised(trained), trained.frozen)
    assert all(np.any(grad) for grad in grads.values())
    # Fresh, it is the text encoder alone, whose states any other step takes.
    fresh, _ = run(trained.params, trained.frozen)
    qwen = load_text_encoder(ASSETS / "tiny_qwen3.safetensors")
    states = qwen(jnp.asarray(ids), jnp.asarray(mask))
    plain = prepared(folder, "type = 'lora'\nrank = 2", model="cache_text_embeddings = true\n")
    model = parameters.merge(plain.graphdef, plain.params | plain.frozen)
    batch = batch._replace(text=text._replace(source_bnd=states))
    expected = jnp.sum(
        quick_jit(lambda model, batch: example_losses(model, batch, noise, times, settings))(model, batch)
    )
    assert float(fresh) == pytest.approx(float(expected), rel=1e-5)
    assert float(value) != pytest.approx(float(fresh), rel=1e-3)
