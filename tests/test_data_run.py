"""A data set from its files to training: what is cached, what is encoded again, and what the steps then see."""

import collections
import contextlib
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps

from anima_jax.checkpoints.models import load_vae, save_network
from anima_jax.checkpoints.names.networks import WAN_VAE
from anima_jax.config.load import load_config
from anima_jax.data.dataset import read_data
from anima_jax.data.encoders import Encoders
from anima_jax.data.problems import Problems
from anima_jax.data.shapes import draw, sample_placement, scenes
from anima_jax.data.store import Store, unpack
from anima_jax.models.parameters import split
from anima_jax.text.tokenizers import load_tokenizers
from anima_jax.train import main as train
from anima_jax.training import step as step_module
from tests.ports import free_port
from tests.small_run import ASSETS, write_config, write_transformer


def write_pictures(folder: pathlib.Path, count: int, sizes=((64, 64),), start: int = 0) -> None:
    """Captioned drawings `00.png`, `01.png`, … in turn of these sizes."""
    folder.mkdir(exist_ok=True)
    every = scenes(held_out=False)
    for number in range(start, start + count):
        scene = every[number % len(every)]
        picture = Image.fromarray(draw(scene, *sample_placement(np.random.default_rng(number))))
        picture.resize(sizes[number % len(sizes)], Image.Resampling.BICUBIC).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(scene.caption)


@pytest.fixture
def run(tmp_path):
    """A folder with ten pictures, a transformer and a configuration; gives the main TOML."""
    write_pictures(tmp_path / "pictures", 10)
    write_transformer(tmp_path / "base.safetensors")
    return write_config(tmp_path, tmp_path / "pictures", "epochs = 1")


def cache_of(config: pathlib.Path) -> pathlib.Path:
    return config.parent / "pictures" / "cache" / "anima_jax"


def records(folder: pathlib.Path) -> dict[bytes, bytes]:
    store = Store(folder)
    return {key: store.read(key) for key in store.keys()}  # noqa: SIM118 - a store is no mapping


def kinds(found: dict[bytes, bytes]) -> collections.Counter:
    """How many latents, masks and captions there are."""
    return collections.Counter("+".join(sorted(unpack(record)[1])) for record in found.values())


def added_by(config: pathlib.Path, *arguments) -> collections.Counter:
    """How many latents, masks and captions a run with `--cache_only` adds to the cache."""
    before = set(records(cache_of(config))) if cache_of(config).exists() else set()
    train(["--config", str(config), "--cache_only", *arguments])
    return kinds({key: record for key, record in records(cache_of(config)).items() if key not in before})


def test_only_what_is_new_is_encoded(run, tmp_path):
    assert added_by(run) == {"latents": 10, "states+t5_ids": 11}  # and the empty caption
    assert added_by(run) == {}
    write_pictures(tmp_path / "pictures", 2, start=10)
    assert added_by(run) == {"latents": 2, "states+t5_ids": 2}
    (tmp_path / "pictures" / "00.txt").write_text("another caption")
    assert added_by(run) == {"states+t5_ids": 1}
    (tmp_path / "pictures" / "00.png").touch()
    (tmp_path / "pictures" / "01.png").rename(tmp_path / "pictures" / "renamed.png")
    (tmp_path / "pictures" / "01.txt").rename(tmp_path / "pictures" / "renamed.txt")
    assert added_by(run) == {}


def test_another_vae_encodes_the_latents_again_and_keeps_those_of_the_first(run, tmp_path):
    assert added_by(run)["latents"] == 10
    vae = load_vae(ASSETS / "tiny_vae.safetensors")
    params = {path: value * 1.01 for path, value in split(vae)[1].items()}
    save_network(WAN_VAE, tmp_path / "other.safetensors", params, config=vae.config)
    assert added_by(run, "--set", f"model.vae_path={tmp_path / 'other.safetensors'}") == {"latents": 10}
    assert added_by(run) == {}


def test_a_file_that_changed_under_trust_is_not_cached_under_its_old_hash(run, tmp_path, capsys):
    train(["--config", str(run), "--cache_only"])
    (tmp_path / "pictures" / "00.png").write_bytes((tmp_path / "pictures" / "01.png").read_bytes())
    toml = tmp_path / "dataset.toml"
    toml.write_text(toml.read_text().replace("[64]", "[48]"))
    before = set(records(cache_of(run)))
    train(["--config", str(run), "--cache_only", "--trust_cache"])
    assert "00.png: changed since it was inspected" in capsys.readouterr().err
    new = {key: record for key, record in records(cache_of(run)).items() if key not in before}
    assert kinds(new) == {"latents": 9}


def test_a_mask_is_a_record_of_its_own(run, tmp_path):
    train(["--config", str(run), "--cache_only"])
    before = records(cache_of(run))
    (tmp_path / "masks").mkdir()
    half = np.repeat(np.array([[0], [102]], np.uint8), 32, 0).repeat(64, 1)
    Image.fromarray(half).save(tmp_path / "masks" / "03.png")
    toml = tmp_path / "dataset.toml"
    toml.write_text(toml.read_text() + f"mask_path = '{tmp_path / 'masks'}'\n")
    train(["--config", str(run), "--cache_only"])
    after = records(cache_of(run))
    (new,) = (record for key, record in after.items() if key not in before)
    np.testing.assert_array_equal(unpack(new)[1]["mask"], half[4::8, 4::8])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cached_latents_are_the_vaes_own_to_the_storage_dtype(run, tmp_path, dtype):
    train(["--config", str(run), "--cache_only", "--set", f"cache_dtype={dtype}"])
    vae = load_vae(ASSETS / "tiny_vae.safetensors", jnp.float32)
    encode = jax.jit(vae.encode)
    found = [unpack(record) for record in records(cache_of(run)).values()]
    latents = {pathlib.Path(header["name"]).name: arrays["latents"] for header, arrays in found if "latents" in arrays}
    for number in (0, 7):
        pixels = np.asarray(Image.open(tmp_path / "pictures" / f"{number:02d}.png"), np.float32) / 127.5 - 1.0
        expected = np.asarray(encode(pixels[None, None]))[0, 0]
        # Token by token: row, column, and within the token row, column, channel.
        tokens = expected.reshape(4, 2, 4, 2, 16).transpose(0, 2, 1, 3, 4).reshape(16, 64)
        stored = latents[f"{number:02d}.png"]
        assert stored.dtype == jnp.dtype(dtype)
        # Programs for other batches round differently; bfloat16 adds half a unit in its eighth bit.
        rounding = 2**-8 * np.abs(tokens) if dtype == "bfloat16" else 0.0
        assert np.all(np.abs(stored.astype(np.float32) - tokens) <= rounding + 2e-5 * np.abs(tokens).max())


def test_files_that_cannot_be_decoded_are_named_and_left_out(run, tmp_path, capsys):
    broken = tmp_path / "pictures" / "04.png"
    broken.write_bytes(broken.read_bytes()[:400])
    (tmp_path / "pictures" / "05.txt").write_bytes(b"caf\xe9")
    train(["--config", str(run), "--dry_run"])
    assert "1 file was skipped" in capsys.readouterr().out  # pictures are not decoded yet
    train(["--config", str(run), "--cache_only"])
    said = capsys.readouterr()
    named = [line for line in said.err.replace("\r", "\n").splitlines() if line.startswith("skipped: ")]
    assert sorted(line.split(": ")[1].rpartition("/")[2] for line in named) == ["04.png", "05.txt"]
    assert "2 files were skipped" in said.out
    assert "1 of 9 examples cannot be encoded" in said.out
    assert kinds(records(cache_of(run)))["latents"] == 8
    with pytest.raises(SystemExit) as exit_:
        train(["--config", str(run), "--cache_only", "--strict_data"])
    assert exit_.value.code == 2


COUNTED = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[2]))
if len(sys.argv) > 3:
    jax.distributed.initialize("localhost:" + sys.argv[3], 2, int(sys.argv[4]))
from anima_jax.train import main
main(["--config", sys.argv[1], "--cache_only"])
"""


def cache_with(config: pathlib.Path, devices: int, *distributed) -> subprocess.Popen:
    """`--cache_only` in a process of its own with so many devices, which writes to `log_of`'s file."""
    command = [sys.executable, "-c", COUNTED, str(config), str(devices), *map(str, distributed)]
    with log_of(config).open("a") as log:  # a pipe that nobody reads stops its writer when it is full
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def log_of(config: pathlib.Path) -> pathlib.Path:
    return config.with_name("said.log")


def latents_of(found: dict[bytes, bytes]) -> dict[bytes, np.ndarray]:
    return {key: unpack(record)[1].get("latents", np.zeros(1)) for key, record in found.items()}


def check_equal(found: dict[bytes, bytes], expected: dict[bytes, bytes]) -> None:
    found_latents, expected_latents = latents_of(found), latents_of(expected)
    assert found_latents.keys() == expected_latents.keys()
    for key, latents in expected_latents.items():
        # Programs for other batches and devices round differently.
        np.testing.assert_allclose(found_latents[key], latents, rtol=0, atol=2e-5 * max(1.0, np.abs(latents).max()))


def test_eight_devices_share_a_batch_and_encode_the_same(run):
    with cache_with(run, 1) as one:
        assert one.wait() == 0, log_of(run).read_text()
    alone = records(cache_of(run))
    for file in cache_of(run).iterdir():
        file.unlink()
    with cache_with(run, 8) as eight:
        assert eight.wait() == 0, log_of(run).read_text()
    check_equal(records(cache_of(run)), alone)


@pytest.mark.slow
def test_two_processes_fill_disjoint_parts_of_one_cache(tmp_path):
    write_pictures(tmp_path / "pictures", 150)
    write_transformer(tmp_path / "base.safetensors")
    run = write_config(tmp_path, tmp_path / "pictures", "epochs = 1\ncaching_batch_size = 8")
    with cache_with(run, 1) as one:
        assert one.wait() == 0, log_of(run).read_text()
    alone = records(cache_of(run))
    for file in cache_of(run).iterdir():
        file.unlink()
    port = free_port()
    with cache_with(run, 1, port, 0) as first, cache_with(run, 1, port, 1) as second:
        assert (first.wait(), second.wait()) == (0, 0), log_of(run).read_text()
    check_equal(records(cache_of(run)), alone)
    parts = [Store(cache_of(run)).keys()]
    assert len(list(parts[0])) == len(alone)


@pytest.mark.slow
def test_caching_killed_at_random_moments_ends_with_the_same_files(tmp_path):
    write_pictures(tmp_path / "pictures", 400)
    write_transformer(tmp_path / "base.safetensors")
    run = write_config(tmp_path, tmp_path / "pictures", "epochs = 1\ncaching_batch_size = 4")
    began = time.monotonic()
    with cache_with(run, 1) as undisturbed:
        assert undisturbed.wait() == 0, log_of(run).read_text()
    took = time.monotonic() - began
    files = {file.name: file.read_bytes() for file in cache_of(run).iterdir() if file.suffix != ".jsonl"}
    expected = records(cache_of(run))
    for file in cache_of(run).iterdir():
        file.unlink()
    moments = random.Random(0)
    for _ in range(5):
        with cache_with(run, 1) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moments.uniform(0.2, 1.1) * took)
            process.send_signal(signal.SIGKILL)
    with cache_with(run, 1) as process:
        assert process.wait() == 0, log_of(run).read_text()
    assert records(cache_of(run)) == expected
    assert {file.name: file.read_bytes() for file in cache_of(run).iterdir() if file.suffix != ".jsonl"} == files


@pytest.fixture
def mixed(tmp_path):
    """Forty pictures of four shapes, eight of them with masks, at two resolutions; gives the main TOML."""
    folder, masks = tmp_path / "pictures", tmp_path / "masks"
    write_pictures(folder, 40, sizes=((96, 96), (128, 80), (80, 140), (200, 110)))
    masks.mkdir()
    for number in range(0, 40, 5):
        width, height = Image.open(folder / f"{number:02d}.png").size
        Image.fromarray(np.tile(np.uint8([[0], [255]]).repeat(height // 2, 0), (1, width))).save(
            masks / f"{number:02d}.png"
        )
    write_transformer(tmp_path / "base.safetensors")
    run = write_config(tmp_path, folder, "epochs = 100\nmax_steps = 20\nmicro_batch_size_per_gpu = 4")
    (tmp_path / "dataset.toml").write_text(
        "resolutions = [64, 96]\nenable_ar_bucket = true\nmin_ar = 0.5\nmax_ar = 2.0\nnum_ar_buckets = 7\n"
        f"[[directory]]\npath = '{folder}'\nmask_path = '{masks}'\n"
    )
    return run


def test_a_dry_run_over_mixed_sizes_plans_two_programs_and_writes_nothing(mixed, tmp_path, capsys):
    train(["--config", str(mixed), "--dry_run"])
    assert "compiled programs: 2" in capsys.readouterr().out
    assert not (tmp_path / "pictures" / "cache").exists()


@pytest.mark.slow
def test_a_whole_run_over_mixed_sizes_resolutions_and_masks(mixed, tmp_path, monkeypatch):
    run, folder = mixed, tmp_path / "pictures"
    traced = []
    original = step_module.train_step
    monkeypatch.setattr(step_module, "train_step", lambda *a, **k: (traced.append(1), original(*a, **k))[1])
    train(["--config", str(run)])
    assert len(traced) == 2
    (made,) = (tmp_path / "runs").iterdir()
    lines = (made / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 20
    assert (made / "step20" / "model.safetensors").is_file()

    train(["--config", str(run), "--dump_dataset", str(tmp_path / "dump")])
    dumped = sorted(path.name for path in (tmp_path / "dump").glob("*.png"))
    assert len(dumped) == 80 + 16
    errors = []
    for path in (tmp_path / "dump").glob("*[0-9].png"):
        stem, size = path.name.split(".")[:2]
        width, height = map(int, size.split("x"))
        fitted = ImageOps.fit(Image.open(folder / f"{stem}.png"), (width, height), Image.Resampling.BICUBIC)
        errors.append(np.mean((np.asarray(Image.open(path), np.float64) - np.asarray(fitted)) ** 2))
        assert path.with_suffix(".txt").read_text() == (folder / f"{stem}.txt").read_text()
    # The small VAE was trained on drawings of 64 × 64 pixels; stretched ones it gives back at 25 dB or better.
    assert 10 * np.log10(255**2 / np.mean(errors)) > 25


@pytest.mark.slow
def test_an_epoch_of_thirteen_aspect_ratios_at_two_resolutions_is_two_programs(tmp_path, monkeypatch, capsys):
    ratios = np.geomspace(0.25, 4.0, 13)
    sizes = [(round(192 * ratio**0.5), round(192 / ratio**0.5)) for ratio in ratios]
    write_pictures(tmp_path / "pictures", 26, sizes)
    write_transformer(tmp_path / "base.safetensors")
    run = write_config(tmp_path, tmp_path / "pictures", "epochs = 1\nmicro_batch_size_per_gpu = 4")
    toml = tmp_path / "dataset.toml"
    ratio_keys = "enable_ar_bucket = true\nmin_ar = 0.25\nmax_ar = 4.0\nnum_ar_buckets = 13\n"
    toml.write_text(ratio_keys + toml.read_text().replace("[64]", "[192, 256]"))
    traced = []
    original = step_module.train_step
    monkeypatch.setattr(step_module, "train_step", lambda *a, **k: (traced.append(1), original(*a, **k))[1])
    train(["--config", str(run)])
    said = capsys.readouterr().out
    buckets = {part.split(":")[0] for line in said.splitlines() if "×" in line for part in line.split(",")}
    assert len({bucket.strip() for bucket in buckets if "×" in bucket}) == 26
    assert len(traced) == 2


def write_video(path: pathlib.Path, frames: int) -> None:
    """A white square that moves to the right over blue, 16 frames a second."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=16)
        stream.width = stream.height = 64
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for number in range(frames):
            pixels = np.full((64, 64, 3), (45, 85, 200), np.uint8)
            pixels[16:48, 4 + 2 * number : 36 + 2 * number] = 250
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    path.with_suffix(".txt").write_text("a white square on a blue background")


@pytest.mark.slow
def test_videos_and_images_have_separate_tiers(run, tmp_path, capsys):
    for number in range(3):
        write_video(tmp_path / "pictures" / f"clip{number}.mp4", 7 + number)
    write_video(tmp_path / "pictures" / "short.mp4", 3)
    toml = tmp_path / "dataset.toml"
    toml.write_text("frame_buckets = [1, 5]\n" + toml.read_text())
    options = ["--config", str(run), "--set", "micro_batch_size_per_gpu=2"]
    train([*options, "--dump_dataset", str(tmp_path / "dump")])
    clips = sorted(path.name for path in (tmp_path / "dump").glob("*.mp4"))
    assert clips == [f"clip{number}.64x64x5.mp4" for number in range(3)]
    assert len(list((tmp_path / "dump").glob("*.png"))) == 10

    train(options)
    out = capsys.readouterr().out
    assert "64x5f" in out
    assert "1 file was skipped" in out
    (made,) = (tmp_path / "runs").iterdir()
    assert len((made / "metrics.jsonl").read_text().splitlines()) == 5 + 2


@pytest.mark.slow
def test_uncached_text_equals_cached_text(run):
    """Step by step the same loss, whether the states come from the cache or from the encoder."""

    def losses(*arguments):
        train(["--config", str(run), *arguments])
        made = max((run.parent / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        lines = (made / "metrics.jsonl").read_text().splitlines()
        return [float(line.split('"loss": ')[1].split(",")[0]) for line in lines]

    cached = losses()
    online = losses("--set", "model.cache_text_embeddings=false")
    assert len(cached) == 10
    # Other paddings and batches of the encoder: float32 rounding.
    np.testing.assert_allclose(online, cached, rtol=1e-5)


def test_evaluation_data_without_a_usable_example_are_named(run, tmp_path, capsys):
    write_pictures(tmp_path / "held_out", 1)
    broken = tmp_path / "held_out" / "00.png"
    broken.write_bytes(broken.read_bytes()[:400])
    dataset = (tmp_path / "dataset.toml").read_text().replace(str(tmp_path / "pictures"), str(tmp_path / "held_out"))
    (tmp_path / "held_out.toml").write_text(dataset)
    with pytest.raises(SystemExit) as exit_:
        train(["--config", str(run), "--cache_only", "--set", f"eval_datasets=['{tmp_path}/held_out.toml']"])
    expected = f"{tmp_path}/held_out.toml: nothing to evaluate: none of 1 examples could be encoded"
    assert expected in f"{exit_.value}{capsys.readouterr().err}"


def test_too_long_captions_are_counted_and_cut(run, tmp_path, capsys):
    (tmp_path / "pictures" / "00.txt").write_text("a red circle on a blue background " * 40)
    train(["--config", str(run), "--cache_only", "--set", "model.max_caption_tokens=64"])
    train(["--config", str(run), "--dry_run", "--set", "model.max_caption_tokens=64"])
    assert "different captions over 64 tokens, which are cut (max_caption_tokens): 1" in capsys.readouterr().out
    config = load_config(run, ["model.max_caption_tokens=64"])
    tokenizers = load_tokenizers(config.model.tokenizer_path)
    data = read_data(config, Problems(), batch_size_of=lambda size: 1)
    encoders = Encoders(config, tokenizers)
    data.open_cache(encoders)
    data.encode(encoders, Problems())
    (example,) = (e for e in data.examples if e.entry.media.name.endswith("00.png"))
    assert [len(array) for array in data.cache.text(example.captions[0])] == [64, 64]
