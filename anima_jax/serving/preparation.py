"""What is done for an order before it enters a slot, beside the evaluations of others: text, noise, plan and mask."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np

from anima_jax.diffusion import samplers
from anima_jax.diffusion.guidance import Variants
from anima_jax.diffusion.samplers.plan import SamplerPlan
from anima_jax.models.dit import CONTEXT_ROWS, OUT_CHANNELS
from anima_jax.sampling import plans
from anima_jax.sampling.context import Context, join_contexts
from anima_jax.sampling.control_networks import ControlInputs, ControlNetworks, network_key
from anima_jax.sampling.controls import Control
from anima_jax.sampling.evaluation import InpaintMask
from anima_jax.sampling.images import latent_mask, mask_values, to_pixels
from anima_jax.sampling.noise import BatchNoise
from anima_jax.sampling.packing import TokenPacking
from anima_jax.sampling.pipeline import AnimaPipeline
from anima_jax.sampling.program import SHORT_CONTEXT, used_rows
from anima_jax.serving.adapters import OrderAdapters, OwnAdapters
from anima_jax.serving.orders import Order
from anima_jax.serving.tickets import Ticket

CACHE_BYTES = 2**28
"""Memory for the context rows of prompts that were used before: 256 prompts of the released model in bfloat16."""

CARRIED = 8
"""Arrays that a pool carries between evaluations. Samplers that need more have pools of their own."""


class PoolKey(NamedTuple):
    """What a pool is for. It follows from the order alone, so that an image is always drawn by the same program."""

    tokens: int
    """Token budget of an image."""
    context: int
    """Context rows of a prompt that are stored; there are `CONTEXT_ROWS` with those that are zero."""
    carried: int
    draws: int
    """Noise arrays of an evaluation."""
    adapters: str | None = None
    """`OwnAdapters.pool` of the images."""
    controls: tuple[Any, ...] = ()
    """Keys of the control networks that steer the images, in order."""


@dataclasses.dataclass
class Prepared:
    """An order with all that its evaluations need; arrays with n have one entry for each of them."""

    order: Order
    key: PoolKey
    plan: SamplerPlan
    factors_nkj: np.ndarray
    """The plan's factors, with zeros for the arrays that the pool has and the sampler does not need."""
    scale_n: np.ndarray
    rising_n: np.ndarray
    guided_n: np.ndarray
    """Whether the negative prompt is evaluated."""
    variants: Variants
    packing: TokenPacking
    start_lc: np.ndarray
    inpaint: InpaintMask
    context: Context
    """Rows (2, n, d) of the negative prompt and the prompt."""
    lengths_p: np.ndarray | None
    noise: BatchNoise
    sigmas: np.ndarray
    original: np.ndarray
    mask: np.ndarray | None
    redrawn: np.ndarray | None
    adapters: OwnAdapters
    controls: tuple[ControlInputs, ...]
    """The control networks with their embeddings (1, l, e), strengths and levels."""

    def latents(self, point_lc: np.ndarray) -> np.ndarray:
        """Return the clean latents (t, y, x, c) after the last evaluation."""
        latents = self.packing.unpack(point_lc[None])
        return plans.completed(latents, [self.original], self.mask, self.order.params, self.sigmas)[0]


@dataclasses.dataclass(eq=False)
class WaitingOrder:
    """An order that waits."""

    ticket: Ticket
    alone: bool
    group: tuple[Any, ...]
    """Token budget and names of adapters."""
    prepared: Future[Prepared] | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether it is in front of others in the queue."""
        return self.ticket.order.is_counted and self.ticket.state == "waiting"


def draws_alone(order: Order) -> bool:
    """Return whether an order is drawn by `AnimaPipeline` instead of in a slot.

    So are samplers that choose their steps as they go, step caches, and images whose rows depend on each other or are
    longer than the image; and what needs no evaluation.
    """
    request, params = order.request, order.params
    return bool(
        request.references
        or request.regions
        or params.step_cache
        or params.denoise == 0
        or samplers.SAMPLERS[params.sampler].controller
        or not len(params.levels())
    )


class Preparer:
    """Prepares orders for the slots of a pipeline. It is used by one thread."""

    def __init__(self, pipeline: AnimaPipeline, adapters: OrderAdapters, cache_bytes: int = CACHE_BYTES):
        self._pipeline, self._adapters, self._cache_bytes = pipeline, adapters, cache_bytes
        self._contexts: collections.OrderedDict[Any, tuple[Context, int]] = collections.OrderedDict()
        self._controls = ControlNetworks(pipeline.config, pipeline.dtype)

    def __call__(self, order: Order) -> Prepared:
        """Return the prepared order. Raises UserError for what only shows here, such as a sampler's options."""
        request, params = order.request, order.params
        sampler, sigmas = samplers.SAMPLERS[params.sampler], params.levels()
        noise = BatchNoise([request], params.noise, sampler, sigmas, add_noise=params.add_noise)
        plan = plans.plan_of(params, sigmas, noise_on_device=noise.keys_b3 is not None)
        scale_n = plans.scale_of(params, plan.sigmas_n)
        guided_n = (scale_n != 1.0) | plan.both
        own = self._adapters.read(order.loras)
        prompts = params.negative_prompt if guided_n.any() else request.prompt, request.prompt
        context, rows = self._context(own, prompts)
        redrawn = None if order.mask is None else mask_values(order.mask)
        mask = None if redrawn is None else latent_mask(redrawn)
        original = np.zeros((1, *request.latent_size, OUT_CHANNELS), np.float32)
        if order.image is not None:
            original = self._pipeline.encode_image(to_pixels(order.image), params.tile)
        packing = TokenPacking([original.shape[:3]])
        blank = np.zeros_like(original)
        kept = [np.ones_like(original), blank, blank]
        if mask is not None:
            kept = [np.broadcast_to(mask, original.shape), original, noise.outside_mask[0]]
        _, carried, _ = plan.factors_nkj.shape
        draws = _class(plan.draw_numbers_nq.shape[1], 1)
        networks = tuple(map(network_key, request.controls))
        key = PoolKey(packing.length, rows, _class(carried, CARRIED), draws, own.pool, networks)
        controls = self._steering(request.controls, packing, params.shift)
        return Prepared(
            order,
            key,
            plan,
            _widened(plan, key),
            scale_n,
            np.diff(plan.sigmas_n, prepend=-np.inf) > 0,
            guided_n,
            params.variants,
            packing,
            packing.pack([samplers.start(noise.start[0], sigmas[0], original)])[0],
            InpaintMask(*(packing.pack([array])[0] for array in kept)),
            context._replace(lengths_b=None),
            context.lengths_b,
            noise,
            sigmas,
            original,
            mask,
            redrawn,
            own,
            controls,
        )

    def forget(self) -> None:
        """Forget the context rows of all prompts, which other parameters of the transformer make invalid."""
        self._contexts.clear()

    def _steering(self, controls: Sequence[Control], packing: TokenPacking, shift: float) -> tuple[ControlInputs, ...]:
        """Return the control networks of an image; strengths and levels are on the host."""
        found = self._controls.inputs([controls], packing.size_b3, packing.length, shift) if controls else ()
        return tuple(ControlInputs(*own[:2], *map(np.asarray, own[2:])) for own in found)

    def _context(self, own: OwnAdapters, prompts: Iterable[str]) -> tuple[Context, int]:
        """Return the context of an image's prompts, and how many of its rows are stored."""
        contexts: list[Context] = []
        most = 0
        for prompt in prompts:
            key = prompt, own.prompts_key
            if key not in self._contexts:
                context = self._adapters.encoder(own).encode([prompt])
                self._contexts[key] = context, int(used_rows(context.rows_bnd))
            self._contexts.move_to_end(key)
            context, used = self._contexts[key]
            contexts.append(context)
            most = max(most, used)
        while len(self._contexts) > 1 and self._cached_bytes() > self._cache_bytes:
            self._contexts.popitem(last=False)
        # Few sizes: each has programs of its own.
        rows = _class(max(context.rows_bnd.shape[1] for context in contexts), CONTEXT_ROWS)
        is_short = rows == CONTEXT_ROWS and most <= SHORT_CONTEXT
        return join_contexts(*contexts, least=rows), SHORT_CONTEXT if is_short else rows

    def _cached_bytes(self) -> int:
        return sum(context.rows_bnd.nbytes for context, _ in self._contexts.values())


def _class(size: int, least: int) -> int:
    """Return the smallest of `least`, 2 · `least`, 4 · `least`, … that is not smaller than `size`."""
    while least < size:
        least *= 2
    return least


def _widened(plan: SamplerPlan, key: PoolKey) -> np.ndarray:
    """Return the plan's factors (n, k, j) for as many arrays as the pool has."""
    count, carried, _ = plan.factors_nkj.shape
    factors_nkj = np.zeros((count, key.carried, key.carried + 2 + key.draws), np.float32)
    drawn = plan.draw_numbers_nq.shape[1]
    # Carried arrays, the estimate, the negative prompt's estimate, noise.
    columns = [*range(carried), key.carried, *([key.carried + 1] if plan.both else [])]
    columns += [key.carried + 2 + number for number in range(drawn)]
    factors_nkj[:, :carried, columns] = plan.factors_nkj
    return factors_nkj
