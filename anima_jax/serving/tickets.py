"""Tickets: what a caller holds of an order while the engine draws it."""

import threading
import traceback
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Literal

from PIL import Image

from anima_jax.errors import UserError, first_line
from anima_jax.serving.orders import Order

State = Literal["waiting", "drawing", "decoding", "done", "failed", "cancelled"]

FINISHED: tuple[State, ...] = ("done", "failed", "cancelled")


class EngineFullError(UserError):
    """The queue is full: the order may be submitted again later."""


class EngineClosedError(UserError):
    """The engine takes no orders any more."""


class DrawingError(UserError, RuntimeError):
    """An image could not be drawn, through no fault of its order."""

    exit_code = 1


class Ticket:
    """An order in the engine. Its attributes may be read, and its methods called, from any thread.

    `state` is one of `State`; `done` and `total` count evaluations of the network, of which the total is 0 until it is
    known; `preview` is the latest preview; `error` is what made the order fail. `position_of` returns how many orders
    are drawn before this one.
    """

    def __init__(self, id: str, order: Order, position_of: Callable[["Ticket"], int]):
        self.id, self.order = id, order
        self.state: State = "waiting"
        self.done = self.total = 0
        self.preview: Image.Image | None = None
        self.error: BaseException | None = None
        self.cancel_requested = False
        self._position_of = position_of
        self._image: Image.Image | None = None
        self._changed = threading.Condition()
        self._callbacks: list[Callable[[Ticket], None]] = []

    def __repr__(self) -> str:
        return f"Ticket({self.id}: {self.state}, {self.done} of {self.total})"

    @property
    def position(self) -> int:
        """The number of orders that are started before this one; 0 if it is no longer waiting."""
        return self._position_of(self) if self.state == "waiting" else 0

    @property
    def finished(self) -> bool:
        """Whether the state is final."""
        return self.state in FINISHED

    def result(self, timeout: float | None = None) -> Image.Image:
        """Wait for the image and return it.

        Raises what made the order fail, `concurrent.futures.CancelledError` if it was cancelled, and TimeoutError after
        `timeout` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.finished, timeout):
                raise TimeoutError(f"the image is not finished after {timeout:g} s")
        if self.error is not None:
            raise self.error
        if self._image is None:
            raise CancelledError
        return self._image

    def cancel(self) -> None:
        """Cancel the order: at once if it is waiting, else at the next evaluation; nothing if it is finished."""
        with self._changed:
            self.cancel_requested = True
            waiting = self.state == "waiting"
        if waiting:
            self.move("cancelled")

    def subscribe(self, callback: Callable[["Ticket"], None]) -> None:
        """Call `callback` with the ticket at every change, from threads of the engine, which it must not block."""
        with self._changed:
            self._callbacks.append(callback)

    # For the engine

    def move(self, state: State, *, error: BaseException | None = None, image: Image.Image | None = None) -> bool:
        """Change the state. Return False, and change nothing, if the ticket is finished already."""
        with self._changed:
            if self.finished:
                return False
            self.error, self._image, self.state = error, image, state
            self._changed.notify_all()
        self._tell()
        return True

    def report(self, done: int, total: int) -> None:
        """Set how many evaluations are done, of how many."""
        if (done, total) != (self.done, self.total):
            self.done, self.total = done, total
            self._tell()

    def show(self, preview: Image.Image) -> None:
        """Set the preview."""
        self.preview = preview
        self._tell()

    def _tell(self) -> None:
        with self._changed:
            callbacks = list(self._callbacks)
        for callback in callbacks:
            try:
                callback(self)
            except Exception:  # A fault of a caller must not stop the engine.
                traceback.print_exc()


def shown_error(error: Exception, ticket: Ticket) -> Exception:
    """Return what a caller is told of an error."""
    if isinstance(error, UserError):
        return error
    request, text = ticket.order.request, first_line(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        reason = f"out of memory for {request.width}×{request.height} pixels; fewer slots or a smaller image need less"
    else:
        reason = f"could not be drawn: {type(error).__name__}: {text}"
    try:
        raise DrawingError(reason) from error
    except DrawingError as shown:
        return shown
