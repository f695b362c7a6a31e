"""From prompts to pictures: encode, sample, decode.

The same pipeline serves `python -m anima_jax.generate`, Python users and the samples that a training run draws.
Axes: b batch, t frames, y rows, x columns, c channels; n source (Qwen3) tokens, m target (T5) tokens, d features.
Latents of one picture are (t, y, x, c): pictures of a batch may differ in size.
"""

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike
from PIL import Image

from anima_jax.adapters.merge import AdapterStack, Weight
from anima_jax.checkpoints.locations import PathLike
from anima_jax.checkpoints.models import load_dit, load_text_encoder, load_vae
from anima_jax.data.encode import padded, rounded_up, text_states
from anima_jax.diffusion import guidance, samplers, schedules
from anima_jax.diffusion.samplers.plan import make_plan
from anima_jax.errors import UserError
from anima_jax.models.constraints import constrain
from anima_jax.models.dit import CONTEXT_ROWS, OUT_CHANNELS, AnimaDiT, DiTConfig
from anima_jax.models.parameters import Params, cast_to_compute, merge, split
from anima_jax.models.qwen3 import Qwen3, Qwen3Config
from anima_jax.models.wan_vae import WanVAE
from anima_jax.parallel import rules
from anima_jax.parallel.mesh import current_mesh, replicas, replicate, shard_batch
from anima_jax.sampling import program
from anima_jax.sampling.callbacks import ProgressBar
from anima_jax.sampling.noise import BatchNoise
from anima_jax.sampling.packing import TokenPacking
from anima_jax.sampling.program import Context, InpaintMask, SharedInputs
from anima_jax.sampling.request import (
    PIXELS_PER_LATENT,
    ImageRequest,
    SamplingParams,
    latent_mask,
    mask_values,
    to_images,
    to_pixels,
)
from anima_jax.sampling.tiles import in_tiles
from anima_jax.text.prompts import embeddings, spans
from anima_jax.text.tokenizers import Tokenizers, load_tokenizers

UNTILED_PIXELS = 1_500_000
"""Larger pictures pass the VAE in tiles."""

ProgressCallback = Callable[[int, int, Callable[[], list[np.ndarray]]], None]
"""Told how many evaluations are done, of how many, and what gives each picture's clean latents as last estimated."""


class AnimaPipeline:
    """A transformer, a VAE, a text encoder and tokenizers. Calling it draws pictures.

    `dit_params` and `text_encoder_params` may be replaced by others of the same structure, as training does with its
    averaged parameters and `set_lora_weights` with merged ones. With `offload` the text encoder and the VAE stay in
    host memory, and are on the device only while they work.
    """

    def __init__(
        self,
        dit: AnimaDiT,
        vae: WanVAE,
        text_encoder: Qwen3,
        tokenizers: Tokenizers,
        *,
        dtype: DTypeLike = jnp.bfloat16,
        offload: bool = False,
    ):
        check_networks(dit.config, text_encoder.config, tokenizers)
        self.dtype = jnp.dtype(dtype)
        self.tokenizers = tokenizers
        self.dit_graphdef, params = split(dit)
        self.dit_params = cast_to_compute(params, dtype)
        self._vae_graphdef, self._vae_params = split(vae)
        self._text_graphdef, self.text_encoder_params = split(text_encoder)
        self._loras: AdapterStack | None = None
        if offload:
            self._vae_params, self.text_encoder_params = jax.device_get((self._vae_params, self.text_encoder_params))

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
        offload: bool = False,
    ) -> "AnimaPipeline":
        """Load everything from files; `tokenizers` is a folder with `qwen/` and `t5/`, or None for the hub's.

        `loras` are adapters of any kind and dialect, each with its weight: a number, or one for each part of the
        network (`{"blocks.0-9": 0.5}`). With `allow_unused`, keys of theirs that fit no module are not an error. Raises
        UserError for whatever is missing or does not fit.
        """
        networks = load_dit(transformer, dtype, adapter_path=adapter), load_vae(vae, dtype)
        pipeline = cls(
            *networks, load_text_encoder(text_encoder, dtype), load_tokenizers(tokenizers), dtype=dtype, offload=offload
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
        width: int | Sequence[int] = 1024,
        height: int | Sequence[int] = 1024,
        seed: int | Sequence[int] = 0,
        batch_size: int = 1,
        image: Image.Image | None = None,
        mask: Image.Image | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> list[Image.Image]:
        """One picture of each prompt, size and seed given, in one batch, or `batch_size` pictures of one of each.

        Sizes are in pixels, multiples of 16. One seed is the whole batch's, as in ComfyUI: it gives each picture other
        noise. Of several seeds each gives its picture the noise that it has alone. `image` is what pictures start from
        (with `denoise` below 1) and what stays where `mask` is black. `settings` are the fields of `SamplingParams`:
        steps, guidance_scale, sampler, schedule, shift, denoise, noise and others. `progress` shows a bar.
        Raises UserError for a value out of range or an unknown name.
        """
        pictures = arranged(prompt, width, height, seed, batch_size)
        chosen = SamplingParams(negative_prompt, **settings)
        return self.draw(pictures, chosen, image=image, mask=mask, watch=ProgressBar() if progress else None)

    def draw(
        self,
        pictures: Sequence[ImageRequest],
        settings: SamplingParams,
        *,
        image: Image.Image | None = None,
        mask: Image.Image | None = None,
        watch: ProgressCallback | None = None,
    ) -> list[Image.Image]:
        """These pictures, in one batch. Raises UserError for what cannot be drawn.

        With a mask, pixels where it is black are the VAE's reconstruction of the image, whatever is beside them.
        """
        check_sources(pictures, settings, image, mask)
        original = None if image is None else self.encode_image(to_pixels(image))
        area = None if mask is None else mask_values(mask)
        latents = self.draw_latents(
            pictures, settings, original=original, mask=None if area is None else latent_mask(area), watch=watch
        )
        pixels = self.decode(latents)
        if area is not None and original is not None:
            (kept,) = self.decode([original])
            pixels = [np.where(area > 0.0, drawn, kept) for drawn in pixels]
        return to_images(pixels)

    def draw_latents(
        self,
        pictures: Sequence[ImageRequest],
        settings: SamplingParams,
        *,
        original: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        watch: ProgressCallback | None = None,
    ) -> list[np.ndarray]:
        """The pictures' normalised latents, each (t, y, x, c), from noise or from `original` latents.

        They stay `original` where `mask` (1, y, x, 1) is 0.
        """
        if original is not None and settings.denoise == 0:
            return [original] * len(pictures)
        sampler = samplers.SAMPLERS[settings.sampler]
        sigmas = schedules.sigmas(
            settings.schedule,
            settings.steps,
            settings.shift,
            denoise=settings.denoise,
            without_penultimate=sampler.without_penultimate,
        )
        return self.sample(
            self.encode([picture.prompt for picture in pictures]),
            self.encode([settings.negative_prompt] * len(pictures)),
            BatchNoise(pictures, settings.noise, sampler, sigmas),
            sigmas,
            settings,
            original=original,
            mask=mask,
            watch=watch,
        )

    def encode(self, prompts: Sequence[str]) -> Context:
        """Context rows of prompts with ComfyUI's weights: Qwen3's states through the transformer's adapter.

        Token lists are padded to a multiple of 512 and masked, which leaves real rows what they would be alone.
        """
        params = _on_devices(self.text_encoder_params)
        found = {prompt: self._encode_prompt(params, prompt) for prompt in dict.fromkeys(prompts)}
        return joined(*(found[prompt] for prompt in prompts))

    def _encode_prompt(self, text_params: Params, prompt: str) -> Context:
        source_n, target_m, weights_m = self.tokenizers.prompt_ids(spans(prompt))
        for name in embeddings(prompt):
            print(f"prompt '{prompt}': embedding:{name} is left out: there are none for Anima", file=sys.stderr)
        if not np.isfinite(weights_m).all():
            raise UserError(f"prompt '{prompt}': a weight is not a finite number")
        source_bn, source_mask_bn = padded([source_n], rounded_up(len(source_n), CONTEXT_ROWS))
        target_bm, target_mask_bm = padded([target_m], rounded_up(len(target_m), CONTEXT_ROWS))
        weights_bm, _ = padded([weights_m], target_bm.shape[1])
        inputs = (source_bn, source_mask_bn, target_bm, target_mask_bm, weights_bm)
        source_bn, source_mask_bn, target_bm, target_mask_bm, weights_bm = replicate(inputs)
        # float16 cannot hold the largest of Qwen3's activations.
        dtype = jnp.dtype(jnp.float32) if self.dtype == jnp.float16 else self.dtype
        states_bnd = text_states(text_params, source_bn, source_mask_bn, graphdef=self._text_graphdef, dtype=dtype)
        rows_bmd = context_rows(
            self.dit_params,
            states_bnd,
            source_mask_bn,
            target_bm,
            target_mask_bm,
            weights_bm,
            graphdef=self.dit_graphdef,
        )
        length = max(len(target_m), CONTEXT_ROWS)
        return Context(rows_bmd, np.array([length], np.int32) if rows_bmd.shape[1] > CONTEXT_ROWS else None)

    def sample(
        self,
        positive: Context,
        negative: Context,
        noise: BatchNoise,
        sigmas: np.ndarray,
        settings: SamplingParams,
        *,
        original: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        watch: ProgressCallback | None = None,
    ) -> list[np.ndarray]:
        """Each picture's normalised latents (t, y, x, c), float32, along `sigmas`.

        They begin at `noise`, or at the first level between it and `original`, and stay `original` where `mask`
        (1, y, x, 1) is 0.
        """
        sampler = samplers.SAMPLERS[settings.sampler]
        plan = make_plan(sampler.formulas, sigmas, settings.shift)
        layout = TokenPacking([array.shape[:3] for array in noise.start])
        latents = [np.zeros_like(array) if original is None else original for array in noise.start]
        kept = None
        if mask is not None:
            masks = [np.broadcast_to(mask, array.shape) for array in latents]
            kept = InpaintMask(*map(layout.pack, (masks, latents, noise.outside_mask)))
        start = [samplers.start(drawn, sigmas[0], x) for drawn, x in zip(noise.start, latents, strict=True)]
        tokens_blc = program.sample(
            self.dit_params,
            self.dit_graphdef,
            self.dtype,
            plan,
            layout.pack(start),
            SharedInputs(layout.grid_b3, joined(negative, positive), settings.cfg_zero_star, kept, noise.keys_b3),
            guidance.scales(plan.sigmas_n, settings.guidance_scale, settings.guidance_interval, settings.shift),
            None if noise.keys_b3 is not None else lambda draw: layout.pack(noise.step(draw)),
            watch and (lambda done, total, x_blc: watch(done, total, lambda: layout.unpack(x_blc))),
        )
        results = [x / np.float32(1.0 - sampler.ends_at) for x in layout.unpack(tokens_blc)]
        # Where the mask is grey, the last estimate is already a mixture.
        return results if mask is None else [np.where(mask > 0.0, x, latents[0]) for x in results]

    def encode_image(self, pixels_tyxc: np.ndarray) -> np.ndarray:
        """Normalised latents (t, y, x, c), float32, of pixels in [−1, 1]; of large pictures in blended tiles."""
        return np.asarray(_whole_or_tiled(self._vae(encode_pixels), pixels_tyxc[None], PIXELS_PER_LATENT, 1)[0])

    def decode(self, latents: Iterable[np.ndarray]) -> list[np.ndarray]:
        """Pixels (t, y, x, 3) in about [−1, 1], float32; large pictures in blended tiles.

        Each device takes one picture at a time, those of one size together.
        """
        run, together = self._vae(decode_latents), replicas(current_mesh().shape)
        found: list[np.ndarray] = []
        for _, alike in itertools.groupby(map(np.asarray, latents), key=np.shape):
            pictures = list(alike)
            for first in range(0, len(pictures), together):
                batch_btyxc = np.stack(pictures[first : first + together])
                found += list(np.asarray(_whole_or_tiled(run, batch_btyxc, 1, PIXELS_PER_LATENT)))
        return found

    def _vae(self, run: Callable[..., Array]) -> Callable[[np.ndarray], Array]:
        """`run` with the VAE, which is on the device as long as the result exists."""
        params = _on_devices(self._vae_params)

        def run_on_mesh(array_btyxc: np.ndarray) -> Array:
            batch = shard_batch(array_btyxc, len(array_btyxc))
            return run(params, batch, graphdef=self._vae_graphdef, dtype=self.dtype)

        return run_on_mesh


def _on_devices(params: Params) -> Params:
    """Parameters that may wait in host memory."""
    mesh = jax.sharding.get_mesh()
    return jax.device_put(params) if mesh.empty else jax.device_put(params, rules.shardings(params, params, mesh))


def _whole_or_tiled(run: Callable, array_btyxc: np.ndarray, unit_in: int, unit_out: int):
    """`run` of one picture; a latent pixel's side in argument and result are `unit_in` and `unit_out`."""
    pixels = math.prod(size // unit_in * PIXELS_PER_LATENT for size in array_btyxc.shape[2:4])
    return run(array_btyxc) if pixels <= UNTILED_PIXELS else in_tiles(run, array_btyxc, unit_in, unit_out)


def arranged(
    prompt: str | Sequence[str],
    width: int | Sequence[int],
    height: int | Sequence[int],
    seed: int | Sequence[int],
    batch_size: int,
) -> list[ImageRequest]:
    """The pictures that these describe. Raises UserError for several numbers of them."""
    columns = [
        [values] if isinstance(values, str) or np.ndim(values) == 0 else list(values)  # type: ignore[arg-type]
        for values in (prompt, width, height, seed)
    ]
    count = max(batch_size, *map(len, columns))
    for name, values in zip(("prompts", "widths", "heights", "seeds"), columns, strict=True):
        if len(values) not in (1, count):
            raise UserError(f"{len(values)} {name} for {count} pictures, expected one or as many")
    rows = zip(*(values if len(values) == count else values * count for values in columns), strict=True)
    pictures = [ImageRequest(*row) for row in rows]
    if len(columns[-1]) > 1:
        return pictures
    sizes = [picture.latent_size for picture in pictures]
    return [
        dataclasses.replace(picture, batch_size=sizes.count(size), batch_index=sizes[:index].count(size))
        for index, (picture, size) in enumerate(zip(pictures, sizes, strict=True))
    ]


def check_sources(
    pictures: Sequence[ImageRequest], settings: SamplingParams, image: Image.Image | None, mask: Image.Image | None
) -> None:
    """Raise UserError for pictures and settings that cannot be, or that do not go with `image` and `mask`."""
    settings.check()
    for picture in pictures:
        picture.check()
    if image is None:
        if mask is not None:
            raise UserError("a mask without an image: nothing says what is kept where it is black")
        if settings.denoise < 1:
            raise UserError(f"denoise {settings.denoise} needs an image to start from; without one it is 1")
        return
    for picture in pictures:
        if image.size != (picture.width, picture.height):
            raise UserError(f"the image is {image.width}×{image.height}, expected {picture.width}×{picture.height}")
    if mask is not None and mask.size != image.size:
        raise UserError(f"the mask is {mask.width}×{mask.height}, expected the image's {image.width}×{image.height}")


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


def joined(*contexts: Context) -> Context:
    """All in one batch. Rows of zeros are appended to the shorter ones, and not seen beyond their own lengths."""
    length = max(context.rows_bnd.shape[1] for context in contexts)
    rows = [jnp.pad(x.rows_bnd, ((0, 0), (0, length - x.rows_bnd.shape[1]), (0, 0))) for x in contexts]
    lengths = None
    if length > CONTEXT_ROWS:
        short = [np.full(len(x.rows_bnd), CONTEXT_ROWS, np.int32) for x in contexts]
        lengths = [own if x.lengths_b is None else x.lengths_b for x, own in zip(contexts, short, strict=True)]
    return Context(jnp.concatenate(rows), None if lengths is None else np.concatenate(lengths))


@functools.partial(jax.jit, static_argnames="graphdef")
def context_rows(
    params: Params,
    states_bnd: Array,
    source_mask_bn: Array,
    target_bm: Array,
    target_mask_bm: Array,
    weights_bm: Array,
    *,
    graphdef: nnx.GraphDef,
) -> Array:
    rows_bmd = merge(graphdef, params).llm_adapter(states_bnd, target_bm, source_mask_bn, target_mask_bm)
    return constrain(rows_bmd * weights_bm[..., None].astype(rows_bmd.dtype), "nnn")


@functools.partial(jax.jit, static_argnames=("graphdef", "dtype"))
def encode_pixels(params: Params, pixels_btyxc: Array, *, graphdef: nnx.GraphDef, dtype: Any) -> Array:
    return constrain(merge(graphdef, params).encode(pixels_btyxc.astype(dtype)).astype(jnp.float32), "nnnnn")


@functools.partial(jax.jit, static_argnames=("graphdef", "dtype"))
def decode_latents(params: Params, latents_btyxc: Array, *, graphdef: nnx.GraphDef, dtype: Any) -> Array:
    return constrain(merge(graphdef, params).decode(latents_btyxc.astype(dtype)).astype(jnp.float32), "nnnnn")
