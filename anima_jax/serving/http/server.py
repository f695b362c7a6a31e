"""What all routes of a server share: its configuration, engine, jobs and gallery. A handler has it as `server_of`."""

import asyncio
import concurrent.futures
import dataclasses
import functools
import ipaddress
import os
import pathlib
import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal, ParamSpec, TypeVar

from PIL import Image
from starlette.requests import Request

from anima_jax.errors import UserError, size_text
from anima_jax.sampling.file_hashes import FileHashes, file_hash
from anima_jax.sampling.image_text import to_text
from anima_jax.sampling.images import digest_of, name_in_text
from anima_jax.sampling.recipe import NETWORKS, file_name
from anima_jax.sampling.request import SIZE_STEP, ImageRequest, SamplingParams
from anima_jax.serving.engine import Engine
from anima_jax.serving.http.gallery import Gallery, GalleryImage
from anima_jax.serving.http.jobs import Jobs, Keep
from anima_jax.serving.http.limits import RequestLimits, TooLargeError, UnavailableError
from anima_jax.serving.http.pictures import counted
from anima_jax.serving.lora_library import LoraLibrary
from anima_jax.serving.orders import Order

P = ParamSpec("P")
T = TypeVar("T")

DECODERS = 4
"""Threads that decode pictures of requests."""

STUDIO = 4
"""Threads that read runs and data sets: what the server needs to draw and to answer never waits for them."""

ServerState = Literal["loading", "ok", "draining", "failed"]


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """What a server is told when it starts.

    `files` are the arguments of `AnimaPipeline.load`, for the text of images; `defaults` are settings of a request that
    does not give them. `gallery` and `run` are folders and `dataset` a file, None without that feature. `hosts` are
    further names by which clients may call the server, `cors` the origins of other pages that may use it.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    limits: RequestLimits = dataclasses.field(default_factory=RequestLimits)
    files: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    page: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    """Settings that only the page begins with, such as a LoRA that was just trained."""
    gallery: pathlib.Path | None = None
    run: pathlib.Path | None = None
    dataset: pathlib.Path | None = None
    cors: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    heartbeat: float = 15.0
    """Seconds between two signs of life of a stream of events."""
    retry_after: int = 5
    """Seconds after which a client that was refused should try again."""

    def __post_init__(self) -> None:
        """Keep the defaults within the limits: what is not asked for can always be drawn."""
        side = self.limits.max_size // SIZE_STEP * SIZE_STEP
        most = {"width": side, "height": side, "steps": self.limits.max_steps}
        usual = {"width": ImageRequest.width, "height": ImageRequest.height, "steps": SamplingParams.steps}
        given = {**usual, **self.defaults}
        object.__setattr__(self, "defaults", given | {name: min(given[name], most[name]) for name in most})

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return self.host == "localhost"


class Server:
    """A server's state. `engine` is None until the model is loaded (`start`)."""

    def __init__(self, config: ServerConfig, engine: Engine | None = None):
        self.config, self.limits = config, config.limits
        self.gallery = Gallery(config.limits, config.gallery)
        self._hashes = _hashes_of(config.files)
        self.jobs = Jobs(functools.partial(self._keep, config.files, self._hashes), config.limits)
        self.loading = asyncio.Lock()
        self.loaded: str | None = None
        """The checkpoint of a run that the engine draws with; None: the model of the start."""
        self.state: ServerState = "loading"
        self.files = config.files
        """The arguments of `AnimaPipeline.load` that new images are drawn with."""
        self.reading = 0
        """Bytes of requests in memory."""
        self._decoders = concurrent.futures.ThreadPoolExecutor(DECODERS, "anima pictures")
        self._counting, self._decoded = threading.Lock(), 0
        self._studio = concurrent.futures.ThreadPoolExecutor(STUDIO, "anima studio")
        if engine is not None:
            self.start(engine)

    @property
    def engine(self) -> Engine:
        """The engine. Raises UnavailableError while the model is loading."""
        if self.jobs.engine is None:
            raise UnavailableError(self.jobs.refusal or "the model is still loading")
        return self.jobs.engine

    @property
    def library(self) -> LoraLibrary | None:
        """The LoRAs and control networks that requests may name; None if the server has no folder of them."""
        return self.engine.library

    def start(self, engine: Engine) -> None:
        """Take jobs from now on."""
        self.jobs.engine, self.jobs.refusal, self.state = engine, None, "ok"

    def stop_taking_jobs(self) -> None:
        """Refuse new jobs from now on; those that are there go on."""
        self.jobs.refusal, self.state = "the server is shutting down", "draining"

    def fail(self) -> None:
        """Say that the model could not be loaded."""
        self.jobs.refusal, self.state = "the model could not be loaded", "failed"

    def use_files(self, files: Mapping[str, Any], label: str) -> None:
        """Say in the texts of the images that are ordered from now on that they are drawn with these files."""
        self.files, self.loaded, self._hashes = files, label, _hashes_of(files)
        self.jobs.keep = functools.partial(self._keep, files, self._hashes)

    async def decoding(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function that decodes pictures, in one of a few threads: each may need much memory.

        Until its result can be submitted, its pictures count for `limits.max_pending`. Raises TooLargeError if they are
        more than that, UnavailableError if they are with all others.
        """
        own = 0

        def count(size: int) -> None:
            nonlocal own
            most = self.limits.max_pending
            with self._counting:
                if own + size > most:
                    raise TooLargeError(f"the pictures of the request take more than {size_text(most)}")
                if (held := self._decoded + self.jobs.picture_bytes + size) > most:
                    raise UnavailableError(f"the pictures of all requests would take {size_text(held)}")
                own, self._decoded = own + size, self._decoded + size

        def call() -> T:
            with counted(count):
                return function(*args, **kwargs)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._decoders, call)
        finally:
            with self._counting:
                self._decoded -= own

    async def in_studio(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function that reads or writes a run or a data set, in one of a few threads: disks may be slow."""
        call = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._studio, call)

    @property
    def default_size(self) -> tuple[int, int]:
        """Width and height of an image for which nothing else is asked."""
        width, height = (self.config.defaults.get(name, getattr(ImageRequest, name)) for name in ("width", "height"))
        return width, height

    def keep_changed(self, change: Callable[[Mapping[str, str]], dict[str, str]]) -> Keep:
        """Return what puts images that are ordered now into the gallery with another text: what `change` returns."""
        return functools.partial(self._keep, self.files, self._hashes, change=change)

    def _lora_file(self, name: str) -> str:
        """Return the path of a LoRA that was drawn with, or its name if the file is gone by now."""
        try:
            return self.library.lora(name) if self.library else name
        except UserError:
            return name

    def _keep(
        self,
        drawn_with: Mapping[str, Any],
        base_hashes: FileHashes,
        order: Order,
        image: Image.Image,
        change: Callable[[Mapping[str, str]], dict[str, str]] = dict,
    ) -> GalleryImage:
        """Put an image into the gallery, with what `change` makes of the text that `generate` writes.

        Clients on other machines learn the names of files, not the folders of this one.
        """
        files, request = dict(drawn_with), order.request
        own = [(self._lora_file(name), weight) for name, weight in order.loras]
        loras = [*files.get("loras", ()), *own]
        shown = str if self.config.is_local else file_name
        hashes = base_hashes.wait() | {path: _hash_of(path, is_lora=True) for path, _ in own}
        hashes |= {control.name: _hash_of(control.name) for control in request.controls}
        hashes = {shown(path): found for path, found in hashes.items() if found}
        controls = tuple(dataclasses.replace(control, path=shown(control.path)) for control in request.controls)
        files = {name: shown(files[name]) if name in NETWORKS and files[name] else files[name] for name in files}
        files["loras"] = [(shown(path), weight) for path, weight in loras]
        parts = {"image": order.image, "mask": order.mask}
        files |= {name: name_in_text(part, name, digest_of(part)) for name, part in parts.items() if part is not None}
        request = dataclasses.replace(request, controls=controls)
        text = to_text(request, order.params, files, mask=order.mask, hashes=hashes)
        return self.gallery.add(image, change(text), seed=request.seed, prompt=request.prompt)


def _hashes_of(files: Mapping[str, Any]) -> FileHashes:
    """Begin to compute the hashes of the files that all images are drawn with."""
    return FileHashes(str(files.get("transformer", "")), [str(path) for path, _ in files.get("loras", ())])


def _hash_of(path: str, *, is_lora: bool = False) -> str | None:
    """Return `file_hash`, which is computed once for each version of a file."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return _known_hash(path, (found.st_size, found.st_mtime_ns), is_lora)


@functools.lru_cache(256)
def _known_hash(path: str, version: tuple[int, int], is_lora: bool) -> str | None:
    return file_hash(path, is_lora=is_lora)


def server_of(request: Request) -> Server:
    """Return the server that a request came to."""
    return request.app.state.server
