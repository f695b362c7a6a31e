import concurrent.futures
import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time

import fsspec
import hypothesis.extra.numpy as arrays_of
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from anima_jax.data.store import OPEN_READERS, Store, pack, unpack
from anima_jax.errors import UserError
from tests.data.store_killed import PARTS, records_of

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.uint8, np.int32)
# As the format names them (its README).
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8", "int32": "I32"}


def key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def some_records(name: str, count: int = 3) -> list[tuple[bytes, bytes]]:
    return [(key(f"{name} {row}"), f"{name} {row} ".encode() * 1000) for row in range(count)]


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def only(folder: pathlib.Path, pattern: str) -> pathlib.Path:
    (path,) = folder.glob(pattern)
    return path


def test_the_store_needs_no_jax_and_loads_array_record_on_use():
    code = (
        "import sys, anima_jax.data.store; "
        "print([m for m in ('jax', 'flax', 'array_record', 'etils', 'grain') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# ---- records --------------------------------------------------------------------------------------------------------


@st.composite
def named_arrays(draw):
    def array():
        shape = draw(arrays_of.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
        dtype = np.dtype(draw(st.sampled_from(DTYPES)))
        count = int(np.prod(shape)) * dtype.itemsize
        array = np.frombuffer(draw(st.binary(min_size=count, max_size=count)), dtype).reshape(shape)
        return array.T if draw(st.booleans()) else array

    names = draw(st.lists(st.text(max_size=5).filter(lambda name: name != "__metadata__"), max_size=4, unique=True))
    return {name: array() for name in names}


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=10), max_size=3), named_arrays())
def test_unpack_inverts_pack(header, arrays):
    found_header, found = unpack(pack(header, arrays))
    assert found_header == header
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()  # also of NaNs
        assert found[name].flags.aligned


@given(named_arrays())
def test_records_are_safetensors_files(arrays):
    # The format's own library, both ways; its writer for numpy has no bfloat16.
    theirs = dict(safetensors.deserialize(pack({"a": "b"}, arrays)))
    assert theirs == {
        name: {"dtype": CODES[array.dtype.name], "shape": list(array.shape), "data": bytearray(array.tobytes())}
        for name, array in arrays.items()
    }
    plain = {name: array.copy("C") for name, array in arrays.items() if array.dtype != ml_dtypes.bfloat16}
    header, ours = unpack(safetensors.numpy.save(plain, {"a": "b"}))
    assert header == {"a": "b"}
    assert {name: array.tobytes() for name, array in ours.items()} == {n: a.tobytes() for n, a in plain.items()}


def test_unpacked_arrays_share_the_records_memory():
    record = pack({}, {"latents": np.arange(12.0)})
    array = unpack(record)[1]["latents"]
    assert np.shares_memory(array, np.frombuffer(record, np.uint8))


def test_a_file_name_that_is_not_unicode_is_stored_with_escapes():
    assert unpack(pack({"name": "caf\udce9.png"}, {}))[0] == {"name": "caf\\udce9.png"}


@given(named_arrays(), st.data())
def test_a_damaged_record_is_an_error_of_one_line(arrays, data):
    record = pack({"caption": "a cat"}, arrays)
    with pytest.raises(UserError, match=r"^damaged record$"):
        unpack(record[: data.draw(st.integers(0, len(record) - 1))])
    at, bit = data.draw(st.integers(0, len(record) - 1)), data.draw(st.integers(0, 7))
    flipped = bytearray(record)
    flipped[at] ^= 1 << bit
    with contextlib.suppress(UserError):  # and nothing else; a flip inside an array is ArrayRecord's to find
        unpack(bytes(flipped))


# ---- keys and parts -------------------------------------------------------------------------------------------------


def test_written_records_are_found_at_once_and_by_later_stores(tmp_path):
    store, records = Store(tmp_path / "cache"), [*some_records("a"), (key("empty"), b"")]
    assert len(store) == 0
    assert key("empty") not in store
    store.write_part(records)
    store.write_part(some_records("b"))
    for seen in (store, Store(tmp_path / "cache")):
        assert {each: seen.read(each) for each in seen.keys()} == dict(records + some_records("b"))  # noqa: SIM118
        assert len(seen) == len(records) + 3
        assert all(each in seen for each, _ in records)
        with pytest.raises(KeyError):
            seen.read(key("another"))


@settings(max_examples=30)  # each writes files
@given(st.data())
def test_any_keys_are_distinguished(tmp_path_factory, data):
    # Keys of few different bytes: beginnings in common, zeros at the end, the same key in two parts.
    a_key = st.lists(st.sampled_from([0, 1, 255]), min_size=2, max_size=3).map(lambda few: bytes(few).ljust(32, b"\0"))
    parts = data.draw(st.lists(st.lists(a_key, min_size=1, max_size=4, unique=True), min_size=1, max_size=3))
    folder = tmp_path_factory.mktemp("cache")
    store = Store(folder)
    for keys in parts:
        store.write_part([(each, each * 2) for each in keys])
    expected = {each: each * 2 for keys in parts for each in keys}
    for seen in (store, Store(folder)):
        assert len(seen) == len(expected)
        assert {each: seen.read(each) for each in seen.keys()} == expected  # noqa: SIM118
        assert data.draw(a_key.filter(lambda other: other not in expected) | st.just(b"\2" * 32)) not in seen


def test_equal_records_give_equal_files_and_another_part_changes_none(tmp_path):
    one, two = Store(tmp_path / "one"), Store(tmp_path / "two")
    one.write_part(some_records("a"))
    before = contents(tmp_path / "one")
    one.write_part(some_records("b"))
    one.write_part(some_records("a"))
    two.write_part(some_records("b"))
    two.write_part(some_records("a"))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert before.items() < contents(tmp_path / "one").items()
    assert len(before) == 2


def test_refresh_sees_what_others_added_and_removed(tmp_path):
    one, two = Store(tmp_path), Store(tmp_path)
    assert len(one) == len(two) == 0
    one.write_part(some_records("a"))
    one.write_part(some_records("b"))
    assert len(two) == 0
    two.refresh()
    assert sorted(two.keys()) == sorted(one.keys())
    one.clear()
    two.refresh()
    assert len(two) == 0


def test_clear_removes_only_the_stores_files(tmp_path):
    store = Store(tmp_path)
    store.write_part(some_records("a"))
    (tmp_path / "notes.keys").write_text("mine")
    (tmp_path / "a.array_record").write_text("mine")
    store.clear()
    assert len(store) == 0
    assert contents(tmp_path) == {"notes.keys": b"mine", "a.array_record": b"mine"}
    store.write_part([(each, record[::-1]) for each, record in some_records("a")])
    assert all(store.read(each) == record[::-1] for each, record in some_records("a"))
    Store(tmp_path / "nowhere").clear()


def test_many_threads_read_while_parts_are_added(tmp_path):
    store = Store(tmp_path)
    store.write_part(some_records("0", 20))
    done = False

    def read(seed: int) -> int:
        rng, count = random.Random(seed), 0
        while not done or count < 50:
            each, record = rng.choice(some_records("0", 20))
            assert store.read(each) == record
            count += 1
        return count

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        readers = [pool.submit(read, seed) for seed in range(8)]
        try:
            for part in range(1, 10):
                store.write_part(some_records(str(part)))
                assert store.read(key(f"{part} 2")) == f"{part} 2 ".encode() * 1000
                store.refresh()
        finally:
            done = True
        assert all(reader.result() >= 50 for reader in readers)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors as Linux shows them")
def test_open_files_stay_few(tmp_path):
    stores = [Store(tmp_path / name) for name in "ab"]
    for number in range(OPEN_READERS // 2 + 10):
        for store in stores:
            store.write_part([(key(str(number)), str(number).encode())])
            assert store.read(key(str(number))) == str(number).encode()
    opened = [os.readlink(path) for path in pathlib.Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert sum(name.startswith(str(tmp_path)) for name in opened) == OPEN_READERS


# ---- killed and concurrent processes --------------------------------------------------------------------------------


def start(folder: pathlib.Path, turn: int = 0, of: int = 1, most: int = PARTS) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.data.store_killed", folder, *map(str, (turn, of, most))]
    return subprocess.Popen(command, cwd=pathlib.Path(__file__).parents[2])


def listed(folder: pathlib.Path) -> int:
    return sum(name.endswith(".keys") for name in os.listdir(folder))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    store = Store(folder)
    began = time.monotonic()
    for part in range(PARTS):
        store.write_part(records_of(part))
    return contents(folder), (time.monotonic() - began) / PARTS


def test_killed_at_ten_random_moments_the_finished_store_is_the_same(tmp_path, undisturbed):
    files, seconds_a_part = undisturbed
    rng = random.Random(0)
    for _ in range(10):
        before = listed(tmp_path)
        process = start(tmp_path, most=PARTS // 10 - 1)  # however late the kill comes, the last one finds it unfinished
        while listed(tmp_path) == before and process.poll() is None:
            time.sleep(0.0005)
        time.sleep(rng.uniform(0.0, 2.0) * seconds_a_part)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        found, expected = Store(tmp_path), dict(pair for part in range(PARTS) for pair in records_of(part))
        assert before * 3 < len(found) < len(expected)
        assert all(found.read(each) == expected[each] for each in found.keys())  # noqa: SIM118
    assert start(tmp_path).wait() == 0
    assert contents(tmp_path) == files  # nothing is left of the killed ones either


def test_two_processes_fill_one_folder(tmp_path, undisturbed):
    processes = [start(tmp_path, turn, 2) for turn in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert contents(tmp_path) == undisturbed[0]


def locked(path: pathlib.Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_living_writers_file_is_left_alone(tmp_path, undisturbed):
    process = start(tmp_path)
    try:
        # Between its creation and its lock a file looks abandoned; its writer, which then finds it gone, makes another.
        while not (unfinished := [path for path in tmp_path.glob(".*.tmp") if locked(path)]):
            process.send_signal(signal.SIGCONT)
            time.sleep(0.003)
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            assert process.poll() is None
        Store(tmp_path).write_part(some_records("a"))
        assert list(tmp_path.glob(".*.tmp")) == unfinished
    finally:
        process.send_signal(signal.SIGCONT)
    assert process.wait() == 0
    assert contents(tmp_path).items() > undisturbed[0].items()


def test_leftovers_of_other_hosts_go_when_they_are_old(tmp_path):
    young, old = (tmp_path / f".{digit * 32}.array_record.elsewhere.0123abcd.tmp" for digit in "ab")
    orphan, young_orphan = (tmp_path / f"{digit * 32}.array_record" for digit in "cd")
    mine = tmp_path / "picture.tmp"
    for path in (young, old, orphan, young_orphan, mine):
        path.write_bytes(b"")
    for path in (old, orphan, mine):
        os.utime(path, (0, 0))
    Store(tmp_path).write_part(some_records("a"))
    left = [path for path in (young, old, orphan, young_orphan, mine) if path.exists()]
    assert left == [young, young_orphan, mine]


WRITING = """
    import sys, time
    from anima_jax.checkpoints.locations import replacing
    with replacing(sys.argv[1]) as file:
        file.write(b"half")
        print("writing", flush=True)
        time.sleep(60)
"""


def test_a_killed_writers_memo_goes_and_a_living_ones_stays(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(WRITING), str(tmp_path / "files-0123456789abcdef.jsonl")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        (unfinished,) = tmp_path.iterdir()
        Store(tmp_path).write_part(some_records("a"))
        assert unfinished.exists()
        process.kill()
    Store(tmp_path).write_part(some_records("b"))
    assert not unfinished.exists()


def test_leftovers_go_when_there_is_nothing_to_write(tmp_path):
    (tmp_path / ".files-0123456789abcdef.jsonl.0123abcd.tmp").touch()
    Store(tmp_path).sweep()
    assert list(tmp_path.iterdir()) == []
    Store(tmp_path / "nowhere").sweep()
    assert list(tmp_path.iterdir()) == []


# ---- damage and mistakes --------------------------------------------------------------------------------------------


def cut(path: pathlib.Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("*.array_record", cut),
        ("*.array_record", os.unlink),
        ("*.array_record", lambda path: path.write_bytes(b"")),
        ("*.keys", cut),
        ("*.keys", flip),
        ("*.keys", lambda path: path.write_bytes(b"")),
        ("*.keys", lambda path: path.write_bytes(b"\xff{[1]\n")),
        ("*.keys", lambda path: path.write_bytes(b"[]\n")),
    ],
)
def test_a_damaged_part_counts_as_absent_and_is_written_again(tmp_path, caplog, pattern, damage):
    Store(tmp_path).write_part(some_records("a"))
    files = contents(tmp_path)
    damaged = only(tmp_path, pattern)
    damage(damaged)
    store = Store(tmp_path)
    store.write_part(some_records("b"))
    with caplog.at_level(logging.WARNING):
        assert len(store) == 3
        store.refresh()
    assert [damaged.stem in record.getMessage() for record in caplog.records] == [True]
    store.write_part(some_records("a"))
    assert contents(tmp_path).items() > files.items()
    assert {each: Store(tmp_path).read(each) for each, _ in some_records("a")} == dict(some_records("a"))


def test_parts_whose_files_were_swapped_are_noticed_and_written_again(tmp_path, caplog):
    store = Store(tmp_path)
    parts = [some_records("a"), [(key(f"b {row}"), f"b {row} ".encode() * 1000) for row in range(3)]]
    for part in parts:
        store.write_part(part)
    one, two = sorted(tmp_path.glob("*.array_record"))
    assert one.stat().st_size == two.stat().st_size
    one.rename(tmp_path / "other")
    two.rename(one)
    (tmp_path / "other").rename(two)
    swapped = Store(tmp_path)
    assert len(swapped) == 0
    assert sum("its file is another part's, or damaged" in message for message in caplog.messages) == 2
    for part in parts:
        swapped.write_part(part)
    again = Store(tmp_path)
    assert all(again.read(name) == record for name, record in itertools.chain(*parts))


def test_a_part_without_the_checksum_of_its_ends_is_read(tmp_path):
    Store(tmp_path).write_part(some_records("a"))
    listing = only(tmp_path, "*.keys")
    head, _, keys = listing.read_bytes().partition(b"\n")
    old = {name: value for name, value in json.loads(head).items() if name != "ends"}
    listing.write_bytes(json.dumps(old).encode() + b"\n" + keys)
    assert all(Store(tmp_path).read(name) == record for name, record in some_records("a"))


def test_a_flipped_bit_in_a_record_is_found_when_it_is_read(tmp_path):
    Store(tmp_path).write_part(some_records("a"))
    path = only(tmp_path, "*.array_record")
    data = bytearray(path.read_bytes())
    data[data.index(b"a 1 a 1 ")] ^= 1
    path.write_bytes(data)
    store = Store(tmp_path)
    assert store.read(key("a 0")) == some_records("a")[0][1]
    with pytest.raises(
        UserError, match=rf"{path.name}: record 1 cannot be read: .*hash mismatch.*; delete this file, "
    ):
        store.read(key("a 1"))


def test_a_part_that_is_deleted_while_in_use_is_named(tmp_path):
    store = Store(tmp_path)
    store.write_part(some_records("a"))
    path = only(tmp_path, "*.array_record")
    path.unlink()
    with pytest.raises(UserError, match=rf"{path.name}: .*No such file or directory"):
        store.read(key("a 0"))


def test_a_cache_of_another_format_is_an_error_until_it_is_cleared(tmp_path):
    Store(tmp_path).write_part(some_records("a"))
    path = only(tmp_path, "*.keys")
    path.write_bytes(path.read_bytes().replace(b'"format": 1', b'"format": 2'))
    store = Store(tmp_path)
    with pytest.raises(UserError, match=rf"{path.name}: is of cache format 2, expected 1; .*--regenerate_cache"):
        len(store)
    store.clear()
    assert len(store) == 0


def test_a_full_disk_leaves_nothing(tmp_path):
    store = Store(tmp_path)
    store.write_part(some_records("a"))
    files, limits = contents(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    records = [(each, os.urandom(200_000)) for each, _ in some_records("b")]
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))  # ends a file as a full disk does
        reason = r"the file would be larger than this process may write \(ulimit -f\)"
        with pytest.raises(UserError, match=rf"^{tmp_path}: cannot be written: {reason}$"):
            store.write_part(records)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == files
    assert key("b 0") not in store
    store.write_part(records)
    assert store.read(key("b 0")) == records[0][1]


def test_an_impossible_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/cache: cannot be written: Not a directory; set cache_dir "):
        Store(tmp_path / "file" / "cache").write_part(some_records("a"))
    with pytest.raises(UserError, match=r"file: cannot be read: Not a directory"):
        len(Store(tmp_path / "file"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_can_be_read(tmp_path):
    Store(tmp_path).write_part(some_records("a"))
    tmp_path.chmod(0o555)
    store = Store(tmp_path)
    assert store.read(key("a 0")) == some_records("a")[0][1]
    denied = "cannot be written: Permission denied; set cache_dir to a folder that can"
    with pytest.raises(UserError, match=rf"^{tmp_path}: {denied}$"):
        store.write_part(some_records("b"))


# ---- a folder that is far away --------------------------------------------------------------------------------------


def test_parts_are_written_to_both_folders_and_copied_before_they_are_read(tmp_path):
    far, near, other = tmp_path / "far", tmp_path / "near", tmp_path / "other"
    Store(far, local_dir=near).write_part(some_records("a"))
    Store(far).write_part(some_records("b"))
    files = {name: data for name, data in contents(far).items() if name.endswith(".array_record")}
    assert len(contents(far)) == 4
    assert contents(near).items() < files.items()
    store = Store(far, local_dir=other)
    assert {each: store.read(each) for each in store.keys()} == dict(some_records("a") + some_records("b"))  # noqa: SIM118
    assert contents(other) == files
    store.clear()
    assert contents(far) == contents(other) == {}


def test_a_copy_that_was_cut_off_or_is_of_another_part_is_replaced(tmp_path):
    far, near = tmp_path / "far", tmp_path / "near"
    Store(far, local_dir=near).write_part(some_records("a"))
    cut(only(near, "*.array_record"))
    assert Store(far, local_dir=near).read(key("a 2")) == some_records("a")[2][1]
    assert contents(near).items() < contents(far).items()


def test_an_impossible_folder_for_copies_is_named_at_the_first_read(tmp_path):
    Store(tmp_path / "far").write_part(some_records("a"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/near: cannot be written: Not a directory; set cache_local_dir to"):
        Store(tmp_path / "far", local_dir=tmp_path / "file" / "near").read(key("a 0"))


def test_an_old_copy_stays(tmp_path):
    far, near = tmp_path / "far", tmp_path / "near"
    Store(far, local_dir=near).write_part(some_records("a"))
    os.utime(only(near, "*.array_record"), (0, 0))
    Store(far, local_dir=near).write_part(some_records("b"))
    assert len(contents(near)) == 2


class Bucket(MemoryFileSystem):
    """An object store in memory, which remembers listings until it is told not to, as gcsfs does."""

    protocol = ("gs", "gcs")
    listings: dict = {}  # noqa: RUF012 - fsspec's own way

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("gs://").strip("/")

    def ls(self, path, detail=True, **_):
        path = self._strip_protocol(path)
        if path not in self.listings:
            self.listings[path] = super().ls(path, detail=True)
        return self.listings[path] if detail else [entry["name"] for entry in self.listings[path]]

    def invalidate_cache(self, path=None):
        self.listings.clear()


def test_an_address_works_as_a_folder_does(tmp_path):
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    one, two = (Store("gs://bucket/cache", local_dir=tmp_path / name) for name in ("one", "two"))
    assert len(one) == 0
    one.write_part(some_records("a"))
    two.refresh()
    one.write_part(some_records("b"))
    two.refresh()
    assert {each: two.read(each) for each in two.keys()} == dict(some_records("a") + some_records("b"))  # noqa: SIM118
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    remote = epath.Path("gs://bucket/cache")
    records = sorted(path.name for path in remote.iterdir() if path.name.endswith(".array_record"))
    (remote / records[0]).write_bytes(b"cut off")
    assert len(Store("gs://bucket/cache", local_dir=tmp_path / "one")) == 3
    two.clear()
    one.refresh()
    assert len(one) == len(two) == 0


def test_an_address_needs_a_folder_on_this_machine(tmp_path):
    with pytest.raises(UserError, match=r"^gs://bucket/cache: .*cache_local_dir"):
        Store("gs://bucket/cache")
    with pytest.raises(UserError, match=r"cache_local_dir is gs://bucket/near, expected a folder on this machine"):
        Store(tmp_path, local_dir="gs://bucket/near")


def test_an_unreachable_address_is_an_error_of_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^s3://bucket/cache: cannot be read: .*s3fs"):
        len(Store("s3://bucket/cache", local_dir=tmp_path))
