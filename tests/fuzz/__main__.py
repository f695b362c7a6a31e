"""`python -m tests.fuzz FORMAT --minutes 10`: try hostile inputs of a format, or of `all`, and count how they end."""

import argparse
import multiprocessing
import os
import pathlib
import pickle
import random
import shutil
import sys
import tempfile
import time
import zipfile
from multiprocessing.process import BaseProcess

from tests.fuzz.campaign import LIMIT_S, Counts, child
from tests.fuzz.formats import FORMATS
from tests.fuzz.mutations import Files

FORKS = multiprocessing.get_context("forkserver")
"""Children are forked from a process that has imported the program."""

STUCK_S = 60 * LIMIT_S
"""Time after which a child that makes no progress is killed; it may have a small share of the cores, at nice 19."""


def run(name: str, *, seconds: float, most: int = 10**9, seed: int = 0) -> Counts:
    """Try inputs of a format in child processes; an input that ends its process, or that hangs it, is lost."""
    counts, left, died = Counts(), seconds, True
    FORKS.set_forkserver_preload(["tests.fuzz.formats"])
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as place:
        while died and left > 0 and counts.inputs < most:
            began = time.monotonic()
            folder = pathlib.Path(place, str(seed))
            folder.mkdir()
            process = FORKS.Process(target=child, args=(name, folder, seed, left, most - counts.inputs))
            process.start()
            why = _wait(process, folder / "current")
            died, left = bool(process.exitcode), left - (time.monotonic() - began)
            if not died:
                results, refused, lost = pickle.loads((folder / "counts").read_bytes())
            elif (folder / "current").exists():
                results, refused, lost, files = pickle.loads((folder / "current").read_bytes())
                last = (folder / "stderr").read_bytes().decode(errors="replace").strip().splitlines()[-1:]
                lost = {
                    **lost,
                    f"{why or f'the process ended with {process.exitcode}'} {' '.join(last)[:150]}": files,
                }
            else:
                said = (folder / "stderr").read_text(errors="replace")[-4000:]
                raise RuntimeError(f"the child ended with {process.exitcode}: {said}")
            counts.results, counts.refused = counts.results + results, counts.refused + refused
            counts.lost |= lost
            shutil.rmtree(folder)
            seed += 1000
    return counts


def _wait(process: BaseProcess, current: pathlib.Path) -> str:
    """Wait for the child; return why it was killed, or ""."""
    began = time.time()
    while process.join(0.2) or process.is_alive():
        last = max(began + 60, current.stat().st_mtime if current.exists() else 0)  # it begins by compiling
        if time.time() > last + STUCK_S:
            process.kill()
            process.join()
            return f"no progress in {STUCK_S:.0f} s"
    return ""


def keep(name: str, files: Files, folder: pathlib.Path) -> pathlib.Path:
    """Write an input as a zip, as `corpus/` has them."""
    path = folder / name / f"{abs(hash(frozenset(files.items()))) % 10**8:08d}.zip"
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for inside, data in sorted(files.items()):
            file.writestr(zipfile.ZipInfo(inside), data, zipfile.ZIP_DEFLATED)
    return path


def line(name: str, counts: Counts) -> str:
    ended = f"{counts.results:>9} results{counts.refused:>9} refused{len(counts.lost):>5} lost"
    return f"{name:<16}{counts.inputs:>9} inputs:{ended}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("format", choices=["all", *FORMATS])
    parser.add_argument("--minutes", type=float, default=1.0, help="for each format")
    parser.add_argument("--inputs", type=int, default=10**9, help="for each format, at most")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument(
        "--keep", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir(), "lost"), help="for lost inputs"
    )
    options = parser.parse_args()
    total = Counts()
    for name in FORMATS if options.format == "all" else [options.format]:
        counts = run(name, seconds=60 * options.minutes, most=options.inputs, seed=options.seed)
        print(line(name, counts), flush=True)
        for how, files in counts.lost.items():
            print(f"    {how}\n        {keep(name, files, options.keep)}", flush=True)
        total.results, total.refused = total.results + counts.results, total.refused + counts.refused
        total.lost |= {f"{name}: {how}": files for how, files in counts.lost.items()}
    print(line("together", total))
    sys.exit(1 if total.lost else 0)


if __name__ == "__main__":
    main()
