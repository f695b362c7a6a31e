"""Files that an image names: which file is opened, and that no other machine ever is."""

import pathlib
import socket

import pytest

from anima_jax.errors import UserError
from anima_jax.sampling.recipe import find_file


@pytest.fixture
def models(tmp_path):
    for name in (
        "diffusion_models/anima/base.safetensors",
        "diffusion_models/both.safetensors",
        "checkpoints/both.safetensors",
        "loras/both.safetensors",
        "loras/a/twice.safetensors",
        "loras/b/twice.safetensors",
        "loras/Style-v1.0.safetensors",
        "loras/Ünïcode 猫.safetensors",
        "vae/vae.SAFETENSORS",
        "input/start.png",
    ):
        path = tmp_path / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "models" / "loras" / "loop").symlink_to(tmp_path / "models")
    return tmp_path / "models"


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("transformer", "base.safetensors", "diffusion_models/anima/base.safetensors"),
        ("transformer", "other\\base.safetensors", "diffusion_models/anima/base.safetensors"),
        ("transformer", "/home/x/models/BASE.safetensors", "diffusion_models/anima/base.safetensors"),
        ("transformer", "base", "diffusion_models/anima/base.safetensors"),
        ("lora", "both.safetensors", "loras/both.safetensors"),
        ("lora", "b\\twice.safetensors", "loras/b/twice.safetensors"),
        ("lora", "Style-v1.0", "loras/Style-v1.0.safetensors"),
        ("lora", "Ünïcode 猫", "loras/Ünïcode 猫.safetensors"),
        ("vae", "vae.safetensors", "vae/vae.SAFETENSORS"),
        ("image", "start.png", "input/start.png"),
    ],
)
def test_files_are_found_by_name_in_folders_of_models(models, kind, name, expected):
    assert find_file("x.png", kind, name, [str(models)]) == str(models / expected)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("transformer", "both.safetensors", "x.png: names the transformer 'both.safetensors', and there are 2 of that"),
        ("lora", "twice", "there are 2 of that name: "),
        ("lora", "none", "x.png: names the lora 'none': there is no such file in '"),
        ("vae", "\x1b[31m\n", "names the vae '\\x1b[31m\\n': there is no such file"),
        ("vae", "", "names the vae '': there is no such file"),
        ("image", "start", "names the image 'start': there is no such file"),
        ("transformer", "/dev/zero", "there is no such file"),
    ],
)
def test_missing_and_ambiguous_files_are_named(models, kind, name, message):
    with pytest.raises(UserError) as error:
        find_file("x.png", kind, name, [str(models)])
    assert message in str(error.value)
    assert f"with --{kind}" in str(error.value) or f"give --{kind}" in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "hf://owner/repo/file.safetensors",
        "https://example.com/file.safetensors",
        "HTTP://example.com/x",
        "gs://bucket/file",
        "s3://bucket/file",
        "file:///etc/passwd",
        "\\\\server\\share\\file.safetensors",
        "//server/share/file.safetensors",
        "\\\\?\\UNC\\server\\share\\file",
        "\\/server/share/file",
        "\\??\\UNC\\server\\share\\file",
        "https:/example.com/file",
        "C:\\folder\\con.png",
        "COM1",
        "lpt9 .txt",
    ],
)
@pytest.mark.parametrize("kind", ["transformer", "lora", "tokenizers", "image", "region"])
def test_an_address_in_an_image_is_never_opened(models, monkeypatch, kind, name):
    monkeypatch.setattr(socket, "socket", None)
    with pytest.raises(UserError, match=rf"an address that an image names is not opened; give it with --{kind}"):
        find_file("x.png", kind, name, [str(models)])


def test_without_folders_of_models_names_are_relative_to_here(models, monkeypatch):
    monkeypatch.chdir(models)
    assert find_file("x.png", "vae", "vae\\vae.SAFETENSORS", []) == "vae/vae.SAFETENSORS"
    assert find_file("x.png", "tokenizers", "vae", []) == "vae"
    with pytest.raises(UserError, match="there is no such file here; --models DIR says where to look, or give --vae"):
        find_file("x.png", "vae", "vae.SAFETENSORS", [])
    with pytest.raises(UserError, match="--models nowhere: is not a folder"):
        find_file("x.png", "vae", "vae.SAFETENSORS", ["nowhere"])


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_an_image_to_start_from_is_opened_only_in_the_folder_of_the_image_that_names_it(tmp_path, monkeypatch, kind):
    (tmp_path / "theirs" / "sub").mkdir(parents=True)
    for path in ("private.png", "theirs/mine.png", "theirs/sub/deep.png"):
        (tmp_path / path).write_bytes(b"")
    (tmp_path / "theirs" / "link.png").symlink_to(tmp_path / "private.png")
    monkeypatch.chdir(tmp_path)
    source = str(tmp_path / "theirs" / "x.png")
    folder = tmp_path / "theirs"
    for name in ("mine.png", "theirs/mine.png", str(folder / "mine.png"), "C:\\art\\mine.png", "/elsewhere/mine.png"):
        assert pathlib.Path(find_file(source, kind, name, [])).resolve() == folder / "mine.png"
    assert pathlib.Path(find_file(source, kind, "sub\\deep.png", [])).resolve() == folder / "sub" / "deep.png"
    names = ("private.png", "../private.png", "sub/../../private.png", str(tmp_path / "private.png"), "link.png")
    for name in (*names, "..\\private.png", "\0", ".", "", "/etc/passwd", "a" * 5000):
        with pytest.raises(UserError, match=f"there is no such file in the folder of {source}, or give --{kind}"):
            find_file(source, kind, name, [])
    assert find_file(source, kind, "../private.png", [str(tmp_path)]) == str(tmp_path / "private.png")
