"""Jobs as clients see them while images wait and are drawn: queue, events, cancelling, refusals, and the gallery."""

import asyncio
import base64
import contextlib
import gc
import io
import json
import socket
import threading

import httpx
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("uvicorn")

from starlette.requests import ClientDisconnect

from anima_jax.errors import NotFiniteError
from anima_jax.models.control import LAYERS
from anima_jax.sampling.controls import Control
from anima_jax.sampling.file_hashes import file_hash
from anima_jax.sampling.image_text import to_text
from anima_jax.sampling.references import Reference
from anima_jax.sampling.regions import Region
from anima_jax.sampling.request import ImageRequest, SamplingParams
from anima_jax.serving.app import create_app
from anima_jax.serving.compatible.webui_requests import WebuiDrawing
from anima_jax.serving.http.gallery import Gallery
from anima_jax.serving.http.http_server import HttpServer
from anima_jax.serving.http.limits import RequestLimits
from anima_jax.serving.http.server import ServerConfig
from anima_jax.serving.lora_library import LoraLibrary
from anima_jax.serving.orders import Order
from tests.serving.servers import SMALL, ManualEngine, running_app
from tests.serving.test_loras import write_control


@pytest.fixture(scope="module")
def running():
    engine = ManualEngine()
    config = ServerConfig(limits=RequestLimits(kept_images=3, kept_jobs=4), heartbeat=0.05)
    with running_app(create_app(engine, config)) as running:
        yield running


@pytest.fixture
def engine(running):
    engine = ManualEngine()
    running.server.jobs.engine = engine
    yield engine
    for ticket in engine.tickets:
        ticket.move("cancelled")


def submit(running, **options) -> str:
    response = running.client.post("/api/jobs", json=SMALL | options)
    assert response.status_code == 202, response.text
    return response.json()["id"]


class Stream:
    """The events of a job, one by one."""

    def __init__(self, running, id: str):
        self._context = running.client.stream("GET", f"/api/jobs/{id}/events")
        self._lines = self._context.__enter__().iter_lines()
        self.comments = 0

    def next(self) -> tuple[str, dict] | None:
        name = ""
        for line in self._lines:
            self.comments += line.startswith(":")
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            if line.startswith("data: "):
                return name, json.loads(line.removeprefix("data: "))
        self._context.__exit__(None, None, None)
        return None


def test_a_stream_tells_what_happens_and_a_new_one_begins_with_the_state_now(running, engine):
    first, second = submit(running), submit(running)
    streams = [Stream(running, id) for id in (first, second)]
    told = [stream.next() for stream in streams]
    engine.tickets[0].move("drawing")
    told.append(streams[1].next())
    assert told == [("queued", {"position": position}) for position in (0, 1, 0)]
    engine.tickets[0].report(1, 3)
    assert streams[0].next() == ("progress", {"image": 0, "done": 1, "total": 3})
    engine.tickets[0].show(Image.new("RGB", (8, 8), "red"))
    name, data = streams[0].next()
    assert (name, data["data"][:23]) == ("preview", "data:image/jpeg;base64,")
    again = Stream(running, first)
    assert [again.next(), again.next()[0]] == [("progress", {"image": 0, "done": 1, "total": 3}), "preview"]
    running.client.delete(f"/api/jobs/{second}")
    engine.finish(engine.tickets[0])
    ends = [stream.next() for stream in (streams[0], streams[1], again)]
    assert [name for name, _ in ends] == ["done", "cancelled", "done"]
    assert [stream.next() for stream in streams] == [None, None]


def test_a_quiet_stream_shows_that_it_lives(running, engine):
    stream = Stream(running, submit(running))
    stream.next()
    threading.Timer(0.3, lambda: engine.tickets[0].report(1, 3)).start()
    assert stream.next()[0] == "progress"
    assert stream.comments


def test_failures_are_told_and_others_of_the_job_are_cancelled(running, engine, capfd):
    for error, expected in (
        (NotFiniteError("the last evaluation: NaN"), "the last evaluation: NaN"),
        (RuntimeError("/secret/path.py"), "internal error; the server's own output says more"),
        (MemoryError(), "out of memory"),
    ):
        id = submit(running, batch_size=2)
        engine.tickets[-2].move("failed", error=error)
        assert Stream(running, id).next() == ("failed", {"error": expected})
        job = running.client.get(f"/api/jobs/{id}").json()
        assert (job["state"], job["error"]) == ("failed", expected)
        assert engine.tickets[-1].state == "cancelled"
    assert "/secret/path.py" in capfd.readouterr().err


def test_a_full_queue_refuses_whole_jobs_and_says_when_to_come_back(running, engine):
    submit(running)
    response = running.client.post("/api/jobs", json=SMALL | {"batch_size": 2})
    assert (response.status_code, response.headers["retry-after"]) == (429, "5")
    assert [ticket.state for ticket in engine.tickets] == ["waiting", "cancelled"]


def test_pictures_count_before_they_are_decoded_and_no_longer_when_their_job_is_over():
    """The limit is three pictures of 32 × 48 pixels, of 4 bytes each."""
    file = io.BytesIO()
    Image.new("RGB", (32, 48), "white").save(file, "png")
    picture = base64.b64encode(file.getvalue()).decode()
    config = ServerConfig(limits=RequestLimits(max_pending=3 * 32 * 48 * 4))
    with running_app(create_app(engine := ManualEngine(max_waiting=9), config)) as running:

        def post(count: int) -> httpx.Response:
            regions = [{"prompt": "x", "mask": picture}] * count
            return running.client.post("/api/jobs", json=SMALL | {"prompt": "x", "regions": regions})

        answers = [post(4), post(2), post(2)]
        engine.tickets[0].cancel()
        answers.append(post(2))
    assert [answer.status_code for answer in answers] == [413, 202, 503, 202]
    assert "retry-after" in answers[2].headers
    assert "pictures of all requests" in answers[2].json()["error"]


def test_a_job_that_takes_too_long_is_unavailable_and_leaves_the_queue(running, engine, monkeypatch):
    monkeypatch.setattr(running.server.jobs, "_limits", RequestLimits(job_timeout=0.05))
    response = running.client.post("/api/jobs?wait=true", json=SMALL)
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert engine.tickets[0].state == "cancelled"


def test_no_job_is_taken_while_the_model_loads_or_the_server_stops(running, engine):
    server = running.server
    for state, refusal in (("loading", "the model is still loading"), ("draining", "the server is shutting down")):
        server.state, server.jobs.refusal = state, refusal
        response = running.client.post("/api/jobs", json=SMALL)
        assert (response.status_code, response.json()["error"]) == (503, refusal)
        health = running.client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, state)
    server.start(engine)
    assert running.client.get("/health").status_code == 200


def test_a_second_pass_is_drawn_though_the_server_stops(running, engine):
    body = {"prompt": "x", "width": 32, "height": 48, "steps": 3, "enable_hr": True, "hr_scale": 1.5}
    url, answers, events = f"{running.url}/sdapi/v1/txt2img", [], []
    client = threading.Thread(target=lambda: answers.append(httpx.post(url, json=body, timeout=300)))
    client.start()
    engine.submitted.acquire()
    stopping = HttpServer(running.app, lambda: engine, 300.0, lambda: None)
    engine.drain = lambda timeout: events.append(len(engine.tickets))

    def draw() -> None:
        engine.finish(engine.tickets[0])
        engine.submitted.acquire()
        engine.finish(engine.tickets[1])

    try:
        threading.Timer(0.3, draw).start()
        asyncio.run(stopping._drain())
    finally:
        running.server.start(engine)
    client.join()
    assert answers[0].status_code == 200, answers[0].text
    assert events == [2]


def test_a_client_that_goes_away_cancels_what_it_waits_for(running, engine):
    body = json.dumps(SMALL).encode()
    head = f"POST /api/jobs?wait=true HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    left = threading.Event()
    with socket.create_connection(running.address) as connection:
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        assert engine.submitted.acquire(timeout=300)
        engine.tickets[0].subscribe(lambda ticket: ticket.finished and left.set())
    assert left.wait(300)
    assert engine.tickets[0].state == "cancelled"


def test_messages_name_a_control_network_as_the_request_does(tmp_path):
    write_control(tmp_path / "edges.safetensors", 0, layers=LAYERS[:1])
    picture = io.BytesIO()
    Image.new("RGB", (32, 48)).save(picture, "png")
    control = {"name": "edges", "image": base64.b64encode(picture.getvalue()).decode(), "start": 0.9, "end": 0.1}
    engine = ManualEngine(at_once=True)
    engine.library = LoraLibrary(controls=[tmp_path])
    with running_app(create_app(engine, ServerConfig())) as running:
        answer = running.client.post("/api/jobs", json=SMALL | {"prompt": "x", "controls": [control]})
    assert answer.json() == {"error": "control 'edges': start 0.9, end 0.1, expected two ascending numbers from 0 to 1"}


def test_a_client_that_leaves_before_its_stream_begins_cancels_its_job():
    """Whoever sends the answer's head to a connection that is gone gets an OSError, before any event is made."""
    app = create_app(engine := ManualEngine(), ServerConfig())
    body = {"prompt": "x", "stream": True}
    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1", "method": "POST"}
    scope |= {"path": "/v1/images/generations", "raw_path": b"", "root_path": "", "scheme": "http", "query_string": b""}
    scope |= {"headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1), "server": ("::1", 80)}

    async def receive() -> dict:
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    async def send(message: dict) -> None:
        raise OSError

    with contextlib.suppress(OSError, ClientDisconnect):
        asyncio.run(app(scope, receive, send))
    assert [ticket.state for ticket in engine.tickets] == ["cancelled"]


def test_slow_disks_of_runs_and_data_sets_stop_no_image():
    gate = threading.Event()

    async def drawn() -> str:
        server = create_app(ManualEngine(at_once=True), ServerConfig()).state.server
        slow = [asyncio.ensure_future(server.in_studio(gate.wait)) for _ in range(100)]
        await asyncio.sleep(0)
        job = server.jobs.submit([Order(ImageRequest("x", 32, 32), SamplingParams())])
        try:
            async with asyncio.timeout(60):
                await job.finished()
        finally:
            gate.set()
            await asyncio.gather(*slow)
        return job.state

    assert asyncio.run(drawn()) == "done"


@pytest.mark.parametrize("kind", ["control", "reference"])
def test_the_text_of_an_image_is_that_of_generate_and_says_what_it_was_made_from(tmp_path, monkeypatch, kind):
    """All but the names of pictures: a server has no files of them."""
    monkeypatch.chdir(tmp_path)
    network, transformer = tmp_path / "controls" / "edges.safetensors", tmp_path / "base.safetensors"
    network.parent.mkdir()
    write_control(network, 0, layers=LAYERS[:1])
    transformer.write_bytes(b"1")
    for seed, name in enumerate(("image", "mask", "picture", "where")):
        noise = np.random.default_rng(seed).integers(0, 256, (48, 32, 3), np.uint8)
        Image.fromarray(noise).convert("L" if name in ("mask", "where") else "RGB").save(f"{name}.png")
    data = {path.stem: base64.b64encode(path.read_bytes()).decode() for path in tmp_path.glob("*.png")}
    engine = ManualEngine(at_once=True)
    engine.library = LoraLibrary(controls=[network.parent])
    config = ServerConfig(files={"transformer": str(transformer)})
    body = SMALL | {name: data[name] for name in ("image", "mask")} | {"prompt": "a cat", "seed": 3, "paste": 8}
    control = {"name": "edges", "image": data["picture"], "strength": 0.5, "end": 0.75}
    body |= {"controls": [control]} if kind == "control" else {"references": [data["picture"]]}
    body |= {"regions": [{"prompt": "a", "area": "0,0,16,16"}, {"prompt": "b", "mask": data["where"], "strength": 2}]}
    with running_app(create_app(engine, config)) as running:
        (link,) = running.client.post("/api/jobs?wait=1", json=body).json()["images"]
        png = running.client.get(link["url"]).content
        answer = running.client.post("/api/settings", content=png, headers={"content-type": "image/png"}).json()
    request = ImageRequest(
        *("a cat", 32, 48, 3),
        controls=(Control(str(network), "picture.png", 0.5, 0.0, 0.75),) if kind == "control" else (),
        references=(Reference.of("picture.png"),) if kind == "reference" else (),
        regions=(Region("0,0,16,16", "a"), Region("where.png", "b", 2.0)),
    )
    files = {"transformer": str(transformer), "image": "image.png", "mask": "mask.png"}
    hashes = {str(path): file_hash(str(path)) for path in (transformer, network)}
    params = SamplingParams(steps=3, sampler="euler", paste=8)
    expected = to_text(request, params, files, mask=Image.open("mask.png"), hashes=hashes)
    found = Image.open(io.BytesIO(png)).info
    own = json.loads(found["anima_jax"])
    picture = own["controls"][0]["image"] if kind == "control" else own["references"][0][0]
    names = own["image"], own["mask"], picture, own["regions"][1]["where"]
    for name, file in zip(names, ("image", "mask", "picture", "where"), strict=True):
        found = {chunk: text.replace(name, f"{file}.png") for chunk, text in found.items()}
    assert found == expected
    assert answer["settings"]["regions"] == [
        {"area": "0,0,16,16", "prompt": "a", "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    ]
    network = " for edges.safetensors" if kind == "control" else ""
    assert answer["notes"] == [
        f"the start image '{names[0]}' is not in the file: give it again",
        f"the mask '{names[1]}' is not in the file: give it again",
        f"the {kind} picture '{picture}{network}' is not in the file: give it again",
        f"the region's mask '{names[3]}' is not in the file: give it again",
    ]


def test_finished_jobs_are_forgotten_and_keep_no_pictures(running, engine):
    engine.at_once = True
    picture = io.BytesIO()
    Image.new("RGB", (32, 48)).save(picture, format="PNG")
    ids = [running.client.post("/api/jobs?wait=1", json=SMALL).json()["id"] for _ in range(6)]
    known = [job["id"] for job in running.client.get("/api/jobs").json()["jobs"]]
    assert known[:4] == ids[:1:-1]
    assert running.client.get(f"/api/jobs/{ids[0]}").status_code == 404
    assert not any(job._tickets for job in running.server.jobs.newest_first() if job.is_finished)


def test_a_finished_job_keeps_neither_what_made_its_images_nor_images_that_left_the_gallery(running, engine):
    engine.at_once, picture = True, io.BytesIO()
    Image.new("RGB", (32, 48), "red").save(picture, format="PNG")
    body = {"prompt": "x", "init_images": [base64.b64encode(picture.getvalue()).decode()], "steps": 3}
    for _ in range(4):
        response = running.client.post("/sdapi/v1/img2img", json=body)
        assert response.status_code == 200, response.text
    jobs = running.server.jobs.newest_first()[3::-1]
    gc.collect()
    assert not [one for one in gc.get_objects() if isinstance(one, WebuiDrawing)]
    assert [job.images[0].png is None for job in jobs] == [True, False, False, False]


def test_the_gallery_is_read_in_pages_and_the_oldest_images_leave_it(running, engine):
    engine.at_once, client = True, running.client
    for seed in range(5):
        client.post("/api/jobs?wait=1", json=SMALL | {"seed": seed, "prompt": f"number {seed}"})
    first = client.get("/api/images?limit=2").json()["images"]
    rest = client.get("/api/images", params={"limit": 9, "before": first[-1]["id"]}).json()["images"]
    assert [(image["seed"], image["prompt"]) for image in first + rest] == [(n, f"number {n}") for n in (4, 3, 2)]
    thumbnail = client.get(first[0]["thumbnail"])
    assert Image.open(io.BytesIO(thumbnail.content)).size == (32, 48)
    assert client.delete(f"/api/images/{first[0]['id']}").status_code == 200
    assert [client.get(path).status_code for path in (first[0]["url"], first[0]["thumbnail"])] == [404, 404]


def test_images_of_a_folder_are_there_after_a_restart_and_nothing_else_is(tmp_path):
    config = ServerConfig(gallery=tmp_path / "new" / "gallery")
    with running_app(create_app(ManualEngine(at_once=True), config)) as running:
        for seed in (3, 4):
            running.client.post("/api/jobs?wait=1", json=SMALL | {"seed": seed, "prompt": "猫 red"})
        images = running.client.get("/api/images").json()["images"]
        data = running.client.get(images[0]["url"]).content
    folder = tmp_path / "new" / "gallery"
    (folder / f"{images[0]['id'][:-1]}!.png").write_bytes(data)
    (folder / f"{images[1]['id'][:-4]}0000.png").write_bytes(data[:100])
    again = Gallery(RequestLimits(), folder)
    assert [(image.id, image.seed, image.prompt) for image in again.page(9)] == [
        (image["id"], image["seed"], "猫 red") for image in images
    ]
    assert again.png(again.page(1)[0]) == data
    assert np.asarray(Image.open(io.BytesIO(data))).max() == 0
    assert again.remove(images[0]["id"])
    assert not (folder / f"{images[0]['id']}.png").exists()
