"""The converters' commands for adapters, run as a user runs them, and diffusers' folders, against diffusers' own."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from anima_jax.adapters.file import open_adapter
from anima_jax.adapters.patch import Patch
from anima_jax.checkpoints.models import load_dit, open_network
from anima_jax.checkpoints.names.networks import QWEN3
from convert.__main__ import main
from tests.adapters.adapter_files import LOKR, LORA, lora_as, updates, velocity
from tests.golden_files import GOLDEN, VALUE_TOLERANCE, channel_last, golden, relative_error
from tests.models import dit_peer
from tests.models.networks import normal

DIT_FILE = GOLDEN / "dit_image.model.safetensors"


def convert(*arguments) -> None:
    main([str(argument) for argument in arguments])


def refusal(capsys, *arguments) -> str:
    """The one line that the command line says against `arguments`."""
    with pytest.raises(SystemExit) as stopped:
        convert(*arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def patches_in(path) -> list[Patch]:
    with open_adapter(path) as adapter:
        return list(adapter.patches.values())


# ---- lora ------------------------------------------------------------------------------------------------------------


def test_lora_goes_through_every_dialect_and_comes_back(tmp_path, capsys):
    paths = [tmp_path / f"{name}.safetensors" for name in ("kohya", "diffusers", "comfyui")]
    for source, target in zip([LORA, *paths], paths, strict=False):
        convert("lora", source, target, "--to", target.stem)
        assert f"{target}: 68 modules matched (LoRA of rank 4)" in capsys.readouterr().out
    original, back = load_file(LORA), load_file(paths[-1])
    assert original.keys() == back.keys()
    assert all(np.array_equal(array, back[name]) for name, array in original.items())


def test_lora_moves_between_depths(tmp_path, capsys):
    convert("lora", LORA, tmp_path / "deep.safetensors", "--to", "kohya", "--remap", "28:52")
    deep = load_file(tmp_path / "deep.safetensors")
    numbers = {int(name.split("_")[3]) for name in deep if name.startswith("lora_unet_blocks_")}
    assert numbers == {0, 1, 4}  # blocks 0, 1 and 2 of 28 are 0, 1 and 3 of 40, and 3 of 40 is 4 of 52
    convert("lora", tmp_path / "deep.safetensors", tmp_path / "back.safetensors", "--to", "comfyui", "--remap", "52:28")
    original, back = load_file(LORA), load_file(tmp_path / "back.safetensors")
    assert original.keys() == back.keys()
    assert all(np.array_equal(array, back[name]) for name, array in original.items())


def test_lora_keeps_the_factors_beside_an_alpha(tmp_path, capsys):
    kohya = lora_as("kohya", tmp_path / "kohya.safetensors", 2.0)
    convert("lora", kohya, tmp_path / "out.safetensors", "--to", "diffusers", "--dtype", "bf16")
    assert len(capsys.readouterr().out.splitlines()) == 1  # no value is changed but by --dtype
    assert {array.dtype for array in load_file(tmp_path / "out.safetensors").values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert {patch.scale for patch in patches_in(tmp_path / "out.safetensors")} == {0.5}


def test_lora_refuses_parts_that_the_dialect_has_no_place_for(tmp_path, capsys):
    module = "diffusion_model.blocks.0.self_attn.q_proj"
    save_file({f"{module}.diff": normal(64, 64)}, tmp_path / "diff.safetensors")
    for dialect in ("diffusers", "peft"):
        line = refusal(capsys, "lora", tmp_path / "diff.safetensors", tmp_path / "no", "--to", dialect)
        assert "have no place for diff of 1 modules" in line
        assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("remap", "message"),
    [
        ("28", "expected two numbers of blocks, as in 28:40, of 28, 40, 52"),
        ("28:41", "expected two numbers of blocks, as in 28:40, of 28, 40, 52"),
        (
            "40:28",
            "lora_rank4.safetensors: the adapter changes blocks 2, which a model of 28 blocks does not have",
        ),
    ],
)
def test_lora_refuses_depths_that_do_not_fit(tmp_path, capsys, remap, message):
    assert message in refusal(capsys, "lora", LORA, tmp_path / "no", "--to", "kohya", "--remap", remap)


def test_lora_leaves_unused_keys_out_only_if_allowed(tmp_path, capsys):
    stray = load_file(LORA) | {"lora_unet_blocks_0_self_attn_qkv.lora_down.weight": np.zeros((4, 64), np.float32)}
    save_file(stray, tmp_path / "stray.safetensors")
    arguments = ("lora", tmp_path / "stray.safetensors", tmp_path / "no", "--to", "kohya")
    assert "1 keys are unused: lora_unet_blocks_0_self_attn_qkv.lora_down.weight" in refusal(capsys, *arguments)
    assert not (tmp_path / "no").exists()
    convert(*arguments, "--allow_unused")
    assert "warning: " in capsys.readouterr().err
    assert len(load_file(tmp_path / "no")) == 3 * 68
    assert "already exists" in refusal(capsys, *arguments)


# ---- merge, extract, resize, diff ------------------------------------------------------------------------------------


def test_merge_adds_every_adapter_at_its_weight_in_float32(tmp_path, capsys):
    base = {name: array.astype(ml_dtypes.bfloat16) for name, array in golden("dit_image.model").items()}
    bundle = {name.replace("net.", "model.diffusion_model.", 1): array for name, array in base.items()}
    save_file(bundle | {"vae.conv1.bias": np.ones(3, np.float32)}, tmp_path / "base.safetensors", {"title": "x"})
    out = tmp_path / "out.safetensors"
    convert("merge", tmp_path / "base.safetensors", f"{LORA}:0.7", f"{LOKR}:-0.2", out)
    said = capsys.readouterr().out
    assert said.count("68 of 68 modules matched") == 2
    assert "68 of 110 tensors changed" in said
    found, first, second = load_file(out), updates(LORA), updates(LOKR)
    assert found.keys() == bundle.keys() | {"vae.conv1.bias"}
    for name, array in bundle.items():
        module = name.removeprefix("model.diffusion_model.").removesuffix(".weight")
        expected = array
        if module in first:
            exact = array.astype(np.float64) + 0.7 * first[module] - 0.2 * second[module]
            expected = exact.astype(np.float32).astype(ml_dtypes.bfloat16)
        difference = np.abs(found[name].astype(np.float32) - expected.astype(np.float32))
        assert found[name].dtype == ml_dtypes.bfloat16
        # The last bit of bfloat16 where the sum lies at a boundary: hardly ever.
        assert np.mean(difference > 0) < 1e-3, name
    with safe_open(out, "np") as file:
        assert file.metadata() == {"title": "x"}


def test_a_merged_model_is_the_reference_with_its_lora(tmp_path):
    convert("merge", DIT_FILE, LORA, tmp_path / "out.safetensors")
    found = velocity(load_dit(tmp_path / "out.safetensors"))
    assert relative_error(found, channel_last(golden("lora_rank4.io")["velocity"])) < VALUE_TOLERANCE


def test_merge_refuses_what_the_base_has_not(tmp_path, capsys):
    small = {name: array for name, array in golden("dit_image.model").items() if "llm_adapter." not in name}
    save_file(small, tmp_path / "base.safetensors")
    arguments = ("merge", tmp_path / "base.safetensors", LORA, tmp_path / "out.safetensors")
    assert "40 keys are unused: diffusion_model.llm_adapter.blocks.0" in refusal(capsys, *arguments)
    convert(*arguments, "--allow_unused")
    assert "48 of 68 modules matched" in capsys.readouterr().out
    save_file(dict(golden("vae.model")), tmp_path / "vae.safetensors")
    for number in ("nan", "inf", "much"):
        assert "expected FILE, FILE:WEIGHT or FILE:MODEL:TEXT_ENCODER with numbers" in refusal(
            capsys, "merge", DIT_FILE, f"{LORA}:{number}", tmp_path / "no"
        )
    biased = "diffusion_model.llm_adapter.blocks.0.mlp.0.diff_b"
    save_file({biased: np.ones(1, "f4")}, tmp_path / "bias.safetensors")
    arguments = ("merge", DIT_FILE, tmp_path / "bias.safetensors", tmp_path / "no")
    assert "mlp.0 changes a bias of shape (1,), the model's is (192,)" in refusal(capsys, *arguments)
    assert "it looks like: Wan VAE" in refusal(capsys, "merge", tmp_path / "vae.safetensors", LORA, tmp_path / "no")


def test_merge_leaves_out_no_more_than_what_the_base_has_not(tmp_path, capsys):
    module = "diffusion_model.blocks.0.self_attn.q_proj"
    factors = {f"{module}.lora_A.weight": normal(2, 64), f"{module}.lora_B.weight": normal(64, 2)}
    save_file(factors | {f"{module}.diff_b": normal(64)}, tmp_path / "lora.safetensors")
    arguments = ("merge", DIT_FILE, tmp_path / "lora.safetensors", tmp_path / "out.safetensors")
    assert f"1 keys are unused: {module}.diff_b;" in refusal(capsys, *arguments)
    convert(*arguments, "--allow_unused")
    a, b = factors.values()
    name = "net.blocks.0.self_attn.q_proj.weight"
    expected = golden("dit_image.model")[name] + b @ a
    np.testing.assert_allclose(load_file(tmp_path / "out.safetensors")[name], expected, atol=1e-6)


def test_merge_refuses_an_adapter_that_breaks_the_model(tmp_path, capsys):
    broken = {
        key: array * np.float32("nan") if "blocks.1.mlp.layer1" in key else array
        for key, array in load_file(LORA).items()
    }
    save_file(broken, tmp_path / "lora.safetensors")
    with pytest.raises(SystemExit) as ended:
        convert("merge", DIT_FILE, tmp_path / "lora.safetensors", tmp_path / "out.safetensors")
    assert ended.value.code == 1
    line = capsys.readouterr().err
    assert f"{tmp_path / 'lora.safetensors'}: NaN or infinite values in 2 tensors: " in line
    assert "blocks.1.mlp.layer1" in line
    assert not (tmp_path / "out.safetensors").exists()


def test_an_adapter_that_was_trained_on_another_model_is_named_with_both(tmp_path, capsys):
    metadata = {"base_model": "Anima preview", "base_model_sha256": "ab" * 32}
    save_file(load_file(LORA), tmp_path / "lora.safetensors", metadata)
    convert("merge", DIT_FILE, tmp_path / "lora.safetensors", tmp_path / "out.safetensors")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path}/lora.safetensors: was trained on Anima preview (SHA-256 abababab…)")
    assert "and this is dit_image.model.safetensors (SHA-256 " in line
    convert("extract", DIT_FILE, tmp_path / "out.safetensors", tmp_path / "own.safetensors", "--rank", 4)
    convert("merge", DIT_FILE, tmp_path / "own.safetensors", tmp_path / "again.safetensors")
    assert capsys.readouterr().err == ""


def test_extract_finds_the_adapter_that_was_merged(tmp_path, capsys):
    convert("merge", DIT_FILE, LORA, tmp_path / "tuned.safetensors")
    convert("extract", DIT_FILE, tmp_path / "tuned.safetensors", tmp_path / "found.safetensors", "--rank", 4)
    assert "68 modules, rank 4, 100.00% of the energy kept" in capsys.readouterr().out
    found, expected = updates(tmp_path / "found.safetensors"), updates(LORA)
    assert found.keys() == expected.keys()
    for module, update in expected.items():
        # Rounding of the merged weights, which are some ten times as large as the update.
        assert relative_error(found[module], update) < 2e-5


def test_extract_keeps_norms_whole_and_of_the_rest_the_best_of_its_rank(tmp_path, capsys):
    base = golden("dit_image.model")
    names = [name for name in base if name.endswith(("blocks.0.mlp.layer1.weight", "q_norm.weight", "mlp.0.bias"))]
    tuned = base | {name: base[name] + 0.01 * normal(*base[name].shape, seed=n) for n, name in enumerate(names)}
    save_file(tuned, tmp_path / "tuned.safetensors")
    convert("extract", DIT_FILE, tmp_path / "tuned.safetensors", tmp_path / "out.safetensors", "--rank", 5)
    said = capsys.readouterr().out
    differences = {name: tuned[name] - base[name] for name in names}
    kept = total = 0.0
    for difference in differences.values():
        energy = np.sum(difference**2)
        values = np.linalg.svd(difference, compute_uv=False) if difference.ndim == 2 else np.array([energy**0.5])
        total, kept = total + energy, kept + np.sum(values[:5] ** 2)
    assert f"{kept / total:.2%} of the energy kept" in said
    convert("merge", DIT_FILE, tmp_path / "out.safetensors", tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    for name in names:
        if differences[name].ndim == 1:
            np.testing.assert_allclose(again[name], tuned[name], rtol=1e-6)
    assert {name for name in base if not np.array_equal(again[name], base[name])} == set(names)


def test_extract_refuses_two_models_that_are_not_one(tmp_path, capsys):
    same = ("extract", DIT_FILE, DIT_FILE, tmp_path / "no", "--rank", 4)
    assert "has the same values as" in refusal(capsys, *same)
    smaller = {name: array for name, array in golden("dit_image.model").items() if "q_norm" not in name}
    save_file(smaller, tmp_path / "smaller.safetensors")
    assert "tensors are only in one of it" in refusal(
        capsys, "extract", DIT_FILE, tmp_path / "smaller.safetensors", tmp_path / "no", "--rank", 4
    )
    assert "--rank: found 0" in refusal(capsys, *same[:-1], 0)


@pytest.mark.parametrize("source", [LORA, LOKR])
@pytest.mark.parametrize("rank", [2, 16])
def test_resize_keeps_the_best_of_each_module(tmp_path, capsys, source, rank):
    convert("resize", source, tmp_path / "out.safetensors", "--rank", rank)
    said = capsys.readouterr().out
    found, original = updates(tmp_path / "out.safetensors"), updates(source)
    kept = total = 0.0
    for module, update in original.items():
        values = np.linalg.svd(update.astype(np.float64), compute_uv=False)
        total, kept = total + np.sum(values**2), kept + np.sum(values[:rank] ** 2)
        left = np.linalg.norm(found[module] - update)
        assert left == pytest.approx(
            np.sqrt(np.sum(values[rank:] ** 2)), rel=1e-3, abs=1e-5 * float(np.linalg.norm(update))
        )
    assert f"rank {rank}, {kept / total:.2%} of the energy kept" in said
    with open_adapter(tmp_path / "out.safetensors") as adapter:
        assert {patch.kind.name for patch in adapter.patches.values()} == {"lora"}
        assert max(patch.rank for patch in adapter.patches.values()) <= max(rank, 4)


def test_diff_of_models_and_of_adapters(tmp_path, capsys):
    base = golden("dit_image.model")
    name = "net.blocks.1.mlp.layer1.weight"
    save_file(base | {name: base[name] * 1.5}, tmp_path / "other.safetensors")
    convert("diff", DIT_FILE, tmp_path / "other.safetensors")
    said = capsys.readouterr().out
    assert "equal: 108 tensors; different: 1" in said
    assert "blocks.1                 5.000e-01" in said
    kohya = lora_as("kohya", tmp_path / "kohya.safetensors", 2.0)
    convert("diff", LORA, kohya)
    assert "equal: 68 modules; different: 0" in capsys.readouterr().out
    convert("diff", LORA, LOKR)
    assert "equal: 0 modules; different: 68" in capsys.readouterr().out
    assert "one of the two is an adapter" in refusal(capsys, "diff", LORA, DIT_FILE)


def test_inspect_shows_how_much_each_block_changes(tmp_path, capsys):
    lora_as("kohya", tmp_path / "kohya.safetensors", 2.0)
    convert("inspect", tmp_path / "kohya.safetensors")
    said = capsys.readouterr().out
    assert "with alpha (scale 0.5)" in said
    squares = {}
    for module, update in updates(LORA).items():
        block = module[: module.index("blocks.") + len("blocks.0")]
        squares[block] = squares.get(block, 0.0) + np.sum(update.astype(np.float64) ** 2)
    assert len(squares) == 5
    for block, square in squares.items():
        assert f"norm      {block:<24} {square**0.5:.4g}\n" in said


# ---- diffusers and PEFT ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The golden networks as a folder of diffusers'."""
    root = tmp_path_factory.mktemp("diffusers")
    qwen, vae = (GOLDEN / f"{name}.model.safetensors" for name in ("qwen3", "vae"))
    convert("checkpoint", DIT_FILE, root / "anima", "--to", "diffusers", "--text_encoder", qwen, "--vae", vae)
    return root / "anima"


def test_a_folder_of_diffusers_contains_and_describes_every_network(folder):
    assert {path.name for path in folder.iterdir()} == {
        *("transformer", "text_conditioner", "text_encoder", "vae", "scheduler", "modular_model_index.json"),
        *("tokenizer", "t5_tokenizer"),  # the package's own, as no others are given
    }
    index = json.loads((folder / "modular_model_index.json").read_text())
    assert (index["_class_name"], index["_blocks_class_name"]) == ("AnimaModularPipeline", "AnimaAutoBlocks")
    assert index["transformer"][:2] == ["diffusers", "CosmosTransformer3DModel"]
    assert json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["shift"] == 3.0


def test_a_folder_of_diffusers_returns_the_same_bytes(folder, tmp_path):
    names = ("anima", "qwen3", "vae")
    dit, qwen, vae = (tmp_path / f"{name}.safetensors" for name in names)
    convert("checkpoint", folder, dit, "--prefix", "net.", "--text_encoder", qwen, "--vae", vae)
    for path, golden_name in zip((dit, qwen, vae), ("dit_image", "qwen3", "vae"), strict=True):
        original, found = golden(f"{golden_name}.model"), load_file(path)
        assert original.keys() == found.keys()
        for name, array in original.items():
            assert found[name].tobytes() == array.tobytes()
            assert found[name].dtype == array.dtype


def test_a_folder_without_some_networks_is_written_and_they_are_named(tmp_path, capsys):
    convert("checkpoint", DIT_FILE, tmp_path / "half", "--to", "diffusers")
    assert "without text_encoder, vae" in capsys.readouterr().out
    assert "has no vae" in refusal(capsys, "checkpoint", tmp_path / "half", tmp_path / "x", "--vae", tmp_path / "v")


def test_a_folder_that_is_not_diffusers_is_neither_overwritten_nor_read(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    line = refusal(capsys, "checkpoint", DIT_FILE, tmp_path / "full", "--to", "diffusers", "--force")
    assert "already exists" in line
    assert (tmp_path / "full" / "mine.txt").read_text() == "precious"
    assert "contains no file with weights" in refusal(capsys, "checkpoint", tmp_path / "full", tmp_path / "x")


def test_the_output_format_must_be_another_one(folder, tmp_path, capsys):
    assert "is already a diffusers folder" in refusal(capsys, "checkpoint", folder, tmp_path / "x", "--to", "diffusers")
    assert "choose an output format: --to diffusers" in refusal(capsys, "checkpoint", DIT_FILE, tmp_path / "x")


def peer_context(folder, inputs):
    """diffusers' text conditioner of a folder, and what it makes of the golden captions, without its padding."""
    import torch
    from diffusers import AnimaTextConditioner  # pyright: ignore[reportPrivateImportUsage]

    conditioner = AnimaTextConditioner.from_pretrained(folder, subfolder="text_conditioner")
    text = [torch.from_numpy(inputs[key]) for key in ("qwen", "t5_ids", "t5_mask", "qwen_mask")]
    masks = {"target_attention_mask": text[2], "source_attention_mask": text[3]}
    return conditioner, lambda: conditioner(text[0], text[1].long(), **masks)[:, : text[1].shape[1]]


def test_diffusers_loads_the_folder_and_gives_the_references_numbers(folder):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    inputs, qwen_io = golden("dit_image.io"), golden("qwen3.io")
    with torch.inference_mode():
        _, context = peer_context(folder, inputs)
        rows = context()
        assert relative_error(rows, inputs["context_train"]) < VALUE_TOLERANCE
        transformer = diffusers.CosmosTransformer3DModel.from_pretrained(folder, subfolder="transformer")
        latents, times = torch.from_numpy(inputs["x_t"]), torch.from_numpy(inputs["t"])
        transformer.register_to_config(
            concat_padding_mask=False
        )  # diffusers' own way to add the mask needs torchvision
        found = dit_peer.velocity_tensor(transformer, latents, times, rows)
        assert relative_error(found, inputs["velocity"]) < VALUE_TOLERANCE
        qwen = transformers.Qwen3Model.from_pretrained(folder / "text_encoder")
        ids, mask = (torch.from_numpy(qwen_io[key]) for key in ("input_ids", "attention_mask"))
        states = qwen(ids.long(), attention_mask=mask.long()).last_hidden_state * mask[..., None]
        assert relative_error(states, qwen_io["last_hidden_state"]) < VALUE_TOLERANCE
        vae = diffusers.AutoencoderKLQwenImage.from_pretrained(folder, subfolder="vae")
        assert set(vae.state_dict()) == set(load_file(folder / "vae" / "diffusion_pytorch_model.safetensors"))


def test_a_text_encoder_in_shards_as_transformers_writes_it(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 60}
    torch.manual_seed(0)
    model = transformers.Qwen3Model(
        transformers.Qwen3Config(hidden_size=32, intermediate_size=48, num_hidden_layers=2, **sizes)
    )
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with open_network(QWEN3, tmp_path) as checkpoint:
        found = {name: source.read() for name, source in checkpoint.sources.items()}
    assert all(np.array_equal(found.pop(name), tensor.numpy()) for name, tensor in model.state_dict().items())
    assert not found


def test_diffusers_pipeline_finds_the_components(folder):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("torch")
    pipeline = diffusers.ModularPipeline.from_pretrained(str(folder))
    pipeline.load_components(names=["transformer", "text_conditioner", "vae", "scheduler", "text_encoder"])
    assert type(pipeline).__name__ == "AnimaModularPipeline"
    assert pipeline.transformer.config.num_layers == 3
    assert pipeline.scheduler.config.shift == 3.0
    assert type(pipeline.text_encoder).__name__ == "Qwen3Model"


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_diffusers_loads_a_lora_that_is_written_for_it_and_gives_the_references_numbers(folder, tmp_path, alpha):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from diffusers.loaders import AnimaLoraLoaderMixin

    source = lora_as("kohya", tmp_path / "kohya.safetensors", alpha)
    convert("lora", source, tmp_path / "out.safetensors", "--to", "diffusers")
    inputs, expected = golden("dit_image.io"), golden("lora_rank4.io")
    transformer = diffusers.CosmosTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    transformer.register_to_config(concat_padding_mask=False)
    conditioner, context = peer_context(folder, inputs)

    class Pipeline(AnimaLoraLoaderMixin):
        hf_device_map = None
        components = {"transformer": transformer, "text_conditioner": conditioner}  # noqa: RUF012

    Pipeline.transformer, Pipeline.text_conditioner = transformer, conditioner
    Pipeline().load_lora_weights(str(tmp_path), weight_name="out.safetensors", adapter_name="style")
    with torch.inference_mode():
        rows = context()
        assert relative_error(rows, expected["context_train"]) < VALUE_TOLERANCE
        latents, times = (torch.from_numpy(inputs[key]) for key in ("x_t", "t"))
        found = dit_peer.velocity_tensor(transformer, latents, times, rows)
    assert relative_error(found, expected["velocity"]) < VALUE_TOLERANCE
