"""Reference pictures in sampling, against arithmetic on latents joined by hand."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from anima_jax.errors import UserError
from anima_jax.models.dit import patchify
from anima_jax.sampling.arguments import reference_pictures
from anima_jax.sampling.comfyui_graph import comfyui_graph
from anima_jax.sampling.comfyui_reader import from_comfyui
from anima_jax.sampling.flags import parse_arguments
from anima_jax.sampling.image_text import from_text, to_text
from anima_jax.sampling.packing import TokenPacking, grid_of, wrapped
from anima_jax.sampling.recipe import Recipe
from anima_jax.sampling.references import EncodedReferences, Reference, join, packed_references
from anima_jax.sampling.request import ImageRequest, SamplingParams
from tests.models.networks import normal

SIZES = ((6, 8), (7, 5), (8, 8))
"""Rows and columns of latents; the second are odd."""
REFERENCES = (2, 1, 0)


def test_an_images_tokens_are_followed_by_its_references_and_padding():
    images = [normal(1, *size, 16, seed=index) for index, size in enumerate(SIZES)]
    others = [
        [normal(1, *size, 16, seed=10 * index + n) for n in range(count)]
        for index, (size, count) in enumerate(zip(SIZES, REFERENCES, strict=True), 1)
    ]
    packing = TokenPacking([image.shape[:3] for image in images])
    references = packed_references(packing, others)
    assert references is not None
    joined_blc, size_b3 = join(packing.pack(images), packing.size_b3, references)
    found_blc = np.asarray(wrapped(joined_blc, size_b3))
    assert grid_of(np.asarray(size_b3)).tolist() == [[3, 3, 4], [2, 4, 3], [1, 4, 4]]
    for row, image, own in zip(found_blc, images, others, strict=True):
        clip = np.concatenate([image, *own])
        # ComfyUI's pad_to_patch_size repeats the opposite edge.
        clip = np.pad(clip, [(0, 0), *((0, side % 2) for side in clip.shape[1:3]), (0, 0)], mode="wrap")
        expected = np.asarray(patchify(clip[None]))[0]
        np.testing.assert_array_equal(row[: len(expected)], expected)
        np.testing.assert_array_equal(row[len(expected) :], 0.0)
    assert packed_references(packing, [[], [], []]) is None


def test_a_reference_is_read_fitted_and_encoded_once_for_each_size(tmp_path):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (40, 80, 4), np.uint8))
    picture.save(tmp_path / "reference.png")
    in_memory, read = Reference.of(picture), Reference.of(tmp_path / "reference.png")
    assert (in_memory.digest, read.path) == (read.digest, str(tmp_path / "reference.png"))
    assert in_memory != read == Reference.of(str(tmp_path / "reference.png"))
    # Scaled to 32 rows, then the middle of 64 columns; a picture of the right size is not touched.
    fitted = np.asarray(read.fitted(32, 32), np.float32)
    whole = np.asarray(read.picture.resize((64, 32), Image.Resampling.BICUBIC), np.float32)
    assert np.abs(fitted - whole[:, 16:48]).max() <= 1.0
    assert read.fitted(80, 40) is read.picture
    encoded = []

    def encode(pixels):
        encoded.append(pixels.shape)
        return pixels

    run = EncodedReferences()
    for _ in range(2):
        run([(read, in_memory), (read,), ()], [(32, 32), (16, 32), (32, 32)], encode)
    assert encoded == [(1, 32, 32, 3), (1, 32, 16, 3)]


def test_what_is_no_picture_is_refused_by_name(tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    (tmp_path / "clip.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(32))
    for given, message in (
        (tmp_path / "nothing.png", r"nothing\.png: no such file"),
        (tmp_path / "notes.png", r"notes\.png: cannot be read as an image"),
        (tmp_path / "clip.mp4", r"clip\.mp4: is a video, expected a picture"),
        (3, "reference 3, expected a PIL image or the path of an image"),
    ):
        with pytest.raises(UserError, match=message):
            Reference.of(given)


def test_like_finds_the_references_next_to_the_image_and_tells_a_changed_one(tmp_path, capsys):
    for name, level in (("a.png", 10), ("b.png", 200)):
        Image.new("RGB", (8, 8), (level, 0, 0)).save(tmp_path / name)
    references = tuple(Reference.of(str(tmp_path / name)) for name in ("b.png", "a.png"))
    request = ImageRequest("a", 16, 16, references=references)
    texts = to_text(request, SamplingParams(), {"transformer": "t", "vae": "v", "text_encoder": "q"})
    assert "ComfyUI-Cosmos-Reference" in json.loads(texts["anima_jax"])["left_out_for_comfyui"][0]
    recipe = from_text(str(tmp_path / "drawn.png"), texts)
    flags = ["--like", "x", "-o", "y.png"]
    assert reference_pictures(parse_arguments(flags), recipe) == references
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    capsys.readouterr()
    changed, same = reference_pictures(parse_arguments(flags), recipe)
    assert (changed == references[0], same == references[1]) == (False, True)
    assert "b.png: is not the reference that" in capsys.readouterr().err
    own = reference_pictures(parse_arguments([*flags, "--reference", str(tmp_path / "a.png")]), recipe)
    assert own == references[1:]
    stranger = Recipe(str(tmp_path / "x.png"), references=[("/etc/secret.png", "")])
    with pytest.raises(UserError, match=r"names the reference '/etc/secret\.png': there is no such file in the folder"):
        reference_pictures(parse_arguments(flags), stranger)


def test_references_of_a_comfyui_graph_are_read_in_the_order_of_their_inputs():
    def node(kind, **inputs):
        return {"class_type": kind, "inputs": inputs}

    latents = {f"ref_latents.ref_latent_{number}": [str(number), 0] for number in (2, 1)}
    graph = comfyui_graph(ImageRequest("a").settings() | dataclasses.asdict(SamplingParams()), {}, [], "red")[0]
    sampler = next(node for node in graph.values() if node["class_type"].startswith("KSampler"))
    graph |= {
        "90": node("ApplyCosmosReferenceLatent", model=sampler["inputs"]["model"], **{
            name: [f"9{link[0]}", 0] for name, link in latents.items()
        }),
        "91": node("VAEEncode", pixels=["93", 0], vae=["3", 0]),
        "92": node("VAEEncode", pixels=["94", 0], vae=["3", 0]),
        "93": node("LoadImage", image="first.png [input]"),
        "94": node("LoadImage", image="second.png"),
    }  # fmt: skip
    sampler["inputs"]["model"] = ["90", 0]
    assert from_comfyui("x.json", graph).references == [("first.png", ""), ("second.png", "")]
