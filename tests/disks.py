"""Small file systems that tests can fill."""

import contextlib
import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, kib: int) -> Iterator[pathlib.Path]:
    """Mount a file system of `kib` KiB in memory at `folder`; the test is skipped where that is not allowed."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(folder)]
    folder.mkdir(exist_ok=True)
    if not shutil.which("mount") or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let a test mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: pathlib.Path, *, leave: int) -> None:
    """Fill the file system of `folder` except for `leave` bytes, rounded down to its blocks."""
    found = os.statvfs(folder)
    with open(folder / "ballast", "wb") as file:
        file.write(bytes(found.f_bavail * found.f_frsize - leave))
