"""The folder of a run in output_dir: which one it is, creating it, finding the one to resume, and locking it."""

import contextlib
import datetime
import os
import pathlib
import re
import socket
import sys
import time
import tomllib
from collections.abc import Iterator
from typing import NamedTuple

from anima_jax.checkpoints.locations import reading_folders, writing_to
from anima_jax.checkpoints.locks import lock
from anima_jax.checkpoints.orbax import RunCheckpoints
from anima_jax.config.main import MainConfig
from anima_jax.errors import UserError, did_you_mean, os_reason, plural
from anima_jax.parallel.hosts import is_process_0, value_of_process_0
from anima_jax.training.resume import FOLDER

_TIME = "%Y%m%d_%H-%M-%S"
_NAME = re.compile(r"(\d{8}_\d{2}-\d{2}-\d{2})(.*)")
_LOCK = ".lock"


JOBS = (
    ("slurm", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"),
    ("slurm", "SLURM_JOB_ID"),
    ("pbs", "PBS_JOBID"),
    ("lsf", "LSB_JOBID", "LSB_JOBINDEX"),
    ("job", "JOBSET_NAME"),
    ("job", "JOB_NAME"),
)
"""Schedulers: the beginning of a run's name, and the variables that are the same when a job is started again.

Kubernetes sets no such variable itself; scripts/kubernetes.yaml and scripts/tpu_jobset.yaml do.
"""

PATIENCE_S = 120
"""Seconds that `resume = "auto"` waits for the job before it to leave the folder; a lost node's lock lasts a while."""


def job_name() -> str | None:
    """Return the name of the run of the scheduler's job in which this process runs; None outside of jobs."""
    for words in JOBS:
        kind, *values = words[0], *map(os.environ.get, words[1:])
        if all(values):
            return "-".join(re.sub(r"[^\w.-]", "_", str(word))[:100] for word in (kind, *values))
    return None


class ChosenRun(NamedTuple):
    """The folder of a run: `resumed`, if it has a checkpoint from which the run resumes; `locked`, if it existed."""

    folder: pathlib.Path | None = None
    """None: a new folder that is named by the time."""
    resumed: bool = False
    locked: bool = False


def choose_run(config: MainConfig, locks: contextlib.ExitStack, *, lock_folder: bool = True) -> ChosenRun:
    """Return the run to train, which process 0 chooses; if its folder exists, it is locked until `locks` is closed.

    Raises UserError, in all processes, if the run to resume has no checkpoint, if `run_name` is taken, or if another
    run is training in the folder; with `resume = "auto"`, it first waits for `PATIENCE_S` seconds.
    """

    def choice() -> tuple[str, bool, bool, list[str]]:
        locked = False
        try:
            chosen = _choice(config)
            if lock_folder and chosen.folder and chosen.folder.is_dir():
                locks.enter_context(alone_in(chosen.folder, patience_s=PATIENCE_S if config.resume else 0))
                locked, again = True, _choice(config)  # the job before may have written its first checkpoint meanwhile
                chosen = again if again.folder == chosen.folder else chosen
        except UserError as error:
            return "", False, False, list(error.messages)
        return os.fspath(chosen.folder or ""), chosen.resumed, locked, []

    folder, resumed, locked, errors = value_of_process_0(choice)
    if errors:
        raise UserError(*errors)
    return ChosenRun(pathlib.Path(folder) if folder else None, resumed, locked)


def _choice(config: MainConfig) -> ChosenRun:
    root, name = pathlib.Path(config.output_dir), config.run_name
    if config.resume_from_checkpoint is not None and not config.resume:
        return ChosenRun(find_run(root, config.resume_from_checkpoint or name or ""), True)
    name = name or (job_name() if config.resume else None)
    with reading_folders(root):
        if name is None:
            newest = newest_run(root) if config.resume else None
            return ChosenRun(newest, newest is not None)
        folder = root / name
        if folder.exists() and not folder.is_dir():
            raise UserError(f"run_name: {folder} is a file, expected a folder or nothing")
        if not config.resume and folder.is_dir() and any(path.name != _LOCK for path in folder.iterdir()):
            raise UserError(
                f"run_name: {folder} already exists; --resume auto goes on with it, another run_name begins a new run"
            )
        return ChosenRun(folder, _has_checkpoint(folder))


def make_folder(root: pathlib.Path, folder: pathlib.Path | None) -> pathlib.Path:
    """Create the folder of a new run: `folder`, or else one in `root` that is named by the time (UTC).

    Raises UserError if that is not possible.
    """
    now = root / datetime.datetime.now(datetime.UTC).strftime(_TIME)
    names = [folder] if folder else [now, *(now.with_name(f"{now.name}-{number}") for number in range(2, 100))]
    for name in names:
        try:
            name.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{root}: cannot be written: {os_reason(error)}") from error
        return name
    raise UserError(f"{names[0]}: another run has just started here")


def configuration_files(config: MainConfig) -> dict[str, bytes]:
    """Return the TOML files of a run, the main one first, without the secrets in them: name → content."""
    found: dict[str, bytes] = {}
    for path in (config.path, config.dataset, *(each.config for each in config.eval_datasets)):
        name = pathlib.Path(path).name
        while name in found:
            name = f"dataset_{name}"
        try:
            found[name] = without_secrets(pathlib.Path(path).read_bytes().decode("utf-8-sig")).encode()
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {os_reason(error)}") from error
    return found


_SECRET = re.compile(
    r"""((?:^|[\s.,{#])(?:wandb_api_key|"wandb_api_key"|'wandb_api_key')[ \t]*=[ \t]*)"""
    r'''("""(?:\\.|[^\\])*?"""|"(?:\\.|[^"\\\n])*"|'''
    r"""'''.*?'''|'[^'\n]*')""",
    re.MULTILINE | re.DOTALL,
)


def without_secrets(text: str) -> str:
    """Return a TOML text with an empty `wandb_api_key`, also in comments; else as it was."""
    cleaned = _SECRET.sub(r'\1""', text)
    if tomllib.loads(cleaned).get("monitoring", {}).get("wandb_api_key"):  # such as with escapes in the key
        return "# This file is not copied, because the value of its wandb_api_key could not be removed.\n"
    return cleaned


def find_run(output_dir: str | os.PathLike[str], name: str) -> pathlib.Path:
    """Return the folder of the run to resume.

    `name` is the name of a run in `output_dir` or a path; "" selects the newest run in `output_dir` with a checkpoint.
    Raises UserError if there is no such run, or if it has no checkpoint.
    """
    with reading_folders(output_dir):
        return _find_run(pathlib.Path(output_dir), name)


def newest_run(root: pathlib.Path) -> pathlib.Path | None:
    """Return the folder of the newest run in `root` that has a checkpoint; None if there is none."""
    return next((folder for folder in reversed(_runs(root)) if _has_checkpoint(folder)), None)


def _find_run(root: pathlib.Path, name: str) -> pathlib.Path:
    runs = _runs(root)
    if name == "":
        if newest := newest_run(root):
            return newest
        found = f"the newest of {plural(len(runs), 'run')} is {runs[-1].name}" if runs else "there is no run"
        raise UserError(f"resume_from_checkpoint: no run in {root} has a checkpoint ({found})")
    given = pathlib.Path(name)
    given = given.parent if given.name == FOLDER else given
    for folder in (root / given, given):
        if _has_checkpoint(folder):
            return folder
        if (folder / "latest").is_file() or list(folder.glob("global_step*")):
            raise UserError(
                f"resume_from_checkpoint: {folder} contains checkpoints of DeepSpeed, which only diffusion-pipe can "
                "resume; to continue, start from the model or adapter that it saved"
            )
        if folder.is_dir():
            raise UserError(f"resume_from_checkpoint: {folder} has no checkpoint (expected {folder / FOLDER}/<step>)")
    near = did_you_mean(name, [folder.name for folder in runs])
    raise UserError(f"resume_from_checkpoint: found {name}, expected the name of a run in {root} or its path{near}")


def replicas_of(run_folder: pathlib.Path) -> int:
    """Return the number of replicas of a run's batches, which all its checkpoints record.

    Raises UserError if none of them is readable.
    """
    checkpoints = RunCheckpoints(run_folder / FOLDER, keep=None)
    *damaged, oldest = reversed(checkpoints.steps())
    for step in damaged:
        with contextlib.suppress(UserError):
            return checkpoints.metadata(step).get("replicas", 1)
    return checkpoints.metadata(oldest).get("replicas", 1)


@contextlib.contextmanager
def alone_in(run_folder: pathlib.Path, *, patience_s: float = 0) -> Iterator[None]:
    """Prevent other runs from training in this folder during the block.

    Process 0 locks the folder; the lock ends with the process. Raises UserError if another run has the lock, and still
    has it after `patience_s` seconds. On a file system without locks, nothing is prevented.
    """
    if not is_process_0():
        yield
        return
    with writing_to(os.fspath(run_folder)):
        descriptor = os.open(run_folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        ends = time.monotonic() + patience_s
        while not _locked(descriptor):
            owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            if time.monotonic() >= ends:
                raise UserError(f"{run_folder}: is being trained by {owner}")
            if patience_s:
                print(f"{run_folder}: waiting up to {patience_s} s for {owner} to end", file=sys.stderr)
                patience_s = 0
            time.sleep(0.2)
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    """Lock an open file unless another process has locked it; return whether it is locked now."""
    try:
        lock(descriptor, wait=False)
    except BlockingIOError:
        return False
    return True


def _has_checkpoint(run_folder: pathlib.Path) -> bool:
    return RunCheckpoints(run_folder / FOLDER, keep=None).latest() is not None


def _runs(root: pathlib.Path) -> list[pathlib.Path]:
    """Return the folders of the runs in `root`, oldest first: those named by the time, and others with checkpoints."""
    folders = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    return sorted((path for path in folders if _NAME.fullmatch(path.name) or (path / FOLDER).is_dir()), key=start_of)


def start_of(folder: pathlib.Path) -> tuple[str, int, str]:
    """Return the sort key of a run: time (of a named run, its last checkpoint's), then suffix, -2 before -10."""
    if match := _NAME.fullmatch(folder.name):
        return match[1], len(match[2]), match[2]
    checkpoints = folder / FOLDER
    changed = (checkpoints if checkpoints.is_dir() else folder).stat().st_mtime
    written = datetime.datetime.fromtimestamp(changed, datetime.UTC)
    return written.strftime(_TIME), 0, folder.name
