"""The folder of a run in output_dir: creating a new one, finding the one to resume, and locking it."""

import contextlib
import datetime
import os
import pathlib
import re
import socket
import tomllib
from collections.abc import Iterator

from anima_jax.checkpoints.locations import reading_folders, writing_to
from anima_jax.checkpoints.locks import lock
from anima_jax.checkpoints.orbax import RunCheckpoints
from anima_jax.config.main import MainConfig
from anima_jax.errors import UserError, did_you_mean, os_reason, plural
from anima_jax.parallel.hosts import is_process_0
from anima_jax.training.resume import FOLDER

_NAME = re.compile(r"(\d{8}_\d{2}-\d{2}-\d{2})(.*)")


def new_folder(root: pathlib.Path) -> pathlib.Path:
    """Create the folder of a new run in `root`, named by the time (UTC). Raises UserError if that is not possible."""
    name = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d_%H-%M-%S")
    for suffix in ("", *(f"-{number}" for number in range(2, 100))):
        try:
            (root / (name + suffix)).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{root}: cannot be written: {os_reason(error)}") from error
        return root / (name + suffix)
    raise UserError(f"{root}: 100 runs already started this second")


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


def _find_run(root: pathlib.Path, name: str) -> pathlib.Path:
    folders = [path.name for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    runs = sorted((match for folder in folders if (match := _NAME.fullmatch(folder))), key=_age)
    if name == "":
        for match in reversed(runs):
            if _has_checkpoint(root / match[0]):
                return root / match[0]
        found = f"the newest of {plural(len(runs), 'run')} is {runs[-1][0]}" if runs else "there is no run"
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
    near = did_you_mean(name, [match[0] for match in runs])
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
def alone_in(run_folder: pathlib.Path) -> Iterator[None]:
    """Prevent other runs from training in this folder during the block.

    Process 0 locks the folder; the lock ends with the process. Raises UserError if another run has the lock. On a file
    system without locks, nothing is prevented.
    """
    if not is_process_0():
        yield
        return
    with writing_to(os.fspath(run_folder)):
        descriptor = os.open(run_folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            lock(descriptor, wait=False)
        except BlockingIOError:
            owner = os.read(descriptor, 200).decode(errors="replace").strip()
            raise UserError(f"{run_folder}: is being trained by {owner or 'another process'}") from None
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def _has_checkpoint(run_folder: pathlib.Path) -> bool:
    return RunCheckpoints(run_folder / FOLDER, keep=None).latest() is not None


def _age(match: re.Match[str]) -> tuple[str, int, str]:
    """Return the sort key of a run's name: time, then suffix, with -2 before -10."""
    return match[1], len(match[2]), match[2]
