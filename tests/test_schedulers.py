"""Runs under schedulers, faked: the scripts of scripts/ stop, requeue and finish a real, small run in one folder."""

import contextlib
import io
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from anima_jax.exit_codes import INTERRUPTED, STOPPED
from anima_jax.train import main as train
from tests.test_resume_run import check_equal, small_config

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
JOB = "4242"


def command_in(folder: pathlib.Path, name: str, body: str) -> None:
    """Put a command of this name into a folder of the PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


def environment(path: pathlib.Path, **variables: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return clean | {"PATH": f"{path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), **variables}


def wait_for(path: pathlib.Path, process: subprocess.Popen) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.02)


@pytest.mark.slow
def test_a_slurm_job_that_runs_out_of_time_is_requeued_and_ends_as_if_it_had_not_been(tmp_path):
    config = small_config(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        train(["--config", str(config), "--set", f"output_dir={tmp_path / 'one'}", "--run_name", "alone"])
    # srun forwards signals; so does a process that takes its place.
    command_in(tmp_path / "bin", "srun", 'exec "$@"')
    command_in(tmp_path / "bin", "scontrol", f'echo "$@" >> {tmp_path}/scontrol')
    names = environment(tmp_path / "bin", SLURM_JOB_ID=JOB, ANIMA_PYTHON=sys.executable)

    def start() -> subprocess.Popen:
        return subprocess.Popen(["bash", SCRIPTS / "slurm.sh", config], env=names, cwd=ROOT, stdout=subprocess.DEVNULL)

    first, run = start(), tmp_path / "runs" / f"slurm-{JOB}"
    wait_for(run / "metrics.jsonl", first)
    first.send_signal(signal.SIGUSR1)  # --signal=B:USR1: to the batch shell only
    assert first.wait() == STOPPED
    assert (tmp_path / "scontrol").read_text() == f"requeue {JOB}\n"
    assert [start().wait() for _ in range(2)] == [0, 0]  # the second finds a finished run
    assert (tmp_path / "scontrol").read_text() == f"requeue {JOB}\n"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [run.name]
    check_equal(run, tmp_path / "one" / "alone")


@pytest.mark.parametrize(
    ("code", "sent", "requeued"),
    [(0, "USR1", False), (75, "USR1", True), (138, "USR1", True), (2, "USR1", False), (75, "TERM", False)],
)
def test_what_slurm_requeues(tmp_path, code, sent, requeued):
    """75 without the warning of SLURM is a stop that somebody asked for; 138 is a task that was still starting."""
    command_in(
        tmp_path, "srun", f"trap 'kill $!; exit {code}' USR1 TERM; sleep 60 & touch {tmp_path}/ready; wait; exit 9"
    )
    command_in(tmp_path, "scontrol", f"touch {tmp_path}/requeued")
    script = ["bash", SCRIPTS / "slurm.sh", "x.toml"]
    names = environment(tmp_path, SLURM_JOB_ID=JOB)
    job = subprocess.Popen(script, env=names, stdout=subprocess.DEVNULL, start_new_session=True)
    wait_for(tmp_path / "ready", job)
    time.sleep(0.3)  # the script waits for srun, too
    if sent == "USR1":
        job.send_signal(signal.SIGUSR1)
    else:  # scancel, to all of them
        os.killpg(job.pid, signal.SIGTERM)
    assert job.wait(timeout=60) == code
    assert (tmp_path / "requeued").exists() == requeued


def manifest(name: str) -> dict:
    return yaml.safe_load((SCRIPTS / name).read_text())


def rule_of(job: dict, code: int) -> tuple[int | None, str]:
    """Number and action of the first rule for a container that ends with `code`; Kubernetes counts what has none."""
    for number, rule in enumerate(job["podFailurePolicy"]["rules"]):
        if code in rule.get("onExitCodes", {}).get("values", ()):
            return number, rule["action"]
    return None, "Count"


@pytest.mark.parametrize("early", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_pod_that_is_evicted_is_replaced_and_goes_on_in_the_same_folder(tmp_path, early):
    job = manifest("kubernetes.yaml")["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    command_in(tmp_path / "bin", "anima-train", f'exec {sys.executable} -m anima_jax.train "$@"')
    if early:  # what it imports never ends
        (tmp_path / "bin" / "jax.py").write_text(f"import time; open('{tmp_path}/importing', 'w'); time.sleep(60)")
    else:
        small_config(tmp_path)
    (variable,) = container["env"]
    assert variable["valueFrom"]["fieldRef"]["fieldPath"].startswith("metadata.labels['batch.kubernetes.io/job-name']")
    names = environment(tmp_path / "bin", **{variable["name"]: "anima"})
    names["PYTHONPATH"] = f"{tmp_path / 'bin'}:{ROOT}"
    words = [re.sub(r"^/work/\w+\.toml$", str(tmp_path / "main.toml"), word) for word in container["args"]]
    ended = []
    while not ended or rule_of(job, ended[-1])[1] == "Ignore":
        process = subprocess.Popen([*container["command"], *words], env=names, cwd=tmp_path, stdout=subprocess.DEVNULL)
        wait_for(tmp_path / ("importing" if early else "runs/job-anima/metrics.jsonl"), process)
        if not ended:
            process.terminate()
        elif early:
            process.kill()
        ended.append(process.wait(timeout=pod["terminationGracePeriodSeconds"]))
    assert ended == [STOPPED, -signal.SIGKILL if early else 0]


def test_kubernetes_stops_after_a_mistake_and_does_not_count_what_was_asked_for():
    job = manifest("kubernetes.yaml")["spec"]
    assert {code: rule_of(job, code)[1] for code in (1, 2, 75, 137)} == {
        1: "Count",
        2: "FailJob",
        75: "Ignore",
        137: "Count",
    }
    assert job["template"]["spec"]["restartPolicy"] == "Never"


def test_a_jobset_tells_the_reasons_of_its_jobs_apart():
    spec = manifest("tpu_jobset.yaml")["spec"]
    (job,) = (each["template"]["spec"] for each in spec["replicatedJobs"])

    def action(code: int) -> str:
        number, _ = rule_of(job, code)
        if number is not None:  # what the Job controller of Kubernetes says
            message = (
                f"Container train for pod x/y failed with exit code {code} matching FailJob rule at index {number}"
            )
            for rule in spec["failurePolicy"]["rules"]:
                if any(re.search(pattern, message) for pattern in rule["onJobFailureMessagePatterns"]):
                    return rule["action"]
        return "RestartJobSet"

    found = {code: action(code) for code in (1, 2, STOPPED)}
    assert found == {1: "RestartJobSet", 2: "FailJobSet", STOPPED: "RestartJobSetAndIgnoreMaxRestarts"}
    assert job["parallelism"] == job["completions"] == 4 * 4 * 8 // 4  # chips of the topology, four a host


def test_xpk_is_told_the_exit_code_and_the_command_word_by_word(tmp_path):
    command_in(tmp_path, "xpk", f'printf "%s\\n" "$@" > {tmp_path}/words')
    names = environment(tmp_path, CLUSTER="anima", TPU="v5p-256")
    script = [SCRIPTS / "xpk.sh", "my-run", "image:tpu", "/work/pod.toml", "--set", "model.shift=3 "]
    subprocess.run(["bash", *script], env=names, check=True)
    words = (tmp_path / "words").read_text().splitlines()
    assert words[words.index("--restart-on-exit-codes") + 1] == str(STOPPED)
    inner = words[words.index("--command") + 1]
    shown = subprocess.run(
        ["bash", "-c", inner.replace("exec anima-train", "printf '%s|'")], capture_output=True, check=True
    )
    expected = ["--config", "/work/pod.toml", "--run_name", "my-run", "--resume", "auto", "--set", "model.shift=3 "]
    assert shown.stdout.decode().split("|")[:-1] == expected


@pytest.mark.parametrize(
    ("module", "sent", "code", "line"),
    [
        ("anima_jax.train", "SIGINT", INTERRUPTED, "interrupted\n"),
        ("anima_jax.train", "SIGTERM", STOPPED, "stopped by SIGTERM; the same command starts it again\n"),
        ("anima_jax.generate", "SIGINT", INTERRUPTED, "interrupted\n"),
        ("convert", "SIGINT", INTERRUPTED, "interrupted\n"),
    ],
)
def test_a_signal_in_the_first_second_ends_a_command_in_one_line(tmp_path, module, sent, code, line):
    for name in ("jax", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"import time; open('{tmp_path}/importing', 'w'); time.sleep(60)")
    names = environment(tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
    process = subprocess.Popen([sys.executable, "-m", module], env=names, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "importing", process)
    process.send_signal(getattr(signal, sent))
    assert process.communicate(timeout=60)[1] == line
    assert process.returncode == code
