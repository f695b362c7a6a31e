"""Check that a run that is killed, or loses its power, over and over, ends bit-identical to an undisturbed one.

`python -m tests.benchmarks.kill CONFIG.toml --kills 10` trains twice: once undisturbed, once killed with SIGKILL at
random moments, of every three one at any time after the start and one while a checkpoint is being written. It compares
every loss, the last checkpoint's arrays and the last exports' bytes. With `--power_cuts 20` the run is on a disk image
that loses, with each kill, all that was not flushed to it.

Processes are forked from one that has imported the trainer, so that an attempt takes seconds.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import pathlib
import random
import re
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess

from tests.disks import LoopDisk

POLL_S = 0.02

FORKS = multiprocessing.get_context("forkserver")


def main() -> None:
    options = parse_arguments()
    FORKS.set_forkserver_preload(["anima_jax.train"])
    folder = pathlib.Path(options.folder or tempfile.mkdtemp(prefix="kill-"))
    print(f"in {folder}, random seed {options.seed}, load average {os.getloadavg()[0]:.1f}", flush=True)
    undisturbed = folder / "undisturbed"
    began = time.monotonic()
    if ended(start(options, undisturbed, folder)):
        sys.exit("the undisturbed run failed")
    (run,) = runs_of(undisturbed)
    total = max(losses_of([run]))
    print(f"undisturbed: {total} steps in {time.monotonic() - began:.0f} s", flush=True)
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(contextlib.closing(LoopDisk(folder))) if options.power_cuts else None
        kills, while_saving = options.power_cuts or options.kills, 0
        rng, disturbed = random.Random(options.seed), (disk.folder if disk else folder) / "disturbed"
        for kill in range(kills):
            since = time.time()
            process = start(options, disturbed, folder)
            target = int(total * (kill + rng.random()) / kills)
            if kill % 3 < 2:
                wait(process, disturbed, target, since if kill % 3 else None)
            process.join(rng.uniform(0, options.jitter) * (10 if kill % 3 == 2 else 1))
            if process.exitcode is not None:
                sys.exit(f"the run ended with {process.exitcode} before kill {kill + 1}: it needs more steps")
            while_saving += saving(disturbed, since)
            if disk:
                disk.cut_power(process.pid or 0)
            else:
                process.kill()
            process.join()
            print(f"kill {kill + 1} after step {last_step(disturbed)} of {total}", flush=True)
        if ended(start(options, disturbed, folder)):
            sys.exit("the last attempt failed")
        print(f"{kills} {'power cuts' if disk else 'kills'}, {while_saving} of them while saving")
        found = differences(run, runs_of(disturbed))
    print("\n".join(found) or f"bit-identical: {total} losses, the last checkpoint and the exports")
    sys.exit(1 if found else 0)


def wait(process: BaseProcess, output: pathlib.Path, target: int, since: float | None) -> None:
    """Wait until step `target`, and then, if `since` is the start of this attempt, until it writes a checkpoint."""
    while process.is_alive() and last_step(output) < target:
        time.sleep(POLL_S)
    while since and process.is_alive() and not saving(output, since):
        time.sleep(POLL_S / 10)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Kill a run repeatedly and compare it with an undisturbed one.")
    parser.add_argument("config", help="main TOML; output_dir is replaced")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--power_cuts", type=int, default=0, help="instead of --kills; needs root and mkfs.ext4")
    parser.add_argument("--minutes", type=float, default=0.05, help="checkpoint_every_n_minutes")
    parser.add_argument("--jitter", type=float, default=0.2, help="maximum random delay before a kill, in seconds")
    parser.add_argument("--folder", help="folder for the runs (default: a new one)")
    parser.add_argument("--platform", default="cpu", help="JAX_PLATFORMS; other devices may sum in another order")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="random seed for the moments")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for anima_jax.train")
    return parser.parse_args()


def start(options: argparse.Namespace, output: pathlib.Path, folder: pathlib.Path) -> BaseProcess:
    """Start the run in `output`, or resume it from its newest checkpoint if there is one."""
    settings = [*options.set, f"output_dir='{output}'", f"checkpoint_every_n_minutes={options.minutes}"]
    words = ["--config", options.config, *(word for setting in settings for word in ("--set", setting))]
    words += ["--resume_from_checkpoint"] if any(map(checkpoints_of, runs_of(output))) else []
    process = FORKS.Process(target=train, args=(words, options.platform, str(folder / f"{output.name}.log")))
    process.start()
    return process


def train(words: list[str], platform: str, log: str) -> None:
    """What a process of the run does: `python -m anima_jax.train` with these words."""
    os.environ["JAX_PLATFORMS"] = platform
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    from anima_jax.train import main

    main(words)


def ended(process: BaseProcess) -> int | None:
    """Wait for a process and return its exit code."""
    process.join()
    return process.exitcode


def runs_of(output: pathlib.Path) -> list[pathlib.Path]:
    """Run folders, oldest first; an attempt killed before its first checkpoint leaves one too."""
    return sorted(output.iterdir()) if output.is_dir() else []


def checkpoints_of(run: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdecimal())


def saving(output: pathlib.Path, since: float) -> bool:
    """Whether a checkpoint is being written by the attempt that began at this time; killed ones leave remains."""
    with contextlib.suppress(FileNotFoundError):
        return any(path.stat().st_mtime >= since for path in output.glob("*/checkpoints/*.unsealed*"))
    return False


def last_step(output: pathlib.Path) -> int:
    """The last step whose loss is in a log, 0 if there is none."""
    for run in reversed(runs_of(output)):
        log = run / "metrics.jsonl"
        for line in reversed(log.read_bytes()[-4000:].splitlines()) if log.is_file() else ():
            if found := re.search(rb'^{.*"step": (\d+).*}$', line):
                return int(found[1])
    return 0


def losses_of(runs: list[pathlib.Path]) -> dict[int, float]:
    """Step → loss. For a repeated step the last attempt counts; a kill may truncate a line."""
    losses = {}
    for run in runs:
        log = run / "metrics.jsonl"
        for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else []:
            if line.endswith("}"):
                figures = json.loads(line)
                if "loss" in figures:
                    losses[figures["step"]] = figures["loss"]
    return losses


def arrays_of(run: pathlib.Path) -> dict[str, tuple]:
    """Item and path → dtype, shape and bytes of every array in the run's newest checkpoint."""
    import jax
    import numpy as np

    from anima_jax.checkpoints.orbax import RunCheckpoints

    def struct(text: str) -> jax.ShapeDtypeStruct:
        dtype, sizes = re.fullmatch(r"(.*)\[(.*)\]", text).groups()  # type: ignore[union-attr]
        return jax.ShapeDtypeStruct(tuple(map(int, filter(None, sizes.split(",")))), jax.numpy.dtype(dtype))

    checkpoints = RunCheckpoints(run / "checkpoints", keep=None)
    step = checkpoints_of(run)[-1]
    abstract = {
        item: {path: struct(text) for path, text in leaves.items()} for item, leaves in checkpoints.layout(step).items()
    }
    found = {
        f"step {step} {item} {path}": (str(array.dtype), array.shape, np.asarray(array).tobytes())
        for item, leaves in checkpoints.restore(step, abstract).items()
        for path, array in leaves.items()
    }
    checkpoints.close()
    return found


def exports_of(run: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*.safetensors")}


def differences(one: pathlib.Path, others: list[pathlib.Path]) -> list[str]:
    """Name what differs between the undisturbed run and the attempts of the disturbed one (newest last)."""
    last = [run for run in others if checkpoints_of(run)][-1]
    pairs = (
        (losses_of([one]), losses_of(others)),
        (arrays_of(one), arrays_of(last)),
        (exports_of(one), exports_of(last)),
    )
    return [
        f"{name} differs"
        for left, right in pairs
        for name in sorted(left.keys() | right.keys(), key=str)
        if left.get(name) != right.get(name)
    ]


if __name__ == "__main__":
    main()
