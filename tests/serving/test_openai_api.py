"""OpenAI's images API, with the official client."""

import base64
import io
import json
import time

import httpx
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("uvicorn")
pytest.importorskip("openai")

import openai

from anima_jax.serving.app import create_app
from anima_jax.serving.http.server import ServerConfig
from anima_jax.serving.lora_library import LoraLibrary
from tests.serving.servers import SMALL, running_app, running_server
from tests.serving.test_lora_library import write_lora


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("openai")


@pytest.fixture(scope="module")
def running(folder):
    write_lora(folder / "loras" / "style.safetensors")
    with running_server(str(folder), library=LoraLibrary(folder / "loras"), defaults=SMALL) as running:
        yield running


@pytest.fixture(scope="module")
def client(running):
    return openai.OpenAI(api_key="any", base_url=f"{running.url}/v1", max_retries=0)


def opened(data: bytes | str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(data) if isinstance(data, str) else data))
    image.load()
    return image


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def noise(size_wh, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size_wh[::-1], 3), np.uint8))


def own_api(running, **settings) -> list[Image.Image]:
    """The images that our own API draws, which `test_http` compares with the pipeline's."""
    job = running.client.post("/api/jobs?wait=true", json=settings).json()
    return [opened(running.client.get(image["url"]).content) for image in job["images"]]


def same(left: Image.Image, right: Image.Image) -> bool:
    return left.size == right.size and bool((np.asarray(left) == np.asarray(right.convert(left.mode))).all())


def test_the_client_draws_what_our_own_api_draws(running, client):
    own = {"seed": 7, "sampler": "heun", "negative_prompt": "ugly", "shift": 2.5}
    answer = client.images.generate(prompt="a (red:1.2) circle", n=2, size="48x32", extra_body=own)
    expected = own_api(running, prompt="a (red:1.2) circle", width=48, height=32, batch_size=2, **own)
    assert [same(opened(one.b64_json), image) for one, image in zip(answer.data, expected, strict=True)] == [True] * 2
    assert (answer.size, answer.output_format, answer.background) == ("48x32", "png", "opaque")
    assert answer.usage.output_tokens == 2 * 3 * 2  # tokens of 16 × 16 pixels


def test_a_size_that_the_model_cannot_draw_is_cut_from_a_larger_one(client):
    exact, larger = (
        client.images.generate(prompt="red", size=size, extra_body={"seed": 1}).data[0].b64_json
        for size in ("43x33", "48x40")
    )
    assert opened(exact).size == (43, 33)
    assert same(opened(exact), opened(larger).crop((2, 3, 45, 36)))


@pytest.mark.parametrize(("format", "kind"), [("jpeg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
def test_an_image_comes_in_the_format_that_is_asked_for_as_text_and_at_its_address(client, format, kind):
    asked = {"prompt": "red", "output_format": format, "extra_body": {"seed": 3}}
    asked |= {} if format == "png" else {"output_compression": 60}
    text = client.images.generate(**asked).data[0].b64_json
    address = client.images.generate(**asked, response_format="url").data[0].url
    file = httpx.get(address)
    assert opened(text).format == kind
    assert (file.content, file.headers["content-type"]) == (base64.b64decode(text), f"image/{format}")
    assert "Seed: 3," in opened(text).getexif().get_ifd(0x8769).get(0x9286, b"").decode("utf-16-be", "ignore") or (
        "Seed: 3," in opened(text).info["parameters"]
    )


def test_a_lora_of_the_library_is_used_in_json_and_in_forms(running, client):
    own = {"seed": 1, "loras": [{"name": "style", "weight": 3.0}]}
    drawn = opened(client.images.generate(prompt="x", extra_body=own).data[0].b64_json)
    assert same(drawn, own_api(running, prompt="x", **own)[0])
    assert not same(drawn, own_api(running, prompt="x", seed=1)[0])
    written = own | {"loras": json.dumps(own["loras"])}
    forms = [client.images.edit(image=png(noise((32, 48))), prompt="x", extra_body=extra) for extra in (own, written)]
    texts = [opened(answer.data[0].b64_json).info["parameters"].split("\n")[0] for answer in forms]
    assert texts == ["x <lora:style:3>"] * 2


def test_an_edit_redraws_where_the_mask_is_transparent_and_nothing_else(running, client):
    start, mask = noise((48, 32)), Image.new("RGBA", (48, 32), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 24, 32))
    named = {"image": ("a.png", png(start)), "mask": ("m.png", png(mask)), "prompt": "a tree"}
    drawn = opened(client.images.edit(**named, extra_body={"seed": 5}).data[0].b64_json)
    pictures = {"image": base64.b64encode(png(start)).decode(), "mask": base64.b64encode(png(mask)).decode()}
    (expected,) = own_api(running, prompt="a tree", seed=5, paste=8, **pictures)
    assert same(drawn, expected)
    assert same(drawn.crop((24, 0, 48, 32)), start.crop((24, 0, 48, 32)))
    assert not same(drawn.crop((0, 0, 24, 32)), start.crop((0, 0, 24, 32)))


def test_an_edit_without_a_mask_starts_from_the_first_picture_and_shows_the_others(running, client):
    first, second = noise((48, 32)), noise((48, 32), 1)
    pictures = [("a.png", png(first)), ("b.png", png(second))]
    own = {"seed": 5, "sampler_options": {"version": "alternative"}, "sampler": "euler_cfg_pp"}
    drawn = client.images.edit(image=pictures, prompt="a tree", input_fidelity="high", extra_body=own).data[0]
    image, reference = (base64.b64encode(png(picture)).decode() for picture in (first, second))
    (expected,) = own_api(running, prompt="a tree", image=image, references=[reference], denoise=0.5, **own)
    assert same(opened(drawn.b64_json), expected)


def test_pictures_also_come_as_data_urls_in_json(client):
    start = noise((48, 32))
    url = f"data:image/png;base64,{base64.b64encode(png(start)).decode()}"
    form = client.images.edit(image=("a.png", png(start)), prompt="x", extra_body={"seed": 2}).data[0].b64_json
    body = {"images": [{"image_url": url}], "prompt": "x", "seed": 2}
    assert client.post("/images/edits", body=body, cast_to=dict)["data"][0]["b64_json"] == form
    for address in ("http://127.0.0.1:1/a.png", "file:///etc/passwd"):
        with pytest.raises(openai.BadRequestError, match="addresses and paths are not opened"):
            client.post("/images/edits", body=body | {"images": [{"image_url": address}]}, cast_to=dict)


def test_a_stream_sends_partial_images_and_then_the_image(client):
    asked = {"prompt": "red", "extra_body": {"seed": 9, "steps": 12}}
    events = list(client.images.generate(**asked, stream=True, partial_images=2))
    partial = [event for event in events if event.type == "image_generation.partial_image"]
    assert [event.partial_image_index for event in partial] == list(range(len(partial)))[:2]
    assert {opened(event.b64_json).size for event in partial} <= {(32, 48)}
    assert [event.type for event in events[len(partial) :]] == ["image_generation.completed"]
    assert events[-1].b64_json == client.images.generate(**asked).data[0].b64_json


@pytest.mark.parametrize(
    ("asked", "status", "param", "code"),
    [
        ({"n": 0}, 400, "n", "invalid_value"),
        ({"n": 11}, 400, "n", "invalid_value"),
        ({"size": "large"}, 400, "size", "invalid_value"),
        ({"size": "99999x8"}, 400, "width", "invalid_value"),
        ({"background": "transparent"}, 400, "background", "invalid_value"),
        ({"output_format": "gif"}, 400, "output_format", "invalid_value"),
        ({"output_compression": 50}, 400, "output_compression", "invalid_value"),
        ({"model": "gpt-5"}, 404, "model", "model_not_found"),
        ({"prompt": ""}, 400, "prompt", "invalid_value"),
        ({"prompt": "x" * 20_001}, 400, "prompt", "string_above_max_length"),
        ({"extra_body": {"colour": 1}}, 400, "colour", "unknown_parameter"),
        ({"extra_body": {"steps": 10**6}}, 400, "steps", "invalid_value"),
        ({"extra_body": {"loras": [{"name": "none"}]}}, 400, "loras", "invalid_value"),
        ({"stream": True, "extra_body": {"loras": [{"name": "none"}]}}, 400, "loras", "invalid_value"),
    ],
)
def test_what_is_wrong_is_an_error_of_the_clients(client, asked, status, param, code):
    with pytest.raises(openai.APIStatusError) as error:
        client.images.generate(**{"prompt": "red"} | asked)
    assert (error.value.status_code, error.value.param, error.value.code) == (status, param, code)
    assert error.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mask": png(Image.new("RGB", (48, 32)))}, "no alpha channel"),
        ({"mask": png(Image.new("RGBA", (32, 32)))}, "is 32×32, expected the image's 48×32"),
        ({"image": b"nothing"}, "is not a picture"),
        ({"image": [png(noise((8, 8)))] * 17}, "17 pictures, expected at most 16"),
        ({"extra_body": {"loras": [{"name": "a", "weight": 1}, {"name": "b"}]}}, "its objects have different fields"),
        ({"extra_body": {"cache": "x", "cache[]": "y", "steps": 1, "steps[a]": 2}}, "is there in two forms"),
    ],
)
def test_what_is_wrong_with_an_edit_is_said_in_a_line(client, changed, message):
    with pytest.raises(openai.BadRequestError, match=message):
        client.images.edit(**{"image": png(noise((48, 32))), "prompt": "x"} | changed)


def test_the_model_is_listed_and_openais_names_mean_it_too(client):
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id == "base"
    assert client.images.generate(prompt="x", model="gpt-image-1.5", quality="high", user="me").quality == "high"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("none")


def test_a_wrong_key_and_a_wrong_address_are_errors_of_openais_form():
    with running_app(create_app(None, ServerConfig(api_key="secret"))) as running:
        client = openai.OpenAI(api_key="wrong", base_url=f"{running.url}/v1", max_retries=0)
        with pytest.raises(openai.AuthenticationError) as error:
            client.models.list()
        assert error.value.code == "invalid_api_key"
        right = client.with_options(api_key="secret")
        with pytest.raises(openai.InternalServerError) as error:
            right.images.generate(prompt="x")
        assert (error.value.code, error.value.response.headers["retry-after"]) == ("server_unavailable", "5")
        with pytest.raises(openai.NotFoundError):
            right.post("/images/nothing", cast_to=dict)


def test_a_client_that_goes_away_ends_its_job(running):
    before = len(running.server.jobs.newest_first())
    with running.client.stream(
        "POST", "/v1/images/generations", json={"prompt": "x", "steps": 150, "stream": True, "partial_images": 3}
    ) as response:
        next(response.iter_raw())
    (job, *_), deadline = running.server.jobs.newest_first(), time.monotonic() + 60
    while not job.is_finished and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (len(running.server.jobs.newest_first()), job.state) == (before + 1, "cancelled")
