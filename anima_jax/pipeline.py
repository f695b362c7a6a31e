"""From prompts to pictures: encode, sample, decode.

The same pipeline serves `python -m anima_jax.generate`, Python users and the samples that a training run draws.
Axes: b batch, l image tokens, n text tokens, d features, c the 64 values of a token.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from PIL import Image

from anima_jax.checkpoints.locations import PathLike
from anima_jax.checkpoints.merging import AdapterStack, Weight
from anima_jax.checkpoints.models import load_dit, load_text_encoder, load_vae
from anima_jax.diffusion import samplers, schedules
from anima_jax.diffusion.torch_random import randn
from anima_jax.encode import encode_tokens, padded, rounded_up
from anima_jax.errors import UserError, did_you_mean
from anima_jax.models.dit import CONTEXT_ROWS, OUT_CHANNELS, PATCH, AnimaDiT, DiTConfig, patchify, unpatchify
from anima_jax.models.parameters import Params, compute_copy, merge, split
from anima_jax.models.qwen3 import Qwen3, Qwen3Config
from anima_jax.models.wan_vae import WanVAE
from anima_jax.text.tokenizers import Tokenizers, load_tokenizers

PIXELS_PER_LATENT = 8
SIZE_STEP = PIXELS_PER_LATENT * PATCH


class Context(NamedTuple):
    """Prompts as the transformer takes them. `lengths_b` is None unless one is longer than 512 tokens."""

    rows_bnd: Array
    lengths_b: Array | None


class AnimaPipeline:
    """A transformer, a VAE, a text encoder and tokenizers. Calling it draws pictures.

    `dit_params` and `text_encoder_params` may be replaced by others of the same structure, as training does with its
    averaged parameters and `set_lora_weights` with merged ones.
    """

    def __init__(
        self,
        dit: AnimaDiT,
        vae: WanVAE,
        text_encoder: Qwen3,
        tokenizers: Tokenizers,
        *,
        dtype: DTypeLike = jnp.bfloat16,
    ):
        check_networks(dit.config, text_encoder.config, tokenizers)
        self.dtype = dtype
        self.tokenizers = tokenizers
        self.dit_graphdef, params = split(dit)
        self.dit_params = compute_copy(params, dtype)
        self._vae_graphdef, self._vae_params = split(vae)
        self._encode_tokens = encode_tokens(text_encoder, dtype)
        self._loras: AdapterStack | None = None

    @property
    def text_encoder_params(self) -> Params:
        """The text encoder's parameters."""
        return self._encode_tokens.params

    @text_encoder_params.setter
    def text_encoder_params(self, params: Params) -> None:
        self._encode_tokens.params = params

    @classmethod
    def load(
        cls,
        *,
        transformer: PathLike,
        vae: PathLike,
        text_encoder: PathLike,
        tokenizers: str | None = None,
        adapter: PathLike | None = None,
        loras: Sequence[tuple[PathLike, Weight]] = (),
        allow_unused: bool = False,
        dtype: DTypeLike = jnp.bfloat16,
    ) -> "AnimaPipeline":
        """Load everything from files; `tokenizers` is a folder with `qwen/` and `t5/`, or None for the hub's.

        `loras` are adapters of any kind and dialect, each with its weight: a number, or one for each part of the
        network (`{"blocks.0-9": 0.5}`). With `allow_unused`, keys of theirs that fit no module are not an error. Raises
        UserError for whatever is missing or does not fit.
        """
        pipeline = cls(
            load_dit(transformer, dtype, adapter_path=adapter),
            load_vae(vae, dtype),
            load_text_encoder(text_encoder, dtype),
            load_tokenizers(tokenizers),
            dtype=dtype,
        )
        if loras:
            params = pipeline.dit_params, pipeline.text_encoder_params
            paths = [path for path, _ in loras]
            pipeline._loras = AdapterStack(paths, *params, base=transformer, allow_unused=allow_unused)
            pipeline.set_lora_weights([weight for _, weight in loras])
        return pipeline

    def set_lora_weights(self, weights: Sequence[Weight]) -> None:
        """Give the adapters that the pipeline was loaded with other weights, one for each, in their order.

        Nothing compiles anew, and the base's own values are where each change begins. Raises UserError for another
        number of weights.
        """
        if self._loras is None:
            raise UserError(f"found {len(weights)} weights, but the pipeline was loaded without LoRAs")
        transformer, text_encoder = self._loras.at(weights)
        self.dit_params = self.dit_params | transformer
        self.text_encoder_params = self.text_encoder_params | text_encoder

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str = "",
        *,
        width: int = 1024,
        height: int = 1024,
        steps: int = 30,
        guidance_scale: float = 4.0,
        sampler: str = "euler",
        schedule: str = "simple",
        shift: float = 3.0,
        seed: int = 0,
        batch_size: int = 1,
    ) -> list[Image.Image]:
        """`batch_size` pictures of one prompt, or one picture of each of several.

        Sizes are in pixels, multiples of 16. The noise of the whole batch is torch's for `seed`. With `guidance_scale`
        1 the negative prompt is not evaluated. Raises UserError for a value out of range or an unknown name.
        """
        check_settings(width, height, steps, sampler, schedule)
        prompts = [prompt] * batch_size if isinstance(prompt, str) else list(prompt)
        sigmas = schedules.SCHEDULES[schedule](steps, shift)
        latents = self.sample(
            self.encode(prompts),
            None if guidance_scale == 1.0 else self.encode([negative_prompt] * len(prompts)),
            initial_noise(seed, len(prompts), width, height),
            sigmas,
            guidance_scale=guidance_scale,
            sampler=sampler,
        )
        return to_images(self.decode(latents))

    def encode(self, prompts: Sequence[str]) -> Context:
        """Context rows of prompts: Qwen3's states through the transformer's adapter.

        Token lists are padded and masked, which leaves real rows what they would be alone; a few lengths serve all.
        """
        ids = [self.tokenizers.prompt_ids(prompt) for prompt in prompts]
        (source_bn, source_mask_bn), (target_bm, target_mask_bm) = (
            padded(rows, rounded_up(max(map(len, rows)))) for rows in zip(*ids, strict=True)
        )
        states_bnd = self._encode_tokens(source_bn, source_mask_bn)
        rows_bmd = _adapt(self.dit_params, states_bnd, target_bm, source_mask_bn, target_mask_bm, self.dit_graphdef)
        longer = rows_bmd.shape[1] > CONTEXT_ROWS
        return Context(rows_bmd, jnp.maximum(target_mask_bm.sum(1), CONTEXT_ROWS) if longer else None)

    def sample(
        self,
        positive: Context,
        negative: Context | None,
        noise_btyxc: np.ndarray,
        sigmas: np.ndarray,
        *,
        guidance_scale: float = 4.0,
        sampler: str = "euler",
    ) -> Array:
        """Normalised latents (b, t, y, x, 16), float32, from `noise_btyxc` along `sigmas`.

        Without `negative` there is no guidance.
        """
        context = positive if negative is None else _joined(negative, positive)
        _, frames, rows, columns, _ = noise_btyxc.shape
        return _sample(
            self.dit_params,
            jnp.asarray(noise_btyxc, jnp.float32),
            jnp.asarray(sigmas, jnp.float32),
            context,
            jnp.float32(guidance_scale),
            graphdef=self.dit_graphdef,
            sampler=sampler,
            grid=(frames, rows // PATCH, columns // PATCH),
            guided=negative is not None,
            dtype=jnp.dtype(self.dtype),
        )

    def decode(self, latents_btyxc: Array) -> np.ndarray:
        """Pixels (b, t, y, x, 3) in about [−1, 1], float32, one example at a time."""
        examples = (latents_btyxc[i : i + 1].astype(self.dtype) for i in range(len(latents_btyxc)))
        return np.concatenate([np.asarray(_decode(self._vae_params, x, self._vae_graphdef)) for x in examples])


def check_networks(dit: DiTConfig, text_encoder: Qwen3Config, tokenizers: Tokenizers) -> None:
    """Raise UserError unless transformer, text encoder and tokenizers fit each other."""
    adapter = dit.adapter
    if adapter is None:
        raise UserError("the transformer has no LLM adapter (llm_adapter.…), without which no prompt reaches it")
    if dit.latent_channels != OUT_CHANNELS:
        raise UserError(f"the transformer takes {dit.latent_channels} latent channels, the VAE gives {OUT_CHANNELS}")
    for what, found, needed in (
        ("width of the text encoder", text_encoder.width, adapter.source_width),
        ("width of the LLM adapter's result", adapter.target_width, dit.context_width),
    ):
        if found != needed:
            raise UserError(f"{what} is {found}, the transformer expects {needed}")
    for what, rows, ids in (
        ("text encoder's", text_encoder.vocabulary, tokenizers.qwen_vocabulary),
        ("LLM adapter's", adapter.vocabulary, tokenizers.t5_vocabulary),
    ):
        if ids > rows:
            raise UserError(
                f"the tokenizer has {ids} tokens, the {what} table only {rows} rows: they do not belong together"
            )


def check_settings(width: int, height: int, steps: int, sampler: str, schedule: str) -> None:
    """Raise UserError for sizes, steps or names that cannot be sampled."""
    for name, size in (("width", width), ("height", height)):
        if size < SIZE_STEP or size % SIZE_STEP:
            raise UserError(f"{name} {size}, expected a positive multiple of {SIZE_STEP}")
    if steps < 1:
        raise UserError(f"steps {steps}, expected at least 1")
    for what, name, table in (("sampler", sampler, samplers.SAMPLERS), ("schedule", schedule, schedules.SCHEDULES)):
        if name not in table:
            raise UserError(f"{what} '{name}', expected one of {', '.join(table)}{did_you_mean(name, table)}")


def initial_noise(seed: int, batch: int, width: int, height: int) -> np.ndarray:
    """Torch's CPU noise for `seed`, (b, 1, y, x, 16), drawn for the whole batch at once, as ComfyUI does."""
    shape = (batch, OUT_CHANNELS, 1, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
    return np.moveaxis(randn(shape, seed), 1, -1)


def to_images(pixels_btyxc: np.ndarray) -> list[Image.Image]:
    """Pictures of the first frames; values are cut off at [−1, 1] and rounded down, as ComfyUI does."""
    levels = np.clip((pixels_btyxc[:, 0] + 1.0) * 127.5, 0.0, 255.0).astype(np.uint8)
    return [Image.fromarray(picture) for picture in levels]


def _joined(first: Context, second: Context) -> Context:
    """Both contexts in one batch. Rows of zeros are appended to the shorter, and not seen beyond its own length."""
    length = max(first.rows_bnd.shape[1], second.rows_bnd.shape[1])
    rows = [jnp.pad(x.rows_bnd, ((0, 0), (0, length - x.rows_bnd.shape[1]), (0, 0))) for x in (first, second)]
    lengths = None
    if length > CONTEXT_ROWS:
        lengths = jnp.concatenate(
            [
                jnp.full(len(x.rows_bnd), CONTEXT_ROWS, jnp.int32) if x.lengths_b is None else x.lengths_b
                for x in (first, second)
            ]
        )
    return Context(jnp.concatenate(rows), lengths)


@functools.partial(jax.jit, static_argnums=5)
def _adapt(params: Params, states_bnd, target_bm, source_mask_bn, target_mask_bm, graphdef: nnx.GraphDef) -> Array:
    return merge(graphdef, params).llm_adapter(states_bnd, target_bm, source_mask_bn, target_mask_bm)


@functools.partial(jax.jit, static_argnums=2)
def _decode(params: Params, latents_btyxc: Array, graphdef: nnx.GraphDef) -> Array:
    return merge(graphdef, params).decode(latents_btyxc).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("graphdef", "sampler", "grid", "guided", "dtype"))
def _sample(
    params: Params,
    noise_btyxc: Array,
    sigmas: Array,
    context: Context,
    guidance_scale: Array,
    *,
    graphdef: nnx.GraphDef,
    sampler: str,
    grid: tuple[int, int, int],
    guided: bool,
    dtype: Any,
) -> Array:
    model: AnimaDiT = merge(graphdef, params)
    options = {
        "context_lengths_b": context.lengths_b,
        "zero_context": max(0, CONTEXT_ROWS - context.rows_bnd.shape[1]),
    }

    def velocity(x_blc: Array, sigma: Array) -> Array:
        # One evaluation serves both halves of the guidance.
        both = jnp.concatenate([x_blc, x_blc]) if guided else x_blc
        times_b = jnp.full(both.shape[:1], sigma)
        out = model.velocity(both.astype(dtype), grid, times_b, context.rows_bnd, **options)
        if not guided:
            return out
        negative, positive = jnp.split(out, 2)
        return samplers.guided(positive, negative, guidance_scale)

    start = samplers.start(patchify(noise_btyxc), sigmas[0])
    return unpatchify(samplers.sample(sampler, velocity, start, sigmas), *grid)
