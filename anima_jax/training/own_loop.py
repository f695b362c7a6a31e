"""Training in Python, with one's own arrays and one's own loop: a data set in memory and the trainer's step.

docs/python.md shows how they are used. Noise, times and the order of the examples follow from the seed, as in a run of
`anima_jax.train`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike

from anima_jax.adapters import modules
from anima_jax.config.sizes import FRAMES_PER_LATENT, PIXEL_MULTIPLE, Size
from anima_jax.data.buckets import Bucket
from anima_jax.data.encoders import caption_encoder, clip_encoder
from anima_jax.diffusion.objective import TimeDistribution
from anima_jax.diffusion.randomness import split_ids
from anima_jax.errors import UserError, check_names, suggests_names
from anima_jax.models.control import ControlConfig, ControlNetwork
from anima_jax.models.dit import OUT_CHANNELS, PATCH, REMAT_POLICIES, AnimaDiT
from anima_jax.models.parameters import Params, cast_to_compute, merge, split
from anima_jax.models.qwen3 import Qwen3
from anima_jax.models.wan_vae import WanVAE
from anima_jax.parallel.mesh import current_mesh, shard_batch, standard_mesh
from anima_jax.parallel.rules import shardings
from anima_jax.text.states import EncodedText, padded, rounded_up, text_rows
from anima_jax.text.tokenizers import Tokenizers, load_tokenizers
from anima_jax.training import control
from anima_jax.training.step import Metrics, StepConfig, TrainBatch, TrainState, compile_step, init_state

LATENT_FEATURES = PATCH * PATCH * OUT_CHANNELS

CONTROL_CHANNELS = (3, 4)
"""Channels of control pictures: those of an image, and the mask of what is drawn anew."""


class ArrayDataset:
    """Images and captions in memory, encoded: an iterator of batches for `make_train_step`.

    `latents` are tokens (l, 64) of each example, as `clip_encoder` returns them, `grids` its (frames, rows, columns) of
    patches, `texts` its encoded captions, `controls` the patches of its control picture, uint8 (l, 16·16·c), as
    `TrainBatch.control_blp` has them. Examples may differ in size; each is padded to the largest, so that one program
    serves all batches. Raises UserError unless they fit together.
    """

    def __init__(
        self,
        latents: Sequence[np.ndarray],
        grids: Sequence[tuple[int, int, int]],
        texts: Sequence[EncodedText],
        controls: Sequence[np.ndarray] | None = None,
    ):
        if not len(latents) == len(grids) == len(texts) or not latents:
            sizes = f"{len(latents)} latents, {len(grids)} grids, {len(texts)} captions"
            raise UserError(f"{sizes}: expected one of each for every example, and at least one example")
        for number, (tokens_lc, grid) in enumerate(zip(latents, grids, strict=True)):
            if tokens_lc.shape != (int(np.prod(grid)), LATENT_FEATURES):
                raise UserError(f"example {number}: latents {tokens_lc.shape} for a grid of {grid}")
        if controls is not None:
            self._check_controls(controls, latents, grids)
        self._latents, self._grids, self._texts = list(latents), np.array(grids, np.int32), list(texts)
        self._controls = None if controls is None else list(controls)
        self._tokens = max(map(len, latents))
        self._lengths = [rounded_up(max(len(text[part]) for text in texts)) for part in (0, 1)]

    @staticmethod
    def _check_controls(
        controls: Sequence[np.ndarray], latents: Sequence[np.ndarray], grids: Sequence[tuple[int, int, int]]
    ) -> None:
        if len(controls) != len(latents):
            raise UserError(f"{len(latents)} images and {len(controls)} controls, expected as many")
        widths = [PIXEL_MULTIPLE**2 * channels for channels in CONTROL_CHANNELS]
        for number, (patches_lp, grid) in enumerate(zip(controls, grids, strict=True)):
            if grid[0] != 1:
                raise UserError(f"example {number}: a control picture of {grid[0]} frames, expected of single pictures")
            widths = widths if number else [width for width in widths if width == patches_lp.shape[1]] or widths
            if patches_lp.dtype != np.uint8 or patches_lp.shape not in [(len(latents[number]), w) for w in widths]:
                found = f"{patches_lp.dtype} {patches_lp.shape}"
                expected = f"uint8 ({len(latents[number])}, {' or '.join(map(str, widths))})"
                raise UserError(f"example {number}: control patches {found}, expected {expected}")

    @classmethod
    @suggests_names
    def from_images(
        cls,
        images: Iterable[Any],
        captions: Iterable[str],
        *,
        references: Iterable[Sequence[Any]] | None = None,
        controls: Iterable[Any] | None = None,
        vae: WanVAE,
        text_encoder: Qwen3,
        tokenizers: Tokenizers | None = None,
        dtype: DTypeLike = jnp.bfloat16,
    ) -> "ArrayDataset":
        """Encode images and captions, each once.

        An image is a PIL image or an array (y, x, 3), uint8 or floating-point numbers in [0, 1]; a video has a first
        axis of frames, 4n + 1 of them. Sides are multiples of 16. `references` are the reference pictures of each
        image, of its size, for `make_train_step(…, edit=True)`. `controls` are the control pictures of each image, of
        its size, for a transformer with `add_control`: pictures, or to inpaint arrays (y, x, 4), the fourth channel 1
        (uint8: 255) where the image is drawn anew. `tokenizers` None are the package's. `dtype` is the compute dtype of
        the networks. Raises UserError for an image of another form and unequal numbers.
        """
        clips = [_clip(image, f"image {number}") for number, image in enumerate(images)]
        texts = [str(caption) for caption in captions]
        others = [list(each) for each in references] if references is not None else [[] for _ in clips]
        if not len(clips) == len(texts) == len(others):
            besides = f" and references of {len(others)}" if references is not None else ""
            raise UserError(f"{len(clips)} images and {len(texts)} captions{besides}, expected as many")
        patches = None if controls is None else _control_patches(clips, list(controls))
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
        return cls(list(map(np.concatenate, latents)), grids, list(encode_captions(texts)), patches)

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
        controls = self._controls
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
                control_blp=controls and padded([controls[row] for row in rows], self._tokens)[0],
            )
            step += 1


def _clip(image: Any, label: str, channels: Sequence[int] = (3,)) -> np.ndarray:
    """Return an image as a clip (t, y, x, c), uint8. Raises UserError for another shape, dtype or range."""
    array = np.asarray(image.convert("RGB") if hasattr(image, "convert") else image)
    shape, array = array.shape, array if array.ndim == 4 else array[None]
    if (
        array.ndim != 4
        or array.shape[3] not in channels
        or not all(array.shape)
        or any(n % PIXEL_MULTIPLE for n in array.shape[1:3])
    ):
        expected = " or ".join(f"(y, x, {count})" for count in channels)
        raise UserError(f"{label}: shape {shape}, expected {expected} with sides of multiples of {PIXEL_MULTIPLE}")
    if len(array) % FRAMES_PER_LATENT != 1:
        raise UserError(f"{label} has {len(array)} frames, expected 4n + 1")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating) or not (np.min(array) >= 0 and np.max(array) <= 1):
        raise UserError(f"{label}: {array.dtype}, expected uint8, or floating-point numbers in [0, 1]")
    return np.rint(array * 255.0).astype(np.uint8)


def _references(clip: np.ndarray, references: Sequence[Any], number: int) -> list[np.ndarray]:
    """Return an image's references as clips. Raises UserError unless all are single frames of one size."""
    found = [_clip(image, f"image {number}: reference") for image in references]
    if found and any(other.shape != (1, *clip.shape[1:]) for other in (clip, *found)):
        shapes = ", ".join(str(other.shape) for other in found)
        raise UserError(f"image {number}: references {shapes} of an image {clip.shape}, expected pictures of one size")
    return found


def _control_patches(clips: Sequence[np.ndarray], controls: Sequence[Any]) -> list[np.ndarray]:
    """Return the patches (l, p) of each image's control picture. Raises UserError unless it has the image's size."""
    if len(controls) != len(clips):
        raise UserError(f"{len(clips)} images and {len(controls)} controls, expected as many")
    patches = []
    for number, (clip, image) in enumerate(zip(clips, controls, strict=True)):
        picture = _clip(image, f"control {number}", CONTROL_CHANNELS)
        if picture.shape[:3] != clip.shape[:3]:
            raise UserError(f"control {number}: {picture.shape} of an image {clip.shape}, expected one of its size")
        tokens = "t (y m) (x n) c -> (t y x) (m n c)"
        patches.append(rearrange(picture, tokens, m=PIXEL_MULTIPLE, n=PIXEL_MULTIPLE))
    return patches


def add_control(dit: AnimaDiT, network: ControlNetwork | None = None, *, seed: int = 0, **sizes: Any) -> AnimaDiT:
    """Return the transformer with a control network to train: `network`, or a new one that changes nothing yet.

    `sizes` are those of the new one, fields of `ControlConfig` such as `layers` and, to inpaint, `channels=4`. The
    transformer is not changed, and shares its arrays with the result. Raises UserError for unknown sizes and for a
    network of another transformer.
    """
    if network is None:
        known = [one.name for one in dataclasses.fields(ControlConfig) if one.name not in ("blocks", "width")]
        check_names("add_control", sizes, known)
        try:
            sizes = {name: tuple(value) if isinstance(value, list) else value for name, value in sizes.items()}
            config = ControlConfig(**sizes, blocks=dit.config.blocks, width=dit.config.width)
        except ValueError as error:
            raise UserError(f"add_control: {error}") from error
        with standard_mesh():
            network = control.network_with(config, control.initial(config, seed, current_mesh()))
    elif sizes:
        raise UserError(f"add_control: {', '.join(sizes)}: a network has its own sizes, expected none beside it")
    if (network.config.blocks, network.config.width) != (dit.config.blocks, dit.config.width):
        own, theirs = (f"{one.blocks} blocks of width {one.width}" for one in (dit.config, network.config))
        raise UserError(f"a control network for {theirs}, expected one for {own}")
    model = merge(*split(dit))
    model.control = nnx.data(network)
    return model


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

    Trained are the adapter's factors and the control network if the transformer has such, else all its parameters, in
    float32; the other parameters stay in their dtype. `optimizer` is any of optax. `dtype` is the compute dtype,
    `shift`, `sigmoid_scale` and `times` ("logit_normal" or "uniform") the distribution of times, `ema_decay` that of
    the averaged weights, `dropout` and `rank_dropout` the adapter's. `accumulation` micro-batches make up a batch. With
    `edit`, the frames after an example's first are its reference pictures: clean, and not part of the loss. The step is
    `train_step`, which `anima_jax.train` runs: a step whose loss is not finite changes only the counters. It donates
    the old state, so that only the new one can be used. It runs on the mesh that is set when this is called. Raises
    UserError for a model without an LLM adapter and for a value out of range.
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
        ("edit", edit, not edit or dit.control is None, "False: a control network works on single frames"),
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
        _check_batch(batch, accumulation, dit.control)
        with jax.set_mesh(mesh):
            return compiled(state, frozen, shard_batch(batch, size), None, accumulation)

    return state, step


def _trained(params: Params) -> list[str]:
    """Return the paths of the adapter's factors and of the control network, or of all parameters without such."""
    return [path for path in params if modules.is_factor(path) or path.startswith(control.PREFIX)] or list(params)


def _check_batch(batch: TrainBatch, accumulation: int, network: ControlNetwork | None) -> None:
    if len(batch.latents_blc) % accumulation:
        raise UserError(
            f"a batch of {len(batch.latents_blc)} examples, expected a multiple of accumulation, {accumulation}"
        )
    expected = network.config.channels if network else 0
    found = 0 if batch.control_blp is None else batch.control_blp.shape[2] // PIXEL_MULTIPLE**2
    if found != expected:
        raise UserError(
            f"control pictures of {found} channels, expected {expected}: add_control makes the network, and "
            "ArrayDataset.from_images(…, controls=…) takes its pictures"
        )


def trained_model(dit: AnimaDiT, state: TrainState, *, ema: bool = False) -> AnimaDiT:
    """Return the transformer with the weights of a state, or with `ema` the averaged ones; they are copies.

    `dit` is the transformer that `make_train_step` was given. Raises UserError if the state has no average.
    """
    if ema and state.ema is None:
        raise UserError("ema: the state has no averaged weights; make_train_step(…, ema_decay=0.999) keeps them")
    graphdef, params = split(dit)
    weights = state.ema if ema and state.ema is not None else state.params
    return merge(graphdef, params | {path: jnp.array(value) for path, value in weights.items()})
