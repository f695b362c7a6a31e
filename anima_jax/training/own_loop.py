"""Training in Python, with one's own arrays and one's own loop: a data set in memory and the trainer's step.

docs/python.md shows how they are used. Noise, times and the order of the examples follow from the seed, as in a run of
`anima_jax.train`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from anima_jax.adapters import modules
from anima_jax.config.sizes import FRAMES_PER_LATENT, PIXEL_MULTIPLE, Size
from anima_jax.data.buckets import Bucket
from anima_jax.data.encoders import caption_encoder, clip_encoder
from anima_jax.diffusion.objective import TimeDistribution
from anima_jax.diffusion.randomness import split_ids
from anima_jax.errors import UserError, suggests_names
from anima_jax.models.dit import OUT_CHANNELS, PATCH, REMAT_POLICIES, AnimaDiT
from anima_jax.models.parameters import Params, cast_to_compute, merge, split
from anima_jax.models.qwen3 import Qwen3
from anima_jax.models.wan_vae import WanVAE
from anima_jax.parallel.mesh import current_mesh, shard_batch, standard_mesh
from anima_jax.parallel.rules import shardings
from anima_jax.text.states import EncodedText, padded, rounded_up, text_rows
from anima_jax.text.tokenizers import Tokenizers, load_tokenizers
from anima_jax.training.step import Metrics, StepConfig, TrainBatch, TrainState, compile_step, init_state

LATENT_FEATURES = PATCH * PATCH * OUT_CHANNELS


class ArrayDataset:
    """Images and captions in memory, encoded: an iterator of batches for `make_train_step`.

    `latents` are tokens (l, 64) of each example, as `clip_encoder` returns them, `grids` its (frames, rows, columns) of
    patches, `texts` its encoded captions. Examples may differ in size; each is padded to the largest, so that one
    program serves all batches. Raises UserError unless they fit together.
    """

    def __init__(
        self, latents: Sequence[np.ndarray], grids: Sequence[tuple[int, int, int]], texts: Sequence[EncodedText]
    ):
        if not len(latents) == len(grids) == len(texts) or not latents:
            sizes = f"{len(latents)} latents, {len(grids)} grids, {len(texts)} captions"
            raise UserError(f"{sizes}: expected one of each for every example, and at least one example")
        for number, (tokens_lc, grid) in enumerate(zip(latents, grids, strict=True)):
            if tokens_lc.shape != (int(np.prod(grid)), LATENT_FEATURES):
                raise UserError(f"example {number}: latents {tokens_lc.shape} for a grid of {grid}")
        self._latents, self._grids, self._texts = list(latents), np.array(grids, np.int32), list(texts)
        self._tokens = max(map(len, latents))
        self._lengths = [rounded_up(max(len(text[part]) for text in texts)) for part in (0, 1)]

    @classmethod
    @suggests_names
    def from_images(
        cls,
        images: Iterable[Any],
        captions: Iterable[str],
        *,
        references: Iterable[Sequence[Any]] | None = None,
        vae: WanVAE,
        text_encoder: Qwen3,
        tokenizers: Tokenizers | None = None,
        dtype: DTypeLike = jnp.bfloat16,
    ) -> "ArrayDataset":
        """Encode images and captions, each once.

        An image is a PIL image or an array (y, x, 3), uint8 or floating-point numbers in [0, 1]; a video has a first
        axis of frames, 4n + 1 of them. Sides are multiples of 16. `references` are the reference pictures of each
        image, of its size, for `make_train_step(…, edit=True)`. `tokenizers` None are the package's. `dtype` is the
        compute dtype of the networks. Raises UserError for an image of another form and unequal numbers.
        """
        clips = [_clip(image, number) for number, image in enumerate(images)]
        texts = [str(caption) for caption in captions]
        others = [list(each) for each in references] if references is not None else [[] for _ in clips]
        if not len(clips) == len(texts) == len(others):
            besides = f" and references of {len(others)}" if references is not None else ""
            raise UserError(f"{len(clips)} images and {len(texts)} captions{besides}, expected as many")
        encode_clips = clip_encoder(vae, dtype=dtype)
        frames = [
            [clip, *_references(clip, own, number)]
            for number, (clip, own) in enumerate(zip(clips, others, strict=True))
        ]
        latents: list[list[np.ndarray]] = [[] for _ in clips]
        for shape in sorted({clip.shape for clip in clips}):
            rows = [row for row, clip in enumerate(clips) for _ in frames[row] if clip.shape == shape]
            of_shape = (frame for clip, own in zip(clips, frames, strict=True) for frame in own if clip.shape == shape)
            for row, tokens_lc in zip(rows, encode_clips(of_shape), strict=True):
                latents[row].append(tokens_lc)
        encode_captions = caption_encoder(text_encoder, tokenizers or load_tokenizers(), dtype=dtype)
        sizes = [Size(clip.shape[2], clip.shape[1], len(clip)) for clip in clips]
        grids = [Bucket(size, None, len(own) - 1).grid for size, own in zip(sizes, frames, strict=True)]
        return cls(list(map(np.concatenate, latents)), grids, list(encode_captions(texts)))

    def __len__(self) -> int:
        return len(self._latents)

    @suggests_names
    def batches(self, batch_size: int, *, steps: int | None = None, seed: int = 0) -> Iterator[TrainBatch]:
        """Yield batches of `batch_size` examples, without end or `steps` of them, each epoch in another order.

        Examples that do not fill a batch at the end of an epoch are in the next batch with those of the next epoch.
        Raises UserError unless the batch size is at least 1.
        """
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}, expected at least 1")
        return self._batches(batch_size, steps, seed)

    def _batches(self, batch_size: int, steps: int | None, seed: int) -> Iterator[TrainBatch]:
        orders: dict[int, np.ndarray] = {}
        step = 0
        while steps is None or step < steps:
            places = np.arange(step * batch_size, (step + 1) * batch_size)
            epochs = places // len(self)
            for epoch in set(epochs.tolist()) - set(orders):
                orders = {old: order for old, order in orders.items() if old >= epochs[0]}
                orders[epoch] = np.random.default_rng([seed, epoch]).permutation(len(self))
            rows = [int(orders[int(epoch)][place % len(self)]) for epoch, place in zip(epochs, places, strict=True)]
            yield TrainBatch(
                latents_blc=padded([self._latents[row] for row in rows], self._tokens)[0],
                grid_b3=self._grids[rows],
                ids_b2=split_ids(np.array(rows)),
                epochs_b=epochs.astype(np.int32),
                text=text_rows([self._texts[row] for row in rows], *self._lengths),
            )
            step += 1


def _clip(image: Any, number: int) -> np.ndarray:
    """Return an image as a clip (t, y, x, 3), uint8. Raises UserError for another shape, dtype or range."""
    array = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
    shape, array = array.shape, array if array.ndim == 4 else array[None]
    if (
        array.ndim != 4
        or array.shape[3] != 3
        or not all(array.shape)
        or any(n % PIXEL_MULTIPLE for n in array.shape[1:3])
    ):
        raise UserError(
            f"image {number}: shape {shape}, expected (y, x, 3) with sides of multiples of {PIXEL_MULTIPLE}"
        )
    if len(array) % FRAMES_PER_LATENT != 1:
        raise UserError(f"image {number} has {len(array)} frames, expected 4n + 1")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating) or not (np.min(array) >= 0 and np.max(array) <= 1):
        raise UserError(f"image {number}: {array.dtype}, expected uint8, or floating-point numbers in [0, 1]")
    return np.rint(array * 255.0).astype(np.uint8)


def _references(clip: np.ndarray, references: Sequence[Any], number: int) -> list[np.ndarray]:
    """Return an image's references as clips. Raises UserError unless all are single frames of one size."""
    found = [_clip(image, number) for image in references]
    if found and any(other.shape != (1, *clip.shape[1:]) for other in (clip, *found)):
        shapes = ", ".join(str(other.shape) for other in found)
        raise UserError(f"image {number}: references {shapes} of an image {clip.shape}, expected pictures of one size")
    return found


TrainStep = Callable[[TrainState, TrainBatch], tuple[TrainState, Metrics]]


@suggests_names
def make_train_step(
    dit: AnimaDiT,
    optimizer: optax.GradientTransformation,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    shift: float | None = None,
    sigmoid_scale: float = 1.0,
    times: str = "logit_normal",
    ema_decay: float | None = None,
    dropout: float = 0.0,
    rank_dropout: float = 0.0,
    remat: str = "full",
    accumulation: int = 1,
    seed: int = 0,
    edit: bool = False,
) -> tuple[TrainState, TrainStep]:
    """Return the state before the first step and the compiled step: (state, batch) → (new state, metrics).

    Trained are the adapter's factors if the transformer has an adapter, else all its parameters, in float32; the other
    parameters stay in their dtype. `optimizer` is any of optax. `dtype` is the compute dtype, `shift`, `sigmoid_scale`
    and `times` ("logit_normal" or "uniform") the distribution of times, `ema_decay` that of the averaged weights,
    `dropout` and `rank_dropout` the adapter's. `accumulation` micro-batches make up a batch. With `edit`, the frames
    after an example's first are its reference pictures: clean, and not part of the loss. The step is `train_step`,
    which `anima_jax.train` runs: a step whose loss is not finite changes only the counters. It donates the old state,
    so that only the new one can be used. It runs on the mesh that is set when this is called. Raises UserError for a
    model without an LLM adapter and for a value out of range.
    """
    if dit.llm_adapter is None:
        raise UserError("the transformer has no LLM adapter, without which it cannot read captions")
    for name, value, fits, expected in (
        ("shift", shift, shift is None or shift > 0, "a number above 0"),
        ("ema_decay", ema_decay, ema_decay is None or 0 < ema_decay < 1, "a number between 0 and 1"),
        ("dropout", dropout, 0 <= dropout < 1, "0 or more, below 1"),
        ("rank_dropout", rank_dropout, 0 <= rank_dropout < 1, "0 or more, below 1"),
        ("remat", remat, remat in REMAT_POLICIES, f"one of {', '.join(REMAT_POLICIES)}"),
        ("accumulation", accumulation, accumulation >= 1, "at least 1"),
    ):
        if not fits:
            raise UserError(f"{name} {value}, expected {expected}")
    try:
        distribution = TimeDistribution(times, sigmoid_scale, shift)
    except ValueError as error:
        raise UserError(f"times: {error}") from error
    config = StepConfig(
        compute_dtype=jnp.dtype(dtype),
        times=distribution,
        seed=seed,
        ema_decay=ema_decay,
        dropout=dropout,
        rank_dropout=rank_dropout,
        remat=remat,
        edit=edit,
    )
    graphdef, params = split(dit)
    with standard_mesh():
        mesh = current_mesh()
        params = jax.device_put(params, shardings(params, params, mesh))
        # Copies: the step donates them, and the caller's model keeps its own.
        trained = {path: jnp.array(params[path], jnp.float32) for path in _trained(params)}
        frozen = cast_to_compute({path: value for path, value in params.items() if path not in trained}, dtype)
        state = init_state(trained, optimizer, config, mesh)
        compiled = compile_step(graphdef, optimizer, config, shardings=jax.tree.map(lambda leaf: leaf.sharding, state))

    def step(state: TrainState, batch: TrainBatch) -> tuple[TrainState, Metrics]:
        size = len(batch.latents_blc)
        if size % accumulation:
            raise UserError(f"a batch of {size} examples, expected a multiple of accumulation, {accumulation}")
        with jax.set_mesh(mesh):
            return compiled(state, frozen, shard_batch(batch, size), None, accumulation)

    return state, step


def _trained(params: Params) -> list[str]:
    """Return the paths of the adapter's factors, or of all parameters if there is no adapter."""
    return [path for path in params if modules.is_factor(path)] or list(params)


def trained_model(dit: AnimaDiT, state: TrainState, *, ema: bool = False) -> AnimaDiT:
    """Return the transformer with the weights of a state, or with `ema` the averaged ones; they are copies.

    `dit` is the transformer that `make_train_step` was given. Raises UserError if the state has no average.
    """
    if ema and state.ema is None:
        raise UserError("ema: the state has no averaged weights; make_train_step(…, ema_decay=0.999) keeps them")
    graphdef, params = split(dit)
    weights = state.ema if ema and state.ema is not None else state.params
    return merge(graphdef, params | {path: jnp.array(value) for path, value in weights.items()})
