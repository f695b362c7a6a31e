"""The pipeline from prompts to images: encode, sample, decode.

It serves `python -m anima_jax.generate`, Python users and the samples drawn during training.
Axes: b batch, t frames, y rows, x columns, c channels; n source (Qwen3) tokens, m target (T5) tokens, d features.
Latents of one image are (t, y, x, c); the images of a batch may differ in size.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from PIL import Image

from anima_jax.adapters.merge import AdapterStack, Weight
from anima_jax.adapters.opening import files_of
from anima_jax.checkpoints import folders
from anima_jax.checkpoints.locations import PathLike
from anima_jax.checkpoints.models import load_dit, load_text_encoder, load_vae
from anima_jax.diffusion import samplers
from anima_jax.diffusion.step_cache import Savings
from anima_jax.errors import NotFiniteError, UserError, suggests_names
from anima_jax.models.dit import CONTEXT_ROWS, OUT_CHANNELS, AnimaDiT
from anima_jax.models.parameters import Params, cast_to_compute, count, split
from anima_jax.models.qwen3 import Qwen3
from anima_jax.models.wan_vae import WanVAE
from anima_jax.parallel import rules
from anima_jax.parallel.mesh import replicate, standard_mesh
from anima_jax.sampling import adaptive, plans, program
from anima_jax.sampling.batches import draw_whole_batches
from anima_jax.sampling.callbacks import ProgressBar, ProgressCallback
from anima_jax.sampling.context import Context, context_rows, join_contexts
from anima_jax.sampling.control_networks import ControlNetworks
from anima_jax.sampling.controls import Control
from anima_jax.sampling.embeddings import Embeddings
from anima_jax.sampling.evaluation import InpaintMask, SharedInputs
from anima_jax.sampling.finite import are_finite, not_finite
from anima_jax.sampling.images import (
    latent_mask,
    mask_values,
    paste_original,
    to_images,
    to_pixels,
)
from anima_jax.sampling.latent_codec import LatentCodec
from anima_jax.sampling.matching import check_networks
from anima_jax.sampling.noise import BatchNoise
from anima_jax.sampling.packing import TokenPacking
from anima_jax.sampling.prompt_loras import remark
from anima_jax.sampling.references import EncodedReferences, given_references, layout, packed_references
from anima_jax.sampling.region_rows import region_rows
from anima_jax.sampling.regions import Region
from anima_jax.sampling.request import ImageRequest, SamplingParams, batch_of_requests, check_requests
from anima_jax.text.states import padded, padded_prompt, rounded_up, text_dtype, text_states
from anima_jax.text.tokenizers import Tokenizers, load_tokenizers


class AnimaPipeline:
    """A transformer, a VAE, a text encoder and tokenizers. Calling it generates images.

    `dtype` is the compute dtype. `dit_params` and `text_encoder_params` may be replaced by parameters of the same
    structure: training uses its averaged parameters, `set_lora_weights` merged ones. With `offload` the text encoder
    and the VAE stay in host memory and are on the device only while they run. `savings` counts the evaluations that a
    step cache saved.

    Raises UserError if transformer, text encoder and tokenizers do not match.
    """

    def __init__(
        self,
        dit: AnimaDiT,
        vae: WanVAE,
        text_encoder: Qwen3,
        tokenizers: Tokenizers,
        *,
        embeddings: PathLike | None = None,
        dtype: DTypeLike = jnp.bfloat16,
        offload: bool = False,
    ):
        check_networks(dit.config, text_encoder.config, tokenizers)
        self.config = dit.config
        self.dtype = jnp.dtype(dtype)
        self.tokenizers = tokenizers
        self._embeddings = Embeddings(embeddings, text_encoder.config.width)
        self.dit_graphdef, params = split(dit)
        self.dit_params = cast_to_compute(params, dtype)
        self._vae = LatentCodec(vae, self.dtype)
        self._text_graphdef, self.text_encoder_params = split(text_encoder)
        self._references = EncodedReferences()
        self._loras: AdapterStack | None = None
        self._controls = ControlNetworks(dit.config, self.dtype)
        self.savings = Savings()
        self._said: set[str] = set()
        self._transformer_files: list[PathLike] = []
        self._files: list[PathLike] = []
        if offload:
            self._vae.params, self.text_encoder_params = jax.device_get((self._vae.params, self.text_encoder_params))

    def __repr__(self) -> str:
        networks = {"transformer": self.dit_params, "vae": self._vae.params, "text_encoder": self.text_encoder_params}
        lines = [f"  {name}: {_described(params)}," for name, params in networks.items()]
        config = self.config
        sizes = f"  blocks={config.blocks}, width={config.width}, heads={config.heads}, dtype={self.dtype.name},"
        return "\n".join(["AnimaPipeline(", sizes, *lines, ")"])

    @classmethod
    @suggests_names
    def load(
        cls,
        *,
        transformer: PathLike,
        vae: PathLike | None = None,
        text_encoder: PathLike | None = None,
        tokenizers: PathLike | None = None,
        embeddings: PathLike | None = None,
        adapter: PathLike | None = None,
        loras: Sequence[tuple[PathLike, Weight]] = (),
        variant: str | None = None,
        allow_unused: bool = False,
        comfyui_dora: bool = False,
        dtype: DTypeLike = jnp.bfloat16,
        transformer_dtype: str | None = None,
        compute: str | None = None,
        offload: bool = False,
    ) -> "AnimaPipeline":
        """Load everything from files: local paths, `gs://` or `hf://owner/repo/file`.

        Networks may be in folders or repositories, too (`load_dit`). If `transformer` is a diffusers folder, its VAE,
        text encoder and tokenizers are the defaults; `variant`, such as "fp16", chooses between its transformers, and
        between the files of the other networks that have it. `tokenizers` is a folder with `qwen/` and `t5/`, or None
        for the diffusers folder's or else the package's. `embeddings` is a local folder with the files that
        `embedding:name` in a prompt stands for. `adapter` is a file with the LLM adapter, if the transformer's file has
        none. `loras` are adapters of any kind and dialect, each with its weight: a number, or one for each part of the
        network (`{"blocks.0-9": 0.5}`). With `allow_unused`, tensors of the files that
        belong to no network or module are not an error. With `comfyui_dora`, a DoRA by output counts as in ComfyUI:
        W + ΔW is divided by the norm of W, not by its own. `transformer_dtype` and `compute` are those of `load_dit`:
        weights in fewer bits. Raises UserError for anything missing or incompatible.
        """
        transformer, vae, text_encoder, tokenizers = folders.complete(
            transformer, vae, text_encoder, tokenizers, variant
        )
        stored = {"transformer_dtype": transformer_dtype, "compute": compute}
        networks = (
            load_dit(transformer, dtype, adapter_path=adapter, allow_unused=allow_unused, **stored),
            load_vae(vae, dtype, allow_unused=allow_unused),
            load_text_encoder(text_encoder, dtype, allow_unused=allow_unused),
        )
        pipeline = cls(*networks, load_tokenizers(tokenizers), embeddings=embeddings, dtype=dtype, offload=offload)
        pipeline._transformer_files = [path for path in (transformer, adapter) if path is not None]
        pipeline._files = [vae, text_encoder]
        if loras:
            params = pipeline.dit_params, pipeline.text_encoder_params
            paths = [path for path, _ in loras]
            pipeline._files += [file for path in paths for file in files_of(path).values()]
            pipeline._loras = AdapterStack(
                paths, *params, base=transformer, allow_unused=allow_unused, comfyui_dora=comfyui_dora
            )
            pipeline.set_lora_weights([weight for _, weight in loras])
        return pipeline

    @standard_mesh()
    def set_lora_weights(self, weights: Sequence[Weight]) -> None:
        """Set the weights of the adapters that the pipeline was loaded with, one for each, in the same order.

        Nothing is recompiled, and each call starts from the base model's original values. Raises UserError if the
        number of weights differs from the number of adapters.
        """
        if self._loras is None:
            raise UserError(f"found {len(weights)} weights, but the pipeline was loaded without LoRAs")
        transformer, text_encoder = self._loras.params_for(weights)
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
        controls: Sequence[Control | Sequence[Control]] = (),
        references: Any = (),
        regions: Region | Sequence[Region | Sequence[Region]] = (),
        progress: bool = False,
        **params: Any,
    ) -> list[Image.Image]:
        """Generate a batch: one image for each prompt, size and seed, or `batch_size` images of a single one.

        A single prompt, size or seed is repeated for all images. `width` and `height` are in pixels, multiples of 8. A
        single seed is the seed of the whole batch, as in ComfyUI, and gives each image different noise; with several
        seeds each image gets the noise that it would get alone. `image` is the image to start from (with `denoise`
        below 1); it is kept where `mask` is black. `controls`, `regions` and `references` (PIL images or paths) are
        those of all images, or a sequence of them for each image. `params` are the fields of `SamplingParams`: steps,
        guidance_scale, sampler, schedule, shift, denoise, noise and others; the sampler's options, such as eta, may be
        given as they are. `progress` shows a progress bar. Raises UserError for a value out of range or an unknown
        name.
        """
        inputs = {
            "controls": controls,
            "references": given_references(references),
            "regions": [regions] if isinstance(regions, Region) else regions,
        }
        requests = batch_of_requests(prompt, width, height, seed, batch_size, **inputs)
        settings = SamplingParams.named({"negative_prompt": negative_prompt, **params})
        return self.draw(requests, settings, image=image, mask=mask, callback=ProgressBar() if progress else None)

    @standard_mesh()
    def draw(
        self,
        requests: Sequence[ImageRequest],
        params: SamplingParams,
        *,
        image: Image.Image | None = None,
        mask: Image.Image | None = None,
        callback: ProgressCallback | None = None,
    ) -> list[Image.Image]:
        """Generate these images in one batch. Raises UserError for invalid requests, parameters, image or mask.

        With a mask, black pixels are the VAE's reconstruction of `image`, unaffected by redrawn pixels next to them, or
        with `paste` those of `image` itself.
        """
        check_requests(requests, params, image, mask)
        original = None if image is None else self.encode_image(to_pixels(image), params.tile)
        redrawn = None if mask is None else mask_values(mask)
        latents = self.draw_latents(
            requests,
            params,
            original=original,
            mask=None if redrawn is None else latent_mask(redrawn),
            callback=callback,
        )
        return self.finish(latents, params, image=image, redrawn=redrawn, original=original)

    @standard_mesh()
    def finish(
        self,
        latents: Sequence[np.ndarray],
        params: SamplingParams,
        *,
        image: Image.Image | None = None,
        redrawn: np.ndarray | None = None,
        original: np.ndarray | None = None,
    ) -> list[Image.Image]:
        """Return the images of sampled latents.

        With the `mask_values` of inpainting, `redrawn`, they keep the rest of `image`, whose latents are `original`.
        """
        pixels = self.decode(latents, params.tile)
        if image is None or redrawn is None or original is None:
            return to_images(pixels)
        if params.paste is not None:
            return [paste_original(drawn, image, redrawn, params.paste) for drawn in to_images(pixels)]
        (kept,) = self.decode([original], params.tile)
        return to_images(np.where(redrawn > 0.0, drawn, kept) for drawn in pixels)

    @standard_mesh()
    def draw_latents(
        self,
        requests: Sequence[ImageRequest],
        params: SamplingParams,
        *,
        original: np.ndarray | Sequence[np.ndarray] | None = None,
        mask: np.ndarray | None = None,
        callback: ProgressCallback | None = None,
    ) -> list[np.ndarray]:
        """Return the images' normalised latents, each (t, y, x, c), sampled from noise or from `original` latents.

        `original` is one array for all images or one for each, for instance what another call returned: with
        `end_at_step` and `return_with_leftover_noise` there, `start_at_step` and no `add_noise` here, both calls are
        one sampling. Where `mask` (1, y, x, 1) is 0, the latents stay equal to `original`.
        """
        if original is None:
            original = [np.zeros((1, *request.latent_size, OUT_CHANNELS), np.float32) for request in requests]
        originals = [original] * len(requests) if isinstance(original, np.ndarray) else list(original)
        sampler, sigmas = samplers.SAMPLERS[params.sampler], params.levels()
        if params.denoise == 0 or not len(sigmas):
            return originals

        by_request = dict(zip(requests, originals, strict=True))
        by_batch = {dataclasses.replace(request, batch_index=0): x for request, x in by_request.items()}

        def drawn(requests: Sequence[ImageRequest], callback: ProgressCallback | None) -> list[np.ndarray]:
            return self.sample(
                self.encode(
                    [*(each.prompt for each in requests), *(own.prompt for each in requests for own in each.regions)]
                ),
                self.encode([params.negative_prompt] * len(requests)),
                BatchNoise(requests, params.noise, sampler, sigmas, add_noise=params.add_noise),
                sigmas,
                params,
                originals=[
                    by_request.get(request, by_batch[dataclasses.replace(request, batch_index=0)])
                    for request in requests
                ],
                references=self._references(
                    [request.references for request in requests],
                    [(request.width, request.height) for request in requests],
                    lambda pixels_tyxc: self.encode_image(pixels_tyxc, params.tile),
                ),
                mask=mask,
                regions=[request.regions for request in requests],
                controls=[request.controls for request in requests],
                callback=callback,
            )

        draw = functools.partial(draw_whole_batches, draw=drawn) if sampler.controller else drawn
        try:
            latents = draw(requests, callback=callback)
            if callback is None and not are_finite(latents):  # Again, to find out where it begins.
                latents = draw(requests, callback=lambda *_: None)
        except FloatingPointError as error:
            raise self.not_finite(str(error)) from None
        return self._checked(latents, "the last evaluation")

    @standard_mesh()
    def encode(self, prompts: Sequence[str]) -> Context:
        """Return the context rows of prompts, which may contain ComfyUI's weights and embeddings.

        Qwen3's states pass through the LLM adapter. Tokens are padded to a multiple of 512 and masked, which does not
        change the rows of real tokens. Raises UserError if a prompt's weight is not finite.
        """
        params = rules.on_devices(self.text_encoder_params)
        contexts = {prompt: self._encode_prompt(params, prompt) for prompt in dict.fromkeys(prompts)}
        for line in {line for prompt in prompts if (line := remark(prompt))} - self._said:
            self._said.add(line)
            print(line, file=sys.stderr)
        return join_contexts(*(contexts[prompt] for prompt in prompts))

    def _encode_prompt(self, text_params: Params, prompt: str) -> Context:
        ids = self.tokenizers.prompt_ids(self._embeddings.spans(prompt))
        if not np.isfinite(ids.t5_weights).all():
            raise UserError(f"prompt '{prompt}': a weight is not a finite number")
        source = padded_prompt(ids, rounded_up(len(ids.qwen_ids), CONTEXT_ROWS))
        target = padded([ids.t5_ids], rounded_up(len(ids.t5_ids), CONTEXT_ROWS))
        weights_bm, _ = padded([ids.t5_weights], target[0].shape[1])
        source, target, weights_bm = replicate((source, target, weights_bm))
        states_bnd = text_states(text_params, *source, graphdef=self._text_graphdef, dtype=text_dtype(self.dtype))
        rows_bmd = context_rows(self.dit_params, states_bnd, source[1], *target, weights_bm, graphdef=self.dit_graphdef)
        length = max(len(ids.t5_ids), CONTEXT_ROWS)
        return Context(rows_bmd, np.array([length], np.int32) if rows_bmd.shape[1] > CONTEXT_ROWS else None)

    @standard_mesh()
    def sample(
        self,
        positive: Context,
        negative: Context,
        noise: BatchNoise,
        sigmas: np.ndarray,
        params: SamplingParams,
        *,
        originals: Sequence[np.ndarray] | None = None,
        references: Sequence[Sequence[np.ndarray]] = (),
        mask: np.ndarray | None = None,
        regions: Sequence[Sequence[Region]] = (),
        controls: Sequence[Sequence[Control]] = (),
        callback: ProgressCallback | None = None,
    ) -> list[np.ndarray]:
        """Return each image's normalised latents (t, y, x, c), float32, sampled along `sigmas`.

        Sampling starts at the first level on the line from `originals` (zeros if None) to `noise`. `references` are the
        latents (1, y, x, c) of each image's reference pictures, of its size. Latents stay `originals` where `mask`
        (1, y, x, 1) is 0. `regions` and `controls` are those of each image; `positive` has the regions' prompts after
        the images'. If the last level σ is above 0, latents are divided by 1 − σ, as in ComfyUI, where another sampling
        multiplies them by it to go on from there.
        """
        packing = TokenPacking([array.shape[:3] for array in noise.start])
        clean = originals or [np.zeros_like(array) for array in noise.start]
        inpaint = None
        if mask is not None:
            masks = [np.broadcast_to(mask, array.shape) for array in clean]
            inpaint = InpaintMask(*map(packing.pack, (masks, clean, noise.outside_mask)))
        rows, clean_frames = None, packed_references(packing, references)
        seen = layout(packing.size_b3, clean_frames)
        if any(regions):
            rows = region_rows(regions, packing, seen, params.base_strength, params.shift)
            negative = jax.tree.map(lambda leaf_b: leaf_b[rows.negative.image_r], negative)
        contexts = join_contexts(negative, positive)
        start = [samplers.start(drawn, sigmas[0], x) for drawn, x in zip(noise.start, clean, strict=True)]
        cache = params.step_cache
        limits = cache and cache.limits(params.shift)
        shared = SharedInputs(packing.size_b3, contexts, params.variants, inpaint, noise.keys_b3, limits)
        steering = self._controls.inputs(controls, packing.size_b3, seen[1], params.shift) if any(controls) else ()
        shared = shared._replace(references=clean_frames, regions=rows, controls=steering)
        caching: Any = {"cache": cache, "savings": self.savings}

        plan_of = functools.partial(plans.plan_of, params, noise_on_device=noise.keys_b3 is not None)
        scale_of = functools.partial(plans.scale_of, params)
        network = self.dit_params, self.dit_graphdef, self.dtype
        if controller := samplers.controller(params.sampler, sigmas, params.sampler_options):
            latents = adaptive.sample(
                *network, controller, plan_of, packing, start, shared, scale_of, noise.step, callback, **caching
            )
        else:
            plan = plan_of(sigmas)
            scale_n = scale_of(plan.sigmas_n)
            latents = program.sample(*network, plan, packing, start, shared, scale_n, noise.step, callback, **caching)
        return plans.completed(latents, clean, mask, params, sigmas)

    @standard_mesh()
    def encode_image(self, pixels_tyxc: np.ndarray, tile: int | None = None) -> np.ndarray:
        """Return the normalised latents (t, y, x, c), float32, of pixels in [−1, 1]; `tile` is that of `decode`."""
        return self._checked([self._vae.encode(pixels_tyxc, tile)], "the latents of the image")[0]

    @standard_mesh()
    def decode(self, latents: Iterable[np.ndarray], tile: int | None = None) -> list[np.ndarray]:
        """Return pixels (t, y, x, 3) in about [−1, 1], float32.

        Each device decodes one image at a time; consecutive images of one size are decoded together. `tile` is the side
        of blended tiles in pixels, 0 for whole images, None for tiles only if an image does not fit the memory.
        """
        return self._checked(self._vae.decode(latents, tile), "the VAE's decoder")

    def _checked(self, arrays: list[np.ndarray], where: str) -> list[np.ndarray]:
        """Return the arrays. Raises NotFiniteError if a value is NaN or infinite."""
        if not are_finite(arrays):
            raise self.not_finite(where)
        return arrays

    def use_transformer(self, params: Params, files: Sequence[PathLike]) -> None:
        """Draw with other parameters of the transformer, of the same structure, which come from `files`."""
        self.dit_params, self._transformer_files = dict(params), list(files)

    def not_finite(self, where: str) -> NotFiniteError:
        """Return the error for values that are not finite, at `where`, and the file that has them if one does."""
        files = [*self._transformer_files, *self._files]
        networks = {"the VAE": self._vae.params, "the text encoder": self.text_encoder_params}
        return not_finite(where, files, {"the transformer": self.dit_params} | networks, self.dtype)


def _described(params: Params) -> str:
    """Return the number of parameters, their dtypes and where they are placed."""
    leaves = jax.tree.leaves(params)
    dtypes = sorted({str(leaf.dtype) for leaf in leaves})
    devices = {device for leaf in leaves if isinstance(leaf, Array) for device in leaf.devices()}
    names = ", ".join(str(device) for device in sorted(devices, key=lambda device: device.id))
    return f"{count(params):,} parameters ({', '.join(dtypes)}) {f'on {names}' if names else 'in host memory'}"
