"""A data set over HTTP: what is trained and how, what is left out and why, and captions edited in their own files."""

import collections
import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

pytest.importorskip("starlette")
pytest.importorskip("httpx")

from scipy.sparse.csgraph import connected_components
from starlette.testclient import TestClient

from anima_jax.config.load import load_config
from anima_jax.data.batch_plan import describe
from anima_jax.data.dataset import read_data
from anima_jax.data.problems import Problems
from anima_jax.data.sources import CaptionPlace
from anima_jax.errors import UserError
from anima_jax.serving.app import create_app
from anima_jax.serving.http.server import ServerConfig
from anima_jax.serving.studio.caption_edits import read_fields, write_captions
from anima_jax.serving.studio.dataset_edits import with_tag
from anima_jax.serving.studio.dataset_pictures import MAX_BITS, MAX_COLOUR, Look, near_duplicates
from anima_jax.training.run import Run
from tests.small_run import write_config, write_transformer


def picture(seed: int, width: int, height: int) -> Image.Image:
    """A picture with a few shapes, so that no two look alike."""
    random, image = np.random.default_rng(seed), Image.new("RGB", (width, height))
    pen = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, side = random.integers(0, width), random.integers(0, height), random.integers(8, 60)
        pen.rectangle((x, y, x + side, y + side), fill=tuple(random.integers(0, 256, 3).tolist()))
    return image


@pytest.fixture
def folder(tmp_path):
    """Seven pictures: of several shapes, one without a caption, one damaged, one small, and one that is a copy."""
    root = tmp_path / "set"
    root.mkdir()
    for seed, (name, width, height) in enumerate([("a", 200, 100), ("b", 100, 200), ("c", 90, 90), ("d", 300, 300)]):
        picture(seed, width, height).save(root / f"{name}.png")
    picture(0, 200, 100).resize((150, 75)).save(root / "copy.jpg", quality=80)
    (root / "broken.png").write_bytes(b"not a picture")
    picture(9, 32, 32).save(root / "tiny.png")
    captions = {"a": "cat, red", "b": "cat, blue, tall", "c": "dog", "copy": "Cat", "broken": "x", "tiny": "dog, red"}
    for name, caption in captions.items():
        (root / f"{name}.txt").write_text(caption)
    (root / "e.txt").write_text("of no picture")
    return root


BUCKETS = "resolutions = [64, 96]\nenable_ar_bucket = true\nmin_ar = 0.5\nmax_ar = 2.0\nnum_ar_buckets = 3\n"


def served(path) -> TestClient:
    app = create_app(None, ServerConfig(dataset=path))
    app.state.dataset.view.wait(60)
    return TestClient(app, base_url="http://127.0.0.1")


@pytest.fixture
def client(folder):
    path = folder.parent / "dataset.toml"
    path.write_text(f"{BUCKETS}[[directory]]\npath = '{folder}'\nnum_repeats = 2\n")
    return served(path)


def listed(client, **query) -> dict[str, dict]:
    found = client.get("/api/dataset/pictures", params=query).json()
    return {each["name"]: each for each in found["pictures"]}


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def put(client, id, text, **headers):
    return client.put(f"/api/dataset/pictures/{id}/caption", json={"text": text}, headers=headers)


def test_buckets_steps_and_what_is_left_out_are_those_of_training(folder, caplog):
    write_transformer(folder.parent / "base.safetensors")
    path = write_config(folder.parent, folder, "micro_batch_size_per_gpu = 2\nepochs = 3")
    (folder.parent / "dataset.toml").write_text(f"{BUCKETS}[[directory]]\npath = '{folder}'\nnum_repeats = 1.5\n")
    config, problems = load_config(path), Problems()
    with caplog.at_level("INFO"):
        data = read_data(config, problems, batch_size_of=Run(config, 1).global_batch, keep=False)
    client = served(path)
    found = client.get("/api/dataset").json()
    assert found["table"] == describe(data.plan.tiers, [example.bucket for example in data.examples])
    assert (found["steps_of_first_epoch"], found["steps"]) == (data.plan.steps_for(1), data.plan.steps_for(3))
    assert found["problems"] == problems.lines
    assert any(found["sources"][0]["line"] in line for line in caplog.messages)
    sizes = collections.Counter((example.bucket.size.width, example.bucket.size.height) for example in data.examples)
    assert {(each["width"], each["height"]): each["examples"] for each in found["buckets"]} == sizes


def test_pictures_are_cropped_as_shown_and_flagged(client, folder):
    found = listed(client)
    assert {name for name, each in found.items() if each["left_out"]} == {"broken.png", "d.png"}
    assert found["d.png"]["left_out"] == "left out without a caption (skip_empty_caption)"
    assert "not a readable PNG" in found["broken.png"]["left_out"]
    assert {name for name, each in found.items() if each["upscaled"]} == {"tiny.png", "c.png"}
    for name in ("a.png", "b.png", "c.png"):
        whole, detail = Image.open(folder / name), client.get(f"/api/dataset/pictures/{found[name]['id']}").json()
        for crop, url in zip(found[name]["buckets"], detail["trained"], strict=True):
            left, top = crop["left"] * whole.width, crop["top"] * whole.height
            box = (left, top, left + crop["kept_width"] * whole.width, top + crop["kept_height"] * whole.height)
            size = crop["width"], crop["height"]
            expected = np.asarray(whole.resize(size, Image.Resampling.BICUBIC, box=box))
            trained = np.asarray(Image.open(io.BytesIO(client.get(url).content)))
            np.testing.assert_array_equal(trained, expected)
            np.testing.assert_array_equal(trained, np.asarray(ImageOps.fit(whole, size, Image.Resampling.BICUBIC)))


def test_filters_tags_and_pages(client):
    assert set(listed(client, filter="no_caption")) == {"d.png"}
    assert set(listed(client, tag="CAT")) == {"a.png", "b.png", "copy.jpg"}
    assert set(listed(client, search="RED dog")) == {"tiny.png"}
    assert set(listed(client, bucket="96×96", filter="upscaled")) == {"c.png", "tiny.png"}
    tags = client.get("/api/dataset/tags").json()["tags"]
    assert {each["tag"]: each["count"] for each in tags} == {"cat": 3, "dog": 2, "red": 2, "blue": 1, "tall": 1}
    pages = [client.get("/api/dataset/pictures", params={"offset": at, "limit": 3}).json() for at in (0, 3, 6)]
    assert [name["name"] for page in pages for name in page["pictures"]] == sorted(listed(client))


def test_editing_a_caption_changes_its_file_and_nothing_else(client, folder):
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfcat, red\r\n")
    os.chmod(folder / "a.txt", 0o640)
    before, id = contents(folder), listed(client)["a.png"]["id"]
    shown = client.get(f"/api/dataset/pictures/{id}")
    answer = put(client, id, "cat, green\nbig", **{"If-Match": shown.headers["etag"]})
    assert (answer.status_code, answer.json()["caption"]) == (200, "cat, green\nbig")
    assert contents(folder) == before | {"a.txt": b"\xef\xbb\xbfcat, green\r\nbig\r\n"}
    assert os.stat(folder / "a.txt").st_mode & 0o777 == 0o640
    refused = put(client, id, "mine", **{"If-Match": shown.headers["etag"]})
    (folder / "a.txt").write_text("another program's")
    also = put(client, id, "mine", **{"If-Match": answer.headers["etag"]})
    assert [refused.status_code, also.status_code, (folder / "a.txt").read_text()] == [412, 412, "another program's"]


def test_a_picture_without_a_caption_gets_a_file_and_is_trained_then(client, folder):
    id = listed(client)["d.png"]["id"]
    shown = client.get(f"/api/dataset/pictures/{id}").json()
    assert (shown["captions"][0]["text"], shown["captions"][0]["file"]) == ("", "d.txt")
    edited = put(client, id, "  a house ").json()
    assert (edited["left_out"], (folder / "d.txt").read_text()) == ("", "a house")
    assert client.get("/api/dataset").json()["counts"]["left_out"] == 1
    undone = client.post("/api/dataset/undo").json()
    client.app.state.dataset.view.wait(60)
    assert (undone["refused"], (folder / "d.txt").exists()) == ([], False)
    assert client.get("/api/dataset").json()["counts"]["left_out"] == 2


def test_a_tag_is_changed_in_many_captions_after_a_count_and_back(client, folder):
    before, body = contents(folder), {"action": "rename", "tag": "cat", "to": "kitten"}
    count = client.post("/api/dataset/tags", json=body).json()
    assert (count["changes"], count["done"], contents(folder)) == (3, False, before)
    assert client.post("/api/dataset/tags", json=body | {"expected": 2}).status_code == 412
    assert client.post("/api/dataset/tags", json=body | {"expected": 3}).json()["done"]
    changed = {"a.txt": b"kitten, red", "b.txt": b"kitten, blue, tall", "copy.txt": b"kitten"}
    assert contents(folder) == before | changed
    (folder / "b.txt").write_text("edited elsewhere")
    undone = client.post("/api/dataset/undo").json()
    assert (len(undone["refused"]), contents(folder)) == (1, before | {"b.txt": b"edited elsewhere"})


@pytest.mark.parametrize(
    ("action", "tag", "to", "before", "after"),
    [
        ("add", "dog", "", "cat, red", "cat, red, dog"),
        ("add", "Cat", "", "cat, red", "cat, red"),
        ("add", "dog", "", "", "dog"),
        ("add", "dog", "", "cat,", "cat, dog"),
        ("remove", "CAT", "", "cat,red , blue", "red , blue"),
        ("remove", "red", "", "cat, red hair", "cat, red hair"),
        ("rename", "red", "blue", "red, blue, red", "blue"),
        ("rename", "cat", "Cat", "cat, dog", "Cat, dog"),
    ],
)
def test_a_tag_in_a_caption(action, tag, to, before, after):
    assert with_tag(before, action, tag, to, ", ") == after


@pytest.mark.parametrize(
    ("before", "index", "text", "after"),
    [
        ('{\n "tags": [\n  "a",\n  "b"\n ],\n "x": 1e5}', 0, "a, c", '{\n "tags": [\n  "a",\n  "c"\n ],\n "x": 1e5}'),
        ('{"tags": "a", "nl": "One."}', 1, 'Two "猫".', '{"tags": "a", "nl": "Two \\"猫\\"."}'),
        ('{"tag_string": "long_hair solo", "x": 3}', 0, "red hair, solo", '{"tag_string": "red_hair solo", "x": 3}'),
        ('{"category": "x", "tags": ["a_b","c"]}', 0, "red eyes, ^_^", '{"category": "x", "tags": ["red_eyes","^_^"]}'),
        ('{"tags": {"g": ["a", "b"], "k": ["miku"]}}', 0, "a, miku, c", '{"tags": {"g": ["a", "c"], "k": ["miku"]}}'),
        ('["one", "two"]', 1, "zwei", '["one", "zwei"]'),
        ('"one"', 0, "two", '"two"'),
        ("{}", 0, "new", '{"caption": "new"}'),
        ('{"caption": "\\u732b"}', 0, "犬", '{"caption": "\\u72ac"}'),
    ],
)  # fmt: skip
def test_a_caption_in_json_keeps_the_form_of_its_file(tmp_path, before, index, text, after):
    path = tmp_path / "a.json"
    path.write_bytes(before.encode())
    place = CaptionPlace(str(path))
    write_captions([(read_fields([place])[index], text)], [str(tmp_path)])
    assert path.read_bytes().decode() == after
    assert text in [field.text for field in read_fields([place])] or "miku" in text


def test_a_file_with_the_captions_of_many_changes_only_where_it_was_edited(folder):
    (folder / "captions.json").write_text('{\n  "a.png": ["one"],\n  "b": ["two", "three"],\n  "c.png": ["x"]\n}\n')
    client = served(folder)
    found = listed(client)
    assert (found["a.png"]["caption"], found["d.png"]["left_out"][:24]) == ("one", "left out without a capti")
    put(client, found["b.png"]["id"], "zwei")
    put(client, found["d.png"]["id"], "new")
    expected = '{\n  "a.png": ["one"],\n  "b": ["zwei", "three"],\n  "c.png": ["x"],\n  "d.png": ["new"]\n}\n'
    assert (folder / "captions.json").read_text() == expected
    assert (listed(client)["b.png"]["caption"], listed(client)["d.png"]["left_out"]) == ("zwei", "")
    body = {"action": "add", "tag": "t", "expected": 4, "filter": "trained"}
    assert client.post("/api/dataset/tags", json=body).json()["changes"] == 4
    table = json.loads((folder / "captions.json").read_text())
    assert table == {"a.png": ["one, t"], "b": ["zwei, t", "three"], "c.png": ["x, t"], "d.png": ["new, t"]}


def test_nothing_outside_of_the_data_set_is_written_or_named(client, folder):
    secret = folder.parent / "secret.txt"
    secret.write_text("key")
    (folder / "a.txt").unlink()
    os.symlink(secret, folder / "a.txt")
    id = listed(client)["a.png"]["id"]
    answer = put(client, id, "stolen")
    assert (answer.status_code, secret.read_text()) == (422, "key")
    assert "link out of" in answer.json()["error"]
    for path in ("..%2f..%2fsecret.txt", "a.png", "%2fetc%2fpasswd", id.upper()):
        assert client.get(f"/api/dataset/pictures/{path}/thumbnail.jpg").status_code == 404
        assert put(client, path, "x").status_code in {404, 405}


def test_pictures_that_look_alike_are_found(client):
    view = client.app.state.dataset
    client.get("/api/dataset/duplicates")
    view.duplicates.wait(60)
    found = client.get("/api/dataset/duplicates").json()
    assert found["state"] == "done"
    assert [[each["name"] for each in group] for group in found["groups"]] == [["a.png", "copy.jpg"]]


def test_groups_of_many_that_look_alike_are_those_of_each_pair():
    """All pairs, joined by scipy; and 10,000 that are equal, whose 50 million pairs would take minutes."""
    random = np.random.default_rng(0)
    bits = random.integers(0, 2**64, 12, np.uint64)[random.integers(0, 12, 300)]
    for _ in range(4):
        bits ^= np.uint64(1) << random.integers(0, 64, 300).astype(np.uint64)
    colours = np.repeat(random.integers(0, 200, (300, 1)), 48, 1).astype(np.uint8)
    looks = {str(n): Look(int(bits[n]), colours[n]) for n in range(300)}
    alike = np.bitwise_count(bits[:, None] ^ bits) <= MAX_BITS
    alike &= abs(colours[:, None, 0].astype(int) - colours[:, 0]) <= MAX_COLOUR
    labels = connected_components(alike)[1]
    expected = [[str(n) for n in np.flatnonzero(labels == label)] for label in dict.fromkeys(labels)]
    assert near_duplicates(looks) == [group for group in expected if len(group) > 1]
    assert 10 < len(near_duplicates(looks)) < 100
    equal = {str(n): Look(5, colours[0]) for n in range(10_000)}
    assert near_duplicates(equal) == [list(equal)]


def test_files_that_are_added_are_found_and_thumbnails_are_small(client, folder):
    picture(20, 400, 100).save(folder / "new.png")
    (folder / "new.txt").write_text("a new one")
    client.get("/api/dataset")
    client.app.state.dataset.view.wait(60)
    new = listed(client)["new.png"]
    small = Image.open(io.BytesIO(client.get(f"{new['thumbnail']}&size=100").content))
    assert (small.size, new["caption"], small.format) == ((128, 32), "a new one", "JPEG")
    assert client.get(f"/api/dataset/pictures/{listed(client)['broken.png']['id']}/thumbnail.jpg").status_code == 404


def test_a_data_set_with_mistakes_is_an_error_at_the_start(tmp_path):
    (tmp_path / "dataset.toml").write_text("resolutions = [64]\n[[directory]]\npath = 'nowhere'\n")
    with pytest.raises(UserError, match="nowhere"):
        served(tmp_path / "dataset.toml")
    with pytest.raises(UserError, match=r"missing\.toml"):
        served(tmp_path / "missing.toml")


def test_captions_that_are_not_edited_here_are_shown_and_say_why(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    picture(1, 90, 60).save(tmp_path / "in.png")
    (tmp_path / "in.txt").write_text("in a tar")
    with tarfile.open(folder / "more.tar", "w") as tar:
        for name in ("in.png", "in.txt"):
            tar.add(tmp_path / name, name)
    picture(2, 90, 60).save(folder / "latin.png")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    picture(3, 90, 60).save(os.fsencode(folder) + b"/\xff.png")  # a name that is not UTF-8
    client = served(folder)
    found = listed(client)
    shown = {name: client.get(f"/api/dataset/pictures/{each['id']}").json() for name, each in found.items()}
    why = {name: each["captions"][0]["why"] for name, each in shown.items()}
    assert (shown["in.png"]["caption"], why["in.png"]) == (
        "in a tar",
        "its captions are in a tar that is not edited here",
    )
    assert why["latin.png"].startswith("latin.txt: byte 3 is 0xe9")
    assert put(client, found["in.png"]["id"], "x").status_code == 422
    assert put(client, found[r"\udcff.png"]["id"], "a caption").status_code == 200
    assert (folder / "latin.txt").read_bytes() == b"caf\xe9"
