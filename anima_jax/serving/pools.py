"""Pools: slots whose images share every evaluation of the network.

A pool has one program for its token budget. Images enter and leave it between two evaluations, and nothing is compiled
for that. Axes are those of `slot_program`.
"""

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from anima_jax.diffusion.guidance import Variants
from anima_jax.models import parameters
from anima_jax.models.dit import CONTEXT_ROWS
from anima_jax.models.parameters import Params
from anima_jax.models.quantised import Quantised
from anima_jax.parallel.devices import device_bytes
from anima_jax.parallel.mesh import current_mesh, replicas
from anima_jax.platform import platform
from anima_jax.sampling.pipeline import AnimaPipeline
from anima_jax.sampling.program import DEVICE_BYTES, evaluated_context, keys_fit, modulations
from anima_jax.serving import slot_program
from anima_jax.serving.adapters import MERGED, NO_ADAPTERS, OrderAdapters, OwnAdapters
from anima_jax.serving.preparation import PoolKey, Prepared
from anima_jax.serving.slot_program import LEVELS, PROMPTS, NewImage, SlotInputs
from anima_jax.serving.tickets import Ticket
from anima_jax.serving.turns import Turns

ROWS = {"cpu": (256, 4)}
OTHER_ROWS = (8192, 16)
"""Tokens of the network's batch, and its most rows: more make an evaluation of few images slower."""

KEPT_POOLS = 64
"""Pools that stay for other images of their kind; making one again compiles nothing."""

IDLE_SHARE = 8
"""Pools without images release their arrays if those of all pools take more than this part of a device's memory."""


@dataclasses.dataclass(eq=False)
class Drawing:
    """An image in a slot. `done` counts the evaluations that were started."""

    ticket: Ticket
    prepared: Prepared
    slot: int
    done: int = 0
    noises: concurrent.futures.Future[list[tuple[int, np.ndarray]]] | None = None
    """Noise arrays of the next evaluation with their places, on their way."""
    has_preview: bool = False
    """Whether a preview is on its way."""

    @property
    def total(self) -> int:
        return len(self.prepared.plan.sigmas_n)

    def next_noises(self) -> list[tuple[int, np.ndarray]]:
        """Return the host's noise for the next evaluation, packed, each with its number among the noise arrays."""
        prepared = self.prepared
        if prepared.noise.keys_b3 is not None:
            return []
        drawn = [(q, number) for q, number in enumerate(prepared.plan.draw_numbers_nq[self.done]) if number >= 0]
        draws = prepared.plan.draws
        return [(q, prepared.packing.pack(prepared.noise.step(draws[number]))[0]) for q, number in drawn]


@dataclasses.dataclass
class Evaluated:
    """An evaluation that was started: its results on the device, and the images that took part."""

    finite_b: Any
    estimate_blc: Any
    drawings: list[tuple[Drawing, int]]
    """Each with the number of its evaluations, this one included."""
    points: dict[Drawing, Any]
    """Points of the images for which this was the last evaluation."""


class Pool:
    """The slots for one kind of image. It is used by one thread at a time.

    Making one compiles its programs, unless `programs` has them already: those of a pool with other adapters or control
    networks of the same sizes.
    """

    def __init__(
        self,
        key: PoolKey,
        example: Prepared,
        pipeline: AnimaPipeline,
        adapters: OrderAdapters,
        slots: int,
        programs: dict[Any, dict[str, Any]],
        side: Any,
        turns: Turns,
    ):
        self.last_used = time.monotonic()
        self.key, self._pipeline, self._adapters, self._side = key, pipeline, adapters, side
        self.drawings: list[Drawing | None] = [None] * slots
        self.rows_at_once = rows_at_once(key.tokens, slots)
        self._lengths = None if key.context <= CONTEXT_ROWS else np.zeros(PROMPTS * slots, np.int32)
        self._as_keys = keys_fit(pipeline.dit_params, PROMPTS * slots, key.context, pipeline.dtype)
        self._take_networks(example)
        with turns.take():
            # The example's adapters have no room yet; others have the same sizes.
            new, levels = self._new(example, NO_ADAPTERS), self._levels(example, 0, NO_ADAPTERS)
        shapes = jax.eval_shape(lambda: (new, levels))
        empty = functools.partial(slot_program.empty, *shapes, slots, key.carried)
        # Merged parameters are those of the transformer in other values.
        kind = key._replace(adapters=None if key.adapters == MERGED else key.adapters, controls=self._graphdefs)
        if (known := programs.get(kind)) is None:
            known = {"empty": jax.jit(empty).lower().compile()}
        self._empty = known["empty"]
        self._carry: Any
        self._stored: Any
        self._carry, self._stored = self._empty()
        self._silence = jax.numpy.zeros((key.draws, *self._carry.momentum_blc.shape), np.float32)
        slot = np.int32(0)
        params, graphdef = self._network([NO_ADAPTERS] * slots)
        options = {
            "graphdef": graphdef,
            "network_graphdefs": self._graphdefs,
            "dtype": pipeline.dtype,
            "rows_at_once": self.rows_at_once,
            "zero_context": CONTEXT_ROWS - key.context if key.context < CONTEXT_ROWS else 0,
        }
        arguments: dict[str, Any] = {
            "evaluate": (params, self._carry, self._stored, self._inputs([]), self._silence, self._networks),
            "enter": (self._carry, self._stored, new, slot),
            "put_levels": (self._stored.modulations, levels, slot),
            "taken": (self._carry.momentum_blc, slot),
        }
        for name in arguments.keys() - known.keys():
            own = options if name == "evaluate" else {}
            known[name] = slot_program.program(name).lower(*arguments[name], **own).compile()
        programs[kind] = known
        self._enter, self._put_levels, self._taken = (known[name] for name in ("enter", "put_levels", "taken"))
        self._evaluate = known["evaluate"]
        if key.adapters == MERGED and any(isinstance(value, Quantised) for value in params.values()):
            # Merging dequantises some parameters, which ones depends on the adapters.
            self._evaluate = functools.partial(slot_program.program("evaluate"), **options)

    @property
    def used(self) -> list[Drawing]:
        """The images in the slots."""
        return [drawing for drawing in self.drawings if drawing is not None]

    @property
    def has_room(self) -> bool:
        """Whether a slot is free."""
        return None in self.drawings

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays of all slots and of the control networks."""
        arrays = jax.tree.leaves((self._carry, self._stored, self._networks))
        return sum(leaf.nbytes for leaf in arrays if not leaf.is_deleted())

    def reset(self) -> None:
        """Forget all images and release the arrays, which may be lost after an error."""
        for drawing in self.used:
            self.leave(drawing)
        self._carry = self._stored = None
        self._networks = ()

    def enter(self, ticket: Ticket, prepared: Prepared) -> Drawing:
        """Put an image into a free slot."""
        self.last_used = time.monotonic()
        drawing = Drawing(ticket, prepared, self.drawings.index(None))
        self.drawings[drawing.slot] = drawing
        if self._carry is None:
            self._carry, self._stored = self._empty()
            self._take_networks(prepared)
        if self._lengths is not None and prepared.lengths_p is not None:
            self._lengths[PROMPTS * drawing.slot :][:PROMPTS] = prepared.lengths_p
        new, slot = self._new(prepared, prepared.adapters), np.int32(drawing.slot)
        self._carry, self._stored = self._enter(self._carry, self._stored, new, slot)
        drawing.noises = self._side.submit(drawing.next_noises)
        return drawing

    def leave(self, drawing: Drawing) -> None:
        """Free the slot of an image, and the room of its adapters, if it still has it."""
        if self.drawings[drawing.slot] is drawing:
            self.drawings[drawing.slot] = None
            self._adapters.leave(drawing.prepared.adapters)

    def evaluate(self) -> Evaluated:
        """Start one evaluation of all images. Those for which it is the last one leave their slots."""
        drawings = self.used
        for drawing in drawings:
            if drawing.done % LEVELS == 0:
                own = drawing.prepared
                levels, slot = self._levels(own, drawing.done, own.adapters), np.int32(drawing.slot)
                put = self._put_levels(self._stored.modulations, levels, slot)
                self._stored = self._stored._replace(modulations=put)
        params, _ = self._network([own.prepared.adapters if own else NO_ADAPTERS for own in self.drawings])
        inputs, noises = self._inputs(drawings), self._noises(drawings)
        self._carry, estimate_blc, finite_b = self._evaluate(
            params, self._carry, self._stored, inputs, noises, self._networks
        )
        points: dict[Drawing, Any] = {}
        for drawing in drawings:
            drawing.done += 1
            if drawing.done < drawing.total:
                drawing.noises = self._side.submit(drawing.next_noises)
            else:
                points[drawing] = self._taken(self._carry.arrays[0], np.int32(drawing.slot))
                self.leave(drawing)
        return Evaluated(finite_b, estimate_blc, [(drawing, drawing.done) for drawing in drawings], points)

    def estimate(self, evaluated: Evaluated, drawing: Drawing) -> Any:
        """Return the clean estimate (l, c) of an image. For any thread."""
        return self._taken(evaluated.estimate_blc, np.int32(drawing.slot))

    def _network(self, rows: Sequence[OwnAdapters]) -> tuple[Params, Any]:
        """Return parameters and structure of the transformer for a batch with these adapters in its rows."""
        return self._adapters.network(self.key.adapters, rows)

    def _take_networks(self, prepared: Prepared) -> None:
        """Take over the control networks of an image."""
        split = [parameters.split(own.network) for own in prepared.controls]
        self._graphdefs, self._networks = tuple(one for one, _ in split), tuple(params for _, params in split)

    def _new(self, prepared: Prepared, adapters: OwnAdapters) -> NewImage:
        params, graphdef = self._network([adapters])
        context = evaluated_context(
            params,
            prepared.context,
            graphdef=graphdef,
            dtype=self._pipeline.dtype,
            left_out=0,
            rows=self.key.context,
            as_keys=self._as_keys,
        )
        embeddings = tuple(own.embedding_ble[0] for own in prepared.controls)
        return NewImage(prepared.start_lc, prepared.inpaint, context, embeddings)

    def _levels(self, prepared: Prepared, first: int, adapters: OwnAdapters) -> Any:
        sigmas_n = prepared.plan.sigmas_n[first : first + LEVELS]
        padded_n = np.pad(sigmas_n, (0, LEVELS - len(sigmas_n)), mode="edge")
        params, graphdef = self._network([adapters])
        return modulations(params, padded_n, graphdef=graphdef)

    def _noises(self, drawings: Iterable[Drawing]) -> Any:
        """Return the host's noise for the next evaluation."""
        drawn = [
            (q, drawing.slot, noise_lc)
            for drawing in drawings
            if drawing.noises is not None
            for q, noise_lc in drawing.noises.result()
        ]
        if not drawn:
            return self._silence
        noises_qblc = np.zeros(self._silence.shape, np.float32)
        for q, slot, noise_lc in drawn:
            noises_qblc[q, slot] = noise_lc
        return noises_qblc

    def _inputs(self, drawings: Iterable[Drawing]) -> SlotInputs:
        """Return the numbers of the images' next evaluations."""
        slots, key = len(self.drawings), self.key
        rows = -(-PROMPTS * slots // self.rows_at_once) * self.rows_at_once
        # Sizes of at least 1: positions of tokens are remainders.
        inputs = SlotInputs(
            size_b3=np.ones((slots, 3), np.int32),
            sigma_b=np.zeros(slots, np.float32),
            scale_b=np.ones(slots, np.float32),
            restart_b=np.zeros(slots, np.bool_),
            number_b=np.zeros(slots, np.int32),
            factors_kjb=np.zeros((key.carried, key.carried + 2 + key.draws, slots), np.float32),
            variants=Variants(*(np.full(slots, off, np.bool_ if off is False else np.float32) for off in Variants())),
            draw_qb=np.full((key.draws, slots), -1, np.int32),
            keys_b3=np.zeros((slots, 3), np.uint32),
            on_device_b=np.zeros(slots, np.bool_),
            lengths_p=self._lengths if self._lengths is None else self._lengths.copy(),
            strength_xb=np.zeros((len(key.controls), slots), np.float32),
            slot_r=np.zeros(rows, np.int32),
            prompt_r=np.zeros(rows, np.int32),
            negative_b=np.zeros(slots, np.int32),
            positive_b=np.zeros(slots, np.int32),
            chunks=np.zeros((), np.int32),
        )
        used = 0
        for drawing in drawings:
            b, n, prepared = drawing.slot, drawing.done, drawing.prepared
            inputs.size_b3[b] = prepared.packing.size_b3[0]
            inputs.sigma_b[b], inputs.scale_b[b] = prepared.plan.sigmas_n[n], prepared.scale_n[n]
            inputs.restart_b[b], inputs.number_b[b] = prepared.rising_n[n], n
            inputs.factors_kjb[..., b] = prepared.factors_nkj[n]
            # Without the negative prompt there is nothing to project.
            own = prepared.variants._replace(apg=prepared.variants.apg and bool(prepared.guided_n[n]))
            for array, value in zip(inputs.variants, own, strict=True):
                array[b] = value
            if prepared.noise.keys_b3 is not None:
                inputs.draw_qb[: prepared.plan.draw_numbers_nq.shape[1], b] = prepared.plan.draw_numbers_nq[n]
                inputs.keys_b3[b], inputs.on_device_b[b] = prepared.noise.keys_b3[0], True
            for x, control in enumerate(prepared.controls):
                is_active = control.end_b[0] < inputs.sigma_b[b] <= control.start_b[0]
                inputs.strength_xb[x, b] = control.strength_b[0] if is_active else 0.0
            prompts = [PROMPTS * b, PROMPTS * b + 1][0 if prepared.guided_n[n] else 1 :]
            last = used + len(prompts)
            inputs.slot_r[used:last], inputs.prompt_r[used:last] = b, prompts
            inputs.negative_b[b], inputs.positive_b[b], used = used, last - 1, last
        return inputs._replace(chunks=np.array(-(-used // self.rows_at_once), np.int32))


def rows_at_once(tokens: int, slots: int) -> int:
    """Return the rows of the network's batch for a token budget: a multiple of the devices that share a batch.

    It is a power of two otherwise, at least two, because an image with guidance has two rows.
    """
    budget, most = ROWS.get(platform(), OTHER_ROWS)
    rows = PROMPTS
    while 2 * rows <= min(most, PROMPTS * slots, budget // tokens):
        rows *= 2
    devices = replicas(current_mesh().shape)
    return -(-rows // devices) * devices


def release_idle(pools: Iterable[Pool]) -> list[PoolKey]:
    """Release arrays of pools without images if those of all pools take much memory.

    Return the keys of those that can be forgotten, so that another pool is one of at most `KEPT_POOLS`.
    """
    pools = sorted(pools, key=lambda pool: pool.last_used)
    limit = (device_bytes(jax.local_devices()[0]) or DEVICE_BYTES) // IDLE_SHARE
    for pool in pools:
        if sum(own.nbytes for own in pools) > limit and not pool.used:
            pool.reset()
    idle = [pool.key for pool in pools if not pool.used]
    return idle[: max(0, len(pools) + 1 - KEPT_POOLS)]
