"""The folder of a run over HTTP: curves as the files grow, samples, checkpoints, and drawing with one of them."""

import io
import json
import math
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

from starlette.testclient import TestClient

from anima_jax.checkpoints.models import save_dit
from anima_jax.sampling.images import save_image
from anima_jax.serving.app import create_app
from anima_jax.serving.http.server import ServerConfig
from anima_jax.serving.lora_library import LoraLibrary
from anima_jax.serving.studio.run_figures import Figures, thinned
from anima_jax.training.jsonl import JsonlWriter
from anima_jax.training.samples import sample_grid
from tests.serving.servers import SMALL, running_server, small_pipeline
from tests.serving.test_lora_library import write_lora


def lines(path, rows, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + end)


def client_of(folder) -> TestClient:
    return TestClient(create_app(None, ServerConfig(run=folder)), base_url="http://127.0.0.1")


def loss(figures: Figures) -> dict[int, float | None]:
    curve = figures.after(None)["loss"]
    return dict(zip(curve["steps"], curve["values"], strict=True))


def test_curves_follow_a_file_that_grows_and_never_trip_over_what_is_in_it(tmp_path):
    path, figures = tmp_path / "metrics.jsonl", Figures(tmp_path / "metrics.jsonl")
    figures.refresh()
    assert figures.after(None) == {}
    path.write_bytes(
        b'{"step": 1, "loss": 2.5, "note": "x", "deep": [1]}\n{"step": "2", "loss": 9}\n[1]\nnull\n\xff\xfe\n'
        b'{"step": 2, "loss": NaN}\n{"step": 3, "loss": null, "huge": 1e999}\n{"step": 4, "los'
    )
    figures.refresh()
    assert loss(figures) == {1: 2.5, 2: None, 3: None}
    assert set(figures.after(None)) == {"loss", "huge"}
    with open(path, "ab") as file:
        file.write(b's": 1.5}\n{"step": 5, "loss": 1.25}')  # the rest of the line, and one without a line end
    figures.refresh()
    assert figures.after(3)["loss"] == {"steps": [4, 5], "values": [1.5, 1.25]}


def test_of_a_step_that_is_written_twice_the_later_line_counts(tmp_path):
    path, figures = tmp_path / "metrics.jsonl", Figures(tmp_path / "metrics.jsonl")
    lines(path, [{"step": step, "loss": float(step)} for step in (1, 2, 3)])
    figures.refresh()
    before = figures.generation
    with open(path, "a") as file:
        file.write('{"step": 2, "loss": 20.0}\n{"step": 4, "loss": 4.0}\n')
    figures.refresh()
    assert loss(figures) == {1: 1.0, 2: 20.0, 3: 3.0, 4: 4.0}
    assert figures.generation != before


def test_a_run_that_is_resumed_has_the_curves_of_the_new_attempt(tmp_path):
    folder = tmp_path / "20260101_10-00-00"
    folder.mkdir()
    writer = JsonlWriter(folder / "metrics.jsonl", 0)
    for step in range(1, 6):
        writer.add(step, {"loss": float(step)})
    writer.close()
    client = client_of(folder)
    first = client.get("/api/run/metrics").json()
    assert first["metrics"]["loss"]["steps"] == [1, 2, 3, 4, 5]
    writer = JsonlWriter(folder / "metrics.jsonl", 3)
    writer.add(4, {"loss": 40.0})
    writer.close()
    again = client.get("/api/run/metrics", params={"since": 5, "generation": first["generation"]}).json()
    assert again["reset"]
    assert again["metrics"]["loss"] == {"steps": [1, 2, 3, 4], "values": [1.0, 2.0, 3.0, 40.0]}
    then = client.get("/api/run/metrics", params={"since": 4, "generation": again["generation"]}).json()
    assert (then["reset"], then["metrics"]) == (False, {})


@pytest.mark.parametrize("count", [1, 3, 99, 5000])
def test_a_thinned_curve_keeps_its_ends_and_extremes(count):
    values = np.random.default_rng(0).normal(size=count)
    values[count // 2] = 50.0
    kept = thinned(values, 100)
    assert len(kept) <= 3 * 100
    assert {0, count - 1, int(np.argmin(values)), int(np.argmax(values))} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    gap = np.where(np.arange(count) == count // 3, math.nan, values)
    assert count // 3 in thinned(gap, 100)


def test_runs_are_listed_newest_first_and_appear_when_they_begin(tmp_path):
    client = client_of(tmp_path / "runs")
    assert (client.get("/api/run").json()["chosen"], client.get("/api/run/metrics").status_code) == (None, 404)
    for name, value in (("20260101_10-00-00", 1.0), ("20260102_09-00-00", 2.0), ("20260101_10-00-00-2", 3.0)):
        lines(tmp_path / "runs" / name / "metrics.jsonl", [{"step": 7, "loss": value, "epoch": 2}])
    (tmp_path / "runs" / "notes").mkdir()
    found = client.get("/api/run").json()
    assert [run["name"] for run in found["runs"]] == ["20260102_09-00-00", "20260101_10-00-00-2", "20260101_10-00-00"]
    assert (found["chosen"]["name"], found["chosen"]["step"], found["chosen"]["epoch"]) == ("20260102_09-00-00", 7, 2)
    older = client.get("/api/run/metrics", params={"run": "20260101_10-00-00"}).json()
    assert older["metrics"]["loss"]["values"] == [1.0]
    for name in ("../runs/20260101_10-00-00", "/etc", "..", "notes", ""):
        assert client.get("/api/run/metrics", params={"run": name}).status_code == 404


def test_samples_are_listed_by_step_and_each_image_is_cut_out_as_it_was_drawn(tmp_path, monkeypatch):
    images = [Image.new("RGB", (128, 128), (16 * n, 255 - 16 * n, 90)) for n in range(10)]
    prompts, text = ["a", "b", "c", "d", "e"], {"prompts": ["a", "b", "c", "d", "e"], "seeds": [3, 4], "step": 20}
    grid = sample_grid(images, prompts * 2)
    lines(tmp_path / "metrics.jsonl", [{"step": 20, "loss": 1.0}])
    save_image(grid, tmp_path / "samples" / "step000020.png", {"anima_jax_samples": json.dumps(text)})
    (tmp_path / "samples" / "step000010.png").write_bytes(b"\x89PNG half")
    (tmp_path / "samples" / "other.png").write_bytes(b"")
    client = client_of(tmp_path)
    (sample,) = client.get("/api/run/samples").json()["samples"]
    assert (sample["step"], sample["prompts"], sample["seeds"]) == (20, prompts, [3, 4])
    assert Image.open(io.BytesIO(client.get(sample["url"]).content)).size == grid.size
    for index, image in enumerate(images):
        tile = Image.open(io.BytesIO(client.get(f"{sample['tile']}{index}").content))
        found = np.asarray(tile.convert("RGB"))[20:100, 20:100].reshape(-1, 3).mean(0)
        np.testing.assert_allclose(found, image.getpixel((0, 0)), atol=3)  # it is a JPEG
    monkeypatch.setattr(Image, "open", None)
    assert client.get(f"{sample['tile']}9").status_code == 200, "a tile is decoded once"
    codes = [client.get(path).status_code for path in (f"{sample['tile']}16", "/api/run/samples/..%2fmetrics.png")]
    assert codes == [404, 404]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that exported two models, of which one is of other sizes, and an adapter."""
    folder = tmp_path_factory.mktemp("run")
    lines(folder / "metrics.jsonl", [{"step": 4, "loss": 1.0}])
    return folder


@pytest.fixture(scope="module")
def running(run, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("served"))
    pipeline = small_pipeline(folder)
    other = {path: value + jnp.asarray(0.01, value.dtype) for path, value in pipeline.dit_params.items()}
    for place, params in (("step4", pipeline.dit_params), ("step4/ema", other)):
        (run / place).mkdir(parents=True, exist_ok=True)
        save_dit(run / place / "model.safetensors", params)
    write_lora(run / "epoch1" / "adapter_model.safetensors")
    (run / "checkpoints" / "4").mkdir(parents=True)
    (run / "checkpoints" / "4" / "weights").write_bytes(bytes(1000))
    with running_server(folder, library=LoraLibrary(), run=run) as running:
        yield running


def image_of(client, **settings) -> np.ndarray:
    job = client.post("/api/jobs?wait=true", json=SMALL | {"prompt": "red", "seed": 1} | settings)
    assert job.status_code == 200, job.text
    return np.asarray(Image.open(io.BytesIO(client.get(job.json()["images"][0]["url"]).content)))


def test_checkpoints_are_listed_with_what_they_are_and_the_disk_that_they_take(running, run):
    found = running.client.get("/api/run/checkpoints").json()
    rows = {each["name"]: (each["kind"], each["step"], each["epoch"], each["ema"]) for each in found["checkpoints"]}
    assert rows == {
        "step4": ("model", 4, None, False),
        "step4-ema": ("model", 4, None, True),
        "epoch1": ("adapter", None, 1, False),
        "checkpoints-4": ("resume", 4, None, False),
    }
    sizes = {path: os.path.getsize(path) for path in run.rglob("*") if path.is_file()}
    assert found["disk"]["checkpoints"] == 1000
    assert found["disk"]["exports"] == sum(size for path, size in sizes.items() if path.suffix == ".safetensors")
    assert found["disk"]["free"] <= shutil.disk_usage(run).total


def test_drawing_with_a_checkpoint_draws_with_its_parameters_and_compiles_nothing(running):
    client, pipeline = running.client, running.server.engine.pipeline
    own = dict(pipeline.dit_params)
    before, compiled = image_of(client), running.server.engine.statistics().compilations
    answer = client.post("/api/run/checkpoints/step4-ema/load")
    assert (answer.status_code, answer.json()["kind"]) == (200, "model")
    for path, value in own.items():
        np.testing.assert_array_equal(pipeline.dit_params[path], value + jnp.asarray(0.01, value.dtype))
    assert (image_of(client) != before).any()
    assert client.post("/api/run/checkpoints/step4/load").status_code == 200
    np.testing.assert_array_equal(image_of(client), before)
    assert running.server.engine.statistics().compilations == compiled


def test_an_adapter_of_a_run_becomes_a_lora_and_other_checkpoints_say_what_they_are(running):
    client = running.client
    answer = client.post("/api/run/checkpoints/epoch1/load").json()
    loras = [lora["name"] for lora in client.get("/api/models").json()["loras"]]
    assert answer["lora"] in loras
    assert (image_of(client, loras=[{"name": answer["lora"], "weight": 2.0}]) != image_of(client)).any()
    for name, code in (("checkpoints-4", 422), ("step5", 404), ("..", 404)):
        refused = client.post(f"/api/run/checkpoints/{name}/load")
        assert (refused.status_code, len(refused.json()["error"].splitlines())) == (code, 1)
