"""An image's request as the graph of nodes that draws the same image in ComfyUI.

The graph has ComfyUI's API format: id → {class_type, inputs}, where an input is a value or a link [id, output]. Names
and ranges are those of `nodes.py` and `comfy_extras/`. What no node does is named in the second result.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from anima_jax.sampling.comfyui_samplers import sampler_node
from anima_jax.sampling.recipe import model_and_text_encoder
from anima_jax.sampling.request import SamplingParams

Graph = dict[str, dict[str, Any]]
Link = list[str | int]

TEXT_ENCODER_TYPE = "stable_diffusion"
"""The type of CLIPLoader with which ComfyUI's own workflows for Anima load Qwen3 (`image_anima_base_v1.json`)."""

RANGES = {"guidance_scale": (0.0, 100.0), "shift": (0.0, 100.0)}
"""Parameter → what ComfyUI's widgets accept."""

BY_HAND = ("sigmas", "start_at_step", "end_at_step", "add_noise", "return_with_leftover_noise")
"""Parameters that KSampler does not have: the graph lists the noise levels then."""

LEVELS = ("sampler", "schedule", "steps", "shift", "denoise", *BY_HAND)
"""Parameters that determine the noise levels."""

INTERVAL_STEP = 0.001
"""The step of ConditioningSetTimestepRange's widgets, a fraction of the sampling."""


class GraphWriter:
    """The graph of one image, and what it leaves out."""

    def __init__(self, values: Mapping[str, Any], files: Mapping[str, str], loras: Sequence[tuple[str, Any]]):
        self.graph: Graph = {}
        self.left_out: list[str] = []
        self._values, self._files, self._loras = values, files, loras

    def add(self, class_type: str, **inputs: Any) -> Link:
        """Add a node and return the link to its first output."""
        key = str(len(self.graph) + 1)
        self.graph[key] = {"class_type": class_type, "inputs": inputs}
        return [key, 0]

    def load(self) -> tuple[Link, Link, Link]:
        """Add the loaders and LoRAs, and return the links to model, text encoder and VAE."""
        names = {kind: file_name(self._files.get(kind, "")) for kind in ("transformer", "text_encoder", "vae")}
        if len({self._files.get(kind) for kind in names}) == 1:
            model = self.add("CheckpointLoaderSimple", ckpt_name=names["transformer"])
            clip, vae = output(model, 1), output(model, 2)
        else:
            model = self.add("UNETLoader", unet_name=names["transformer"], weight_dtype="default")
            clip = self.add("CLIPLoader", clip_name=names["text_encoder"], type=TEXT_ENCODER_TYPE, device="default")
            vae = self.add("VAELoader", vae_name=names["vae"])
        if self._files.get("adapter"):
            self.left_out.append("the LLM adapter's own file")
        for name, weight in self._loras:
            if isinstance(weight, Mapping) and not set(weight) <= {"", "text_encoder"}:
                self.left_out.append(f"the weights of parts of {file_name(name)}")
            strengths = dict(zip(("strength_model", "strength_clip"), model_and_text_encoder(weight), strict=True))
            model = self.add("LoraLoader", model=model, clip=clip, lora_name=file_name(name), **strengths)
            clip = output(model, 1)
        return self.patched(model), clip, vae

    def patched(self, model: Link) -> Link:
        """Add the nodes that change how the model is sampled."""
        model = self.add("ModelSamplingAuraFlow", model=model, shift=self._values["shift"])
        values = self._values
        if values["apg"]:
            apg = {name: values[f"apg_{name}"] for name in ("eta", "norm_threshold", "momentum")}
            model = self.add("APG", model=model, **apg)
        if values["rescale_cfg"]:
            model = self.add("RescaleCFG", model=model, multiplier=values["rescale_cfg"])
        if values["cfg_zero_star"]:
            model = self.add("CFGZeroStar", model=model)
        if values["cfg_norm"]:
            model = self.add("CFGNorm", model=model, strength=values["cfg_norm"])
        return model

    def conditionings(self, clip: Link) -> tuple[Link, Link]:
        """Add the prompts, and return the links to both.

        Outside the guidance interval the positive prompt stands on both sides, so that guidance changes nothing.
        """
        positive = self.add("CLIPTextEncode", text=self._values["prompt"], clip=clip)
        negative = self.add("CLIPTextEncode", text=self._values["negative_prompt"], clip=clip)
        first, last = self._separated(self._values["guidance_interval"])
        for conditioning, start, end in ((negative, first, last), (positive, 0.0, first), (positive, last, 1.0)):
            if (first, last) == (0.0, 1.0) or (start == end and conditioning is positive):
                continue
            part = self.add("ConditioningSetTimestepRange", conditioning=conditioning, start=start, end=end)
            negative = part if conditioning is negative else self._combined(negative, part)
        return positive, negative

    def _combined(self, one: Link, other: Link) -> Link:
        return self.add("ConditioningCombine", conditioning_1=one, conditioning_2=other)

    def _separated(self, interval: tuple[float, float]) -> tuple[float, float]:
        """Return the interval with ends at which no step is, because both prompts would count there."""
        levels = self.levels()[:-1]
        steps = 1.0 - levels / (self._values["shift"] - (self._values["shift"] - 1.0) * levels)
        first, last = interval
        if first > 0.0 and np.abs(steps - first).min() < INTERVAL_STEP / 10:
            first = max(round(first - INTERVAL_STEP, 6), 0.0)
        if last < 1.0 and np.abs(steps - last).min() < INTERVAL_STEP / 10:
            last = min(round(last + INTERVAL_STEP, 6), 1.0)
        return first, last

    def levels(self) -> np.ndarray:
        """Return the noise levels of the image's steps, with the last one."""
        return SamplingParams(**{name: self._values[name] for name in LEVELS}).levels()

    def latent(self, vae: Link) -> Link:
        """Add the starting point and return the link to it."""
        values, size = self._values, {name: self._values[name] for name in ("width", "height")}
        batch = values["batch_size"]
        if not self._files.get("image"):
            return self.add("EmptyLatentImage", **size, batch_size=batch)
        image = self.add("LoadImage", image=file_name(self._files["image"]))
        image = self.add("ImageScale", image=image, upscale_method="lanczos", crop="center", **size)
        latent = self.add("VAEEncode", pixels=image, vae=vae)
        if mask := self._files.get("mask"):
            mask = self.add("LoadImageMask", image=file_name(mask), channel=self._values.get("mask_channel", "red"))
            latent = self.add("SetLatentNoiseMask", samples=latent, mask=mask)
            self.left_out.append("the original's pixels, as the VAE reconstructs them, where the mask is black")
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
        # No node has these schedules, or both a denoise and a first step.
        by_hand = values["schedule"] == "beta57" or any(
            values[name] != getattr(SamplingParams, name) for name in BY_HAND
        )
        if not by_hand and node is None:
            return self.add(
                "KSampler",
                seed=values["seed"],
                steps=values["steps"],
                sampler_name=values["sampler"],
                scheduler=values["schedule"],
                denoise=values["denoise"],
                **common,
            )
        name, inputs = node or ("KSamplerSelect", {"sampler_name": values["sampler"]})
        sampler = self.add(name, **inputs, **({"model": model} if name == "SamplerSASolver" else {}))
        if by_hand:
            numbers = ", ".join(np.format_float_positional(level, trim="0") for level in self.levels())
            levels = self.add("ManualSigmas", sigmas=numbers)
        else:
            schedule = {"scheduler": values["schedule"], "steps": values["steps"], "denoise": values["denoise"]}
            levels = self.add("BasicScheduler", model=model, **schedule)
        noise = {"add_noise": values["add_noise"], "noise_seed": values["seed"]}
        return self.add("SamplerCustom", sampler=sampler, sigmas=levels, **noise, **common)

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
        image = self.add("VAEDecode", samples=samples, vae=vae)
        if values["batch_size"] > 1:
            image = self.add("ImageFromBatch", image=image, batch_index=values["batch_index"], length=1)
        self.add("SaveImage", images=image, filename_prefix="anima")


def comfyui_graph(
    values: Mapping[str, Any], files: Mapping[str, str], loras: Sequence[tuple[str, Any]]
) -> tuple[Graph, list[str]]:
    """Return the graph that draws an image in ComfyUI, and what it leaves out of the request.

    `values` are the fields of `ImageRequest` and `SamplingParams`, `files` and `loras` names of files: the graph has
    their last parts, as files are named in ComfyUI's folders.
    """
    writer = GraphWriter(values, files, loras)
    writer.write()
    return writer.graph, writer.left_out


def output(link: Link, index: int) -> Link:
    """Return the link to another output of the same node."""
    return [link[0], index]


def file_name(path: Any) -> str:
    """Return the last part of a path or an address."""
    return re.split(r"[\\/]", str(path))[-1]
