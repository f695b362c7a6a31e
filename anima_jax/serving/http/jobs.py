"""Jobs: orders that one call submits together, and what becomes of them.

Everything here runs in the event loop's thread, except for `_kept`, which writes PNG files. The engine's threads only
wake the loop.
"""

import asyncio
import base64
import collections
import contextlib
import secrets
import sys
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Any, Literal

from PIL import Image

from anima_jax.errors import UserError, one_line, size_text, system_error
from anima_jax.serving.engine import Engine, EngineFullError
from anima_jax.serving.http.gallery import GalleryImage
from anima_jax.serving.http.limits import RequestLimits, UnavailableError
from anima_jax.serving.http.pictures import as_jpeg
from anima_jax.serving.orders import Order
from anima_jax.serving.tickets import Ticket

POSITIONS_EVERY = 0.5
"""Seconds between two positions in the queue that clients are told: with many clients each change concerns them all."""

JobState = Literal["waiting", "drawing", "done", "failed", "cancelled"]

Event = tuple[str, dict[str, Any]]
"""Name and data of a server-sent event."""

Keep = Callable[[Order, Image.Image], GalleryImage]
"""Puts a drawn image into the gallery."""

Finish = Callable[[int, Image.Image], Image.Image]
"""Makes the result of a drawn image, given the index of its order."""


class JobCancelledError(UserError):
    """The job was cancelled before it was finished."""


class Job:
    """Orders that were submitted together. `images` are those that are finished, by the index of their order.

    `finish` makes the result of each drawn image. With `may_skip`, a job goes on when one of its orders is cancelled.
    """

    def __init__(
        self,
        orders: Sequence[Order],
        tickets: Sequence[Ticket],
        keep: Keep,
        timeout: float,
        left_queue: Callable[[], None],
        *,
        finish: Finish | None = None,
        may_skip: bool = False,
    ):
        self.id, self.created = secrets.token_hex(8), time.time()
        self.prompt, self.seed, self.count = orders[0].request.prompt, orders[0].request.seed, len(orders)
        self.picture_bytes = picture_bytes(orders)
        self._tickets = list(tickets)
        self._waiting, self._final = self.count, (0, 0)
        self.images: dict[int, GalleryImage] = {}
        self.state: JobState = "waiting"
        self.error: UserError | None = None
        self._makers: list[tuple[Keep, Finish | None]] = [(keep, finish)]
        self._may_skip = may_skip
        self._loop, self._left_queue = asyncio.get_running_loop(), left_queue
        self._keeping: dict[int, asyncio.Task[None]] = {}
        self._watchers: set[asyncio.Event] = set()
        self._woken = False
        self._previews: dict[int, tuple[Image.Image, str]] = {}
        self._timer = self._loop.call_later(timeout, self._expire, timeout)
        for ticket in self._tickets:
            ticket.subscribe(self._changed)
        self._update()

    @property
    def is_finished(self) -> bool:
        """Whether the state is final."""
        return self.state in ("done", "failed", "cancelled")

    @property
    def position(self) -> int:
        """How many orders of all jobs are started before the first of this job that waits."""
        waiting = [ticket.position for ticket in self._tickets if ticket.state == "waiting"]
        return min(waiting, default=0) if len(waiting) == len(self._tickets) else 0

    @property
    def done(self) -> int:
        """Evaluations of the network that are done."""
        return self._final[0] if self.is_finished else sum(ticket.done for ticket in self._tickets)

    @property
    def total(self) -> int:
        """Evaluations of the network of all images; an estimate until all of them have begun."""
        if self.is_finished:
            return self._final[1]
        totals = [ticket.total or ticket.order.params.steps for ticket in self._tickets]
        return max(sum(totals), self.done)

    def ordered_images(self) -> list[GalleryImage]:
        """Return the finished images in the order of their orders."""
        return [self.images[index] for index in sorted(self.images)]

    def preview(self) -> Image.Image | None:
        """Return the preview of the first order that is not finished and has one."""
        shown = (ticket.preview for ticket in self._tickets if not ticket.finished)
        return next((preview for preview in shown if preview is not None), None)

    def skip(self) -> None:
        """Cancel the first order that is not finished."""
        for ticket in self._tickets:
            if not ticket.finished:
                return ticket.cancel()

    def cancel(self) -> None:
        """Cancel what is not finished."""
        self._end("cancelled", JobCancelledError("the job was cancelled"))

    async def finished(self) -> list[GalleryImage]:
        """Wait for the job and return its images.

        Raises what made it fail, such as JobCancelledError, or UnavailableError if it took too long.
        """
        with self._watched() as changed:
            while not self.is_finished:
                changed.clear()
                await changed.wait()
        if self.error is not None:
            raise self.error
        return self.ordered_images()

    async def events(self) -> AsyncGenerator[Event]:
        """Yield the state now, then what changes, until the job is finished. A slow reader gets the latest only."""
        shown: dict[Any, Any] = {}

        def is_new(key: Any, value: Any) -> bool:
            before, shown[key] = shown.get(key), value
            return before is not value and before != value

        with self._watched() as changed:
            while True:
                changed.clear()
                if self.state == "waiting" and is_new("queued", position := self.position):
                    yield "queued", {"position": position}
                for index, ticket in enumerate(self._tickets):
                    if ticket.total and is_new(index, (ticket.done, ticket.total)):
                        yield "progress", {"image": index, "done": ticket.done, "total": ticket.total}
                    if (preview := ticket.preview) and is_new((index, "preview"), preview):
                        yield "preview", {"image": index, "data": await self._preview(index, preview)}
                    if (image := self.images.get(index)) and is_new((index, "image"), image):
                        yield "image", {"image": index, "kept": image}
                if self.is_finished:
                    break
                await changed.wait()
        match self.state:
            case "done":
                yield "done", {"images": self.ordered_images()}
            case "failed":
                yield "failed", {"error": error_line(self.error)}
            case _:
                yield "cancelled", {}

    async def _preview(self, index: int, preview: Image.Image) -> str:
        """Return a preview as a data URL, made once for all readers."""
        known, url = self._previews.get(index, (None, ""))
        if known is not preview:
            url = await asyncio.to_thread(_data_url, preview)
            self._previews[index] = preview, url
        return url

    @contextlib.contextmanager
    def _watched(self) -> Iterator[asyncio.Event]:
        """Yield an event that is set whenever something has changed."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            yield changed
        finally:
            self._watchers.discard(changed)

    def _changed(self, ticket: Ticket) -> None:
        """Wake the loop; called from the engine's threads. Changes that come before it is awake are one."""
        if not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._update)
            except RuntimeError:  # the loop is closed: the server is at its end
                self._woken = False

    def _update(self) -> None:
        self._woken = False
        if not self.is_finished:
            for index, ticket in enumerate(self._tickets):
                if ticket.state == "done" and index not in self._keeping:
                    self._keeping[index] = self._loop.create_task(self._kept(index, ticket, *self._makers[0]))
                elif ticket.state == "failed":
                    return self._end("failed", reported(ticket.error))
                elif ticket.state == "cancelled" and not self._may_skip:
                    return self.cancel()
            if self._end_if_complete():
                return None
            waiting = sum(ticket.state == "waiting" for ticket in self._tickets)
            if waiting < self.count:
                self.state = "drawing"
            if waiting < self._waiting:
                self._waiting = waiting
                self._left_queue()
        self.wake()

    def wake(self) -> None:
        """Let those who watch look again."""
        for changed in self._watchers:
            changed.set()

    async def _kept(self, index: int, ticket: Ticket, keep: Keep, finish: Finish | None) -> None:
        try:
            image = await asyncio.to_thread(_result, index, ticket, keep, finish)
        except Exception as error:
            self._end("failed", reported(error))
            return
        self.images[index] = image
        if not self._end_if_complete():
            self._update()

    def _end_if_complete(self) -> bool:
        """End the job if each image is in the gallery or was skipped; it is cancelled if all were skipped."""
        skipped = sum(ticket.state == "cancelled" for ticket in self._tickets)
        if self.is_finished or len(self.images) + skipped < self.count:
            return self.is_finished
        if self.images:
            self._end("done", None)
        else:
            self.cancel()
        return True

    def _expire(self, timeout: float) -> None:
        self._end("failed", UnavailableError(f"the job was not finished after {timeout:g} s"))

    def _end(self, state: JobState, error: UserError | None) -> None:
        """Set the final state. What holds pictures is let go: the tickets, and what makes results of them."""
        if self.is_finished:
            return
        self._final = self.done, self.done if state == "done" else self.total
        self.state, self.error = state, error
        self._timer.cancel()
        self._previews.clear()
        self._makers.clear()
        tickets, self._tickets = self._tickets, []
        for ticket in tickets:
            if not ticket.finished:
                ticket.cancel()
        self.wake()
        if self._waiting:
            self._left_queue()


class Jobs:
    """The jobs of a server: those that are not finished, and the state of the last ones that are."""

    def __init__(self, keep: Keep, limits: RequestLimits):
        self.keep, self._limits = keep, limits
        """`keep` is that of the jobs which are submitted from now on."""
        self._jobs: collections.OrderedDict[str, Job] = collections.OrderedDict()
        self._moving = False
        self.followed = 0
        """Calls that submit another job after one that was taken."""
        self.engine: Engine | None = None
        self.refusal: str | None = "the model is still loading"
        """Why no job is taken now, or None."""

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Say that the jobs of this block follow each other: one that follows is taken while the server stops, too."""
        self.followed += 1
        try:
            yield
        finally:
            self.followed -= 1

    def submit(
        self, orders: Sequence[Order], keep: Keep | None = None, *, follows: bool = False, **options: Any
    ) -> Job:
        """Submit the orders of a call, all of them or none, from the event loop's thread.

        `keep` puts images into the gallery in another way than the server's own; `follows` is for all but the first job
        of `following`; `options` are `finish` and `may_skip` of `Job`.
        Raises UserError if they are invalid or exceed a limit, EngineFullError if too many wait, UnavailableError if
        the server takes no jobs now.
        """
        if self.engine is None or (self.refusal is not None and not follows):
            raise UnavailableError(self.refusal or "the server takes no jobs")
        if self.engine.library is not None:
            orders = [self.engine.library.tagged(order) for order in orders]
        self._limits.check(orders)
        self._limits.check_tokens(orders, self.engine.pipeline.tokenizers)
        held = self.picture_bytes + picture_bytes(orders)
        if held > self._limits.max_pending:
            raise EngineFullError(f"the pictures of waiting jobs would take {size_text(held)}")
        tickets: list[Ticket] = []
        try:
            for order in orders:
                tickets.append(self.engine.submit(order))
        except BaseException:
            for ticket in tickets:
                ticket.cancel()
            raise
        timeout = self._limits.job_timeout
        job = Job(orders, tickets, keep or self.keep, timeout, self._move_up, **options)
        self._jobs[job.id] = job
        finished = [job.id for job in self._jobs.values() if job.is_finished]
        for id in finished[: max(0, len(finished) - self._limits.kept_jobs)]:
            del self._jobs[id]
        return job

    def _move_up(self) -> None:
        """Note that positions of jobs that wait have changed; those who watch are told of many changes once."""
        if not self._moving:
            self._moving = True
            asyncio.get_running_loop().call_later(POSITIONS_EVERY, self._tell_positions)

    def _tell_positions(self) -> None:
        self._moving = False
        for job in self._jobs.values():
            if job.state == "waiting":
                job.wake()

    def get(self, id: str) -> Job | None:
        """Return a job, or None if there is none of this id, or no longer."""
        return self._jobs.get(id)

    def newest_first(self) -> list[Job]:
        """Return all jobs that are known."""
        return list(self._jobs.values())[::-1]

    def unfinished(self) -> list[Job]:
        """Return the jobs that are waiting or drawn."""
        return [job for job in list(self._jobs.values()) if not job.is_finished]

    @property
    def picture_bytes(self) -> int:
        """Bytes of the decoded pictures of the jobs that are not finished. For any thread."""
        return sum(job.picture_bytes for job in self.unfinished())


def _result(index: int, ticket: Ticket, keep: Keep, finish: Finish | None) -> GalleryImage:
    image = ticket.result(0)
    return keep(ticket.order, image if finish is None else finish(index, image))


def picture_bytes(orders: Sequence[Order]) -> int:
    """Return the bytes of the decoded pictures of orders, of which several orders may share one."""
    parts: list[Any] = []
    for order in orders:
        parts += [order.image, order.mask, *(one.picture for one in order.request.references)]
        parts += [part for one in order.request.controls for part in (one.image, one.mask)]
        parts += [region.where for region in order.request.regions]
    images = {id(part): part for part in parts if isinstance(part, Image.Image)}
    return sum(4 * image.width * image.height for image in images.values())


def reported(error: BaseException | None) -> UserError:
    """Return the error for a client. One that is not the user's is written to stderr; a client learns no more of it."""
    if isinstance(error, UserError):
        return error
    found = system_error(error) if error and not isinstance(error, OSError) else None
    if found is None and error is not None:
        traceback.print_exception(error, file=sys.stderr)
    return UserError("out of memory" if found else "internal error; the server's own output says more")


def error_line(error: BaseException | None) -> str:
    """Return an error as one line."""
    return one_line("; ".join(error.messages) if isinstance(error, UserError) else error)


def _data_url(preview: Image.Image) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(as_jpeg(preview, 80)).decode()}"
