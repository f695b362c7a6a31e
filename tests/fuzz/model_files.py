"""Hostile networks, adapters, embeddings, tokenizers, diffusers folders and checkpoints."""

import functools
import json
import pathlib
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from anima_jax.adapters import kinds
from anima_jax.adapters.dialects import DIALECTS
from anima_jax.adapters.file import fit_to_weights, open_adapter
from anima_jax.checkpoints.control import load_control, save_control
from anima_jax.checkpoints.models import open_dit, open_network, save_dit, save_network
from anima_jax.checkpoints.names.networks import QWEN3, WAN_VAE, Network
from anima_jax.checkpoints.orbax import RunCheckpoints, errors_reported_once
from anima_jax.checkpoints.quantised import ggml, gguf
from anima_jax.checkpoints.safetensors import SafetensorsFile
from anima_jax.checkpoints.tensor_files import open_tensors
from anima_jax.convert.__main__ import COMMANDS
from anima_jax.errors import ArgumentParser
from anima_jax.models import parameters
from anima_jax.models.control import ControlConfig, ControlNetwork
from anima_jax.models.dit import AnimaDiT, DiTConfig
from anima_jax.models.llm_adapter import LLMAdapterConfig
from anima_jax.models.qwen3 import Qwen3, Qwen3Config
from anima_jax.models.wan_vae import WanVAE, WanVAEConfig
from anima_jax.sampling.embeddings import Embeddings
from anima_jax.text.tokenizers import SMALL_TOKENIZERS, load_tokenizers
from tests.checkpoints import test_gguf as raw_gguf
from tests.fuzz.mutations import Files
from tests.golden_files import GOLDEN
from tests.models.networks import random_params

DIT_CONFIG = DiTConfig(16, 1, 1, 16, 16, 2, adapter=LLMAdapterConfig(16, 1, 1, 16, 16, 16, 20))
QWEN3_CONFIG = Qwen3Config(16, 2, 2, 1, 8, 16, 40)
VAE_CONFIG = WanVAEConfig(4, (1, 2), 1, 16, (True,))

RANK = 2


@functools.cache
def _parser(name: str) -> ArgumentParser:
    parser = ArgumentParser()
    COMMANDS[name].add_arguments(parser)
    return parser


def command(name: str, *words: object) -> None:
    """Run `python -m anima_jax.convert NAME …` without what makes exit codes of its errors."""
    COMMANDS[name].run(_parser(name).parse_args([str(word) for word in words]))


def choice(folder: pathlib.Path, count: int) -> int:
    """A number below `count` that depends on the input only: the next command, so that every input needs one."""
    return zlib.crc32(b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())) % count


def bytes_of(write: Callable[[pathlib.Path], object]) -> bytes:
    """The file that `write(path)` makes."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "file.safetensors")
        write(path)
        return path.read_bytes()


def files_in(folder: pathlib.Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@functools.cache
def params(module: Any, config: Any) -> Any:
    return random_params(parameters.abstract(lambda rngs: module(config, rngs=rngs))[1])


# ---- networks ------------------------------------------------------------------------------------------------------

MODEL = "model.safetensors"


@functools.cache
def transformer() -> bytes:
    return bytes_of(lambda path: save_dit(path, params(AnimaDiT, DIT_CONFIG)))


def _network(network: Network, module: Any, config: Any) -> bytes:
    return bytes_of(lambda path: save_network(network, path, params(module, config), config=config))


def read_network(folder: pathlib.Path, network: Network | None) -> None:
    path = folder / MODEL
    match choice(folder, 3):
        case 0:
            command("inspect", path)
        case 1 if network is None:
            command("checkpoint", path, folder / "out.safetensors", "--to", "comfyui")
        case _:
            with open_dit(path) if network is None else open_network(network, path) as checkpoint:
                checkpoint.load()


def quantised_weights() -> list[Files]:
    """One file per quantised format, with its settings in a tensor or in the metadata."""
    with SafetensorsFile(GOLDEN / "quantised.safetensors") as file:
        found = {name: file.read(name) for name in file.tensors if "|" not in name}
    seeds: list[Files] = []
    for weight in dict.fromkeys(name.split(".")[0] for name in found):
        parts = {name: array for name, array in found.items() if name.split(".")[0] == weight}
        seeds.append({MODEL: safetensors_bytes(parts)})
    parts = {name: array for name, array in found.items() if name in ("fp8.weight", "fp8.weight_scale")}
    layers = '{"format_version": "1.0", "layers": {"fp8": {"format": "float8_e4m3fn"}}}'
    return [*seeds, {MODEL: safetensors_bytes(parts, {"_quantization_metadata": layers})}]


def read_quantised(folder: pathlib.Path) -> None:
    path = folder / MODEL
    if choice(folder, 2):
        command("inspect", path)
    with open_tensors(path) as file:
        for name in file.tensors:
            file.read(name)


# ---- GGUF ----------------------------------------------------------------------------------------------------------

WIDE_DIT = DiTConfig(64, 1, 1, 64, 32, 32, adapter=LLMAdapterConfig(32, 1, 1, 32, 64, 32, 20))
WIDE_QWEN3 = Qwen3Config(32, 1, 1, 1, 32, 32, 40)


def gguf_files() -> list[Files]:
    """A transformer and a text encoder with llama.cpp's names in formats of 32 values, and blocks of every format."""
    found: list[Files] = []
    with tempfile.TemporaryDirectory() as place:
        model, out = pathlib.Path(place, MODEL), pathlib.Path(place, "out.gguf")
        save_dit(model, params(AnimaDiT, WIDE_DIT))
        command("checkpoint", model, out, "--dtype", "gguf:q8_0", "--keep", "none")
        found.append({MODEL: out.read_bytes()})
        save_network(QWEN3, model, params(Qwen3, WIDE_QWEN3), config=WIDE_QWEN3)
        command("checkpoint", model, out, "--dtype", "gguf:q4_1", "--keep", "none", "--force")
        found.append({MODEL: out.read_bytes()})
        tensors = [gguf.GgufTensor(f"blocks.0.{name}", (2, 256), name) for name in ggml.BLOCK_FORMATS]
        data = np.arange(256, dtype=np.uint8)
        gguf.write(
            out, tensors, lambda tensor, rows: np.resize(data, tensor.nbytes), {"general.architecture": "cosmos"}
        )
        found.append({MODEL: out.read_bytes()})
    strings = struct.pack("<Q1sQ2s", 1, b"a", 2, b"bc")
    keys = (
        raw_gguf.number("general.alignment", 64),
        raw_gguf.number("split.count", 1),
        raw_gguf.array("comfy.gguf.orig_shape.blocks.0.w", 5, 2, struct.pack("<2i", 4, 16)),
        raw_gguf.array("tokenizer.ggml.tokens", 8, 2, strings),
        raw_gguf.array("nested", 9, 1, struct.pack("<IQ", 8, 2) + strings),
    )
    tensors = raw_gguf.tensor("blocks.0.w", (32, 2), 8), raw_gguf.tensor("b", (3,), offset=128)
    small = raw_gguf.raw(*keys, *tensors, keys=len(keys), data=bytes(300))
    return [*found, {MODEL: small}]


def read_gguf(folder: pathlib.Path) -> None:
    path = folder / MODEL
    match choice(folder, 4):
        case 0:
            command("inspect", path)
        case 1:
            command("checkpoint", path, folder / "out.safetensors", "--dtype", "f32")
        case 2:
            command("checkpoint", path, folder / "out.gguf", "--dtype", "gguf:q4_0", "--keep", "none")
        case _:
            with open_tensors(path) as file:
                for name in file.tensors:
                    file.read(name, slice(1, 2))


# ---- adapters ------------------------------------------------------------------------------------------------------


@functools.cache
def _shapes() -> dict[str, tuple[int, ...]]:
    from anima_jax.checkpoints.names import file_tensors
    from anima_jax.checkpoints.names.networks import DIT

    abstract = params(AnimaDiT, DIT_CONFIG)
    return {tensor.name: tensor.shape for tensor in file_tensors(DIT.rules(DIT_CONFIG), abstract)}


def safetensors_bytes(tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> bytes:
    from safetensors.numpy import save

    return save({key: np.ascontiguousarray(value) for key, value in tensors.items()}, metadata)


LORA_PARTS = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
NAMES = {
    "trainer": ("diffusion_model.{}", 0),
    "kohya": ("lora_unet_{}", 1),
    "diffusers": ("transformer.{}", 0),
    "peft": ("base_model.model.{}", 0),
    "net": ("net.{}", 0),
    "bare": ("{}", 0),
}


@functools.cache
def adapters() -> list[Files]:
    """LoRAs under the names of every dialect, and one file of every kind."""
    rng, found = np.random.default_rng(0), list[Files]()
    modules = ("blocks.0.self_attn.q_proj", "blocks.0.mlp.layer1", "llm_adapter.blocks.0.mlp.0")
    for dialect, (name, number) in NAMES.items():
        tensors: dict[str, np.ndarray] = {}
        for module in modules:
            spelling = name.format(module.replace(".", "_") if dialect == "kohya" else module)
            tensors[f"{spelling}.{LORA_PARTS[number][0]}"] = rng.standard_normal((RANK, 16), np.float32)
            tensors[f"{spelling}.{LORA_PARTS[number][1]}"] = rng.standard_normal((16, RANK), np.float32)
            if number or dialect == "net":
                tensors[f"{spelling}.alpha"] = np.array(1.0, np.float32)
        metadata = {"ss_network_dim": "2", "ss_network_alpha": "1"} if number else {"format": "pt", "lora_alpha": "1"}
        found.append({MODEL: safetensors_bytes(tensors, metadata)})
    shapes = {"rank": RANK, "in": 16, "out": 16}
    for kind in kinds.KINDS.values():
        tensors = {}
        for module in modules:
            for factor in kind.factors:
                shape = [shapes.get(axis, 4) for axis in factor.axes]
                tensors[f"diffusion_model.{module}.{factor.part}"] = rng.standard_normal(shape, np.float32)
            tensors[f"diffusion_model.{module}.alpha"] = np.array(1.0, np.float32)
        found.append({MODEL: safetensors_bytes(tensors)})
    return found


@functools.cache
def _base() -> str:
    path = pathlib.Path(tempfile.mkdtemp(dir="/dev/shm"), "base.safetensors")
    path.write_bytes(transformer())
    return str(path)


def read_adapter(folder: pathlib.Path) -> None:
    path = folder if (folder / "adapter_config.json").exists() else folder / MODEL
    match choice(folder, 5):
        case 0:
            command("inspect", path)
        case 1:
            command(
                "lora", path, folder / "out.safetensors", "--to", sorted(DIALECTS)[choice(folder, 97) % len(DIALECTS)]
            )
        case 2:
            command("merge", _base(), f"{path}:0.7", folder / "out.safetensors")
        case 3:
            command("resize", path, folder / "out.safetensors", "--rank", "1")
        case _:
            with open_adapter(path) as adapter:
                for patch in fit_to_weights(adapter, _shapes()).patches.values():
                    patch.norm()


def peft_settings() -> list[Files]:
    """PEFT's folders, with the settings that its files have."""
    common = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": ["q_proj"], "use_rslora": False}
    patterns = {"rank_pattern": {r"blocks\.0\..*": 4}, "alpha_pattern": {"^blocks.0.mlp.layer1$": 8, "q_proj": 2}}
    (weights,) = (files[MODEL] for files, dialect in zip(adapters(), NAMES, strict=False) if dialect == "peft")
    return [
        {"adapter_config.json": json.dumps(settings).encode(), "adapter_model.safetensors": weights}
        for settings in (common, common | patterns, common | patterns | {"use_rslora": True, "use_dora": False})
    ]


# ---- embeddings ----------------------------------------------------------------------------------------------------

PROMPT = "a embedding:one, (embedding:two:1.2) cat embedding:sub/three"


def embeddings() -> list[Files]:
    rows = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)
    files = {"qwen3_06b": rows, "t5xxl": np.zeros((4, 8), np.float32)}
    bundle = {"bundle_emb.one.string_to_param.*": rows, "lora_unet_blocks_0_mlp_layer1.alpha": np.array(1.0)}
    return [
        {"one.safetensors": safetensors_bytes(files), "two.safetensors": safetensors_bytes({"emb_params": rows})},
        {"one.safetensors": safetensors_bytes(bundle), "sub/three.pt": b"\x80\x02}q\x00."},
    ]


def read_embeddings(folder: pathlib.Path) -> None:
    spans = Embeddings(folder, 16).spans(PROMPT)
    _tokenizers().prompt_ids(spans)


# ---- tokenizers ----------------------------------------------------------------------------------------------------

_tokenizers = functools.cache(lambda: load_tokenizers(SMALL_TOKENIZERS))
CAPTIONS = ("", "a red circle on white, masterpiece", "猫 🙂 \x00 </s> <|endoftext|>")


def tokenizers() -> list[Files]:
    return [files_in(SMALL_TOKENIZERS)]


def read_tokenizers(folder: pathlib.Path) -> None:
    found = load_tokenizers(folder)
    found.training_ids(CAPTIONS, 64)
    found.lengths(CAPTIONS)
    for caption in CAPTIONS:
        found.prompt_ids(caption)


# ---- folders -------------------------------------------------------------------------------------------------------


def diffusers_folders() -> list[Files]:
    with tempfile.TemporaryDirectory() as place:
        root = pathlib.Path(place)
        for name, data in networks().items():
            (root / name).write_bytes(data)
        paths = "--text_encoder", root / "text_encoder", "--vae", root / "vae"
        command("checkpoint", root / "transformer", root / "folder", "--to", "diffusers", *paths)
        shutil.rmtree(root / "folder" / "tokenizer", ignore_errors=True)
        shutil.rmtree(root / "folder" / "t5_tokenizer", ignore_errors=True)
        return [{f"folder/{name}": data for name, data in files_in(root / "folder").items()}]


def read_diffusers_folder(folder: pathlib.Path) -> None:
    match choice(folder, 3):
        case 0:
            command("inspect", folder / "folder")
        case 1:
            command("checkpoint", folder / "folder", folder / "out.safetensors", "--to", "anima")
        case _:
            out = "--text_encoder", folder / "t.safetensors", "--vae", folder / "v.safetensors"
            command("checkpoint", folder / "folder", folder / "out.safetensors", *out)


@functools.cache
def networks() -> dict[str, bytes]:
    """A tiny file of every network."""
    return {
        "transformer": transformer(),
        "text_encoder": _network(QWEN3, Qwen3, QWEN3_CONFIG),
        "vae": _network(WAN_VAE, WanVAE, VAE_CONFIG),
    }


# ---- control networks ----------------------------------------------------------------------------------------------


def control_networks() -> list[Files]:
    """One for control images, and one with an ASPP and modules at some layers for inpainting, without metadata."""
    graphdefs = [
        parameters.abstract(lambda rngs, config=config: ControlNetwork(config, rngs=rngs))
        for config in (
            ControlConfig(3, 4, 2, 2, 1, (), blocks=2, width=4),
            ControlConfig(4, 4, 2, 2, 0, (1, 2), ("mlp_layer1",), 3, True, 4, ("0.mlp_layer1",)),
        )
    ]
    networks = [parameters.merge(graphdef, random_params(shapes)) for graphdef, shapes in graphdefs]
    return [{MODEL: bytes_of(functools.partial(save_control, network=network))} for network in networks]


def read_control_network(folder: pathlib.Path) -> None:
    path = folder / MODEL
    match choice(folder, 4):
        case 0:
            command("inspect", path)
        case 1:
            command("checkpoint", path, folder / "out.safetensors", "--dtype", "f16")
        case 2:
            load_control(path, blocks=40)
        case _:
            network = load_control(path)
            network.embed(jnp.zeros((1, 16, 32, network.config.channels)))


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def _items(step: int) -> dict[str, Any]:
    return {"params": {"w": jnp.full((4, 3), step, jnp.float32), "b": jnp.full(3, step)}, "counters": jnp.int32(step)}


def checkpoints() -> list[Files]:
    """Two checkpoints of a run, with and without checksums."""
    with tempfile.TemporaryDirectory() as place:
        found = RunCheckpoints(place, keep=None)
        for step in (1, 2):
            found.save(step, _items(step), {"step": step})
        found.close()
        files = files_in(pathlib.Path(place))
    return [files, {name: data for name, data in files.items() if not name.endswith("checksums.json")}]


def read_checkpoints(folder: pathlib.Path) -> None:
    with errors_reported_once():
        found = RunCheckpoints(folder, keep=None)
        step = found.newest_intact()
        if step is not None:
            found.metadata(step)
            restored = found.restore(step, _items(0))
            jax.block_until_ready(restored)
        found.close()


FORMATS: dict[str, tuple[Callable[[], list[Files]], Callable[[pathlib.Path], None]]] = {
    "transformer": (lambda: [{MODEL: networks()["transformer"]}], functools.partial(read_network, network=None)),
    "vae": (lambda: [{MODEL: networks()["vae"]}], functools.partial(read_network, network=WAN_VAE)),
    "text_encoder": (lambda: [{MODEL: networks()["text_encoder"]}], functools.partial(read_network, network=QWEN3)),
    "quantised": (quantised_weights, read_quantised),
    "gguf": (gguf_files, read_gguf),
    "adapter": (adapters, read_adapter),
    "peft": (peft_settings, read_adapter),
    "embedding": (embeddings, read_embeddings),
    "tokenizer": (tokenizers, read_tokenizers),
    "diffusers": (diffusers_folders, read_diffusers_folder),
    "control": (control_networks, read_control_network),
    "checkpoint": (checkpoints, read_checkpoints),
}
