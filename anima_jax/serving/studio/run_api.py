"""The API of a run's folder: its curves, samples, evaluations and checkpoints, and "draw with this one"."""

import contextlib
import io
from typing import Any
from urllib.parse import urlencode

import numpy as np
from PIL import Image
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from anima_jax.errors import UserError, one_line, show_value
from anima_jax.serving.http.pictures import as_jpeg
from anima_jax.serving.http.routes import NotFoundError, api_route
from anima_jax.serving.http.server import Server, server_of
from anima_jax.serving.studio.chosen_model import draw_with
from anima_jax.serving.studio.run_figures import POINTS, Figures
from anima_jax.serving.studio.run_folders import CheckpointKind, RunCheckpoint, RunFolder, Runs, Sample

MOST_READ = 50
"""Runs whose figures are read for the list; of older ones they are read when they are asked for."""

NameField = Field(None, max_length=500, description="the name of a run; unset: the newest")


class RunQuery(BaseModel):
    """Which run."""

    run: str | None = NameField


class MetricsQuery(BaseModel):
    """Which part of a run's figures."""

    run: str | None = NameField
    since: int | None = Field(None, ge=-(2**62), lt=2**62, description="a step: only what comes after it")
    generation: int | None = Field(None, ge=0, lt=2**62, description="that of the last answer")
    points: int = Field(POINTS, ge=10, le=20000, description="most points of a curve")
    names: str | None = Field(None, max_length=10000, description="figures to send, separated by commas; unset: all")


class SampleQuery(BaseModel):
    """Which run, and which version of the picture."""

    run: str | None = NameField
    version: str | None = Field(None, max_length=40)


class TileQuery(SampleQuery):
    """Which image of a grid."""

    index: int = Field(ge=0, lt=2**31, description="number of the image, row by row")


class RunEntry(BaseModel):
    """A run; times are in seconds since 1970."""

    name: str
    step: int | None
    epoch: int | None
    loss: float | None
    updated: float | None


class RunSummary(BaseModel):
    """The chosen run, and all runs, newest first. `chosen` is None as long as there is none."""

    root: str
    runs: list[RunEntry]
    chosen: RunEntry | None
    last: dict[str, float | None] = Field(description="the figures of the last step")
    configuration: dict[str, Any]
    evaluated: bool
    samples: int
    loaded: str | None = Field(description="run and checkpoint that the server draws with, if it is one")


class CurveAnswer(BaseModel):
    """A figure by step; a value that is not finite is null."""

    steps: list[int]
    values: list[float | None]


class FiguresAnswer(BaseModel):
    """Curves of the steps after `since`, thinned so that peaks stay. With `reset` they replace what was sent before."""

    run: str
    generation: int
    reset: bool
    step: int | None
    metrics: dict[str, CurveAnswer]
    evaluations: dict[str, CurveAnswer]


class SampleEntry(BaseModel):
    """A grid of images drawn at a step, with `tile` as the address of one of them (append the number)."""

    name: str
    step: int
    url: str
    tile: str
    width: int
    height: int
    columns: int
    rows: int
    prompts: list[str]
    seeds: list[int]


class SampleList(BaseModel):
    """The grids by step."""

    run: str
    samples: list[SampleEntry]


class CheckpointEntry(BaseModel):
    """An export, or a checkpoint from which training resumes (kind "resume")."""

    name: str
    kind: CheckpointKind
    step: int | None
    epoch: int | None
    ema: bool
    bytes: int
    created: float
    loaded: bool


class CheckpointList(BaseModel):
    """Exports and checkpoints, newest first, and the disk: bytes of exports, checkpoints, samples, other, and free."""

    run: str
    checkpoints: list[CheckpointEntry]
    disk: dict[str, int]


class LoadedAnswer(BaseModel):
    """What the server draws with now: another model, or a LoRA of this name that jobs may use."""

    kind: CheckpointKind
    name: str
    lora: str | None
    note: str


def _runs(request: Request) -> Runs:
    runs: Runs | None = request.app.state.runs
    if runs is None:
        raise NotFoundError("the server shows no run, expected --run FOLDER at its start")
    return runs


def _found(request: Request, name: str | None) -> RunFolder:
    try:
        return _runs(request).run(name)
    except LookupError:
        what = "there is no run yet" if name is None else f"there is no run '{show_value(name)}'"
        raise NotFoundError(what) from None


def _entry(run: RunFolder) -> RunEntry:
    last = run.metrics.last
    return RunEntry(
        name=run.name,
        step=run.metrics.last_step,
        epoch=int(last["epoch"]) if np.isfinite(last.get("epoch", np.nan)) else None,
        loss=_finite(last.get("loss")),
        updated=run.updated,
    )


def _finite(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else value


async def show_run(request: Request, query: RunQuery) -> RunSummary:
    return await server_of(request).in_studio(_summary, request, query.run)


def _summary(request: Request, name: str | None) -> RunSummary:
    runs, server = _runs(request), server_of(request)
    found = runs.all()
    chosen = _found(request, name) if found or name is not None else None
    for run in found[:MOST_READ]:
        run.metrics.refresh()
    if chosen is not None:
        chosen.refresh()
    return RunSummary(
        root=one_line(runs.root) if server.config.is_local else runs.root.name,
        runs=[_entry(run) for run in found],
        chosen=_entry(chosen) if chosen else None,
        last={key: _finite(value) for key, value in chosen.metrics.last.items()} if chosen else {},
        configuration=_settings(chosen.configuration()) if chosen else {},
        evaluated=bool(chosen and chosen.evaluations.curves),
        samples=len(chosen.samples()) if chosen else 0,
        loaded=server.loaded,
    )


SHOWN = ("epochs", "max_steps", "seed", "micro_batch_size_per_gpu", "global_batch_size", "lr_scheduler", "warmup_steps")


def _settings(table: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a run that a person asks for first; nothing that may be a secret or a path."""
    found = {key: table[key] for key in SHOWN if isinstance(table.get(key), int | float | str)}
    for section, keys in (("optimizer", ("type", "lr")), ("adapter", ("type", "rank")), ("model", ("dtype",))):
        own = table.get(section)
        own = own if isinstance(own, dict) else {}
        for key in keys:
            if isinstance(own.get(key), int | float | str):
                found[f"{section}.{key}"] = own[key]
    return found


async def show_metrics(request: Request, query: MetricsQuery) -> FiguresAnswer:
    return await server_of(request).in_studio(_figures, request, query)


def _figures(request: Request, query: MetricsQuery) -> FiguresAnswer:
    run = _found(request, query.run)
    run.refresh()
    generation = run.metrics.generation + run.evaluations.generation
    reset = query.since is None or (query.generation is not None and query.generation != generation)
    since = None if reset else query.since
    wanted = None if query.names is None else set(query.names.split(","))

    def curves(figures: Figures) -> dict[str, CurveAnswer]:
        found = figures.after(since, query.points)
        return {name: CurveAnswer(**curve) for name, curve in found.items() if wanted is None or name in wanted}

    return FiguresAnswer(
        run=run.name,
        generation=generation,
        reset=reset,
        step=run.metrics.last_step,
        metrics=curves(run.metrics),
        evaluations=curves(run.evaluations),
    )


async def list_samples(request: Request, query: RunQuery) -> SampleList:
    return await server_of(request).in_studio(_samples, request, query.run)


def _samples(request: Request, name: str | None) -> SampleList:
    run = _found(request, name)
    return SampleList(run=run.name, samples=[_sample_entry(run, sample) for sample in run.samples()])


def _sample_entry(run: RunFolder, sample: Sample) -> SampleEntry:
    which = urlencode({"run": run.name, "version": f"{sample.changed:.3f}"})
    address = f"/api/run/samples/{sample.name}"
    return SampleEntry(
        name=sample.name,
        step=sample.step,
        url=f"{address}.png?{which}",
        tile=f"{address}/tile.jpg?{which}&index=",
        width=sample.size_wh[0],
        height=sample.size_wh[1],
        columns=sample.columns,
        rows=sample.rows,
        prompts=list(sample.prompts),
        seeds=list(sample.seeds),
    )


def _sample(request: Request, run: str | None) -> Sample:
    try:
        return _found(request, run).sample(request.path_params["name"])
    except LookupError:
        raise NotFoundError("there is no such picture, or no longer") from None


async def show_sample(request: Request, query: SampleQuery) -> Response:
    def read() -> bytes:
        try:
            return _sample(request, query.run).path.read_bytes()
        except OSError:
            raise NotFoundError("there is no such picture, or no longer") from None

    return _picture(await server_of(request).in_studio(read), "image/png")


async def show_tile(request: Request, query: TileQuery) -> Response:
    server, pictures = server_of(request), request.app.state.tiles
    sample = await server.in_studio(_sample, request, query.run)

    def make() -> bytes:
        return _tile(sample, query.index)

    return await pictures.response(server, (sample.path, sample.changed, query.index), make, "image/jpeg")


def _picture(data: bytes, kind: str) -> Response:
    return Response(data, media_type=kind, headers={"Cache-Control": "private, max-age=3600"})


def _tile(sample: Sample, index: int) -> bytes:
    """Return one image of a grid, with its caption below it."""
    row, column = divmod(index, sample.columns)
    if row >= sample.rows:
        raise NotFoundError(f"there is no image {index}, expected 0 to {sample.rows * sample.columns - 1}")
    width, height = sample.size_wh[0] // sample.columns, sample.size_wh[1] // sample.rows
    try:
        with Image.open(io.BytesIO(sample.path.read_bytes()), formats=["PNG"]) as image:
            part = image.crop((column * width, row * height, (column + 1) * width, (row + 1) * height))
            return as_jpeg(part, 92)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise NotFoundError("the picture is not complete, or no longer there") from None


async def list_checkpoints(request: Request, query: RunQuery) -> CheckpointList:
    return await server_of(request).in_studio(_checkpoints, request, query.run)


def _checkpoints(request: Request, name: str | None) -> CheckpointList:
    run, server = _found(request, name), server_of(request)
    return CheckpointList(
        run=run.name,
        checkpoints=[
            CheckpointEntry(
                **{key: getattr(found, key) for key in CheckpointEntry.model_fields if key != "loaded"},
                loaded=server.loaded == _label(run, found),
            )
            for found in run.checkpoints()
        ],
        disk=run.disk(),
    )


def _label(run: RunFolder, checkpoint: RunCheckpoint) -> str:
    return f"{run.name}/{checkpoint.name}"


async def load_checkpoint(request: Request, query: RunQuery) -> LoadedAnswer:
    server = server_of(request)

    def find() -> tuple[RunFolder, RunCheckpoint]:
        run = _found(request, query.run)
        with contextlib.suppress(LookupError):
            return run, run.checkpoint(request.path_params["name"])
        raise NotFoundError(f"there is no checkpoint '{show_value(request.path_params['name'])}', or no longer")

    run, checkpoint = await server.in_studio(find)
    _ = server.engine  # raises while the model is loading
    if checkpoint.kind == "resume":
        raise UserError(f"{checkpoint.name}: is what training resumes from, expected an exported model or adapter")
    if checkpoint.kind == "unknown":
        raise UserError(f"{checkpoint.name}: is no model and no adapter that can be read")
    return LoadedAnswer(kind=checkpoint.kind, name=checkpoint.name, **await _load(server, run, checkpoint))


async def _load(server: Server, run: RunFolder, checkpoint: RunCheckpoint) -> dict[str, Any]:
    label = _label(run, checkpoint)
    if checkpoint.kind == "model":
        await draw_with(server, checkpoint.path, label)
        note = "pictures that were ordered before are drawn with the model before"
        return {"lora": None, "note": note}
    library = server.library
    if library is None:
        raise UserError(f"{checkpoint.name}: the server has no library of adapters")
    if checkpoint.kind == "control":
        library.add("control", label, checkpoint.path)
        return {"lora": None, "note": f"is now a control network with the name {label}"}
    library.add("lora", label, checkpoint.path)
    return {"lora": label, "note": f"is now a LoRA with the name {label}"}


def routes() -> list[Route]:
    """Return the routes of a run's folder."""
    run, samples, checkpoints = "/api/run", "/api/run/samples", "/api/run/checkpoints"
    missing: dict[str, Any] = {"errors": (404,), "query": RunQuery}
    return [
        api_route(run, "GET", show_run, "The training run that the server shows", answer=RunSummary, **missing),
        api_route(
            *(f"{run}/metrics", "GET", show_metrics, "A run's curves, all or after a step"),
            answer=FiguresAnswer,
            **missing | {"query": MetricsQuery},
        ),
        api_route(samples, "GET", list_samples, "The grids of samples by step", answer=SampleList, **missing),
        api_route(
            *(f"{samples}/{{name}}.png", "GET", show_sample, "A grid of samples"),
            answer="image/png",
            **missing | {"query": SampleQuery},
        ),
        api_route(
            *(f"{samples}/{{name}}/tile.jpg", "GET", show_tile, "One image of a grid"),
            answer="image/jpeg",
            **missing | {"query": TileQuery},
        ),
        api_route(
            *(checkpoints, "GET", list_checkpoints, "A run's exports and checkpoints"),
            answer=CheckpointList,
            **missing,
        ),
        api_route(
            *(f"{checkpoints}/{{name}}/load", "POST", load_checkpoint, "Draw with a checkpoint"),
            answer=LoadedAnswer,
            **missing | {"errors": (404, 422, 503)},
        ),
    ]
