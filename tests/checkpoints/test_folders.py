"""Models in folders and repositories: which files count, and what is said of folders that are not clear."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import anima_jax
from anima_jax.adapters.opening import files_of
from anima_jax.checkpoints import hub
from anima_jax.checkpoints.folders import beside, model_files
from anima_jax.checkpoints.joined import open_model
from anima_jax.checkpoints.models import open_dit, open_network
from anima_jax.checkpoints.names.networks import DIT, QWEN3, WAN_VAE
from anima_jax.convert.__main__ import main as convert
from anima_jax.errors import UserError
from anima_jax.text.tokenizers import SMALL_TOKENIZERS, load_tokenizers
from tests.checkpoints.test_hub import FakeHub, server  # noqa: F401 - a fixture
from tests.golden_files import GOLDEN, golden

DIT_FILE, LORA = GOLDEN / "dit_image.model.safetensors", GOLDEN / "lora_rank4.safetensors"
STEM = "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"
SHARDS = [f"{STEM}-0000{number}-of-00002.safetensors" for number in (1, 2)]
TRANSFORMER = {name.removeprefix("net."): array for name, array in golden("dit_image.model").items()}


OWN_TOKENIZERS = ("--tokenizers", SMALL_TOKENIZERS)


def run(*arguments: object) -> None:
    convert([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> pathlib.Path:
    """The golden networks as a diffusers folder with the quick start's tokenizers."""
    root = tmp_path_factory.mktemp("diffusers") / "anima"
    qwen, vae = (GOLDEN / f"{name}.model.safetensors" for name in ("qwen3", "vae"))
    run("checkpoint", DIT_FILE, root, "--to", "diffusers", "--text_encoder", qwen, "--vae", vae, *OWN_TOKENIZERS)
    return root


@pytest.fixture
def folder(written, tmp_path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(written, tmp_path / "anima"))


def sharded(network: pathlib.Path, stem: str = STEM, suffix: str = "index.json") -> dict[str, str]:
    """Replace a component's file by two shards with an index; returns the index's map."""
    (path,) = network.glob("*.safetensors")
    tensors = load_file(path)
    path.unlink()
    keys, shards = list(tensors), [name.replace(STEM, stem) for name in SHARDS]
    index = {key: shards[number >= len(keys) // 2] for number, key in enumerate(keys)}
    for shard in shards:
        save_file({key: tensors[key] for key in keys if index[key] == shard}, network / shard)
    (network / f"{stem}.safetensors.{suffix}").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return index


def other_values(network: pathlib.Path, *names: str) -> None:
    """Write files with the component's names and shapes, and other values."""
    with open_model(network, (network.name,)) as file:
        tensors = {key: file.read(key) + 1 for key in file.tensors}
    for name in names:
        save_file(tensors, network / name)


def values(path: pathlib.Path | str, variant: str | None = None) -> dict[str, np.ndarray]:
    with open_dit(path, variant=variant) as checkpoint:
        return {name: source.read() for name, source in checkpoint.sources.items()}


def assert_transformer(found: dict[str, np.ndarray], plus: float = 0.0) -> None:
    assert found.keys() == TRANSFORMER.keys()
    for name, array in TRANSFORMER.items():
        own = plus if not name.startswith("llm_adapter.") else 0.0
        np.testing.assert_array_equal(found[name], array + np.float32(own), err_msg=name)


def test_the_index_decides_and_other_files_beside_it_are_not_read(folder):
    transformer = folder / "transformer"
    sharded(transformer)
    stale = f"{STEM}-00003-of-00003.safetensors"
    other_values(transformer, stale, f"{STEM}.safetensors", f"{STEM}.fp16.safetensors", f"{STEM}.ema.safetensors")
    for path in (folder, transformer, transformer / INDEX):
        found = values(path)
        if path.suffix:  # an index is one network
            found |= {name: TRANSFORMER[name] for name in TRANSFORMER if name.startswith("llm_adapter.")}
        assert_transformer(found)


@pytest.mark.parametrize("index", [None, f"{STEM}.safetensors.index.fp16.json", f"{STEM}.fp16.safetensors.index.json"])
def test_a_variant_can_be_chosen(folder, index):
    transformer = folder / "transformer"
    other_values(transformer, f"{STEM}.fp16.safetensors")
    if index:  # the names of newer and of older versions of diffusers
        (transformer / f"{STEM}.safetensors").rename(folder / "plain")
        sharded(transformer, f"{STEM}.fp16")
        (transformer / f"{STEM}.fp16.safetensors.index.json").rename(transformer / index)
        (folder / "plain").rename(transformer / f"{STEM}.safetensors")
    assert_transformer(values(folder))
    assert_transformer(values(folder, "fp16"), plus=1.0)
    anima_jax.load_dit(transformer, variant="fp16")
    with pytest.raises(UserError, match=r"/vae: has no variant 'fp16'; it contains diffusion_pytorch_model\.safetens"):
        anima_jax.load_vae(folder, variant="fp16")
    with pytest.raises(UserError, match=r"has no variant 'bf16' \(its variants: fp16\)"):
        anima_jax.load_dit(folder, variant="bf16")


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.safetensors", "diffusion_pytorch_model.safetensors", "a.safetensors"], "model.safetensors"),
        (["diffusion_pytorch_model.safetensors", "model.ema.safetensors"], "diffusion_pytorch_model.safetensors"),
        (["my_qwen.safetensors"], "my_qwen.safetensors"),
        (["model.fp16.safetensors"], "model.fp16.safetensors"),
        (["a.safetensors", "b.safetensors"], "contains a.safetensors, b.safetensors; expected an index, a file with a"),
        (["model.ema.safetensors", "model.fp16.safetensors"], "model.fp16.safetensors; expected an index, a file with"),
        (SHARDS, f"contains {SHARDS[0]}, {SHARDS[1]}; expected an index, a file with a standard name such as model.s"),
        (["pytorch_model.bin"], "contains no file with weights; expected an index, a file with a standard name"),
    ],
)
def test_without_an_index_it_is_the_standard_name_or_the_only_file(tmp_path, names, chosen):
    for name in names:
        (tmp_path / name).touch()
    if chosen.endswith(".safetensors"):
        assert str(model_files(tmp_path, ("text_encoder",))) == f"{tmp_path}/{chosen}"
        return
    with pytest.raises(UserError) as error:
        model_files(tmp_path, ("text_encoder",))
    (line,) = error.value.messages
    assert chosen in line


BAD = {
    "{": "cannot be read as an index: ",
    "[]": "has no weight_map from tensors to files",
    '{"weight_map": {}}': "has no weight_map",
    '{"weight_map": {"a": 3}}': "has no weight_map",
    '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}': "a is there twice",
    "../x.safetensors": "names the file ../x.safetensors, expected one in its own folder",
    "/etc/x.safetensors": "names the file /etc/x.safetensors, expected one in its own folder",
    "gone.safetensors": "names gone.safetensors, which ",
    "model.bin": "names the file model.bin, expected .safetensors files",
    SHARDS[1]: f"is in {SHARDS[1]}, but it is in {SHARDS[0]}",
}


@pytest.mark.parametrize("content", BAD)
def test_an_index_that_is_wrong_is_one_line(folder, content):
    index = sharded(folder / "transformer")
    first = next(iter(index))
    text = content if content[0] in "{[" else json.dumps({"weight_map": index | {first: content}})
    (folder / "transformer" / INDEX).write_text(text)
    with pytest.raises(UserError) as error:
        anima_jax.load_dit(folder)
    (line,) = error.value.messages
    assert line.startswith(f"{folder}/transformer/{INDEX}: ")
    assert BAD[content] in line


def test_a_tensor_in_two_shards_or_in_none_is_one_line(folder):
    index = sharded(folder / "transformer")
    first = next(iter(index))
    path = folder / "transformer" / SHARDS[1]
    tensors = load_file(path)
    save_file(tensors | {first: np.zeros(3, np.float32)}, path)
    with pytest.raises(UserError, match=f"{first} is in .*{SHARDS[0]} and in .*{SHARDS[1]}"):
        anima_jax.load_dit(folder)
    lost = tensors.popitem()[0]
    save_file(tensors, path)
    with pytest.raises(UserError, match=f"says that {lost} is in {SHARDS[1]}, but it is in none of its files"):
        anima_jax.load_dit(folder)


def test_folders_are_taken_where_files_are(folder, tmp_path, capsys):
    sharded(folder / "transformer")
    file = {name: tmp_path / f"{name}.safetensors" for name in ("merged", "expected", "lora", "vae", "anima")}
    (tmp_path / "lora").mkdir()
    shutil.copyfile(LORA, tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    shutil.copyfile(LORA, tmp_path / "lora" / "another.safetensors")
    run("merge", folder, tmp_path / "lora", file["merged"])
    run("merge", DIT_FILE, LORA, file["expected"])
    merged, expected = (load_file(file[name]) for name in ("merged", "expected"))
    assert merged.keys() == expected.keys()
    assert all(merged[name].tobytes() == array.tobytes() for name, array in expected.items())
    capsys.readouterr()
    run("diff", folder, DIT_FILE)
    run("diff", folder / "text_encoder", GOLDEN / "qwen3.model.safetensors")
    run("extract", folder, file["merged"], file["lora"], "--rank", 4)
    run("checkpoint", folder, file["anima"], "--vae", file["vae"])
    said = capsys.readouterr().out
    assert "equal: 109 tensors; different: 0" in said
    assert "equal: 35 tensors; different: 0" in said
    assert "68 modules, rank 4, 100.00% of the energy kept" in said


def test_inspect_describes_a_networks_folder_and_names_stale_files(folder, capsys):
    sharded(folder / "transformer")
    other_values(folder / "transformer", "old.safetensors")
    capsys.readouterr()
    run("inspect", folder / "transformer")
    assert "check     all 109 tensors belong to the model" in capsys.readouterr().out
    run("inspect", folder)
    said = capsys.readouterr().out
    lines = {line.split()[0]: line for line in said.splitlines()}
    assert lines[f"transformer/{SHARDS[0]}"].endswith(f"a part of {INDEX}")
    assert "not in an index: Anima transformer" in lines["transformer/old.safetensors"]
    assert "Anima transformer; width 64" in lines[f"transformer/{INDEX}"]


def test_a_file_of_a_folder_that_is_read_is_never_replaced(folder, capsys):
    for target in (f"{STEM}.safetensors", "config.json"):
        with pytest.raises(SystemExit):
            run("merge", folder, LORA, folder / "transformer" / target, "--force")
        assert "is a file of IN; choose another OUT" in capsys.readouterr().err


def test_a_folder_brings_its_other_networks_and_tokenizers(folder):
    assert beside(folder) == {name: str(folder) for name in ("vae", "text_encoder", "tokenizers")}
    assert beside(folder / "transformer") == beside(folder)
    assert beside(DIT_FILE) == {}
    assert load_tokenizers(folder).fingerprint == load_tokenizers(SMALL_TOKENIZERS).fingerprint
    shutil.rmtree(folder / "t5_tokenizer")
    shutil.rmtree(folder / "vae")
    assert beside(folder) == {"text_encoder": str(folder)}
    with pytest.raises(UserError, match=r"has no vae/, only transformer/, text_conditioner/, text_encoder/"):
        anima_jax.load_vae(folder)


def test_tokenizers_in_either_layout_are_copied_and_a_missing_one_is_named(tmp_path, capsys):
    mixed, out = tmp_path / "mixed", tmp_path / "out"
    shutil.copytree(SMALL_TOKENIZERS / "qwen", mixed / "qwen")
    command = ("checkpoint", DIT_FILE, out, "--to", "diffusers", "--tokenizers", mixed)
    with pytest.raises(SystemExit):
        run(*command)
    assert capsys.readouterr().err.startswith(f"error: {mixed}/t5: no tokenizer found, expected tokenizer.json")
    shutil.copytree(SMALL_TOKENIZERS / "t5", mixed / "t5_tokenizer")
    run(*command)
    for folder in (mixed, out):
        assert load_tokenizers(folder).fingerprint == load_tokenizers(SMALL_TOKENIZERS).fingerprint


# ---- repositories ----------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(server: FakeHub, folder) -> FakeHub:  # noqa: F811
    sharded(folder / "transformer")
    paths = [path for path in folder.rglob("*") if path.is_file()]
    server.files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    server.files["transformer/old.safetensors"] = b"broken"
    server.files["lora/adapter_model.safetensors"] = LORA.read_bytes()
    server.files["lora/a.safetensors"] = b"broken"
    return server


def test_a_repository_is_read_as_a_folder(repository, capsys):
    for address in ("hf://o/r", "hf://o/r@v1", "hf://o/r/transformer"):
        assert_transformer(values(address))
    for network in (QWEN3, WAN_VAE):
        with open_network(network, "hf://o/r") as checkpoint:
            assert checkpoint.tensors
    assert "old.safetensors" not in capsys.readouterr().err
    assert (
        load_tokenizers(beside("hf://o/r")["tokenizers"]).fingerprint == load_tokenizers(SMALL_TOKENIZERS).fingerprint
    )
    assert files_of("hf://o/r/lora") == {"": "hf://o/r/lora/adapter_model.safetensors"}
    run("inspect", "hf://o/r/vae")
    assert "check     all 194 tensors belong to the model" in capsys.readouterr().out


@pytest.mark.parametrize("address", ["hf://o/transformer", "hf://o/vae@v1/"])
def test_the_name_of_a_repository_is_not_that_of_a_component(monkeypatch, address):
    monkeypatch.setattr("anima_jax.checkpoints.locations.files_in", {address: ["model.safetensors"]}.__getitem__)
    assert model_files(address).files == [f"{address}/model.safetensors"]
    assert beside(address) == {}


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("hf://o", "hf://o: expected hf://owner/repo, with a file or folder in it"),
        ("hf://x/y", "hf://x/y: there is no repository x/y, or it is private and needs"),
        ("hf://o/r/transformers", "hf://o/r/transformers: the repository has no file transformers"),
        ("hf://o/r/scheduler", "hf://o/r/scheduler: contains no file with weights; expected an index"),
    ],
)
def test_a_repository_without_the_model_is_one_line(repository, address, line):
    with pytest.raises(UserError) as error:
        anima_jax.load_dit(address)
    (found,) = error.value.messages
    assert found.startswith(line)


def test_without_a_network_the_cached_repository_counts(repository, monkeypatch):
    assert_transformer(values("hf://o/r"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert_transformer(values("hf://o/r"))
    with pytest.raises(UserError, match="hf://o/s: could not be downloaded and is not in the local cache"):
        anima_jax.load_dit("hf://o/s")


def test_a_dry_run_takes_only_the_headers_of_shards(repository, tmp_path):
    with hub.headers_only(), open_network(DIT, "hf://o/r") as checkpoint:
        assert len(checkpoint.tensors) == len(TRANSFORMER)
    (index,) = (tmp_path / "cache").rglob("blobs/*")
    assert json.loads(index.read_text())["weight_map"]
