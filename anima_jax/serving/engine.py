"""The engine: draws orders of many callers, whose images share the evaluations of one network.

One thread goes round the pools that have images, one evaluation each; before it, images whose orders wait enter free
slots, and after it finished ones leave. Text, start images, noise, compilation, decoding and previews have threads
beside it. An order that cannot share evaluations (`draws_alone`) is drawn by the pipeline itself in a thread of its
own, whose evaluations come between those of the pools.
"""

import collections
import concurrent.futures
import contextlib
import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from anima_jax.checkpoints.locations import PathLike
from anima_jax.errors import UserError, plural
from anima_jax.models.parameters import Params
from anima_jax.parallel.mesh import standard
from anima_jax.sampling.callbacks import downsample
from anima_jax.sampling.images import to_images
from anima_jax.sampling.packing import grid_of, token_budget
from anima_jax.sampling.pipeline import AnimaPipeline
from anima_jax.serving.adapters import LORA_RANK, LORA_SLOTS, OrderAdapters
from anima_jax.serving.lora_library import LoraLibrary
from anima_jax.serving.orders import Order
from anima_jax.serving.pools import Drawing, Evaluated, Pool, release_idle
from anima_jax.serving.preparation import PoolKey, Prepared, Preparer, WaitingOrder, draws_alone
from anima_jax.serving.replacements import Replacements
from anima_jax.serving.statistics import Compilations, Statistics
from anima_jax.serving.tickets import EngineClosedError, EngineFullError, Ticket, shown_error
from anima_jax.serving.turns import Turns

NAME = "anima-engine"
"""What the names of the engine's threads begin with."""

AHEAD = 4
"""Images that are prepared before there is room for them, in slots: at most `slots` with the same adapters."""


class Engine:
    """Draws orders. Its methods may be called from any thread.

    `slots` is the number of images of a pool, `max_waiting` the number of orders that may wait, `library` has the LoRAs
    that orders may name, and `mesh` the devices, by default those of the mesh that is set. `lora_slots` and `lora_rank`
    are those of `OrderAdapters`. A sampler that chooses its own steps fails after `max_evaluations`.
    """

    def __init__(
        self,
        pipeline: AnimaPipeline,
        *,
        slots: int = 8,
        library: LoraLibrary | None = None,
        max_waiting: int = 256,
        mesh: Mesh | None = None,
        lora_slots: int = LORA_SLOTS,
        lora_rank: int = LORA_RANK,
        max_evaluations: float = math.inf,
    ):
        if slots < 1:
            raise UserError(f"slots {slots}, expected at least 1")
        self.pipeline, self.library = pipeline, library
        self.mesh = mesh or jax.sharding.get_mesh()
        self._is_meshed = not self.mesh.empty and self.mesh.size > 1
        self._slots, self._max_waiting, self._most = slots, max_waiting, max_evaluations
        self._turns = Turns(self._is_meshed)
        self._changed = threading.Condition()
        self._wake = threading.Event()
        self._accepting, self._closing = True, False
        self._numbers = itertools.count(1)
        self._open: set[Ticket] = set()
        self._waiting: list[WaitingOrder] = []
        self._alone: Ticket | None = None
        self._adapters = OrderAdapters(pipeline, library, slots=lora_slots, rank=lora_rank, wake=self._wake.set)
        self._prepare = Preparer(pipeline, self._adapters)
        self._programs: dict[Any, dict[str, Any]] = {}
        self._replacements = Replacements(pipeline)
        self._pools: dict[PoolKey, concurrent.futures.Future[Pool]] = {}
        self._pending: collections.deque[tuple[Pool, Evaluated, float]] = collections.deque()
        self._counts: collections.Counter[str] = collections.Counter()
        self._seconds, self._settled = 0.0, 0.0
        self._compilations = Compilations(NAME)
        self._threads = {
            name: concurrent.futures.ThreadPoolExecutor(workers, f"{NAME}-{name}")
            for name, workers in {
                "prepare": 1,
                "compile": 1,
                "noise": min(4, os.cpu_count() or 1),
                "alone": 1,
                "decode": 1,
                "preview": 1,
                "fault": 1,
            }.items()
        }
        self._thread = threading.Thread(target=self._run, name=NAME, daemon=True)
        self._thread.start()

    def submit(self, order: Order) -> Ticket:
        """Put an order into the queue. Raises UserError if it is invalid, EngineFullError and EngineClosedError."""
        order.check()
        self._adapters.check(order.loras)
        grid = grid_of(np.array([1, *order.request.latent_size]))
        group = token_budget(int(grid.prod())), *(name for name, _ in order.loras)
        alone = draws_alone(order)
        with self._changed:
            if not self._accepting:
                raise EngineClosedError("the engine takes no orders any more")
            waiting = sum(entry.is_waiting for entry in self._waiting)
            if order.is_counted and waiting >= self._max_waiting:
                raise EngineFullError(f"{plural(waiting, 'order')} already waiting, expected fewer")
            ticket = Ticket(str(next(self._numbers)), order, self._position_of)
            ticket.subscribe(self._on_change)
            self._open.add(ticket)
            self._waiting.append(WaitingOrder(ticket, alone, group))
        self._wake.set()
        return ticket

    def replace_params(self, params: Params, files: Sequence[PathLike] = ()) -> concurrent.futures.Future[None]:
        """Use other parameters of the transformer, of the same structure, for the orders that come after this call.

        `files` are those that they come from, in which values that are not finite are looked for.
        Those that were submitted before are drawn with the parameters before. The future is done when that is so and
        the parameters are in use. Raises EngineClosedError.
        """
        with self._changed:
            if not self._accepting:
                raise EngineClosedError("the engine takes no orders any more")
            done = self._replacements.add(next(self._numbers), params, files)
        self._wake.set()
        return done

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more orders, and wait for those that were submitted. Return whether all are finished."""
        with self._changed:
            self._accepting = False
            return self._changed.wait_for(lambda: not self._open, timeout)

    def close(self) -> None:
        """Take no more orders, cancel those that are not finished, and end the engine's threads."""
        with self._changed:
            self._accepting, self._closing = False, True
            tickets = list(self._open)
        for ticket in tickets:
            ticket.cancel()
        self._wake.set()
        self._thread.join()
        for thread in self._threads.values():
            thread.shutdown()
        self._adapters.close()
        self._compilations.close()

    def statistics(self) -> Statistics:
        """Return what the engine does now, and did since it was made."""
        pools = self._ready_pools()
        with self._changed:
            states = collections.Counter(ticket.state for ticket in self._open)
            counts, evaluations = self._counts, self._counts["evaluations"]
            return Statistics(
                waiting=states["waiting"],
                drawing=states["drawing"],
                decoding=states["decoding"],
                slots=self._slots * len(pools),
                used_slots=sum(len(pool.used) for pool in pools),
                pools=len(pools),
                evaluations=evaluations,
                image_evaluations=counts["image_evaluations"],
                images=counts["done"],
                failed=counts["failed"],
                cancelled=counts["cancelled"],
                compilations=self._compilations.count,
                seconds_per_evaluation=self._seconds / evaluations if evaluations else 0.0,
                adapters=self._adapters.statistics(),
            )

    def _position_of(self, ticket: Ticket) -> int:
        with self._changed:
            before = itertools.takewhile(lambda entry: entry.ticket is not ticket, self._waiting)
            return sum(entry.is_waiting for entry in before)

    def _on_change(self, ticket: Ticket) -> None:
        if ticket.finished:
            with self._changed:
                if ticket in self._open:
                    self._open.remove(ticket)
                    self._counts[ticket.state] += 1
                    self._changed.notify_all()
            self._wake.set()

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return jax.set_mesh(standard(self.mesh)) if self._is_meshed else contextlib.nullcontext()

    def _beside(self, thread: str, run: Callable[..., Any], *args: Any) -> concurrent.futures.Future[Any]:
        """Run a function in one of the threads beside the loop, which looks for new work when it has finished."""

        def on_mesh() -> Any:
            with self._on_mesh():
                return run(*args)

        future = self._threads[thread].submit(on_mesh)
        future.add_done_callback(lambda _: self._wake.set())
        return future

    # The loop

    def _run(self) -> None:
        with self._on_mesh():
            while not self._is_over():
                self._wake.clear()
                try:
                    has_work = self._go_round()
                except Exception as error:  # Whatever it was, it must not leave anyone waiting.
                    self._fail_all(error)
                    has_work = False
                if not has_work and not self._is_over():
                    self._wake.wait()

    def _is_over(self) -> bool:
        return self._closing and not self._open and not self._replacements

    def _go_round(self) -> bool:
        """Start orders that wait, and one evaluation of each pool. Return whether there was one."""
        self._start_waiting()
        pools = [pool for pool in self._ready_pools() if pool.used]
        for pool in sorted(pools, key=lambda pool: min(int(own.ticket.id) for own in pool.used)):
            self._evaluate(pool)
        while not pools and self._pending:
            self._settle(*self._pending.popleft())
        return bool(pools)

    def _ready_pools(self) -> list[Pool]:
        futures = list(self._pools.values())
        return [future.result() for future in futures if future.done() and not future.exception()]

    def _start_waiting(self) -> None:
        """Prepare orders that wait, and start those for which there is room, the oldest first."""
        ahead: collections.Counter[tuple[Any, ...]] = collections.Counter()
        with self._changed:
            if self._replacements.apply(int(ticket.id) for ticket in self._open):
                self._beside("prepare", self._prepare.forget)  # after what a cancelled order has it do now
                self._adapters.forget()
            waiting = list(self._waiting)
        for entry in waiting:
            ticket, started = entry.ticket, False
            if ticket.finished:
                started = True
                self._forget(entry.prepared)
            elif int(ticket.id) > self._replacements.first:
                break
            elif entry.alone:
                started = self._alone is None and ticket.move("drawing")
                if started:
                    self._alone = ticket
                    self._beside("alone", self._draw_alone, ticket)
            elif entry.prepared is not None:
                ahead[entry.group] += 1
                started = entry.prepared.done() and self._enter(ticket, entry.prepared)
            elif ahead[entry.group] < self._slots and ahead.total() < AHEAD * self._slots:
                ahead[entry.group] += 1
                entry.prepared = self._beside("prepare", self._prepared, ticket.order)
            if started:
                with self._changed:
                    self._waiting.remove(entry)

    def _prepared(self, order: Order) -> Prepared:
        with self._turns.take():
            return self._prepare(order)

    def _enter(self, ticket: Ticket, future: concurrent.futures.Future[Prepared]) -> bool:
        """Put a prepared order into a slot if there is one. Return whether it need not wait any more."""
        try:
            prepared = future.result()
            if prepared.key not in self._pools:
                for key in release_idle(self._ready_pools()):
                    del self._pools[key]
                arguments = prepared.key, prepared, self.pipeline, self._adapters, self._slots, self._programs
                side = self._threads["noise"], self._turns
                self._pools[prepared.key] = self._beside("compile", Pool, *arguments, *side)
            made = self._pools[prepared.key]
            if not made.done():
                return False
            if made.exception() is not None:
                del self._pools[prepared.key]  # for the next order
            pool = made.result()
            if not (pool.has_room and self._adapters.enter(prepared.adapters)):
                return False
        except Exception as error:
            ticket.move("failed", error=shown_error(error, ticket))
            return True
        if not ticket.move("drawing"):
            self._forget(future)
            return True
        try:
            with self._turns.take():
                if not pool.nbytes:  # Its arrays were released; now it may be others' turn.
                    release_idle(self._ready_pools())
                pool.enter(ticket, prepared)
        except Exception as error:
            ticket.move("failed", error=shown_error(error, ticket))
            self._fail(pool, error)
        return True

    def _forget(self, prepared: concurrent.futures.Future[Prepared] | None) -> None:
        """Give back the room, or the place in the queue for it, of the adapters of an order that enters no slot."""
        if prepared is not None and prepared.done() and not prepared.exception():
            self._adapters.leave(prepared.result().adapters)

    def _evaluate(self, pool: Pool) -> None:
        """Start an evaluation, and settle those before it, so that the devices always have work."""
        for drawing in pool.used:
            if drawing.ticket.cancel_requested:
                pool.leave(drawing)
                drawing.ticket.move("cancelled")
        if not (drawings := pool.used):
            return
        started = time.monotonic()
        try:
            with self._turns.take():
                evaluated = pool.evaluate()
        except Exception as error:
            self._fail(pool, error, drawings)
            return
        self._pending.append((pool, evaluated, started))
        while len(self._pending) > 1:
            self._settle(*self._pending.popleft())

    def _settle(self, pool: Pool, evaluated: Evaluated, started: float) -> None:
        """Wait for an evaluation, and tell those whose images took part."""
        try:
            finite_b = np.asarray(evaluated.finite_b)
        except Exception as error:
            self._fail(pool, error, [drawing for drawing, _ in evaluated.drawings])
            return
        now = time.monotonic()
        self._count(now - max(started, self._settled), len(evaluated.drawings))
        self._settled = now
        for drawing, done in evaluated.drawings:
            ticket = drawing.ticket
            if ticket.finished:
                pool.leave(drawing)
            elif not finite_b[drawing.slot]:
                pool.leave(drawing)
                self._beside("fault", self._fail_not_finite, ticket, f"evaluation {done} of {drawing.total}")
            elif drawing in evaluated.points:
                ticket.report(done, drawing.total)
                ticket.move("decoding")
                self._beside("decode", self._finish, drawing, evaluated.points[drawing])
            else:
                if ticket.order.preview_due(done) and not drawing.has_preview:
                    drawing.has_preview = True
                    self._beside("preview", self._preview, pool, evaluated, drawing)
                ticket.report(done, drawing.total)

    def _count(self, seconds: float, images: int) -> None:
        with self._changed:
            self._counts["evaluations"] += 1
            self._counts["image_evaluations"] += images
            self._seconds += seconds

    def _fail(self, pool: Pool, error: Exception, drawings: Sequence[Drawing] = ()) -> None:
        """Fail the orders in a pool, whose arrays are lost."""
        failed = [*pool.used, *drawings]
        pool.reset()
        for drawing in failed:
            drawing.ticket.move("failed", error=shown_error(error, drawing.ticket))

    def _fail_all(self, error: Exception) -> None:
        for pool in self._ready_pools():
            self._fail(pool, error)
        for entry in list(self._waiting):
            entry.ticket.move("failed", error=shown_error(error, entry.ticket))

    # Beside the loop

    def _fail_not_finite(self, ticket: Ticket, where: str) -> None:
        try:
            raise self.pipeline.not_finite(where)  # which reads the model's files
        except Exception as error:
            ticket.move("failed", error=shown_error(error, ticket))

    def _finish(self, drawing: Drawing, point_lc: Any) -> None:
        ticket, prepared = drawing.ticket, drawing.prepared
        order = ticket.order
        try:
            (image,) = self.pipeline.finish(
                [prepared.latents(np.asarray(point_lc))],
                order.params,
                image=order.image,
                redrawn=prepared.redrawn,
                original=prepared.original,
            )
            ticket.move("done", image=image)
        except Exception as error:
            ticket.move("failed", error=shown_error(error, ticket))

    def _preview(self, pool: Pool, evaluated: Evaluated, drawing: Drawing) -> None:
        (latents,) = drawing.prepared.packing.unpack(np.asarray(pool.estimate(evaluated, drawing))[None])
        self._show(drawing.ticket, latents)
        drawing.has_preview = False

    def _show(self, ticket: Ticket, latents: np.ndarray) -> None:
        with contextlib.suppress(UserError):  # of values that are not finite, which the loop reports
            (preview,) = to_images(self.pipeline.decode([downsample(latents)]))
            ticket.show(preview)

    def _draw_alone(self, ticket: Ticket) -> None:
        order, last = ticket.order, time.monotonic()

        def callback(done: int, total: int, latents: Callable[[], list[np.ndarray]]) -> None:
            nonlocal last
            if ticket.cancel_requested:
                raise concurrent.futures.CancelledError
            if done > self._most:
                raise UserError(f"sampler '{order.params.sampler}': not finished after {self._most} evaluations")
            if done > ticket.done:
                self._count(time.monotonic() - last, 1)
            last = time.monotonic()
            if order.preview_due(done) and done < total:
                self._beside("preview", self._show, ticket, latents()[0])
            ticket.report(done, total)
            if done == total:
                ticket.move("decoding")
            self._turns.end()
            self._turns.begin()

        try:
            with self._turns.take():
                (image,) = self._adapters.alone(self._adapters.read(order.loras)).draw(
                    [order.request], order.params, image=order.image, mask=order.mask, callback=callback
                )
            ticket.move("done", image=image)
        except concurrent.futures.CancelledError:
            ticket.move("cancelled")
        except Exception as error:
            ticket.move("failed", error=shown_error(error, ticket))
        finally:
            self._alone = None
