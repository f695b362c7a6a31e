"""The engine: draws orders from many callers with one pipeline."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from anima_jax.errors import UserError, plural
from anima_jax.models.parameters import Params
from anima_jax.sampling.callbacks import downsample
from anima_jax.sampling.images import to_images
from anima_jax.sampling.pipeline import AnimaPipeline
from anima_jax.serving.orders import Order
from anima_jax.serving.tickets import Ticket


class EngineFullError(UserError):
    """The queue is full: the order may be submitted again later."""


class EngineClosedError(UserError):
    """The engine takes no orders any more."""


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What the engine does now, and did since it was made."""

    waiting: int
    drawing: int
    slots: int
    used_slots: int
    evaluations: int
    images: int
    failed: int
    cancelled: int
    compilations: int
    seconds_per_evaluation: float


@dataclasses.dataclass(frozen=True, eq=False)
class _Replacement:
    """Parameters of the transformer for the orders from number `first` on."""

    first: int
    params: Params
    done: concurrent.futures.Future[None]


class _Cancelled(Exception):  # noqa: N818 - it ends a drawing, nothing is wrong
    pass


class Engine:
    """Draws orders. Its methods may be called from any thread; one thread of its own uses the devices.

    `slots` is the number of images that are drawn together, `max_waiting` the number of orders that may wait, `library`
    what names the LoRAs that orders may use, and `mesh` the devices, by default those of the mesh that is set.
    """

    def __init__(
        self,
        pipeline: AnimaPipeline,
        *,
        slots: int = 8,
        library: Any = None,
        max_waiting: int = 256,
        mesh: Mesh | None = None,
    ):
        self.pipeline, self.library = pipeline, library
        self._slots, self._max_waiting, self.mesh = slots, max_waiting, mesh or jax.sharding.get_mesh()
        self._changed = threading.Condition()
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._replacements: collections.deque[_Replacement] = collections.deque()
        self._drawing: list[Ticket] = []
        self._numbers = itertools.count(1)
        self._counts: collections.Counter[str] = collections.Counter()
        self._seconds = 0.0
        self._accepting, self._closing = True, False
        self._thread = threading.Thread(target=self._run, name="anima engine", daemon=True)
        self._thread.start()

    def submit(self, order: Order) -> Ticket:
        """Put an order into the queue. Raises UserError if it is invalid, EngineFullError and EngineClosedError."""
        order.check()
        if order.loras and self.library is None:
            raise UserError(f"lora '{order.loras[0][0]}': the server has no folder of LoRAs")
        with self._changed:
            if not self._accepting:
                raise EngineClosedError("the engine takes no orders any more")
            waiting = [ticket for ticket in self._waiting if not ticket.finished]
            if len(waiting) >= self._max_waiting:
                raise EngineFullError(f"{plural(len(waiting), 'order')} already waiting, expected fewer")
            ticket = Ticket(str(next(self._numbers)), order, self._position_of)
            self._waiting = collections.deque([*waiting, ticket])
            self._changed.notify_all()
        return ticket

    def replace_params(self, params: Params) -> concurrent.futures.Future[None]:
        """Use other parameters of the transformer, of the same structure, for the orders that come after this call.

        Those that were submitted before are drawn with the parameters before. The future is done when that is so and
        the parameters are in use. Raises EngineClosedError.
        """
        with self._changed:
            if not self._accepting:
                raise EngineClosedError("the engine takes no orders any more")
            replacement = _Replacement(next(self._numbers), params, concurrent.futures.Future())
            self._replacements.append(replacement)
            self._changed.notify_all()
        return replacement.done

    def _replace(self) -> None:
        """Replace the parameters if all orders before are finished. The lock is held."""
        while self._replacements and not any(int(each.id) < self._replacements[0].first for each in self._waiting):
            replacement = self._replacements.popleft()
            self.pipeline.dit_params = dict(replacement.params)
            replacement.done.set_result(None)

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more orders, and wait for those that were submitted. Return whether all are finished."""
        with self._changed:
            self._accepting = False
            return self._changed.wait_for(lambda: not self._waiting and not self._drawing, timeout)

    def close(self) -> None:
        """Take no more orders, cancel those that are not finished, and end the engine's thread."""
        with self._changed:
            self._accepting, self._closing = False, True
            tickets = [*self._waiting, *self._drawing]
            self._changed.notify_all()
        for ticket in tickets:
            ticket.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def statistics(self) -> Statistics:
        """Return what the engine does now, and did since it was made."""
        with self._changed:
            counts, evaluations = self._counts, self._counts["evaluations"]
            return Statistics(
                waiting=sum(not ticket.finished for ticket in self._waiting),
                drawing=len(self._drawing),
                slots=self._slots,
                used_slots=len(self._drawing),
                evaluations=evaluations,
                images=counts["images"],
                failed=counts["failed"],
                cancelled=counts["cancelled"],
                compilations=counts["compilations"],
                seconds_per_evaluation=self._seconds / evaluations if evaluations else 0.0,
            )

    def _position_of(self, ticket: Ticket) -> int:
        with self._changed:
            before = itertools.takewhile(lambda other: other is not ticket, self._waiting)
            return sum(not other.finished for other in before)

    def _run(self) -> None:
        with contextlib.nullcontext() if self.mesh.empty else jax.set_mesh(self.mesh):
            self._draw_all()

    def _draw_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._replacements or self._closing)
                self._replace()
                if not self._waiting:
                    if self._closing:
                        return
                    continue
                ticket = self._waiting.popleft()
                self._drawing = [ticket]
            if ticket.move("drawing"):
                self._draw(ticket)
            with self._changed:
                self._drawing = []
                self._changed.notify_all()

    def _draw(self, ticket: Ticket) -> None:
        order = ticket.order
        try:
            (image,) = self.pipeline.draw(
                [order.request], order.params, image=order.image, mask=order.mask, callback=self._callback(ticket)
            )
            self._counts["images"] += ticket.move("done", image=image)
        except _Cancelled:
            self._counts["cancelled"] += ticket.move("cancelled")
        except Exception as error:
            self._counts["failed"] += ticket.move("failed", error=error)

    def _callback(self, ticket: Ticket) -> Callable[[int, int, Callable[[], list[np.ndarray]]], None]:
        every, last = ticket.order.preview_every, time.monotonic()

        def callback(done: int, total: int, latents: Callable[[], list[np.ndarray]]) -> None:
            nonlocal last
            if ticket.cancel_requested:
                raise _Cancelled
            self._counts["evaluations"] += done > ticket.done
            self._seconds, last = self._seconds + time.monotonic() - last, time.monotonic()
            if every and done and done < total and done % every == 0:
                (preview,) = to_images(self.pipeline.decode([downsample(x) for x in latents()]))
                ticket.show(preview)
            ticket.report(done, total)
            if done == total:
                ticket.move("decoding")

        return callback
