"""Checkpoints survive a power failure, and a changed byte is noticed: the checkpoint before is taken."""

import contextlib
import gc
import logging
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anima_jax.checkpoints.orbax import RunCheckpoints, errors_reported_once
from anima_jax.errors import UserError
from anima_jax.training.run_folder import find_run
from tests.disks import LoopDisk
from tests.ports import free_port


def items(step: int) -> dict:
    return {
        "params": {"w": jax.random.normal(jax.random.key(step), (50, 40)), "b": jnp.full(3, step)},
        "counters": {"step": jnp.int32(step)},
    }


def saved(folder, *steps: int, keep=None) -> None:
    checkpoints = RunCheckpoints(folder, keep=keep)
    for step in steps:
        checkpoints.save(step, items(step), {"step": step})
    checkpoints.close()
    assert checkpoints.failure is None


def check_restores(folder, step: int) -> None:
    checkpoints = RunCheckpoints(folder, keep=None)
    assert checkpoints.newest_intact() == step
    assert checkpoints.metadata(step) == {"step": step}
    found = checkpoints.restore(step, items(0))
    for name, expected in jax.tree.leaves_with_path(items(step)):
        (value,) = (leaf for path, leaf in jax.tree.leaves_with_path(found) if path == name)
        np.testing.assert_array_equal(value, expected)


def test_a_checkpoint_that_is_written_survives_a_power_failure(tmp_path):
    with contextlib.closing(LoopDisk(tmp_path)) as disk:
        saved(disk.folder / "run" / "checkpoints", 1, 2, keep=1)  # the first is deleted, as the second is there
        after = disk.after_a_power_failure() / "run" / "checkpoints"
        check_restores(after, 2)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    saved(folder, 1, 2)
    return folder


@pytest.fixture
def damaged(two, tmp_path):
    """A copy of the two checkpoints, to damage."""
    return shutil.copytree(two, tmp_path / "checkpoints")


def files_of(checkpoint) -> list:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)


def test_a_flipped_bit_in_any_file_is_noticed(two, tmp_path):
    rng = random.Random(0)
    for number, original in enumerate(files_of(two / "2")):
        folder = shutil.copytree(two, tmp_path / str(number))
        path = folder / original.relative_to(two)
        data = bytearray(path.read_bytes())
        where = rng.randrange(len(data)) if path.name != "checksums.json" else data.index(b'"files"') + 3
        data[where] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        assert RunCheckpoints(folder, keep=None).newest_intact() == 1, path.name


@pytest.mark.parametrize("what", ["cut", "gone", "_CHECKPOINT_METADATA", "checksums"])
def test_a_damaged_checkpoint_is_named_in_one_line_and_kept_and_the_one_before_is_taken(damaged, what, caplog):
    largest = max(files_of(damaged / "2"), key=lambda path: path.stat().st_size)
    if what == "cut":
        largest.write_bytes(largest.read_bytes()[:-1])
    elif what == "gone":
        largest.unlink()
    elif what == "checksums":
        (damaged / "2" / "checksums.json").write_text("{")
    else:
        (damaged / "2" / what).unlink()
    kept = files_of(damaged / "2")
    with caplog.at_level(logging.WARNING), errors_reported_once():
        check_restores(damaged, 1)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"{damaged / '2'}: is damaged: ")
    assert message.endswith("the run goes on from step 1, and it is kept as 2.damaged")
    assert "\n" not in message
    assert [path.name for path in files_of(damaged / "2.damaged")] == [path.name for path in kept]
    saved(damaged, 2, 3, keep=1)  # which neither deletes what was set aside nor fails because of it
    assert sorted(path.name for path in damaged.iterdir()) == ["2.damaged", "3"]


def test_if_all_are_damaged_each_is_named_and_nothing_is_renamed(damaged):
    for step in ("1", "2"):
        for path in files_of(damaged / step):
            path.write_bytes(b"")
    with pytest.raises(UserError) as refused, errors_reported_once():
        RunCheckpoints(damaged, keep=None).newest_intact()
    *named, advice = refused.value.messages
    assert [message[: len(f"{damaged}/1: is dam")] for message in named] == [
        f"{damaged}/{step}: is dam" for step in (2, 1)
    ]
    assert "restore one from a copy, or rename this folder" in advice
    assert sorted(path.name for path in damaged.iterdir()) == ["1", "2"]


def test_a_checkpoint_of_an_earlier_version_has_no_checksums_and_is_restored(damaged):
    (damaged / "2" / "checksums.json").unlink()
    check_restores(damaged, 2)


def test_a_checkpoint_of_an_earlier_version_whose_metadata_is_damaged_is_set_aside(damaged, caplog):
    (damaged / "2" / "checksums.json").unlink()
    (damaged / "2" / "_CHECKPOINT_METADATA").write_text("{")
    with caplog.at_level(logging.WARNING), errors_reported_once():
        check_restores(damaged, 1)
    assert len(caplog.records) == 1


RESTORE = """
    import logging, sys
    from anima_jax.checkpoints.orbax import RunCheckpoints, errors_reported_once
    from anima_jax.errors import UserError
    from tests.checkpoints.test_durable import items
    logging.basicConfig()
    with errors_reported_once():
        try:
            RunCheckpoints(sys.argv[1], keep=None).restore(2, items(0))
        except UserError as error:
            print(error, file=sys.stderr)
"""


def test_a_damaged_checkpoint_of_an_earlier_version_is_one_line(damaged):
    (damaged / "2" / "checksums.json").unlink()
    (largest,) = (damaged / "2" / "params" / "ocdbt.process_0" / "d").iterdir()
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RESTORE), str(damaged)], capture_output=True, text=True, check=False
    )
    assert child.stderr == f"{damaged}/2: cannot be read (its files are damaged)\n"


def test_what_a_killed_save_left_is_neither_taken_nor_kept(damaged):
    (damaged / "2").rename(damaged / "2.unsealed")
    (damaged / "3.orbax-checkpoint-tmp").mkdir()
    check_restores(damaged, 1)
    saved(damaged, 4)
    assert sorted(path.name for path in damaged.iterdir()) == ["1", "4"]


@contextlib.contextmanager
def without_root_rights():
    """Run the block as a user who is not root, whom the rights of files bind."""
    before = os.geteuid()
    os.seteuid(65534 if before == 0 else before)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.mark.parametrize("what", ["", "checkpoints", "checkpoints/2", "checkpoints/2/params"])
def test_a_folder_that_may_not_be_read_is_named_and_nothing_is_set_aside(two, what):
    with tempfile.TemporaryDirectory() as root:
        run = pathlib.Path(root, "20260101_10-00-00")
        shutil.copytree(two, run / "checkpoints")
        os.chmod(root, 0o755)
        os.chmod(run / what, 0)
        with without_root_rights(), pytest.raises(UserError) as refused:
            RunCheckpoints(find_run(root, "") / "checkpoints", keep=None).newest_intact()
        os.chmod(run / what, 0o755)
        assert f"{run / what}" in str(refused.value)
        assert "cannot be read: Permission denied" in str(refused.value)
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["1", "2"]


@pytest.mark.slow
def test_a_checkpoint_leaves_nothing_in_memory(tmp_path):
    """Objects are counted, as the operating system's figures say little of ten small saves."""

    def lists() -> int:
        gc.collect()
        return sum(type(each) is list for each in gc.get_objects())

    checkpoints = RunCheckpoints(tmp_path, keep=1)
    counts = []
    for step in range(1, 13):
        checkpoints.save(step, items(step), {"step": step})
        checkpoints.wait()
        counts.append(lists())
    checkpoints.close()
    assert counts[-1] - counts[2] < 45  # of nine saves; TensorStore's answers alone would be 20 a save


@pytest.mark.slow
def test_two_processes_agree_on_the_newest_intact_checkpoint(tmp_path):
    command = [sys.executable, "-m", "tests.checkpoints.two_savers", str(tmp_path), str(free_port())]
    processes = [
        subprocess.Popen([*command, number], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for number in "01"
    ]
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert [out.splitlines()[-1] for out, _ in said] == ["[2, [0.0, 2.0, 4.0, 6.0]]", "[2, [8.0, 10.0, 12.0, 14.0]]"]
    assert [err.count(f"{tmp_path}/3: is damaged") for _, err in said] == [1, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3.damaged"]
