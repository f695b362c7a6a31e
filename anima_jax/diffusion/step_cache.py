"""Step caching: evaluations of the network that are replaced by what an earlier evaluation computed.

`easy` is ComfyUI's node EasyCache (comfy_extras/nodes_easycache.py; EasyCache is arXiv 2507.02860): how much the
velocity changes is predicted from how much the point changed, and the network runs again once the sum of predicted
changes reaches the threshold. `first_block` is First Block Cache (ParaAttention, src/para_attn/first_block_cache;
diffusers and Comfy-WaveSpeed have it too): the first block always runs, and the others only if what it adds changed by
the threshold or more, relative to their last run.

Every image of a batch has its own decision, so that it does not depend on the others. The network runs if any image
needs it; the others keep their cached values.
Axes: p the negative prompt and the prompt, or only the prompt; b images, l image tokens, c the values of a token,
d width; r the rows of a batch of the network, those of the negative prompts first.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from anima_jax.diffusion.schedules import percent_to_sigma
from anima_jax.errors import UserError, did_you_mean, show_value

PROMPTS = 2
OFF = "off"


class Limits(NamedTuple):
    """What decides whether cached values are used: the threshold, and the noise levels from and down to which."""

    threshold: Any
    start: Any
    end: Any


class EasyState(NamedTuple):
    """What `easy` remembers: points and velocities of each prompt's last run, and the statistics of each image.

    NaN is a statistic that is not known yet, which makes the network run. `first` is the prompt that is compared: the
    first that was evaluated in the interval (0 negative, 1 positive, −1 none yet).
    """

    points_pblc: Any
    velocities_pblc: Any
    norm_b: Any
    rate_b: Any
    change_b: Any
    known_p: Any
    first: Any
    saved: Any


class FirstBlockState(NamedTuple):
    """What `first_block` remembers of each prompt's last run: what the first block added, and what the others did."""

    first_rld: Any
    rest_rld: Any
    known_p: Any
    saved: Any


State = EasyState | FirstBlockState


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of `METHODS`: the default threshold, and the default interval in fractions of the sampling."""

    threshold: float
    interval: tuple[float, float]


METHODS = {"easy": Method(0.2, (0.15, 0.95)), "first_block": Method(0.1, (0.0, 1.0))}
"""The defaults of `easy` are those of ComfyUI's node; the threshold of `first_block` is from 0.05 to 0.12 elsewhere."""


@dataclasses.dataclass(frozen=True)
class StepCache:
    """A method with its threshold and interval."""

    method: str
    threshold: float
    interval: tuple[float, float]

    @classmethod
    def parse(cls, text: str | None, interval: tuple[float, float] | None = None) -> "StepCache | None":
        """Return the cache that `METHOD[:THRESHOLD]` names; None for None and "off".

        Raises UserError for an unknown method and for a threshold that is not a finite number above 0.
        """
        if text is None or text == OFF:
            return None
        name, colon, number = text.partition(":")
        if name not in METHODS:
            names = [OFF, *METHODS]
            found = f"cache '{show_value(name)}', expected one of {', '.join(names)}, as in easy:0.2"
            raise UserError(found + did_you_mean(name, names))
        method = METHODS[name]
        try:
            threshold = float(number) if colon else method.threshold
        except ValueError:
            threshold = math.nan
        if not 0 < threshold < math.inf:
            raise UserError(f"cache '{show_value(text)}': threshold '{show_value(number)}', expected a number above 0")
        return cls(name, threshold, method.interval if interval is None else interval)

    def __str__(self) -> str:
        return f"{self.method}:{self.threshold:g}"

    def limits(self, shift: float) -> Limits:
        """Return threshold and levels, float32."""
        start, end = (percent_to_sigma(fraction, shift) for fraction in self.interval)
        return Limits(*map(np.float32, (self.threshold, start, end)))

    def initial(self, shape_blc: tuple[int, int, int], stream_rld: tuple[int, int, int], dtype: Any) -> State:
        """Return the state before the first evaluation, on the host; arrays of zeros take no memory there.

        `stream_rld` and `dtype` are the shape of the residual stream, with both kinds of prompts, and its dtype.
        """
        known_p, saved = np.zeros(PROMPTS, bool), np.zeros((), np.int32)
        if self.method == "first_block":
            zeros_rld = np.broadcast_to(np.zeros((), dtype), stream_rld)
            return FirstBlockState(zeros_rld, zeros_rld, known_p, saved)
        zeros_pblc = np.broadcast_to(np.float32(0.0), (PROMPTS, *shape_blc))
        unknown_b, change_b = np.full(shape_blc[0], np.nan, np.float32), np.zeros(shape_blc[0], np.float32)
        return EasyState(zeros_pblc, zeros_pblc, unknown_b, unknown_b, change_b, known_p, np.int32(-1), saved)


@dataclasses.dataclass
class Savings:
    """How many evaluations a pipeline's samplings with a cache had, and for how many the network did not run."""

    evaluations: int = 0
    saved: int = 0

    def add(self, state: State | None, evaluations: int) -> None:
        """Add a sampling that ended with this state; nothing if it had no cache."""
        if state is not None:
            self.evaluations += evaluations
            self.saved += int(state.saved)

    def __str__(self) -> str:
        return f"{self.saved} of {self.evaluations} evaluations saved"


def evaluate_easy(
    state: EasyState,
    limits: Limits,
    sigma: Array,
    x_blc: Array,
    compared_blc: Array,
    real_blc: Array,
    run: Callable[[], Array],
    prompts: int,
) -> tuple[Array, EasyState]:
    """Return the velocities (p · b, l, c) at `x_blc`, of `run()` or of the cache, and the next state.

    `compared_blc` are the values that are compared, `real_blc` those that are not padding. With `prompts` 1 only the
    prompt is evaluated. Before the interval, velocities are only remembered; after it, nothing is.
    """
    own = slice(PROMPTS - prompts, PROMPTS)
    points_pblc, velocities_pblc = state.points_pblc[own], state.velocities_pblc[own]
    started, is_over = sigma <= limits.start, ~(sigma > limits.end)
    first = jnp.where((state.first < 0) & started & ~is_over, own.start, state.first)
    # Without the prompt that was the first to be evaluated there is nothing to compare, in ComfyUI as here.
    compares = (first >= own.start) & ~is_over
    index = jnp.maximum(first, own.start)
    input_change_b = _mean(x_blc - state.points_pblc[index], compared_blc)
    change_b = state.change_b + state.rate_b * input_change_b / state.norm_b
    reused_b = compares & started & (change_b < limits.threshold) & jnp.all(state.known_p[own])

    saves = jnp.all(reused_b)
    shape_pblc = velocities_pblc.shape
    computed_pblc = jax.lax.cond(saves, lambda: jnp.zeros(shape_pblc), lambda: run().reshape(shape_pblc))
    reused_b11 = reused_b[:, None, None]
    new_pblc = jnp.where(reused_b11, x_blc + (velocities_pblc - points_pblc), computed_pblc)

    stored_b = ~reused_b & ~is_over
    stored_b11 = stored_b[:, None, None]
    output_change_b = _mean(new_pblc[index - own.start] - state.velocities_pblc[index], compared_blc)
    measured_b = stored_b & compares & started & ~jnp.isnan(state.norm_b)
    return new_pblc.reshape(-1, *shape_pblc[2:]), EasyState(
        state.points_pblc.at[own].set(jnp.where(stored_b11, x_blc, points_pblc)),
        state.velocities_pblc.at[own].set(jnp.where(stored_b11, new_pblc, velocities_pblc)),
        jnp.where(stored_b & compares, jnp.mean(jax.vmap(_mean, (0, None))(new_pblc, real_blc), 0), state.norm_b),
        jnp.where(measured_b, output_change_b / input_change_b, state.rate_b),
        jnp.where(compares & started, jnp.where(reused_b, change_b, 0.0), state.change_b),
        state.known_p.at[own].set(state.known_p[own] | ~is_over),
        first,
        state.saved + saves,
    )


def run_after_first(
    state: FirstBlockState,
    limits: Limits,
    sigma: Array,
    before_rld: Array,
    after_rld: Array,
    real_rl: Array,
    image_r: Array,
    images: int,
    run: Callable[[Array], Array],
) -> tuple[Array, FirstBlockState]:
    """Return the residual stream after all blocks, and the next state.

    `before_rld` and `after_rld` are the stream before and after the first block, `run` returns the stream after the
    other blocks, `real_rl` is false at padding tokens, and `image_r` is the image of each row.
    """
    negatives = len(state.first_rld) - len(after_rld)  # that are not evaluated
    rows, own = slice(negatives, None), slice(1 if negatives else 0, PROMPTS)
    first_rld, rest_rld, added_rld = state.first_rld[rows], state.rest_rld[rows], after_rld - before_rld
    is_own_rb = image_r[:, None] == jnp.arange(images)

    def total_b(x_rld: Array) -> Array:
        sizes_rld = jnp.where(real_rl[..., None], jnp.abs(x_rld.astype(jnp.float32)), 0.0)
        return jnp.sum(jnp.where(is_own_rb, jnp.sum(sizes_rld, (1, 2))[:, None], 0.0), 0)

    changed_b = total_b(added_rld.astype(jnp.float32) - first_rld) / total_b(first_rld)
    in_interval = (sigma <= limits.start) & (sigma > limits.end)
    reused_b = in_interval & (changed_b < limits.threshold) & jnp.all(state.known_p[own])
    saves = jnp.all(reused_b)
    out_rld = jax.lax.cond(saves, jnp.zeros_like, run, after_rld)
    reused_r11 = reused_b[image_r][:, None, None]
    next_state = FirstBlockState(
        state.first_rld.at[rows].set(jnp.where(reused_r11, first_rld, added_rld)),
        state.rest_rld.at[rows].set(jnp.where(reused_r11, rest_rld, out_rld - after_rld)),
        state.known_p.at[own].set(True),
        state.saved + saves,
    )
    return jnp.where(reused_r11, after_rld + rest_rld, out_rld), next_state


def _mean(x_blc: Array, where_blc: Array) -> Array:
    """Return each image's mean size of the values where the mask is true, (b,)."""
    return jnp.sum(jnp.where(where_blc, jnp.abs(x_blc), 0.0), (1, 2)) / jnp.sum(where_blc, (1, 2))
