"""Our own API over HTTP: jobs, their events, the gallery, and what is served beside them."""

import asyncio
import io
import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("uvicorn")

from tests.serving.load import Clients
from tests.serving.servers import SMALL, running_server, small_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def running(folder):
    with running_server(folder) as running:
        yield running


def events(client, path) -> list[tuple[str, dict]]:
    """The events of a stream until its end."""
    with client.stream("GET", path) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        text = response.read().decode()
    blocks = [dict(line.split(": ", 1) for line in block.split("\n") if line) for block in text.strip().split("\n\n")]
    return [(block["event"], json.loads(block["data"])) for block in blocks if "event" in block]


def drawn(client, **settings) -> dict:
    """The job of these settings when it is finished."""
    response = client.post("/api/jobs?wait=true", json=SMALL | settings)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_job_draws_what_the_pipeline_draws_and_reports_it(running, folder):
    client = running.client
    created = client.post("/api/jobs", json=SMALL | {"prompt": "red", "seed": 7, "batch_size": 2, "preview_every": 1})
    assert created.status_code == 202
    found = events(client, f"/api/jobs/{created.json()['id']}/events")
    images = found[-1][1]["images"]
    expected = small_pipeline(folder)("red", seed=7, batch_size=2, **SMALL)
    for link, image in zip(images, expected, strict=True):
        data = client.get(link["url"]).content
        # One level of 8 bits: a batch of the engine adds the same numbers in another order.
        np.testing.assert_allclose(np.asarray(Image.open(io.BytesIO(data)), int), np.asarray(image, int), atol=1)
    assert {name for name, _ in found} >= {"progress", "preview", "image", "done"}
    job = client.get(f"/api/jobs/{created.json()['id']}").json()
    assert (job["state"], job["done"], job["total"], job["images"]) == ("done", 6, 6, images)


def test_the_settings_of_a_picture_draw_it_again(running):
    client = running.client
    first = drawn(client, prompt="a (red:1.3) circle", negative_prompt="ugly", shift=2.5, sampler="heun")["images"][0]
    data = client.get(first["url"]).content
    for body in ({"files": {"file": ("x.png", data)}}, {"content": data, "headers": {"content-type": "image/png"}}):
        answer = client.post("/api/settings", **body).json()
        assert (answer["settings"]["seed"], answer["notes"]) == (first["seed"], [])
    again = drawn(client, **answer["settings"])["images"][0]
    assert client.get(again["url"]).content == data


def test_many_clients_get_their_own_images_and_none_is_lost(running):
    clients = Clients(running.url, SMALL, seeds=4)
    asyncio.run(clients.run(12, lambda jobs: jobs < 2))
    assert (clients.lost, sum(clients.counts.values()) - clients.counts["refused"]) == ([], 24)
    states = {job["state"] for job in running.client.get("/api/jobs").json()["jobs"]}
    assert states <= {"done", "cancelled", "drawing", "waiting"}
