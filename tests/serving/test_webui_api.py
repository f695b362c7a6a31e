"""A1111's API, with requests as its clients send them."""

import base64
import io
import json
import socket
import threading
import time

import httpx
import numpy as np
import pytest
from PIL import Image, ImageChops

pytest.importorskip("uvicorn")

from anima_jax.errors import UserError
from anima_jax.sampling.webui_text import from_webui
from anima_jax.serving.app import create_app
from anima_jax.serving.compatible import webui_lists
from anima_jax.serving.compatible.webui_models import Img2ImgRequest, Txt2ImgRequest, with_infotext
from anima_jax.serving.compatible.webui_pictures import crop_around, redrawn_mask, resized_by
from anima_jax.serving.compatible.webui_requests import Reader, hires_size
from anima_jax.serving.compatible.webui_settings import CHANGEABLE
from anima_jax.serving.http.limits import RequestLimits
from anima_jax.serving.http.pictures import decode_picture
from anima_jax.serving.http.routes import NotFoundError
from anima_jax.serving.http.server import ServerConfig
from tests.serving.servers import SMALL, running_app, running_server

DEFAULTS = {"width": 64, "height": 48, "steps": 5, "sampler": "er_sde", "schedule": "simple", "guidance_scale": 4.0}


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    with running_server(str(tmp_path_factory.mktemp("webui")), defaults=SMALL) as running:
        yield running


@pytest.fixture
def v1(running):
    with httpx.Client(base_url=f"{running.url}/sdapi/v1", timeout=300) as client:
        yield client


def text_of(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def opened(text: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    image.load()
    return image


def noise(size_wh, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size_wh[::-1], 3), np.uint8))


def painted(size_wh, box) -> Image.Image:
    mask = Image.new("L", size_wh)
    mask.paste(255, box)
    return mask


def reader(**settings) -> Reader:
    limits = RequestLimits()
    return Reader(
        DEFAULTS,
        CHANGEABLE | settings,
        lambda text, what: decode_picture(text, what, limits),
        limits,
        lambda: ["pose/lllite_edge"],
        lambda name: f"/models/{name}.safetensors",
    )


def drawing(**body):
    return reader().read((Img2ImgRequest if "init_images" in body else Txt2ImgRequest).model_validate(body))


# Requests as orders


@pytest.mark.parametrize(
    ("body", "sampler", "schedule"),
    [
        ({}, "er_sde", "simple"),
        ({"sampler_index": "Euler"}, "euler", "normal"),
        ({"sampler_name": "Euler a", "sampler_index": "Heun"}, "euler_ancestral", "normal"),
        ({"sampler_name": "DPM++ 2M"}, "dpmpp_2m", "karras"),
        ({"sampler_name": "DPM++ 2M", "scheduler": "Automatic"}, "dpmpp_2m", "karras"),
        ({"sampler_name": "DPM++ 2M Karras"}, "dpmpp_2m", "karras"),
        ({"sampler_name": "DPM++ 3M SDE", "scheduler": "SGM Uniform"}, "dpmpp_3m_sde", "sgm_uniform"),
        ({"sampler_name": "k_euler_a", "scheduler": "sgm_uniform"}, "euler_ancestral", "sgm_uniform"),
        ({"sampler_name": "ER SDE", "scheduler": "Beta"}, "er_sde", "beta"),
        ({"scheduler": "Karras"}, "er_sde", "karras"),
    ],
)
def test_samplers_and_schedules_have_a1111s_names(body, sampler, schedule):
    params = drawing(**body).orders[0].params
    assert (params.sampler, params.schedule) == (sampler, schedule)


def test_every_image_has_the_next_seed_and_what_is_not_given_is_the_servers():
    orders = drawing(prompt="a cat", seed=7, batch_size=2, n_iter=2, cfg_scale="5.5", width=130, eta=1.0).orders
    assert [order.request.seed for order in orders] == [7, 8, 9, 10]
    assert {(order.request.width, order.request.height) for order in orders} == {(128, 48)}
    assert (orders[0].params.guidance_scale, orders[0].params.steps, orders[0].params.sampler_options) == (5.5, 5, {})
    first, second = (drawing(seed=-1).orders[0].request.seed for _ in range(2))
    assert first != second


def test_options_of_a_sampler_are_followed_where_it_has_them():
    assert drawing(sampler_name="Euler a", eta=0.5, s_noise=1.01).orders[0].params.sampler_options == {
        "eta": 0.5,
        "s_noise": 1.01,
    }
    assert drawing(sampler_name="Euler", eta=0.5).orders[0].params.sampler_options == {}
    body = Txt2ImgRequest(sampler_name="Euler a")
    assert reader(eta_ancestral=0.3).read(body).orders[0].params.sampler_options == {"eta": 0.3}


def test_tags_of_loras_leave_both_prompts():
    order = drawing(prompt="a cat, <lora:sub/style:0.8>, red", negative_prompt="ugly <lora:bad:0.5:1>").orders[0]
    assert (order.request.prompt, order.params.negative_prompt) == ("a cat, red", "ugly")
    assert order.loras == (("sub/style", 0.8), ("bad", {"": 1.0, "text_encoder": 0.5}))
    assert drawing(prompt="a <lora:x:1>", disable_extra_networks=True).orders[0].loras == ()


def test_fields_that_are_not_given_come_from_the_infotext():
    pairs = "Steps: 9, Sampler: Heun, Schedule type: Beta, CFG scale: 3.5, Seed: 11, Size: 72x80"
    text = f'a "dog"\nNegative prompt: bad\n{pairs}'
    order = reader().read(with_infotext(Txt2ImgRequest(infotext=text, steps=4))).orders[0]
    assert (order.request.prompt, order.request.seed) == ('a "dog"', 11)
    assert (order.request.width, order.request.height) == (72, 80)
    assert (order.params.steps, order.params.sampler, order.params.schedule) == (4, "heun", "beta")
    assert (order.params.negative_prompt, order.params.guidance_scale) == ("bad", 3.5)


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ({"sampler_name": "Euler b"}, NotFoundError, "Sampler not found: Euler b"),
        ({"sampler_name": "Euler", "scheduler": "Turbo"}, NotFoundError, "Scheduler not found: Turbo"),
        ({"init_images": []}, NotFoundError, "Init image not found"),
        ({"styles": ["anime"]}, UserError, "styles .*no styles"),
        ({"restore_faces": True}, UserError, "restore_faces"),
        ({"tiling": True}, UserError, "tiling"),
        ({"subseed_strength": 0.1}, UserError, "subseed_strength"),
        ({"script_name": "X/Y/Z plot"}, UserError, "Script 'X/Y/Z plot' not found"),
        ({"alwayson_scripts": {"ADetailer": {"args": [True, {}]}}}, UserError, "always on script ADetailer not found"),
        ({"batch_size": 4000, "n_iter": 4000}, UserError, "16000000 images, expected 1 to 16"),
        ({"width": 10**9}, UserError, "expected at most 2048"),
        ({"init_images": ["eA=="], "width": 64, "height": 64}, UserError, r"init_images\[0\]: is not a picture"),
        ({"init_images": [text_of(noise((8, 8)))], "width": 10**9}, UserError, "expected at most 2048"),
    ],
)
def test_what_cannot_be_done_is_an_error_in_a_line(body, error, message):
    with pytest.raises(error, match=message):
        drawing(**body)


def test_what_asks_for_nothing_is_taken_and_what_is_not_known_is_noted():
    nothing = {"subseed": -1, "subseed_strength": 0, "styles": [], "script_name": "", "seed_resize_from_h": 0}
    nothing |= {"alwayson_scripts": {"ADetailer": {"args": [False]}, "ControlNet": {"args": []}}, "tiling": False}
    assert drawing(**nothing, image_cfg_scale=1.5, s_tmax=0, comments={}).notes == []
    assert drawing(prompt_magic=1, save_images=True).notes == [
        "not known here: prompt_magic",
        "save_images: images are in the gallery; no request writes a file",
    ]


def test_units_of_controlnet_are_control_networks_by_name():
    picture, start = noise((32, 32)), noise((64, 48), 1)
    units = [
        {"model": "lllite_edge [0123abcd]", "module": "canny", "threshold_a": 50, "threshold_b": 150},
        {"model": "pose/lllite_edge", "image": text_of(picture), "weight": 0.5, "guidance_end": 0.7},
        {"enabled": False, "model": "unknown"},
        {"model": "None", "module": "none"},
    ]
    units[0]["model"] = "pose/" + units[0]["model"]
    found = drawing(init_images=[text_of(start)], alwayson_scripts={"controlnet": {"args": units}})
    first, second = found.orders[0].request.controls
    assert (first.kind, first.path) == ("canny:low=50:high=150", "/models/pose/lllite_edge.safetensors")
    assert first.image.size == start.size
    assert (second.strength, second.end_percent, second.kind, second.image.size) == (0.5, 0.7, None, (32, 32))
    with pytest.raises(NotFoundError, match="model not found: found depth, expected one of pose/lllite_edge"):
        drawing(alwayson_scripts={"ControlNet": {"args": [{"model": "depth"}]}})


@pytest.mark.parametrize(
    ("body", "size"),
    [
        ({}, (128, 96)),
        ({"hr_scale": 1.3}, (80, 56)),
        ({"hr_resize_x": 100}, (96, 72)),
        ({"hr_resize_y": 96}, (128, 96)),
        ({"hr_resize_x": 96, "hr_resize_y": 96}, (96, 96)),
    ],
)
def test_the_second_pass_has_a1111s_size_in_multiples_of_8(body, size):
    assert hires_size(Txt2ImgRequest(enable_hr=True, **body), (64, 48)) == size


# Pictures


def test_a_mask_is_white_or_opaque_where_the_image_is_redrawn():
    white = painted((8, 8), (0, 0, 4, 8))
    opaque = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    opaque.paste((0, 0, 0, 255), (0, 0, 4, 8))
    for mask in (white, opaque, white.convert("RGBA")):
        assert redrawn_mask(mask, (8, 8), invert=False, blur_xy=(0, 0)).tobytes() == white.tobytes()
    inverted = redrawn_mask(white, (16, 16), invert=True, blur_xy=(0, 0))
    assert (inverted.getpixel((0, 0)), inverted.getpixel((15, 0))) == (0, 255)
    blurred = np.asarray(redrawn_mask(white, (8, 8), invert=False, blur_xy=(2, 0)))
    assert (blurred == blurred[0]).all()
    assert (np.diff(blurred[0].astype(int)) <= 0).all()


@pytest.mark.parametrize(
    ("box", "padding", "size_wh", "expected"),
    [
        ((40, 40, 50, 50), 0, (64, 64), (40, 40, 50, 50)),
        ((40, 40, 50, 50), 5, (64, 64), (35, 35, 55, 55)),
        ((40, 40, 60, 50), 0, (64, 64), (40, 35, 60, 55)),
        ((90, 0, 100, 20), 0, (64, 64), (80, 0, 100, 20)),
        ((0, 0, 100, 10), 0, (32, 64), (0, 0, 100, 80)),
        ((0, 0, 100, 1), 0, (64, 2048), (0, 0, 100, 80)),
    ],
)
def test_only_the_masked_part_is_cut_out_in_the_shape_that_is_drawn(box, padding, size_wh, expected):
    assert crop_around(painted((100, 80), box), padding, size_wh) == expected


def test_pictures_are_stretched_cropped_or_continued():
    image = Image.new("RGB", (4, 2), (255, 0, 0))
    image.paste((0, 0, 255), (2, 0, 4, 2))
    stretched, cropped, continued = (resized_by(mode, image, (8, 8), Image.Resampling.NEAREST) for mode in (0, 1, 2))
    assert (stretched.getpixel((0, 0)), stretched.getpixel((7, 7))) == ((255, 0, 0), (0, 0, 255))
    assert (cropped.getpixel((0, 0)), cropped.getpixel((7, 0))) == ((255, 0, 0), (0, 0, 255))
    assert ImageChops.difference(continued.crop((0, 0, 8, 1)), continued.crop((0, 2, 8, 3))).getbbox() is None
    assert resized_by(2, Image.new("L", (2000, 1)), (8, 8)).size == (8, 8)


# Over HTTP


def test_a_request_of_sillytavern_is_drawn_and_its_text_draws_it_again(v1):
    """As src/endpoints/stable-diffusion.js sends it, with what the extension leaves in the body."""
    assert v1.get("/options").json()["sd_model_checkpoint"] == v1.get("/sd-models").json()[0]["title"]
    body = {"url": "http://127.0.0.1:8000", "auth": "", "prompt": "a red circle", "negative_prompt": "ugly"}
    body |= {"sampler_name": "Heun", "scheduler": "Beta", "steps": 3, "cfg_scale": 3.5, "width": 32, "height": 48}
    body |= {"restore_faces": False, "enable_hr": False, "hr_upscaler": "Latent", "hr_scale": 2, "seed": 3}
    body |= {"denoising_strength": 0.7, "hr_second_pass_steps": 0, "save_images": True, "send_images": True}
    body |= {"override_settings": {"CLIP_stop_at_last_layers": 1}, "override_settings_restore_afterwards": True}
    answer = v1.post("/txt2img", json=body | {"do_not_save_grid": False, "do_not_save_samples": False}).json()
    info = json.loads(answer["info"])
    assert info["infotexts"] == [opened(answer["images"][0]).info["parameters"]]
    recipe = from_webui("x", info["infotexts"][0]).values
    assert {name: recipe[name] for name in ("prompt", "seed", "steps", "guidance_scale", "sampler", "schedule")} == {
        **{"prompt": "a red circle", "seed": 3, "steps": 3, "guidance_scale": 3.5},
        **{"sampler": "heun", "schedule": "beta"},
    }
    again = v1.post("/txt2img", json={"infotext": info["infotexts"][0]}).json()
    assert again["images"] == answer["images"]
    assert (info["all_seeds"], info["sampler_name"], answer["parameters"]["batch_size"]) == ([3], "Heun", 1)


def test_open_webui_writes_all_settings_back_and_others_change_what_follows(v1):
    settings = v1.get("/options").json()
    assert v1.post("/options", json=settings).status_code == 200
    for given, status in (({"sd_model_checkpoint": "none"}, 404), ({"jpeg_quality": "x"}, 422), ({"colour": 1}, 422)):
        error = v1.post("/options", json=given)
        assert (error.status_code, error.json()["detail"]) == (status, error.json()["errors"])
    v1.post("/options", json={"samples_format": "jpg"})
    assert opened(v1.post("/txt2img", json={"prompt": "x"}).json()["images"][0]).format == "JPEG"
    override = {"samples_format": "webp", "sd_vae": "Automatic"}
    answer = v1.post("/txt2img", json={"prompt": "x", "override_settings": override}).json()
    assert opened(answer["images"][0]).format == "WEBP"
    kept = {"override_settings": override, "override_settings_restore_afterwards": False}
    for body, status, format in (({"steps": -1}, 422, "jpg"), ({"sampler_name": "x"}, 404, "jpg"), ({}, 200, "webp")):
        assert v1.post("/txt2img", json={"prompt": "x", **kept, **body}).status_code == status
        assert v1.get("/options").json()["samples_format"] == format
    v1.post("/options", json=settings)


def test_hires_fix_scales_up_and_draws_again(v1):
    body = {"prompt": "x", "seed": 2, "enable_hr": True, "hr_upscaler": "Nearest", "hr_scale": 1.5}
    unchanged = v1.post("/txt2img", json=body | {"denoising_strength": 0}).json()
    first = opened(v1.post("/txt2img", json={"prompt": "x", "seed": 2}).json()["images"][0])
    text = json.loads(unchanged["info"])["infotexts"][0]
    assert "Size: 32x48" in text
    assert "Hires upscale: 1.5, Hires upscaler: Nearest" in text
    drawn = v1.post("/txt2img", json=body | {"denoising_strength": 0.6, "hr_upscaler": "Latent"}).json()
    assert json.loads(drawn["info"])["notes"] == ["hr_upscaler Latent: Lanczos in its place"]
    assert {opened(one["images"][0]).size for one in (unchanged, drawn)} == {(48, 72)}
    # The VAE of the tests does not return what it encodes; the image it starts from is the first one.
    start = {"init_images": [text_of(first.resize((48, 72), Image.Resampling.NEAREST))], "prompt": "x", "seed": 2}
    same = v1.post("/img2img", json=start | {"width": 48, "height": 72, "denoising_strength": 0}).json()
    assert ImageChops.difference(opened(same["images"][0]), opened(unchanged["images"][0])).getbbox() is None
    refused = v1.post("/txt2img", json=body | {"hr_scale": 1000})
    assert (refused.status_code, refused.json()["detail"]) == (422, "width 32000, expected at most 2048 on this server")


def test_a_first_pass_has_no_image_that_can_be_fetched(v1, running):
    v1.post("/txt2img", json={"prompt": "x", "enable_hr": True, "hr_scale": 1.5})
    second, first = running.client.get("/api/jobs").json()["jobs"][:2]
    assert [len(job["images"]) for job in (first, second)] == [0, 1]
    events = running.client.get(f"/api/jobs/{first['id']}/events").text
    assert 'event: done\ndata: {"images": []}' in events
    assert "event: image" not in events


def test_only_the_masked_part_is_redrawn_at_its_own_size(v1):
    start, mask = noise((100, 80)), painted((100, 80), (60, 50, 80, 70))
    body = {"prompt": "x", "seed": 1, "init_images": [text_of(start)], "mask": text_of(mask), "mask_blur": 0}
    body |= {"inpaint_full_res": True, "inpaint_full_res_padding": 8, "width": 32, "height": 48}
    drawn = opened(v1.post("/img2img", json=body | {"denoising_strength": 1}).json()["images"][0])
    left, top, right, bottom = ImageChops.difference(drawn.convert("RGB"), start).getbbox()
    assert drawn.size == (100, 80)
    assert 60 <= left <= right <= 80
    assert 50 <= top <= bottom <= 70
    start, mask = noise((32, 48)), painted((32, 48), (8, 8, 24, 40))
    whole = body | {"inpaint_full_res": False, "init_images": [text_of(start)], "mask": text_of(mask)}
    drawn = opened(v1.post("/img2img", json=whole | {"inpainting_mask_invert": 1}).json()["images"][0])
    difference = ImageChops.difference(drawn, start)
    assert difference.crop((8, 8, 24, 40)).getbbox() is None
    assert difference.getbbox() == (0, 0, 32, 48)


def test_the_client_of_webuiapi_draws(running):
    webuiapi = pytest.importorskip("webuiapi")
    api = webuiapi.WebUIApi(baseurl=f"{running.url}/sdapi/v1", sampler="Euler a", steps=3)
    answer = api.txt2img(prompt="x", seed=5, width=32, height=48, cfg_scale=4)
    assert (answer.image.size, answer.info["all_seeds"]) == ((32, 48), [5])
    mask = painted((32, 48), (0, 0, 16, 48))
    whole = {"width": 32, "height": 48, "inpaint_full_res": False, "mask_blur": 2}
    edited = api.img2img([answer.image], mask_image=mask, seed=1, **whole)
    assert (
        ImageChops.difference(edited.image.crop((24, 0, 32, 48)), answer.image.crop((24, 0, 32, 48))).getbbox() is None
    )
    assert api.png_info(answer.image).info == answer.info["infotexts"][0]
    assert api.extra_single_image(answer.image, upscaler_1="Lanczos", upscaling_resize=1.5).image.size == (48, 72)
    api.util_wait_for_ready()
    assert api.util_get_current_model() == api.util_get_model_names()[0]


@pytest.mark.parametrize(
    "name", [*webui_lists.LISTS, "embeddings", "scripts", "cmd-flags", "memory", "options", "progress"]
)
def test_what_front_ends_ask_for_at_their_start_is_there(v1, name):
    answer = v1.get(f"/{name}")
    assert answer.status_code == 200
    names = [one["name"] for one in answer.json()] if name in ("samplers", "schedulers") else []
    assert {"samplers": "Euler a", "schedulers": "karras"}.get(name) in (None, *names)


def test_progress_shows_the_oldest_request_and_skip_and_interrupt_end_it(v1):
    answers = []
    body = {"prompt": "x", "steps": 150, "batch_size": 2, "seed": 1}
    thread = threading.Thread(target=lambda: answers.append(v1.post("/txt2img", json=body, timeout=300)))
    thread.start()

    def wait_for(found):
        deadline = time.monotonic() + 120
        while not found(progress := v1.get("/progress").json()) and time.monotonic() < deadline:
            time.sleep(0.01)
        return progress

    begun = wait_for(lambda progress: progress["progress"] > 0.02)
    assert (begun["state"]["job_count"], begun["state"]["sampling_steps"]) == (2, 150)
    v1.post("/skip")
    v1.post("/interrupt")
    thread.join(120)
    info = json.loads(answers[0].json()["info"])
    assert (answers[0].json()["images"], info["notes"]) == ([], ["interrupted"])
    assert wait_for(lambda progress: progress["progress"] == 0)["state"]["job_count"] == 0


def test_a_client_that_goes_away_ends_its_job(running, v1):
    """Also while it only waits for the answer."""
    body = json.dumps({"prompt": "x", "steps": 150, "batch_size": 4}).encode()
    address = running.server.config.host, int(running.url.rpartition(":")[2])
    lines = ["POST /sdapi/v1/txt2img HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}"])
    with socket.create_connection(address) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        deadline = time.monotonic() + 120
        while v1.get("/progress").json()["progress"] == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
    job = running.server.jobs.newest_first()[0]
    while not job.is_finished and time.monotonic() < deadline:
        time.sleep(0.01)
    assert job.state == "cancelled"


def test_the_key_is_the_password_of_basic_authentication():
    with running_app(create_app(None, ServerConfig(api_key="secret"))) as running:
        answers = [httpx.get(f"{running.url}/sdapi/v1/samplers", auth=("any", key)) for key in ("secret", "wrong")]
    assert [answer.status_code for answer in answers] == [200, 401]
    assert answers[1].json()["error"] == "HTTPException"


def test_errors_have_a1111s_form(v1):
    for body, status in (({"steps": "many"}, 422), ({"sampler_name": "Euler b"}, 404)):
        answer = v1.post("/txt2img", json={"prompt": "x"} | body)
        assert (answer.status_code, set(answer.json())) == (status, {"error", "detail", "body", "errors"})
    assert v1.post("/interrogate", json={"image": ""}).json()["detail"].startswith("Model not found")
    assert v1.get("/nothing").json()["error"] == "HTTPException"


def test_pictures_are_scaled_up_to_a_number_of_pixels_together(v1, monkeypatch):
    image = noise((48, 32))
    body = {"upscaler_1": "Nearest", "upscaling_resize": 2, "image": text_of(image)}
    drawn = opened(v1.post("/extra-single-image", json=body).json()["image"])
    np.testing.assert_array_equal(np.asarray(drawn), np.repeat(np.repeat(np.asarray(image), 2, 0), 2, 1))
    monkeypatch.setattr(webui_lists, "MAX_UPSCALED", 100)
    body["imageList"] = [{"data": text_of(image)}]
    assert len(v1.post("/extra-batch-images", json=body).json()["images"]) == 1
    answer = v1.post("/extra-batch-images", json=body | {"imageList": body["imageList"] * 2})
    assert answer.status_code == 422
    assert answer.json()["detail"] == "imageList[1]: 96×64 pixels, expected at most 100² of all together"
