"""GGUF files: ours are read by gguf, gguf's by ours; hostile ones end in one line."""

import dataclasses
import struct

import numpy as np
import pytest

from anima_jax.checkpoints.names import qwen3
from anima_jax.checkpoints.quantised import ggml_encode
from anima_jax.checkpoints.quantised import gguf as container
from anima_jax.checkpoints.quantised.gguf import GgufFile, GgufTensor
from anima_jax.checkpoints.tensor_files import open_tensors
from anima_jax.errors import UserError
from tests.checkpoints.hostile import peak_of_refusal

TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q4_k", "q5_1")


def values_of(rows: int = 6, columns: int = 512) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    values = {f"blocks.{number}.weight": rng.standard_normal((rows, columns)) for number in range(len(TYPES))}
    return {name: value.astype(np.float32) for name, value in values.items()} | {"norm": np.ones(5, np.float32)}


def encoded(tensor: GgufTensor, values: np.ndarray) -> np.ndarray:
    form = tensor.form
    return ggml_encode.quantise(values, form) if form else values.astype(container.PLAIN_TYPES[tensor.type])


def write_all(path, values, fields):
    types = dict(zip(values, TYPES, strict=False))
    tensors = [GgufTensor(name, value.shape, types.get(name, "f32")) for name, value in values.items()]
    container.write(path, tensors, lambda tensor, rows: encoded(tensor, values[tensor.name][rows]), fields)


def test_gguf_reads_what_we_write_and_we_read_the_same_values(tmp_path):
    gguf = pytest.importorskip("gguf")
    path, values, fields = tmp_path / "model.gguf", values_of(), {"general.architecture": "cosmos", "a.number": 7}
    write_all(path, values, fields)
    reader = gguf.GGUFReader(path)
    assert {key: reader.get_field(key).contents() for key in fields} == fields
    with open_tensors(path) as file:
        assert [tensor.name for tensor in reader.tensors] == list(file.tensors)
        for tensor in reader.tensors:
            expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(values[tensor.name].shape)
            assert np.array_equal(file.read(tensor.name).astype(np.float32), expected)
        assert [file.storage(name) for name in file.tensors][3:6] == ["q8_0", "q6_k", "q4_k"]
        assert file.metadata == {"general.architecture": "cosmos", "a.number": "7"}


def test_we_read_what_gguf_writes_with_vocabulary_and_reshaped_tensors(tmp_path):
    gguf = pytest.importorskip("gguf")
    path, values = tmp_path / "model.gguf", values_of()["blocks.0.weight"]
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_array("tokenizer.ggml.tokens", [f"token {number}" for number in range(1000)])
    writer.add_float64("a.real", 0.5)
    writer.add_bool("a.flag", True)
    writer.add_custom_alignment(64)
    writer.add_array("comfy.gguf.orig_shape.reshaped", [4, 3, 256])
    quantised = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("norm", np.ones(3, np.float32))
    writer.add_tensor("reshaped", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = gguf.quants.dequantize(quantised, gguf.GGMLQuantizationType.Q8_0).reshape(4, 3, 256)
    for version in (3, 2):
        path.write_bytes(b"GGUF" + struct.pack("<I", version) + path.read_bytes()[8:])
        with open_tensors(path) as file:
            assert file.metadata["a.real"] == "0.5"
            assert file.metadata["a.flag"] == "true"
            assert np.array_equal(file.read("reshaped"), expected)


def test_rows_are_those_of_the_whole_tensor_also_within_blocks_and_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(container, "_STEP", 64)
    values = np.random.default_rng(0).standard_normal((24, 96)).astype(np.float32)
    container.write(
        tmp_path / "a.gguf", [GgufTensor("w", (24, 96), "q8_0")], lambda tensor, rows: encoded(tensor, values[rows]), {}
    )
    with GgufFile(tmp_path / "a.gguf") as file:
        whole = file.read("w")
        # As if ComfyUI-GGUF had reshaped it: rows of the original shape end within blocks.
        file.tensors["w"] = dataclasses.replace(file.tensors["w"], shape=(192, 12))
        for first, last in ((0, 1), (3, 9), (5, 5), (100, 192)):
            assert np.array_equal(file.read("w", slice(first, last)), whole.reshape(192, 12)[first:last])
    assert np.allclose(whole, values, atol=0.02)  # half a step of 8 bits


def test_names_of_llama_cpp_are_those_of_gguf():
    gguf = pytest.importorskip("gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 3)
    attention = [f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    modules = [
        *attention,
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
        "input_layernorm",
        "post_attention_layernorm",
    ]
    for name in ("model.embed_tokens", "model.norm", "lm_head", *(f"model.layers.2.{module}" for module in modules)):
        theirs = names.get_name(name) + ".weight"
        assert qwen3.from_llama_cpp(theirs) == f"{name}.weight"
        assert qwen3.to_llama_cpp(f"{name}.weight") == theirs
    assert qwen3.from_llama_cpp("text_encoders.llm.blk.0.attn_q.weight") == (
        "text_encoders.llm.model.layers.0.self_attn.q_proj.weight"
    )


def text(value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def number(key: str, value: int, kind: int = 4) -> bytes:
    return text(key) + struct.pack("<I", kind) + struct.pack("<I", value)


def tensor(name: bytes | str = "w", shape=(32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def raw(*items: bytes, tensors=None, keys=None, version: int = 3, data: bytes = bytes(128)) -> bytes:
    """A file of these keys and tensors: a tensor is an item after the first `keys`."""
    keys = 0 if keys is None else keys
    count = len(items) - keys if tensors is None else tensors
    header = b"GGUF" + struct.pack("<IQQ", version, count, keys) + b"".join(items)
    return header + bytes(-len(header) % 32) + data


def array(key: str, kind: int, count: int, data: bytes = b"") -> bytes:
    return text(key) + struct.pack("<IIQ", 9, kind, count) + data


NEST = struct.pack("<IQ", 9, 1)

HOSTILE = {
    "version 1": (raw(version=1), "version 1, expected 2 or 3"),
    "big-endian": (raw(version=3 << 24), "big-endian"),
    "only its magic": (b"GGUF", "cut off"),
    "2^60 tensors": (raw(tensors=2**60), "claims 1.15292e+18 tensors"),
    "2^60 keys": (raw(tensors=0, keys=2**60), "claims 1.15292e+18 keys"),
    "a string of 2^60 bytes": (raw(struct.pack("<Q", 2**60), keys=1, tensors=0), "a key has"),
    "a value of 2^60 bytes": (raw(text("k") + struct.pack("<IQ", 8, 2**60), keys=1), "cut off"),
    "2^60 strings": (raw(array("k", 8, 2**60), keys=1), "claims 1.15292e+18 items"),
    "2^60 numbers": (raw(array("k", 4, 2**60), keys=1), "cut off"),
    "nested arrays": (raw(array("k", 9, 1, NEST * 500), keys=1), "nested too deeply"),
    "type of a value": (raw(number("k", 1, 99), keys=1), "'k' has type 99"),
    "a key twice": (raw(number("k", 1), number("k", 1), keys=2), "the key 'k' twice"),
    "alignment 0": (raw(number("general.alignment", 0), keys=1), "general.alignment is 0"),
    "alignment 48": (raw(number("general.alignment", 48), keys=1), "general.alignment is 48"),
    "split": (raw(number("split.count", 3), keys=1), "one of 3 parts of a split GGUF file"),
    "name not UTF-8": (raw(tensor(b"\xff\xfe")), "name is not UTF-8"),
    "name in terminal colours": (raw(tensor("\x1b[31m\n", kind=99)), r"\x1b[31m\n"),
    "9 axes": (raw(tensor(shape=(1,) * 9)), "has 9 axes"),
    "unknown type": (raw(tensor(kind=99)), "has type 99"),
    "type that is not stored": (raw(tensor(kind=9)), "has type 9 (q8_1)"),
    "sizes overflow": (raw(tensor(shape=(2**62, 2**62))), "absurd"),
    "zero hides an absurd size": (raw(tensor(shape=(0, 2**62, 2**62))), "absurd"),
    "row is no block": (raw(tensor(shape=(48, 2), kind=8)), "blocks of 32 values"),
    "data cut off": (raw(tensor(shape=(33,))), "cut off"),
    "block cut off": (raw(tensor(shape=(128,), kind=8), data=bytes(135)), "should be the 136 bytes"),
    "offset outside": (raw(tensor(offset=2**62)), "cut off"),
    "offset not aligned": (raw(tensor(shape=(1,), offset=4)), "cut off or damaged"),
    "overlap": (raw(tensor("a", (16,)), tensor("b", (8,), offset=32)), "'b' overlaps 'a'"),
    "a name twice": (raw(tensor(), tensor()), "'w' twice"),
    "original shape": (raw(array("comfy.gguf.orig_shape.w", 5, 1, bytes(4)), tensor(), keys=1), "original shape"),
    "header cut off": (raw(tensor())[:40], "cut off"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused_in_one_line_and_little_memory(tmp_path, case):
    content, expected = HOSTILE[case]
    peak = peak_of_refusal(open_tensors, tmp_path / "hostile.gguf", content, expected)
    assert peak < 4_000_000  # the pieces in which a header is read


def test_a_scale_that_is_nan_is_refused_with_the_tensors_name(tmp_path):
    (tmp_path / "a.gguf").write_bytes(raw(tensor(shape=(32, 2), kind=8), data=b"\x00\x7e" + bytes(66)))
    with open_tensors(tmp_path / "a.gguf") as file, pytest.raises(UserError, match=r"a.gguf: w: 1 of 2 blocks of q8_0"):
        file.read("w")


def test_after_an_error_an_existing_file_is_unchanged(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"before")
    values = np.full((2, 32), np.nan, np.float32)
    with pytest.raises(ValueError, match="NaN or infinite values, which q8_0 does not have"):
        container.write(
            path, [GgufTensor("w", (2, 32), "q8_0")], lambda tensor, rows: encoded(tensor, values[rows]), {}
        )
    assert path.read_bytes() == b"before"
