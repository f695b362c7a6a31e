"""The whole command line in two processes of two devices each: the run of one process, whatever becomes of the other.

Sums over several devices are taken in another order than on one: losses agree to 1e-6 of themselves.
"""

import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from anima_jax.exit_codes import STOPPED
from tests.ports import free_port
from tests.small_run import write_config, write_transformer

pytestmark = pytest.mark.slow

MAIN = (
    "epochs = 8\nglobal_batch_size = 8\nema_decay = 0.9\nsave_dtype = 'float32'\nuncond_fraction = 0.2\n"
    "lr_scheduler = 'cosine'\ncheckpoint_every_n_epochs = 1\n"
)
SAMPLE = "prompts = ['a red square', 'blue']\nevery_n_steps = 20\nsteps = 2\nshift = 1.0"
STEPS = 24

# A process that notices late would do so after JAX's heartbeat, 30 s; the rest is for a busy machine.
A_MINUTE = 60

HANGS = 900
"""Seconds after which what does not happen is taken for something that never will, on however busy a machine."""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """24 pictures of one size, three steps of eight an epoch."""
    folder = tmp_path_factory.mktemp("two")
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(24):
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"a red square number {number}")
    write_transformer(folder / "base.safetensors")
    evaluated = f"eval_datasets = [{{name = 'held', config = '{folder / 'dataset.toml'}'}}]\neval_every_n_epochs = 4\n"
    return write_config(folder, pictures, MAIN + evaluated, sample=SAMPLE)


def start(config, output, *arguments, devices=8, cluster=()) -> subprocess.Popen:
    options = ["--config", str(config), "--set", f"output_dir={output}", "--set", f"cache_dir={output}-cache"]
    command = [sys.executable, "-m", "anima_jax.train", *options, *arguments, *map(str, cluster)]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def start_two(config, output, *arguments, each=((), ())) -> list[subprocess.Popen]:
    """Both with `arguments`, and each with its own."""
    address = f"localhost:{free_port()}"
    flags = ("--coordinator_address", address, "--num_processes", 2, "--process_id")
    return [
        start(config, output, *arguments, *own, devices=2, cluster=(*flags, index)) for index, own in enumerate(each)
    ]


def finished(*processes, code: int = 0) -> list[str]:
    """What the processes said; all of them must have ended with this code."""
    said = [process.communicate()[0] for process in processes]
    codes = [process.returncode for process in processes]
    assert codes == [code] * len(processes), "\n".join(said)
    return said


def run_of(output: pathlib.Path) -> pathlib.Path:
    (run,) = output.iterdir()
    return run


def lines_of(output: pathlib.Path) -> list[dict]:
    """Of `metrics.jsonl`, as far as it is written."""
    files = list(output.glob("*/metrics.jsonl"))
    return [json.loads(line) for line in files[0].read_text().splitlines() if line.endswith("}")] if files else []


def check_equal(output: pathlib.Path, alone: pathlib.Path) -> None:
    """The losses, evaluations and averaged weights of the run on one device."""
    found, expected = lines_of(output), lines_of(alone)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([line["loss"] for line in found], [line["loss"] for line in expected], rtol=1e-6)
    evaluations = [
        [json.loads(line)["held/loss"] for line in (run_of(one) / "evaluations.jsonl").read_text().splitlines()]
        for one in (output, alone)
    ]
    np.testing.assert_allclose(*(np.unique(each) for each in evaluations), rtol=1e-6)
    name = pathlib.Path(f"step{STEPS}", "ema", "model.safetensors")
    weights, of_one = (load_file(run_of(one) / name) for one in (output, alone))
    assert weights.keys() == of_one.keys()
    for key, value in of_one.items():
        # AdamW divides by the root of the second moment: where that is small, rounding shows in the update.
        assert np.linalg.norm(weights[key] - value) <= 1e-4 * np.linalg.norm(value), key
    shown = (np.asarray(Image.open(run_of(one) / "samples" / f"step{STEPS:06}.png"), int) for one in (output, alone))
    assert np.abs(np.subtract(*shown)).max() <= 1  # of 255: a value on the edge between two levels


@pytest.fixture(scope="module")
def alone(config):
    """The run on one device that nothing disturbed."""
    output = config.parent / "alone"
    finished(start(config, output, devices=1))
    return output


def wait_for(condition) -> None:
    ends = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < ends, "nothing happened"
        time.sleep(0.05)


def test_two_processes_are_one_run_also_after_one_is_killed(config, alone, tmp_path):
    output = tmp_path / "run"
    for killed, mesh in ((1, "mesh.fsdp=4"), (0, "mesh.fsdp=2")):
        resume = ("--resume_from_checkpoint",) if output.exists() else ()
        before = len(lines_of(output))
        processes = start_two(config, output, "--set", mesh, *resume)
        wait_for(lambda first=processes[0], n=before + 5: len(lines_of(output)) >= n or first.poll() is not None)
        processes[killed].send_signal(signal.SIGKILL)
        began = time.monotonic()
        said = processes[1 - killed].communicate(timeout=2 * A_MINUTE)[0]
        assert time.monotonic() - began < A_MINUTE
        assert processes[1 - killed].returncode != 0
        last = said.strip().splitlines()[-1]
        assert f"process {1 - killed} of 2" in last
        assert "start all of them again with --resume_from_checkpoint" in last
        processes[killed].communicate()
        assert len(lines_of(output)) < STEPS
    finished(*start_two(config, output, "--set", "mesh.fsdp=2", "--set", "mesh.tensor=2", "--resume_from_checkpoint"))
    check_equal(output, alone)


def test_sigterm_to_one_stops_both_after_the_same_step(config, alone, tmp_path):
    output = tmp_path / "run"
    processes = start_two(config, output, "--set", "mesh.context=2")
    wait_for(lambda: len(lines_of(output)) >= 4 or processes[0].poll() is not None)
    processes[1].send_signal(signal.SIGTERM)
    said = finished(*processes, code=STOPPED)
    done = len(lines_of(output))
    assert done < STEPS
    assert f"stopped after step {done}, as requested" in said[0]
    again = finished(*start_two(config, output, "--set", "mesh.context=2", "--resume_from_checkpoint"))
    assert f"after step {done}" in again[0]
    assert f"{STEPS}/{STEPS} steps" in again[0]
    assert not re.search(r"/\d+ steps|loss|saved|\r|\x1b", again[1])  # one process reports
    assert "\r" not in again[0]
    check_equal(output, alone)


def test_a_mistake_that_one_process_finds_is_one_line_and_ends_both(config, tmp_path):
    bad = tmp_path / "output"
    bad.write_text("not a folder")
    processes = start_two(config, bad)
    said = [process.communicate(timeout=HANGS)[0] for process in processes]
    assert processes[0].returncode == 2
    assert [line for line in said[0].splitlines() if "error: " in line]
    assert processes[1].returncode != 0


@pytest.mark.parametrize("what", ["optimizer.lr=1e-2", "dataset"])
def test_processes_that_were_started_differently_say_in_what_and_end(config, tmp_path, what):
    """Each with its own rate they would train on, and the weights' parts would drift apart."""
    output, other = tmp_path / "run", ("--set", what)
    if what == "dataset":
        fewer = tmp_path / "fewer"
        shutil.copytree(config.parent / "pictures", fewer, ignore=shutil.ignore_patterns("7.png", "7.txt", "cache"))
        (tmp_path / "other.toml").write_text(f"resolutions = [64]\n[[directory]]\npath = '{fewer}'\n")
        other = ("--set", f"dataset={tmp_path / 'other.toml'}")
    processes = start_two(config, output, each=((), other))
    said = [process.communicate(timeout=HANGS)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    fact = "optimizer.lr is 0.01, not 0.001" if what != "dataset" else "how many examples of tier 64 is 23, not 24"
    for each in said:
        assert f"error: process 1 of 2 disagrees with process 0: {fact}" in each
        assert "Traceback" not in each
    assert not output.exists() or not list(output.glob("*/metrics.jsonl"))


def test_a_run_of_eight_devices_goes_on_with_four_two_and_two_processes(config, alone, tmp_path):
    """A device took one example at a time: fewer devices take the same steps in micro-batches."""
    first = tmp_path / "eight"
    own = ("--set", "mesh.fsdp=-1", "--set", "mesh.data=1")
    finished(start(config, first, *own, "--set", "max_steps=10"))
    for devices, processes in ((4, 1), (2, 1), (2, 2)):
        output = tmp_path / f"{processes}x{devices}"
        shutil.copytree(first, output)
        shutil.copytree(f"{first}-cache", f"{output}-cache")
        resume = (*own, "--resume_from_checkpoint")
        if processes == 2:
            finished(*start_two(config, output, *resume))
        else:
            finished(start(config, output, *resume, devices=devices))
        check_equal(output, alone)


def test_a_number_of_devices_that_cannot_share_a_step_is_refused_with_those_that_can(config, alone, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(alone, output)
    process = start(config, output, "--resume_from_checkpoint", devices=3)
    said = process.communicate()[0]
    assert process.returncode == 2
    assert "[mesh] data × fsdp = 3 must divide the 8 examples of a step (global_batch_size)" in said
    assert "expected data × fsdp = one of 1, 2, 4, 8" in said
    assert "Traceback" not in said


def test_the_cache_of_two_processes_is_that_of_one(config, alone, tmp_path):
    output = tmp_path / "run"
    finished(*start_two(config, output, "--cache_only"))
    names = [sorted(path.name for path in pathlib.Path(f"{one}-cache").glob("*.keys")) for one in (output, alone)]
    assert names[0]
    both = set(itertools.chain(*names))
    assert both  # parts are cut in turn, so their names are those of one process
    assert names[0] == names[1]
