"""Pairs of images: which control pictures belong to which images, what is said of the others, and what a step gets."""

import itertools
import logging
import re

import numpy as np
import pytest
from PIL import Image, ImageOps

from anima_jax.config.dataset import DirectorySource
from anima_jax.config.load import load_config
from anima_jax.data.dataset import read_data
from anima_jax.data.dump import dump_dataset
from anima_jax.data.encoders import Encoders
from anima_jax.data.examples import contents_of, examples_of
from anima_jax.data.file_index import FileIndex
from anima_jax.data.folder_source import FolderReader
from anima_jax.data.inpainting import random_mask
from anima_jax.data.problems import Problems
from anima_jax.data.sources import read_entries
from anima_jax.data.store import Store, unpack
from anima_jax.errors import UserError
from anima_jax.text.tokenizers import load_tokenizers
from anima_jax.training import batches as batches_module
from anima_jax.training.batches import Batches
from anima_jax.training.run import Run
from tests.small_run import write_config

SIZES = ((64, 64), (128, 80), (64, 64), (130, 78))
BUCKETS = ((64, 64), (80, 48))
CONTROL = {"control": "type = 'lllite'", "inpaint": "type = 'lllite'\ncond_in_channels = 4"}


def noise(seed: int, size_wh: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size_wh[::-1], 3), np.uint8))


def edges(seed: int, size_wh: tuple[int, int]) -> Image.Image:
    """Bright lines on black, which deflate well."""
    lines = np.zeros((*size_wh[::-1], 3), np.uint8)
    lines[5 + seed, :] = lines[:, 9 + seed] = 255 - seed
    return Image.fromarray(lines)


@pytest.fixture
def folder(tmp_path):
    """Four captioned images of two shapes; `control` has edges, but noise of another size and suffix for the third."""
    for name in ("pictures", "control", "second", "masks"):
        (tmp_path / name).mkdir()
    (tmp_path / "base.safetensors").touch()  # never loaded
    for number, size in enumerate(SIZES):
        noise(number, size).save(tmp_path / "pictures" / f"{number}.png")
        (tmp_path / "pictures" / f"{number}.txt").write_text(f"picture {number}")
        edges(number, size).save(tmp_path / "control" / f"{number}.png")
        noise(100 + number, size).save(tmp_path / "second" / f"{number}.png")
    (tmp_path / "control" / "2.png").unlink()
    noise(50, (100, 100)).save(tmp_path / "control" / "2.webp", lossless=True)
    return tmp_path


def read(folder, *, strict=False, index=None, **keys):
    """Entries, summary line and problems of the folder's images with these keys."""
    problems = Problems(strict)
    source = DirectorySource.model_construct(path=str(folder / "pictures"), **keys)
    return *read_entries(FolderReader(source), index or FileIndex(), problems), problems


def opened(folder, pairs: str, dataset: str = ""):
    """The data of a run that trains on these pairs, encoded, and its batches of four."""
    adapter = {"adapter": CONTROL[pairs]} if pairs in CONTROL else {}
    keys = f"epochs = 9\nedit = {str(pairs == 'edit').lower()}"
    path = write_config(folder, folder / "pictures", keys, **adapter)
    sizes = "enable_ar_bucket = true\nar_buckets = [1.0, 1.6]\n"
    (folder / "dataset.toml").write_text(f"{sizes}{(folder / 'dataset.toml').read_text()}{dataset}\n")
    config, problems = load_config(path), Problems()
    tokenizers = load_tokenizers(config.model.tokenizers)
    data = read_data(config, problems, batch_size_of=lambda _: 4)
    encoders = Encoders(config, tokenizers)
    data.open_cache(encoders)
    data.encode(encoders, problems)
    return data, Batches(Run(config, 1), data, tokenizers), problems


def row_of(data, batches, number: int, step: int = 0) -> int:
    return [name.rpartition("/")[2] for name in batches.names(step)].index(f"{number}.png")


def patches_of(image: Image.Image, size_wh: tuple[int, int]) -> np.ndarray:
    """The image as Pillow fits it to a size, in patches of 16×16 pixels by hand."""
    pixels = np.asarray(ImageOps.fit(image.convert("RGB"), size_wh, Image.Resampling.BICUBIC))
    corners = itertools.product(range(0, size_wh[1], 16), range(0, size_wh[0], 16))
    return np.stack([pixels[y : y + 16, x : x + 16].reshape(-1) for y, x in corners])


def test_pairs_are_matched_by_base_name_and_those_without_a_partner_are_named_and_counted(folder, caplog):
    (folder / "control" / "0.png").unlink()
    (folder / "control" / "1.png").write_bytes(b"broken")
    frames = [noise(n, (128, 80)) for n in range(4)]
    (folder / "control" / "3.png").unlink()
    frames[0].save(folder / "control" / "3.gif", save_all=True, append_images=frames[1:], duration=100)
    control = str(folder / "control")
    entries, line, problems = read(folder, control_path=(control,))
    pictures = folder / "pictures"
    assert [[partner.media.name for partner in entry.controls] for entry in entries] == [[f"{control}/2.webp"]]
    assert line == f"{pictures}: 1 image, 1 paired with control pictures, 3 could not be used"
    assert problems.count == 3
    found = [line.removeprefix(f"{pictures}/")[:40] for line in problems.lines]
    assert found == [
        "0.png: has no control picture: expected ",
        "1.png: its control picture cannot be use",
        f"3.png: its control picture {control}"[:40],
    ]
    with pytest.raises(UserError, match=r"0\.png: has no control picture"):
        read(folder, control_path=(control,), strict=True)


def test_control_pictures_of_no_image_are_named_and_counted(folder, caplog):
    for name in ("orphan.png", "notes.txt", ".hidden.png"):
        (folder / "control" / name).write_bytes(b"")
    with caplog.at_level(logging.INFO):
        entries, line, problems = read(folder, control_path=(str(folder / "control"),))
    assert (len(entries), problems.count) == (4, 0)
    assert "1 control picture without an image" in line
    assert f"control picture without an image: {folder}/control/orphan.png" in caplog.messages


def test_of_several_partners_with_one_name_the_first_picture_is_used_and_the_others_are_named(folder, caplog):
    noise(7, SIZES[0]).save(folder / "control" / "0.bmp")
    (folder / "control" / "0.aaa").write_bytes(b"")
    for suffix in ("png", "tiff"):
        Image.new("L", SIZES[0], 255).save(folder / "masks" / f"0.{suffix}")
    keys = {"control_path": (str(folder / "control"),), "mask_path": str(folder / "masks")}
    with caplog.at_level(logging.INFO):
        entries, line, problems = read(folder, **keys)
    assert (len(entries), problems.count) == (4, 0)
    assert entries[0].controls[0].media.name == f"{folder}/control/0.bmp"
    assert "2 partners ignored (mask or control picture of whose name there is another)" in line
    names = ", ".join(f"{folder}/{name}" for name in ("masks/0.tiff", "control/0.png"))
    assert f"partner ignored (mask or control picture of whose name there is another): {names}" in caplog.messages


def test_control_pictures_of_other_proportions_are_warned_about(folder, caplog):
    noise(0, (64, 32)).save(folder / "control" / "0.png")
    with caplog.at_level(logging.WARNING):
        entries, _, _ = read(folder, control_path=(str(folder / "control"),))
    assert len(entries) == 4
    assert [line for line in caplog.messages if "proportions" in line] == [
        f"with a control picture of other proportions, which is cropped around its own centre: {folder}/pictures/0.png"
    ]


def control_hashes(entries):
    source = DirectorySource.model_construct(path="", resolutions=(64,))
    return contents_of(examples_of(entries, source, Problems())).get("control pictures")


def test_the_file_index_knows_the_pairs(folder):
    keys = {"control_path": (str(folder / "control"),), "inpaint_mask_path": str(folder / "masks")}
    Image.new("L", SIZES[1], 255).save(folder / "masks" / "1.png")
    first, *_ = read(folder, index=FileIndex(folder / "index"), **keys)
    trusted, *_ = read(folder, index=FileIndex(folder / "index", trust=True), **keys)
    assert trusted == first
    assert [len(entry.partners) for entry in trusted] == [1, 2, 1, 1]
    edges(7, SIZES[0]).save(folder / "control" / "0.png")
    now, *_ = read(folder, index=FileIndex(folder / "index"), **keys)
    changed = control_hashes(trusted) != control_hashes(now)
    assert changed.tolist() == [True, False, False, False]
    assert control_hashes(read(folder)[0]) is None  # so that checkpoints of runs without pairs stay as they are


def test_nothing_left_is_one_line(folder):
    with pytest.raises(UserError, match=r"nothing to train on: .*: 0 images, 4 could not be used: 0 ex[^\n]*$"):
        opened(folder, "control", f"control_path = '{folder / 'masks'}'")


def test_a_step_gets_control_pictures_as_pillow_crops_them(folder):
    data, batches, problems = opened(folder, "control", f"control_path = '{folder / 'control'}'")
    batch = batches.load(0).batch
    assert problems.count == 0
    names = ("0.png", "1.png", "2.webp", "3.png")
    for number, (size, name) in enumerate(zip(BUCKETS * 2, names, strict=True)):
        expected = patches_of(Image.open(folder / "control" / name), size)
        control_lp = batch.control_blp[row_of(data, batches, number)]
        np.testing.assert_array_equal(control_lp[: len(expected)], expected)
        assert not control_lp[len(expected) :].any()
    store = Store(folder / "pictures" / "cache" / "anima_jax")
    kinds = [set(unpack(store.read(key))[1]) for key in list(store.keys())]
    assert (kinds.count({"deflated"}), kinds.count({"control"})) == (3, 1)  # edges and noise


def test_another_control_picture_is_cached_anew_and_a_broken_one_is_left_out(folder):
    opened(folder, "control", f"control_path = '{folder / 'control'}'")
    (folder / "control" / "1.png").write_bytes((folder / "control" / "1.png").read_bytes()[:200])
    edges(9, SIZES[0]).save(folder / "control" / "0.png")
    data, _, problems = opened(folder, "control", f"control_path = '{folder / 'control'}'")
    assert [example.entry.media.name[-5:] for example in data.examples] == ["0.png", "2.png", "3.png"]
    (line,) = problems.lines
    assert line.startswith(f"{folder}/pictures/1.png: its control picture cannot be used: {folder}/control/1.png: ")
    np.testing.assert_array_equal(
        data.cache.control(data.examples[0]), patches_of(Image.open(folder / "control" / "0.png"), (64, 64))
    )


def test_references_follow_the_image_as_frames_with_the_latents_of_those_pictures(folder):
    data, batches, _ = opened(folder, "edit", f"control_path = ['{folder / 'second'}', '{folder / 'pictures'}']")
    batch = batches.load(0).batch
    tier = data.plan.tiers[0]
    assert (tier.name, tier.tokens, batch.control_blp) == ("64+2ref", 48, None)
    alone = {example.entry.media.name[-5:]: data.cache.latents(example) for example in data.examples}
    (folder / "pictures").rename(folder / "first")
    (folder / "second").rename(folder / "pictures")
    for number in range(4):
        (folder / "pictures" / f"{number}.txt").write_text("")
    others, _, _ = opened(folder, "", "skip_empty_caption = false")
    second = {example.entry.media.name[-5:]: others.cache.latents(example) for example in others.examples}
    for row, name in enumerate(one[-5:] for one in batches.names(0)):
        tokens = np.concatenate([alone[name], second[name], alone[name]])
        np.testing.assert_array_equal(batch.latents_blc[row, : len(tokens)], tokens)
        assert batch.grid_b3[row].tolist() == [3, 4, 4] if name in {"0.png", "2.png"} else [3, 3, 5]


def test_random_masks_depend_on_the_example_and_the_epoch_alone(folder):
    data, batches, _ = opened(folder, "inpaint", "inpaint_masks = {boxes = 1, strokes = 1}")
    twice = [batches.load(step).batch for step in (0, 1, 0)]
    np.testing.assert_array_equal(twice[0].control_blp, twice[2].control_blp)
    channels = [batch.control_blp.reshape(4, -1, 256, 4) for batch in twice]
    rows = [[row_of(data, batches, number, step) for number in range(4)] for step in (0, 1)]
    for number, size in enumerate(BUCKETS * 2):
        first, second = (channel[row[number]] for channel, row in zip(channels, rows, strict=False))
        expected = patches_of(Image.open(folder / "pictures" / f"{number}.png"), size)
        np.testing.assert_array_equal(first[: len(expected), :, :3].reshape(expected.shape), expected)
        assert set(np.unique(first[: len(expected), :, 3])) == {0, 255}
        assert (first[..., 3] != second[..., 3]).any()  # in another epoch


def test_masks_are_the_same_in_another_process_and_those_of_evaluation_with_another_seed(folder, monkeypatch):
    data, batches, _ = opened(folder, "inpaint")
    whole = batches.load(0).batch.control_blp
    monkeypatch.setattr(batches_module, "rows_of_process", lambda *_: np.array([1, 3]))
    own = Batches(batches._run, data, batches._tokenizers)
    np.testing.assert_array_equal(own.load(0).batch.control_blp, whole[[1, 3]])
    monkeypatch.undo()
    evaluated = []
    for seed in (0, 5):
        config = data._config.model_copy(update={"seed": seed})
        evaluated += [next(Batches(Run(config, 1), data, batches._tokenizers).for_evaluation())[0].control_blp]
    np.testing.assert_array_equal(*evaluated)


def test_own_masks_are_cropped_like_the_image_and_shown(folder, tmp_path):
    mask = np.zeros((78, 130), np.uint8)
    mask[:40, 60:] = 200
    Image.fromarray(mask).save(folder / "masks" / "3.png")
    Image.new("L", (10, 10)).save(folder / "masks" / "0.png")
    data, batches, problems = opened(folder, "inpaint", f"inpaint_mask_path = '{folder / 'masks'}'")
    size = r"0\.png: its inpainting mask .*/0\.png is an image of 10×10 pixels, expected an image of 64×64$"
    assert [bool(re.search(size, line)) for line in problems.lines] == [True]
    (example,) = (each for each in data.examples if each.entry.inpaint_mask)
    expected = np.asarray(ImageOps.fit(Image.fromarray(mask), (80, 48), Image.Resampling.NEAREST)) >= 128
    np.testing.assert_array_equal(data.cache.inpaint_mask(example), expected)
    vae = Encoders(data._config, batches._tokenizers).vae
    path = dump_dataset(str(tmp_path / "dump"), [example], data.cache, vae, data._config)
    written = sorted(file.name.removeprefix("3.80x48.") for file in path.iterdir())
    assert written == ["control.png", "inpaint.png", "png", "txt"]
    np.testing.assert_array_equal(np.asarray(Image.open(path / "3.80x48.inpaint.png")), expected)
    shown = Image.open(path / "3.80x48.control.png")
    np.testing.assert_array_equal(patches_of(shown, (80, 48)), data.cache.control(example))


def test_kinds_of_masks_are_drawn_in_their_shares_and_cover_something():
    shares = {"boxes": 45.0, "strokes": 45.0, "whole": 10.0}
    masks = [random_mask(shares, (96, 64), 0, epoch, 7) for epoch in range(400)]
    covered = np.array([mask.mean() for mask in masks])
    assert masks[0].shape == (64, 96)
    # Four standard deviations of a share of 10 % of 400 are 6 %.
    assert abs(np.mean(covered == 1.0) - 0.1) < 0.06
    assert covered.min() > 0
    assert 0.1 < np.median(covered[covered < 1]) < 0.5
    assert random_mask({"whole": 1.0}, (16, 16), 0, 0, 1).all()
