"""anima-start: its questions, where it finds and fetches files, what it writes, and that interruptions are harmless.

Nothing is trained here; tests/test_notebook.py runs the whole path. The hub is that of tests/checkpoints/test_hub.py.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
import zipfile
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anima_jax.checkpoints import hub, locations
from anima_jax.config.load import load_config
from anima_jax.errors import UserError
from anima_jax.launch import PARENT
from anima_jax.serving.starting import anima_files, browser, choices, commands, pictures, planning, run_toml
from anima_jax.start import main
from anima_jax.train import main as train
from anima_jax.training import fit
from tests.checkpoints.test_hub import FakeHub, server  # noqa: F401 - a fixture
from tests.small_run import ASSETS, write_transformer

ROOT = pathlib.Path(__file__).parents[1]
PLANS: dict[Any, planning.RunPlan] = {}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> pathlib.Path:
    """A transformer that fits the quick start's other networks."""
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    write_transformer(path)
    return path


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """A home without models, a folder of one's own, plans made in this process, no answer to any question."""
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(anima_files, "ROOTS", tuple(root for root in anima_files.ROOTS if not root.startswith("/")))
    monkeypatch.chdir(tmp_path)

    def plan(module: str, path: str, *overrides: str) -> tuple[int, str]:
        assert module == planning.MODULE
        memory = planning.local_bytes  # a plan takes seconds, and those of the same memory are alike
        PLANS[memory] = PLANS.get(memory) or planning.plan_run(path, overrides)
        return 0, json.dumps(dataclasses.asdict(PLANS[memory]))

    monkeypatch.setattr(commands, "output_of", plan)
    with open(os.devnull, encoding="utf-8") as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        yield


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """Three pictures, one of them with a caption, and what is none."""
    path = tmp_path / "my cats"
    path.mkdir()
    for number, name in enumerate(("tom_01.png", "red-cat (2).png", "x.png")):
        pixels = np.random.default_rng(number).integers(0, 255, (48, 64 + 16 * number, 3), np.uint8)
        Image.fromarray(pixels).save(path / name)
    (path / "x.txt").write_text("a cat on a mat")
    (path / "broken.png").write_text("no picture")
    return path


@pytest.fixture
def anima_hub(server, small, monkeypatch) -> FakeHub:  # noqa: F811 - the fixture
    monkeypatch.setattr(anima_files, "REPOSITORY", "hf://o/r/split_files")
    paths = {
        "transformer": small,
        "vae": ASSETS / "tiny_vae.safetensors",
        "text_encoder": ASSETS / "tiny_qwen3.safetensors",
    }
    server.files = {
        f"split_files/{each.folder}/{each.name}": paths[each.flag].read_bytes() for each in anima_files.FILES
    }
    return server


def run(*words: object, code: int = 0) -> None:
    if not code:
        main([*map(str, words)])
        return
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words)])
    assert ended.value.code == code


def start(folder, small, *words: object, code: int = 0) -> None:
    """Prepare a LoRA of the small model on a folder of pictures, without training it."""
    run("--pictures", folder, "--model", small, "--no_train", "--no_page", *words, code=code)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_fetch_downloads_anima_once_and_prints_where_it_is(anima_hub, capsys):
    run("--fetch")
    paths = capsys.readouterr().out.splitlines()[-3:]
    assert [pathlib.Path(path).read_bytes() for path in paths] == list(anima_hub.files.values())
    run("--fetch")
    assert capsys.readouterr().out.splitlines() == paths
    assert anima_hub.ranges == [None] * 3


def test_an_interrupted_download_goes_on_and_the_rest_is_told(anima_hub, capsys):
    size = len(next(iter(anima_hub.files.values())))
    anima_hub.breaks_after = [size // 2] + [0] * hub.ATTEMPTS
    run("--fetch", code=2)
    shown = capsys.readouterr()
    assert "the same command continues it" in shown.err
    assert "diffusion_models/anima-base-v1.0.safetensors  →  " in shown.out
    run("--fetch")
    assert " of it here already" in capsys.readouterr().out
    assert f"bytes={size // 2}-" in anima_hub.ranges


def test_a_damaged_download_is_tried_again_and_never_kept(anima_hub, tmp_path, capsys):
    anima_hub.sends = b"damaged"
    anima_hub.files = dict.fromkeys(anima_hub.files, b"correct")
    run("--fetch", code=2)
    assert capsys.readouterr().out.count("arrived with another hash") == 1  # and once as the error
    assert len(anima_hub.ranges) == 2
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"] == []


def test_a_full_disk_is_told_before_anything_is_downloaded(anima_hub, monkeypatch, capsys):
    usage = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    run("--fetch", code=2)
    assert "are needed and 1 kB are free; HF_HOME=FOLDER uses another folder" in capsys.readouterr().err
    assert anima_hub.ranges == []


@pytest.mark.parametrize("offline", [False, True])
def test_without_a_network_it_says_which_file_goes_where_and_takes_the_quick_starts_model(
    anima_hub, monkeypatch, tmp_path, capsys, offline
):
    anima_hub.refuses = (503, "")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    (tmp_path / "home" / "ComfyUI" / "models").mkdir(parents=True)
    run("--pictures", "none", "--yes", "--no_train", "--no_page")
    shown = capsys.readouterr().out
    for file in anima_files.FILES:
        goes_to = tmp_path / "home" / "ComfyUI" / "models" / file.folder / file.name
        assert f"{file.folder}/{file.name}  →  {goes_to}" in shown
    assert "--model shapes" in shown.splitlines()[-1]


def test_anima_that_cannot_be_had_is_an_error_where_nobody_can_be_asked(anima_hub, folder, capsys):
    anima_hub.refuses = (401, "RepoNotFound")
    run("--pictures", folder, "--model", "anima", "--no_page", code=2)
    shown = capsys.readouterr()
    assert "needs `hf auth login` or HF_TOKEN" in shown.out
    assert shown.err.count("error: ") == 1


def test_files_in_comfyuis_folders_are_found_by_name_and_header(tmp_path, small):
    models = tmp_path / "home" / "ComfyUI" / "models"
    for name in ("unet", "diffusion_models", "vae", "text_encoders/qwen"):
        (models / name).mkdir(parents=True)
    shutil.copy(small, models / "unet" / "My-Anima-finetune.safetensors")
    (models / "diffusion_models" / "anima-base-v1.0.safetensors").write_bytes(small.read_bytes()[:-1])
    shutil.copy(ASSETS / "tiny_vae.safetensors", models / "vae" / "qwen_image_vae.safetensors")
    shutil.copy(ASSETS / "tiny_qwen3.safetensors", models / "text_encoders" / "qwen" / "Qwen3-0.6B.safetensors")
    found = anima_files.find({}, [])
    assert {flag: pathlib.Path(path).name for flag, path in found.paths.items()} == {
        "transformer": "My-Anima-finetune.safetensors",
        "vae": "qwen_image_vae.safetensors",
        "text_encoder": "Qwen3-0.6B.safetensors",
    }
    (line,) = found.messages
    assert "anima-base-v1.0.safetensors is not used: " in line


# ---- pictures and captions ------------------------------------------------------------------------------------------


def test_pictures_without_a_caption_are_told_and_not_trained_without_an_answer(folder, small, capsys):
    start(folder, small, code=2)
    shown = capsys.readouterr()
    assert "together 3 pictures, 1 with a caption, 2 without" in shown.out
    assert f"left out: {folder / 'broken.png'}: not a readable PNG" in shown.out
    assert "--captions is required where nobody can be asked: 2 of 3 pictures have no caption" in shown.err
    assert not (folder.parent / "runs").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--captions", "names"], {"tom_01": "tom", "red-cat (2)": "red cat"}),
        (["--caption", "a cat"], {"tom_01": "a cat", "red-cat (2)": "a cat"}),
        (["--captions", "leave_out"], {}),
    ],
)
def test_captions_are_written_beside_the_pictures_that_have_none(folder, small, words, expected):
    start(folder, small, *words)
    written = {path.stem: path.read_text().strip() for path in folder.glob("*.txt")}
    assert written == expected | {"x": "a cat on a mat"}


def test_captions_for_a_folder_with_a_captions_json_are_one_file_of_the_run(folder, small):
    (folder / "captions.json").write_text('{"tom_01.png": "tom"}')
    start(folder, small, "--caption", "a cat")
    config = load_config("runs/my_cats_on_shapes/lora.toml")
    table = json.loads(pathlib.Path(config.data.sources[0].captions_file).read_text())
    assert {pathlib.Path(name).stem: text for name, text in table.items()} == {
        "tom_01": "tom",
        "red-cat (2)": "a cat",
        "x": "a cat",
    }


def test_a_zip_is_unpacked_once_and_never_out_of_its_folder(tmp_path, folder):
    with zipfile.ZipFile(tmp_path / "cats.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, f"cats/{path.name}")
    unpacked = pictures.unpacked(str(tmp_path / "cats.zip"), tmp_path / "to" / "pictures")
    assert len(pictures.read_pictures(unpacked).entries) == 3
    (tmp_path / "cats.zip").unlink()
    assert pictures.unpacked(str(tmp_path / "cats.zip"), tmp_path / "to" / "pictures") == unpacked
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("../../evil.png", b"x")
    with pytest.raises(UserError, match="outside of its folder"):
        pictures.unpacked(str(tmp_path / "evil.zip"), tmp_path / "evil")
    assert not (tmp_path / "evil.png").exists()


@pytest.mark.parametrize("kind", ["STORED", "DEFLATED", "BZIP2", "LZMA"])
def test_a_damaged_zip_is_an_error_in_a_line(tmp_path, kind):
    path = tmp_path / "damaged.zip"
    with zipfile.ZipFile(path, "w", getattr(zipfile, f"ZIP_{kind}")) as archive:
        archive.writestr("a.png", bytes(range(256)) * 20)
    data = bytearray(path.read_bytes())
    data[45:110] = bytes(byte ^ 0xA5 for byte in data[45:110])
    path.write_bytes(data)
    with pytest.raises(UserError, match="cannot be unpacked: "):
        pictures.unpacked(str(path), tmp_path / "there")


def test_folders_of_a_folder_are_trained_too_as_often_as_their_names_say(folder, small):
    (folder / "10_dogs").mkdir()
    for name in ("x.png", "x.txt"):
        shutil.copy(folder / name, folder / "10_dogs" / name)
    start(folder, small, "--captions", "leave_out")
    sources = load_config("runs/my_cats_on_shapes/lora.toml").data.sources
    assert [(pathlib.Path(each.path).name, each.num_repeats) for each in sources] == [("my cats", 1), ("10_dogs", 10)]


# ---- the TOML -------------------------------------------------------------------------------------------------------


def test_an_edited_toml_is_used_as_it_is_and_other_answers_get_another(folder, small, capsys):
    own = ("--caption", "a cat", "--trigger", "sks")
    start(folder, small, *own, "--steps", 7)
    path = pathlib.Path("runs/my_cats_on_shapes/lora.toml")
    edited = path.read_text().replace("lr = 0.0015", "lr = 0.001")
    path.write_text(edited)
    start(folder, small, *own, "--yes")
    assert f"going on with {path}" in capsys.readouterr().out
    start(folder, small, *own, "--rank", 4)
    assert path.read_text() == edited
    other = load_config(path.with_name("lora-2.toml"))
    assert (other.adapter.rank, other.max_steps, other.data.sources[0].caption_prefix) == (4, 7, "sks, ")


def test_the_levers_that_fit_are_plain_keys_with_their_reasons(folder, small, monkeypatch, capsys):
    start(folder, small, "--caption", "a cat", "--steps", 5)
    usual = planning.plan_run("runs/my_cats_on_shapes/lora.toml")
    limit = int(usual.needed) - 1
    monkeypatch.setattr(planning, "local_bytes", lambda: limit)
    start(folder, small, "--caption", "a cat", "--steps", 6)
    plan = planning.plan_run("runs/my_cats_on_shapes/draft/lora.toml")
    text = pathlib.Path("runs/my_cats_on_shapes/lora-2.toml").read_text()
    assert plan.keys
    draft = load_config("runs/my_cats_on_shapes/draft/lora.toml", fit.overrides_of(plan.keys))
    keys = ("remat", "micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer", "param_dtype")
    written = load_config("runs/my_cats_on_shapes/lora-2.toml")
    assert {key: getattr(written, key) for key in keys} == {key: getattr(draft, key) for key in keys}
    assert text.count("# so that it fits this device") == len(plan.keys)
    capsys.readouterr()
    train(["--config", "runs/my_cats_on_shapes/lora-2.toml", "--dry_run", "--device_memory", str(limit)])
    assert "it fits: " in capsys.readouterr().out


def test_a_write_that_is_interrupted_leaves_no_toml(folder, small, monkeypatch):
    class KilledError(BaseException):
        pass

    @contextlib.contextmanager
    def killed(path):
        with locations.replacing(path) as file:
            yield file
            if path == pathlib.Path(folder.parent, "runs", "my_cats_on_shapes", "lora.toml"):
                raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(run_toml, "replacing", killed)
        with pytest.raises(KilledError):
            start(folder, small, "--caption", "a cat")
    assert [*pathlib.Path("runs/my_cats_on_shapes").glob("lora.toml")] == []
    start(folder, small, "--caption", "a cat")
    load_config("runs/my_cats_on_shapes/lora.toml")


def test_text_in_a_toml_is_read_back_as_it_was():
    for text in ('a "b" \\ c', "käse\n\x7f", "C:\\new\\table", "🐈"):
        assert tomllib.loads(f"key = {run_toml.toml_text(text)}") == {"key": text}


# ---- questions ------------------------------------------------------------------------------------------------------


def test_questions_on_a_terminal_take_numbers_defaults_and_ask_again(folder, small, monkeypatch):
    pty = pytest.importorskip("pty")
    own, other = pty.openpty()
    with (
        open(own, "r+b", buffering=0),
        open(other, encoding="utf-8") as typed,
        open(os.dup(other), "w", encoding="utf-8") as seen,
    ):
        monkeypatch.setattr("sys.stdin", typed)
        monkeypatch.setattr("sys.stdout", seen)
        os.write(own, f"/no/such folder\n{folder}\n9\n2\nsks\nmany\n12\n".encode())
        run("--model", small, "--no_train", "--no_page")
        seen.flush()
        shown = os.read(own, 100_000).decode()
    assert "/no/such folder: no such folder" in shown
    assert "expected a number from 1 to 4" in shown
    assert "found 'many', expected a whole number" in shown
    config = load_config("runs/my_cats_on_shapes/lora.toml")
    assert (config.max_steps, config.data.sources[0].caption_prefix) == (12, "sks, ")
    assert (folder / "tom_01.txt").read_text() == "tom\n"


def test_without_a_terminal_one_line_says_what_was_assumed(capsys):
    run("--model", "shapes", "--no_train", "--no_page", code=2)  # it is not trained yet
    shown = capsys.readouterr().out.splitlines()
    (line,) = [line for line in shown if line.startswith("assumed")]
    assert line.startswith("assumed, as nobody can be asked here: --pictures demo, ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pictures", "nowhere"], "no such folder"),
        (["--pictures", "."], "there are no pictures in this folder"),
        (["--models", "nowhere"], "--models nowhere: no such folder"),
        (["--model", "nowhere.safetensors", "--pictures", "none"], "nowhere.safetensors: no such file"),
        (["--model", "anima"], "--pictures DIR is required"),
        (["--steps", "0"], "--steps 0: expected 1 to "),
        (["--output", "hf://o/r"], "expected a folder on this machine"),
    ],
)
def test_a_mistake_is_one_line(words, message, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run(*words, "--no_train", "--no_page", code=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


# ---- processes and the page -----------------------------------------------------------------------------------------


def test_a_program_that_is_started_stops_when_anima_start_is_killed():
    if sys.platform != "linux":
        pytest.skip("Linux tells a process that its parent has died")
    child = "from anima_jax import launch; launch._end_with_parent(); print('here', flush=True); input()"
    parent = (
        f"import os, subprocess, sys; os.environ[{PARENT!r}] = str(os.getpid());"
        f"process = subprocess.Popen([sys.executable, '-c', {child!r}], stdin=subprocess.PIPE); process.wait()"
    )
    command = [sys.executable, "-c", parent]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGKILL)
        assert process.stdout.read() == ""  # the pipe is closed: the child has ended, too


def test_the_page_gets_a_free_port_and_an_address_for_other_computers():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = browser.free_port(taken.getsockname()[1])
    assert port != taken
    lines = browser.address_lines(port)
    assert lines[0] == f"the page: http://127.0.0.1:{port}"
    assert f"ssh -L {port}:127.0.0.1:{port} " in lines[1]


@pytest.mark.parametrize("variables", [{"SSH_CONNECTION": "x", "DISPLAY": ":0"}, {}])
def test_no_browser_is_opened_over_ssh_nor_without_a_screen(variables, monkeypatch):
    monkeypatch.setattr(browser.sys, "platform", "linux")
    assert not browser.has_browser(variables)


def test_the_pages_command_chooses_the_newest_lora(folder, small):
    from anima_jax.serve import parse_arguments as parse_serve
    from anima_jax.serving.starting.flags import parse_arguments

    start(folder, small, "--caption", "a cat")
    toml = pathlib.Path("runs/my_cats_on_shapes/lora.toml")
    run_folder = toml.with_suffix("") / "20260101_12-00-00"
    for name in ("checkpoints/5", "step5"):
        (run_folder / name).mkdir(parents=True)
    (run_folder / "step5" / "my_cats_on_shapes.safetensors").write_bytes(b"")
    model = choices.StartModel("shapes", choices.small_networks() | {"transformer": str(small)})
    words = browser.serve_flags(parse_arguments(["--pictures", "x"]), model, toml, 8000)
    arguments = parse_serve(words)
    assert arguments.page_lora in (None, "step5/my_cats_on_shapes")
    assert (arguments.config, arguments.port) == (str(toml), 8000)


def test_a_path_on_another_drive_is_shown_whole(monkeypatch, tmp_path):
    def across_drives(path):
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.chdir(tmp_path)
    assert commands.short_path(tmp_path / "a" / "b") == os.path.join("a", "b")
    monkeypatch.setattr(os.path, "relpath", across_drives)
    assert commands.short_path(tmp_path / "a") == str(tmp_path / "a")
