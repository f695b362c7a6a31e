"""Check that a run that is killed with SIGKILL and resumed, over and over, is bit-identical to an undisturbed one.

`python -m tests.benchmarks.kill CONFIG.toml --kills 10` trains twice through the command line: once undisturbed, once
killed at random moments, every other time while a checkpoint is being written. It compares every loss, the last
checkpoint's arrays and the last exports' bytes.
"""

import argparse
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time

POLL_S = 0.002


def main() -> None:
    options = parse_arguments()
    folder = pathlib.Path(options.folder or tempfile.mkdtemp(prefix="kill-"))
    print(f"in {folder}, random seed {options.seed}, load average {os.getloadavg()[0]:.1f}", flush=True)
    undisturbed, disturbed = folder / "undisturbed", folder / "disturbed"
    began = time.monotonic()
    if start(options, undisturbed).wait():
        sys.exit("the undisturbed run failed")
    (run,) = runs_of(undisturbed)
    total = max(losses_of([run]))
    print(f"undisturbed: {total} steps in {time.monotonic() - began:.0f} s", flush=True)

    rng, while_saving = random.Random(options.seed), 0
    for kill in range(options.kills):
        target = int(total * (kill + rng.random()) / options.kills)
        process = start(options, disturbed)
        while process.poll() is None and max(losses_of(runs_of(disturbed)), default=0) < target:
            time.sleep(POLL_S)
        while kill % 2 and process.poll() is None and not saving(disturbed):
            time.sleep(POLL_S)
        time.sleep(rng.uniform(0, options.jitter))
        if process.poll() is not None:
            sys.exit(f"the run ended with {process.returncode} before kill {kill + 1}: it needs more steps")
        while_saving += saving(disturbed)
        process.kill()
        process.wait()
        print(f"kill {kill + 1} after step {max(losses_of(runs_of(disturbed)), default=0)}", flush=True)
    if start(options, disturbed).wait():
        sys.exit("the last attempt failed")
    print(f"{options.kills} kills, {while_saving} of them while saving")
    found = differences(run, runs_of(disturbed))
    print("\n".join(found) or f"bit-identical: {total} losses, the last checkpoint and the exports")
    sys.exit(1 if found else 0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Kill a run repeatedly and compare it with an undisturbed one.")
    parser.add_argument("config", help="main TOML; output_dir is replaced")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=0.05, help="checkpoint_every_n_minutes")
    parser.add_argument("--jitter", type=float, default=0.2, help="maximum random delay before a kill, in seconds")
    parser.add_argument("--folder", help="folder for the runs (default: a new one)")
    parser.add_argument("--platform", default="cpu", help="JAX_PLATFORMS; other devices may sum in another order")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="random seed for the moments")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for anima_jax.train")
    return parser.parse_args()


def start(options: argparse.Namespace, output: pathlib.Path) -> subprocess.Popen:
    """Start the run in `output`, or resume it from its newest checkpoint if there is one."""
    settings = [*options.set, f"output_dir='{output}'", f"checkpoint_every_n_minutes={options.minutes}"]
    command = [sys.executable, "-m", "anima_jax.train", "--config", options.config]
    command += [word for setting in settings for word in ("--set", setting)]
    command += ["--resume_from_checkpoint"] if any(map(checkpoints_of, runs_of(output))) else []
    with open(output.with_suffix(".log"), "a", encoding="utf-8") as log:
        environment = {**os.environ, "JAX_PLATFORMS": options.platform}
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def runs_of(output: pathlib.Path) -> list[pathlib.Path]:
    """Run folders, oldest first; an attempt killed before its first checkpoint leaves one too."""
    return sorted(output.iterdir()) if output.is_dir() else []


def checkpoints_of(run: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdecimal())


def saving(output: pathlib.Path) -> bool:
    return any(output.glob("*/checkpoints/*.orbax-checkpoint-tmp"))


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
