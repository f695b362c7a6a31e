"""Small file systems that tests can fill."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import time
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
    with open(folder / "ballast", "ab") as file:
        file.write(bytes(found.f_bavail * found.f_frsize - leave))


class LoopDisk:
    """A file system in a file, whose power can fail: what was not flushed to it is lost."""

    def __init__(self, folder: pathlib.Path, mib: int = 64):
        self._image, self._restored, self.folder = folder / "image", folder / "image after", folder / "disk"
        self._after = folder / "disk after"
        self._mounted: list[pathlib.Path] = []
        if not shutil.which("mkfs.ext4"):
            pytest.skip("this machine has no mkfs.ext4")
        with open(self._image, "wb") as file:
            file.truncate(mib * 2**20)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(self._image)], check=True)
        self._mount(self._image, self.folder)

    def _mount(self, image: pathlib.Path, folder: pathlib.Path) -> None:
        folder.mkdir()
        # `commit`: by itself, the file system flushes nothing for five minutes.
        command = ["mount", "-o", "loop,commit=300", str(image), str(folder)]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("this machine does not let a test mount a file system")
        self._mounted.append(folder)

    def after_a_power_failure(self) -> pathlib.Path:
        """Mount a copy of the disk as it is now, without what is only in memory. Only once."""
        shutil.copyfile(self._image, self._restored)
        self._mount(self._restored, self._after)
        return self._after

    def cut_power(self, pid: int) -> None:
        """Lose what is only in memory, and the process that uses the disk; then mount it again."""
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.05)  # a write that the kernel has begun is either done or not
        shutil.copyfile(self._image, self._restored)
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)  # files that are in use would keep the image busy
        subprocess.run(["umount", "-l", str(self.folder)], check=True)
        self._mounted.remove(self.folder)
        self.folder.rmdir()
        os.replace(self._restored, self._image)
        self._mount(self._image, self.folder)

    def close(self) -> None:
        for folder in self._mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)
