"""An image's request as the graph of nodes that draws the same image in ComfyUI.

The graph has ComfyUI's API format: id → {class_type, inputs}, where an input is a value or a link [id, output]. Names
and ranges are those of `nodes.py` and `comfy_extras/`. What no node does is named in the second result.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from anima_jax.adapters.merge import MODEL_AND_TEXT_ENCODER, Weight
from anima_jax.diffusion.guidance import scale_schedule
from anima_jax.diffusion.samplers import SAMPLERS
from anima_jax.diffusion.schedules import SCHEDULES
from anima_jax.diffusion.step_cache import StepCache
from anima_jax.sampling.comfyui_controls import write_control
from anima_jax.sampling.comfyui_regions import write_region
from anima_jax.sampling.comfyui_samplers import sampler_node
from anima_jax.sampling.recipe import file_name, model_and_text_encoder
from anima_jax.sampling.request import SamplingParams

Graph = dict[str, dict[str, Any]]
Link = list[str | int]

TEXT_ENCODER_TYPE = "stable_diffusion"
"""The type of CLIPLoader with which ComfyUI's own workflows for Anima load Qwen3 (`image_anima_base_v1.json`)."""

RANGES = {"guidance_scale": (0.0, 100.0), "shift": (0.0, 100.0)}
"""Parameter → what ComfyUI's widgets accept."""

MAX_REUSE_THRESHOLD = 3.0
"""EasyCache's largest threshold."""

KSAMPLER_SCHEDULES = frozenset(SCHEDULES) - {"beta57"}

BETA57 = {"alpha": 0.5, "beta": 0.7}
"""BetaSamplingScheduler's inputs for the schedule `beta57`, which KSampler does not have."""

KSAMPLER_LAST_STEP = 10000
"""KSamplerAdvanced's default for the last step: all steps."""

INTERVAL_STEP = 0.001
"""The step of ConditioningSetTimestepRange's widgets, a fraction of the sampling."""


class GraphWriter:
    """The graph of one image, and what it leaves out."""

    def __init__(
        self,
        values: Mapping[str, Any],
        files: Mapping[str, str],
        loras: Sequence[tuple[str, Weight]],
        mask_channel: str,
    ):
        self.graph: Graph = {}
        self.left_out: list[str] = []
        self._values, self._files, self._loras, self._mask_channel = values, files, loras, mask_channel
        names = [field.name for field in dataclasses.fields(SamplingParams)]
        self._levels = SamplingParams(**{name: values[name] for name in names}).levels()
        self._original: Link | None = None
        self._encoded: Link | None = None
        self._mask: Link | None = None

    def _name_of(self, kind: str) -> str:
        return file_name(self._files.get(kind, ""))

    def add(self, class_type: str, **inputs: Any) -> Link:
        """Add a node and return the link to its first output."""
        key = str(len(self.graph) + 1)
        self.graph[key] = {"class_type": class_type, "inputs": inputs}
        return [key, 0]

    def load(self) -> tuple[Link, Link, Link]:
        """Add the loaders and LoRAs, and return the links to model, text encoder and VAE."""
        if len({self._files.get(kind) for kind in ("transformer", "text_encoder", "vae")}) == 1:
            model = self.add("CheckpointLoaderSimple", ckpt_name=self._name_of("transformer"))
            clip, vae = output(model, 1), output(model, 2)
        else:
            model = self.add("UNETLoader", unet_name=self._name_of("transformer"), weight_dtype="default")
            text_encoder = {"clip_name": self._name_of("text_encoder"), "type": TEXT_ENCODER_TYPE}
            clip = self.add("CLIPLoader", device="default", **text_encoder)
            vae = self.add("VAELoader", vae_name=self._name_of("vae"))
        if self._files.get("adapter"):
            self.left_out.append("the LLM adapter's own file")
        for name, weight in self._loras:
            if isinstance(weight, Mapping) and not set(weight) <= set(MODEL_AND_TEXT_ENCODER):
                self.left_out.append(f"the weights of parts of {file_name(name)}")
            strengths = dict(zip(("strength_model", "strength_clip"), model_and_text_encoder(weight), strict=True))
            model = self.add("LoraLoader", model=model, clip=clip, lora_name=file_name(name), **strengths)
            clip = output(model, 1)
        return self.patched(model), clip, vae

    def patched(self, model: Link) -> Link:
        """Add the nodes that change how the model is sampled, in the order in which they count."""
        values = self._values
        model = self.add("ModelSamplingAuraFlow", model=model, shift=values["shift"])
        if values["apg"]:
            apg = {name: values[f"apg_{name}"] for name in ("eta", "norm_threshold", "momentum")}
            model = self.add("APG", model=model, **apg)
        if values["rescale_cfg"]:
            model = self.add("RescaleCFG", model=model, multiplier=values["rescale_cfg"])
        if values["cfg_zero_star"]:
            model = self.add("CFGZeroStar", model=model)
        if values["cfg_norm"]:
            model = self.add("CFGNorm", model=model, strength=values["cfg_norm"])
        cache = StepCache.parse(values["cache"], values["cache_interval"])
        if cache is not None and (cache.method != "easy" or cache.threshold > MAX_REUSE_THRESHOLD):
            self.left_out.append(f"cache {cache}")
        elif cache is not None:
            ends = dict(zip(("start_percent", "end_percent"), cache.interval, strict=True))
            model = self.add("EasyCache", model=model, reuse_threshold=cache.threshold, **ends, verbose=False)
        for control in values.get("controls", ()):  # They read the shift.
            model, left_out = write_control(self.add, model, control)
            self.left_out += left_out
        return model

    def conditionings(self, clip: Link) -> tuple[Link, Link]:
        """Add the prompts, and return the links to both.

        Outside the guidance interval the positive prompt stands on both sides, so that guidance changes nothing.
        """
        positive = self._with_regions(self.add("CLIPTextEncode", text=self._values["prompt"], clip=clip), clip)
        negative = self.add("CLIPTextEncode", text=self._values["negative_prompt"], clip=clip)
        first, last = self._separated(self._values["guidance_interval"])
        for conditioning, start, end in ((negative, first, last), (positive, 0.0, first), (positive, last, 1.0)):
            if (first, last) == (0.0, 1.0) or (start == end and conditioning is positive):
                continue
            part = self.add("ConditioningSetTimestepRange", conditioning=conditioning, start=start, end=end)
            negative = part if conditioning is negative else self._combined(negative, part)
        return positive, negative

    def _with_regions(self, positive: Link, clip: Link) -> Link:
        """Add the prompts of regions, and return the link to all that are combined."""
        values = self._values
        regions = values.get("regions", ())
        if regions and values["base_strength"] != 1.0:
            strength = float(values["base_strength"])
            positive = self.add("ConditioningSetAreaStrength", conditioning=positive, strength=strength)
        for region in regions:
            prompt = self.add("CLIPTextEncode", text=region.prompt, clip=clip)
            link, left_out = write_region(self.add, region, prompt, (values["width"], values["height"]))
            positive = self._combined(positive, link)
            self.left_out += left_out
        # There ComfyUI evaluates no negative prompt in an area, and a region's range gives way to the interval's.
        if tuple(values["guidance_interval"]) != (0.0, 1.0) and not all(region.is_simple for region in regions):
            self.left_out.append("the guidance interval for regions that are areas or have a range")
        return positive

    def _combined(self, one: Link, other: Link) -> Link:
        return self.add("ConditioningCombine", conditioning_1=one, conditioning_2=other)

    def _separated(self, interval: tuple[float, float]) -> tuple[float, float]:
        """Return the interval with ends at which no step is, because both prompts would count there."""
        levels, shift = self._levels[:-1], self._values["shift"]
        steps = 1.0 - levels / (shift - (shift - 1.0) * levels)
        guided = scale_schedule(levels, 2.0, interval, shift) != 1.0
        ends = list(interval)
        for index, outwards in ((0, -INTERVAL_STEP), (1, INTERVAL_STEP)):
            at_end = np.abs(steps - interval[index]) < INTERVAL_STEP / 10
            if 0.0 < interval[index] < 1.0 and at_end.any():
                moved = interval[index] + (outwards if guided[at_end].any() else -outwards)
                ends[index] = min(max(round(moved, 6), 0.0), 1.0)
        return ends[0], max(ends)

    def latent(self, vae: Link) -> Link:
        """Add the starting point and return the link to it."""
        values, size = self._values, {name: self._values[name] for name in ("width", "height")}
        batch = values["batch_size"]
        if not self._files.get("image"):
            return self.add("EmptyLatentImage", **size, batch_size=batch)
        scale = {"upscale_method": "lanczos", "crop": "center", **size}
        self._original = self.add("ImageScale", image=self.add("LoadImage", image=self._name_of("image")), **scale)
        latent = self._encoded = self.add("VAEEncode", pixels=self._original, vae=vae)
        if self._files.get("mask"):
            mask = self.add("LoadImageMask", image=self._name_of("mask"), channel=self._mask_channel)
            mask = self.add("ImageScale", image=self.add("MaskToImage", mask=mask), **scale)
            self._mask = self.add("ImageToMask", image=mask, channel="red")
            latent = self.add("SetLatentNoiseMask", samples=latent, mask=self._mask)
        return self.add("RepeatLatentBatch", samples=latent, amount=batch) if batch > 1 else latent

    def sampled(self, model: Link, positive: Link, negative: Link, latent: Link) -> Link:
        """Add the sampler and return the link to its latents."""
        values = self._values
        common = {"model": model, "positive": positive, "negative": negative, "latent_image": latent}
        common["cfg"] = values["guidance_scale"]
        options = values["sampler_options"]
        node = sampler_node(values["sampler"], options) if options else None
        if options and node is None:
            self.left_out.append(f"options of the sampler: {', '.join(options)}")
        steps = {"sampler_name": values["sampler"], "scheduler": values["schedule"], "steps": values["steps"]}
        is_plain = node is None and not values["sigmas"] and values["schedule"] in KSAMPLER_SCHEDULES
        if values["denoise"] == 0 or (is_plain and not self._is_part()):
            return self.add("KSampler", seed=values["seed"], denoise=values["denoise"], **steps, **common)
        noise = {"noise_seed": values["seed"]}
        if is_plain and values["denoise"] == 1:
            noise["add_noise"] = "enable" if values["add_noise"] else "disable"
            leftover = "enable" if values["return_with_leftover_noise"] else "disable"
            end = KSAMPLER_LAST_STEP if values["end_at_step"] is None else values["end_at_step"]
            part = {"start_at_step": values["start_at_step"], "end_at_step": end}
            return self.add("KSamplerAdvanced", return_with_leftover_noise=leftover, **part, **noise, **steps, **common)
        name, inputs = node or ("KSamplerSelect", {"sampler_name": values["sampler"]})
        sampler = self.add(name, **inputs, **({"model": model} if name == "SamplerSASolver" else {}))
        noise["add_noise"] = values["add_noise"]
        return self.add("SamplerCustom", sampler=sampler, sigmas=self._sigmas(model), **noise, **common)

    def _is_part(self) -> bool:
        """Return whether KSamplerAdvanced's inputs differ from their defaults."""
        values = self._values
        steps = values["start_at_step"] or values["end_at_step"] is not None
        return bool(steps) or not values["add_noise"] or values["return_with_leftover_noise"]

    def _sigmas(self, model: Link) -> Link:
        """Add the noise levels: a schedule if it is one as a whole, else a list of numbers."""
        values = self._values
        if not (values["sigmas"] or self._is_part() or SAMPLERS[values["sampler"]].without_penultimate):
            if values["schedule"] in KSAMPLER_SCHEDULES:
                schedule = {"scheduler": values["schedule"], "denoise": values["denoise"]}
                return self.add("BasicScheduler", model=model, steps=values["steps"], **schedule)
            if values["denoise"] == 1:
                return self.add("BetaSamplingScheduler", model=model, steps=values["steps"], **BETA57)
        numbers = ", ".join(np.format_float_positional(level, trim="0") for level in self._levels)
        return self.add("ManualSigmas", sigmas=numbers)

    def image(self, samples: Link, vae: Link) -> Link:
        """Add what comes after the sampler and return the link to the image."""
        values = self._values
        image = self.add("VAEDecode", samples=samples, vae=vae)
        if values["batch_size"] > 1:
            image = self.add("ImageFromBatch", image=image, batch_index=values["batch_index"], length=1)
        if self._mask is None:
            return image
        if values["paste"]:
            self.left_out.append(f"the {values['paste']} blended pixels of paste")
        mask, original = self._mask, self._original
        if values["paste"] is None:  # where the mask is black, the image as the VAE reconstructs it
            mask = self.add("ThresholdMask", mask=mask, value=0.0)
            original = self.add("VAEDecode", samples=self._encoded, vae=vae)
        where = {"x": 0, "y": 0, "resize_source": False}
        return self.add("ImageCompositeMasked", destination=original, source=image, mask=mask, **where)

    def write(self) -> None:
        """Add all nodes."""
        values = self._values
        for name, (low, high) in RANGES.items():
            if not low <= values[name] <= high:
                self.left_out.append(f"{name} {values[name]}, which is outside of ComfyUI's {low:g} to {high:g}")
        if values["noise"] != "torch-cpu":
            self.left_out.append(f"noise {values['noise']}: ComfyUI's is that of the device that it runs on")
        model, clip, vae = self.load()
        positive, negative = self.conditionings(clip)
        samples = self.sampled(model, positive, negative, self.latent(vae))
        self.add("SaveImage", images=self.image(samples, vae), filename_prefix="anima")


def comfyui_graph(
    values: Mapping[str, Any],
    files: Mapping[str, str],
    loras: Sequence[tuple[str, Weight]],
    mask_channel: str = "red",
) -> tuple[Graph, list[str]]:
    """Return the graph that draws an image in ComfyUI, and what it leaves out of the request.

    `values` are the fields of `ImageRequest` and `SamplingParams`, `files` and `loras` names of files: the graph has
    their last parts, as files are named in ComfyUI's folders. `mask_channel` has the mask's values: red or alpha.
    """
    writer = GraphWriter(values, files, loras, mask_channel)
    writer.write()
    return writer.graph, writer.left_out


def output(link: Link, index: int) -> Link:
    """Return the link to another output of the same node."""
    return [link[0], index]
