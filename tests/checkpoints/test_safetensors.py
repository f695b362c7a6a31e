"""Our reader and writer against the format's own library, and against malicious files."""

import errno
import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from anima_jax.checkpoints.safetensors import DTYPES, SafetensorsFile, TensorInfo, write
from anima_jax.errors import UserError
from tests.checkpoints.hostile import peak_of_refusal

LIBRARY_DTYPES = sorted(set(DTYPES) - {"F8_E4M3", "F8_E5M2", "F8_E8M0"})  # the library's numpy side has no float8


@st.composite
def tensor_files(draw, codes):
    names = draw(
        st.lists(st.text(min_size=1, max_size=8).filter(lambda n: n != "__metadata__"), max_size=5, unique=True)
    )
    arrays = {}
    for name in names:
        dtype = DTYPES[draw(st.sampled_from(codes))]
        shape = draw(st.lists(st.integers(0, 4), max_size=4))
        count = int(np.prod(shape, dtype=int))
        if dtype == np.bool_:
            array = np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)), bool)
        else:
            size = count * dtype.itemsize
            array = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype)
        arrays[name] = array.reshape(shape)
    return arrays, draw(st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3))


fast = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_arrays(path, arrays, metadata=None):
    write(path, [TensorInfo(name, a.dtype, a.shape) for name, a in arrays.items()], arrays.__getitem__, metadata)


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (array.dtype, array.shape)
        assert actual[name].tobytes() == array.tobytes()


@fast
@given(tensor_files(LIBRARY_DTYPES))
def test_the_library_reads_what_we_write(tmp_path, file):
    arrays, metadata = file
    path = tmp_path / "ours.safetensors"
    write_arrays(path, arrays, metadata)
    assert_same(safetensors.numpy.load_file(path), arrays)
    with safetensors.safe_open(path, "np") as opened:
        assert (opened.metadata() or {}) == metadata


@fast
@given(tensor_files(LIBRARY_DTYPES))
def test_we_read_what_the_library_writes(tmp_path, file):
    arrays, metadata = file
    path = tmp_path / "theirs.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata or None)
    with SafetensorsFile(path) as opened:
        assert opened.metadata == metadata
        assert_same({name: opened.read(name) for name in opened.tensors}, arrays)


@fast
@given(tensor_files(sorted(DTYPES)))
def test_every_dtype_comes_back_bit_for_bit(tmp_path, file):
    arrays, metadata = file
    path = tmp_path / "file.safetensors"
    write_arrays(path, arrays, metadata)
    with SafetensorsFile(path) as opened:
        assert_same({name: opened.read(name) for name in opened.tensors}, arrays)
        assert all(tensor.start % tensor.dtype.itemsize == 0 for tensor in opened.tensors.values())


@pytest.mark.parametrize(("code", "torch_name"), [("F8_E4M3", "float8_e4m3fn"), ("F8_E5M2", "float8_e5m2")])
def test_float8_and_bfloat16_hold_the_values_that_torch_wrote(tmp_path, code, torch_name):
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    values = torch.tensor([0.0, -1.5, 448.0, 0.0625])
    save_file({"a": values.to(getattr(torch, torch_name)), "b": values.bfloat16()}, tmp_path / "t.safetensors")
    with SafetensorsFile(tmp_path / "t.safetensors") as opened:
        assert opened.tensors["a"].code == code
        assert opened.read("a").astype(np.float32).tolist() == values.tolist()
        assert opened.read("b").astype(np.float32).tolist() == values.tolist()


def test_powers_of_two_hold_the_values_that_torch_wrote(tmp_path):
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({"a": torch.tensor([0.5, 1.0, 2.0**100]).to(torch.float8_e8m0fnu)}, tmp_path / "t.safetensors")
    with SafetensorsFile(tmp_path / "t.safetensors") as opened:
        assert opened.tensors["a"].code == "F8_E8M0"
        assert opened.read("a").astype(np.float32).tolist() == [0.5, 1.0, 2.0**100]


def test_pairs_of_4_bit_floats_are_read_as_bytes(tmp_path):
    header = {"a": {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]}}
    (tmp_path / "t.safetensors").write_bytes(raw_file(header, bytes([1, 2, 3, 250])))
    with SafetensorsFile(tmp_path / "t.safetensors") as opened:
        assert opened.read("a").tolist() == [[1, 2], [3, 250]]


def test_a_transposed_array_is_written_in_its_own_order(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4).T
    write_arrays(tmp_path / "t.safetensors", {"a": array})
    np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / "t.safetensors")["a"], array)


# --- malicious files ---


def raw_file(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HOSTILE = {
    "empty": (b"", "is empty"),
    "three bytes": (b"abc", "not a safetensors file"),
    "header longer than the file": ((10**6).to_bytes(8, "little") + b"{}", "cut off"),
    "header of 2**63": ((2**63).to_bytes(8, "little") + b"{}", "cut off"),
    "header is a list": (raw_file([]), "not a safetensors file"),
    "header ends early": (raw_file(b'{"a":'), "entry of 'a'"),
    "text after the header": (raw_file(b"{} x"), "damaged"),
    "not UTF-8": (raw_file(b'{"\xff":1}'), "not UTF-8"),
    "lone surrogate": (raw_file(b'{"\\ud800":1}'), "valid string"),
    "entry is a number": (raw_file({"a": 1}), "entry of 'a'"),
    "entry lacks a key": (raw_file({"a": {"dtype": "F32", "shape": []}}), "entry of 'a'"),
    "key twice in an entry": (
        raw_file(b'{"a":{"dtype":"F32","dtype":"F32","shape":[],"data_offsets":[0,4]}}', b"0000"),
        "each once",
    ),
    "name twice": (
        raw_file(b'{"a":%s,"a":%s}' % (json.dumps(entry()).encode(), json.dumps(entry()).encode()), bytes(8)),
        "'a' twice",
    ),
    "metadata twice": (raw_file(b'{"__metadata__":{},"__metadata__":{}}'), "twice"),
    "metadata is nested": (raw_file({"__metadata__": {"a": {"b": "c"}}}), "expected a string"),
    "metadata is a number": (raw_file({"__metadata__": 1}), "damaged"),
    "unknown dtype": (raw_file({"a": entry("F33")}, bytes(8)), "did you mean 'F32'"),
    "dtype is a list": (raw_file({"a": entry(["F32"])}, bytes(8)), "has dtype"),
    "negative size": (raw_file({"a": entry(shape=[-2])}, bytes(8)), "has shape"),
    "fractional size": (raw_file({"a": entry(shape=[2.0])}, bytes(8)), "has shape"),
    "boolean size": (raw_file({"a": entry("U8", [True], [0, 1])}, bytes(1)), "has shape"),
    "size of 5000 digits": (
        raw_file(b'{"a":{"dtype":"U8","shape":[1%s],"data_offsets":[0,0]}}' % (b"0" * 5000)),
        "entry",
    ),
    "sizes overflow": (raw_file({"a": entry(shape=[2**62, 2**62], offsets=[0, 8])}, bytes(8)), "has 8 bytes"),
    "zero hides an absurd size": (raw_file({"a": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}), "has 0 bytes"),
    "65 axes": (raw_file({"a": entry(shape=[1] * 65, offsets=[0, 4])}, bytes(4)), "has shape"),
    "size is not shape times dtype": (raw_file({"a": entry(shape=[3])}, bytes(8)), "has 8 bytes"),
    "range backwards": (raw_file({"a": entry(offsets=[8, 0])}, bytes(8)), "data_offsets"),
    "range beyond the file": (raw_file({"a": entry(shape=[2**40], offsets=[0, 2**42])}, bytes(8)), "cut off"),
    "data cut off": (raw_file({"a": entry()}, bytes(7)), "cut off"),
    "overlap": (raw_file({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "overlaps"),
    "hole": (raw_file({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "belong to no tensor"),
    "bytes at the end": (raw_file({"a": entry()}, bytes(9)), "belong to no tensor"),
    "bytes before the first": (raw_file({"a": entry(offsets=[4, 12])}, bytes(12)), "belong to no tensor"),
    "pickle, zipped": (b"PK\x03\x04" + bytes(60), "pickle"),
    "pickle, plain": (b"\x80\x04\x95" + bytes(60), "pickle"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs"),
    "web page": (b"<!DOCTYPE html><html>login</html>", "web page"),
    "GGUF": (b"GGUF\x03\x00\x00\x00" + bytes(60), "GGUF"),
    "depth bomb": (raw_file(b'{"a":' + b"[" * 10**6), "entry of 'a'"),
    "depth bomb in metadata": (raw_file(b'{"__metadata__":{"a":' + b"[" * 10**6), "expected a string"),
    "million numbers": (raw_file(b'{"a":{"shape":[' + b"0," * 10**6 + b"0]}}"), "entry of 'a'"),
    "name in terminal colours": (raw_file({"\x1b[31m\n": entry("F33")}, bytes(8)), r"\x1b[31m\n"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused_in_one_line_and_little_memory(tmp_path, case):
    content, expected = HOSTILE[case]
    peak = peak_of_refusal(SafetensorsFile, tmp_path / "hostile.safetensors", content, expected)
    assert peak < 10 * len(content) + 500_000  # a few copies of the header's text and no more


@fast
@given(st.binary(max_size=300), st.booleans())
def test_random_bytes_are_refused_and_never_crash(tmp_path, noise, framed):
    assume(not framed or noise.strip() != b"}")  # a header of no tensors is whole
    path = tmp_path / "noise.safetensors"
    path.write_bytes(raw_file(b"{" + noise) if framed else noise)
    with pytest.raises(UserError):
        SafetensorsFile(path)


@fast
@given(st.data())
def test_a_damaged_file_is_refused_or_read_within_its_bounds(tmp_path, data):
    content = bytearray(raw_file({"a": entry(), "b": entry("U8", [4], [8, 12])}, bytes(12)))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    try:
        with SafetensorsFile(path) as opened:
            assert sum(opened.read(name).nbytes for name in opened.tensors) == 12
    except UserError:
        pass


def test_missing_file_folder_and_pipe_are_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        SafetensorsFile(tmp_path / "absent.safetensors")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"is a folder.*it contains model\.safetensors"):
        SafetensorsFile(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not an ordinary file"):
        SafetensorsFile(tmp_path / "pipe")


def test_file_cut_off_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "a.safetensors"
    write_arrays(path, {"a": np.zeros(10**6, np.float32)})
    with SafetensorsFile(path) as opened:
        os.truncate(path, 10**6)
        with pytest.raises(UserError, match="ends early"):
            opened.read("a")


def test_hub_address_without_network_says_once_where_to_put_the_file(monkeypatch, caplog):
    hub = pytest.importorskip("huggingface_hub")

    def offline(*_args, **_kwargs):
        hub.logging.get_logger("huggingface_hub.utils").warning("Retrying in 1s")
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(hub, "get_hf_file_metadata", offline)
    with pytest.raises(
        UserError, match=r"no route.*fetch some/file\.safetensors from https://huggingface\.co/owner/repo"
    ):
        SafetensorsFile("hf://owner/repo/some/file.safetensors")
    assert not caplog.records
    with pytest.raises(UserError, match="expected hf://owner/repo/file"):
        SafetensorsFile("hf://owner/repo")


# --- writing ---


@pytest.fixture
def old_file(tmp_path):
    path = tmp_path / "out.safetensors"
    write_arrays(path, {"old": np.ones(3, np.float32)})
    return path


def assert_untouched(path):
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert safetensors.numpy.load_file(path)["old"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError, UserError])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(old_file, failure):
    def array_of(name):
        if name == "b":
            raise failure
        return np.zeros(2, np.float32)

    with pytest.raises(failure):
        write(old_file, [TensorInfo(name, np.dtype(np.float32), (2,)) for name in "ab"], array_of)
    assert_untouched(old_file)


def test_full_disk_is_one_line_and_leaves_the_old_file(old_file, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"out\.safetensors: cannot be written: the disk is full"):
        write_arrays(old_file, {"new": np.zeros(3, np.float32)})
    assert_untouched(old_file)


def test_array_that_is_not_as_announced_is_refused(old_file):
    with pytest.raises(ValueError, match="announced"):
        write(old_file, [TensorInfo("a", np.dtype(np.float32), (2,))], lambda _: np.zeros(2, ml_dtypes.bfloat16))
    assert_untouched(old_file)


def test_unwritable_places_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        write_arrays(tmp_path / "absent" / "a.safetensors", {})
    with pytest.raises(UserError, match="not an ordinary file"):
        write_arrays(tmp_path, {})
    with pytest.raises(UserError, match="not an ordinary file"):
        write_arrays(os.devnull, {})


def test_writing_through_a_link_keeps_the_link(old_file, tmp_path):
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "link.safetensors"
    link.symlink_to(old_file)
    write_arrays(link, {"new": np.zeros(3, np.float32)})
    assert link.is_symlink()
    assert list(safetensors.numpy.load_file(old_file)) == ["new"]


def test_a_header_of_a_million_tensors_is_refused_at_the_limit(tmp_path):
    entry = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(entry % number for number in range(200_000)) + "}").encode()
    path = tmp_path / "many.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(UserError, match="the header has more than 100000 tensors"):
        SafetensorsFile(path)
