"""ComfyUI's graph of an image read back: the nodes that lead to the saved image, as far as this package has them.

A node that is not known is followed by the names of its inputs, and a message names it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from anima_jax.diffusion.step_cache import METHODS, OFF
from anima_jax.errors import UserError
from anima_jax.sampling.comfyui_controls import read_control
from anima_jax.sampling.comfyui_links import MAX_DEPTH, Link, NodeGraph, number_or
from anima_jax.sampling.comfyui_regions import Conditioning, read_regions, settings_of
from anima_jax.sampling.comfyui_samplers import OF_NODE, sampler_of
from anima_jax.sampling.comfyui_sigmas import read_sigmas
from anima_jax.sampling.recipe import Recipe, lora_weight, quoted

IMAGE_LINKS = ("images", "image", "samples", "latent_image", "latent", "pixels", "source", "input", "latents")
CONDITIONING_LINKS = ("conditioning", "conditioning_1", "conditioning_to", "positive", "conditioning_2", "negative")
TEXTS = ("text", "populated_text", "prompt", "text_g", "t5xxl", "clip_l", "string", "text_positive")

PLAIN = re.compile(
    r"vaedecode|reroute|switch|previewimage|saveimage|imagescale$|repeatlatentbatch|torchcompile|sageattention|"
    r"imagefrombatch|setlatentnoisemask|loadimage|vaeencode(tiled)?$|empty.*latent|primitive|masktoimage|imagetomask"
)
"""Classes that need no message: they do not change the image, or what they do is read from their inputs."""


SHIFT = 3.0
"""ComfyUI's for Anima, without a node that sets it."""

PATCHES = {
    "cfgzerostar": {"cfg_zero_star": ""},
    "rescalecfg": {"rescale_cfg": "multiplier"},
    "cfgnorm": {"cfg_norm": "strength"},
    "apg": {"apg": "", "apg_eta": "eta", "apg_norm_threshold": "norm_threshold", "apg_momentum": "momentum"},
}
"""Class of a node that changes guidance → the parameters that it sets, each with the input or "" for True."""

CACHES = {
    "easycache": ("easy", {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95}),
    "applyfbcacheonmodel": ("first_block", {"residual_diff_threshold": 0.0, "start": 0.0, "end": 1.0}),
}
"""Class of a node that is a step cache (the second is Comfy-WaveSpeed's) → our method, and its inputs with defaults."""


class GraphReader(NodeGraph):
    """Reads a graph into a recipe, from the node that saves the image upwards."""

    def read(self) -> Recipe:
        """Return what the graph says. Raises UserError if no sampler leads to a saved image."""
        trail = self._trail()
        samplers = [key for key in trail if self._is_sampler(key)]
        if not samplers:
            raise UserError(f"{self.recipe.path}: no sampler leads to a saved image in its ComfyUI graph")
        first = trail.index(samplers[-1])
        for key in trail[1:first]:
            self._read_finish(key)
        for key in trail[first + 1 :]:
            self._read_start(key)
        self._read_sampler(trail[first])
        for key in samplers[-2::-1]:
            if not self._continues(key, trail[first]):
                self.leave_out(key, "a later pass")
        if self.recipe.loras:
            self.recipe.loading["comfyui_dora"] = True  # as ComfyUI drew the image
        return self.recipe

    def _continues(self, key: str, first: str) -> bool:
        """Read the last step of a KSamplerAdvanced that continues the first one; return whether it is one."""
        inputs, end = self.inputs(key), self.recipe.values.get("end_at_step")
        if inputs.get("add_noise") != "disable" or self.value(key, ("start_at_step",)) != end:
            return False
        self._read_steps(key)
        same = ("model", "positive", "negative", "steps", "cfg", "sampler_name", "scheduler")
        return all(inputs.get(name) == self.inputs(first).get(name) for name in same)

    def _is_sampler(self, key: str) -> bool:
        names = set(self.inputs(key))
        guided = "guider" in names or {"positive", "negative"} <= names
        return guided and bool(names & {"steps", "sigmas"}) and bool(names & {"latent_image", "latent", "samples"})

    def _trail(self) -> list[str]:
        """Return the nodes from the one that saves the image up to where it starts, or none without a sampler."""
        used = {link[0] for key in self.nodes for link in self.links(key).values()}
        saving = [key for key in self.nodes if re.search(r"save.*image|image.*save", self.kind(key))]
        saving += [key for key in self.nodes if key not in used and key not in saving]
        trails = [list(self.chain((key, 0), IMAGE_LINKS)) for key in saving]
        return next((trail for trail in trails if any(map(self._is_sampler, trail))), [])

    def _read_finish(self, key: str) -> None:
        """Read a node between the sampler and the saved image."""
        inputs = self.inputs(key)
        if "vae" in inputs and "vae" not in self.recipe.files:
            self._read_loader("vae", self.link(inputs["vae"]), ("vae",), ("vae_name", "ckpt_name"))
        if "batch_index" in inputs:
            self.set("batch_index", int, key, "batch_index")
        elif "destination" in inputs and "mask" in inputs:
            if not any(
                "vae" in self.kind(found) for found in self.chain(self.link(inputs["destination"]), IMAGE_LINKS)
            ):
                self.recipe.values["paste"] = 0
        elif not PLAIN.search(self.kind(key)) and not self._is_sampler(key):
            self.leave_out(key)

    def _read_start(self, key: str) -> None:
        """Read a node before the sampler: empty latents, or an image to start from and its mask."""
        inputs = self.inputs(key)
        if not {"width", "height"} & set(self.recipe.values):
            for name in ("width", "height"):
                self.set(name, int, key, name, f"empty_latent_{name}")
        if "batch_size" in inputs or "amount" in inputs:
            self.set("batch_size", int, key, "batch_size", "amount")
        if mask := self.link(inputs.get("mask")):
            for found in self.chain(mask, ("mask", "image", "masks")):
                self._read_image("mask", found)
        self._read_image("image", key)

    def _read_image(self, file: str, key: str) -> None:
        if name := self._image_name(key):
            self.recipe.files[file] = name
        if not PLAIN.search(self.kind(key)):
            self.leave_out(key)

    def _image_name(self, key: str) -> str | None:
        """Return the file that a node loads, None if it loads no image."""
        name = self.inputs(key).get("image")
        return re.sub(r" \[(input|output|temp)\]$", "", name) if isinstance(name, str) else None

    def _read_references(self, key: str) -> None:
        """Read the reference pictures of ComfyUI-Cosmos-Reference, whose inputs are numbered latents."""
        links = {name: link for name, link in self.links(key).items() if name != "model"}
        for name in sorted(links):
            found = [self._image_name(node) for node in self.chain(links[name], ("samples", "pixels", "image"))]
            if file := next(filter(None, found), None):
                self.recipe.references.append((file, ""))
            else:
                self.leave_out(key, f"whose {quoted(name)} is not the latents of an image file")

    def _read_sampler(self, key: str) -> None:
        inputs = self.inputs(key)
        guider = self._end(key, "guider")[0]
        noise = self._end(key, "noise")[0]
        if "disable" in self.kind(noise):
            self.recipe.values["add_noise"] = False
        else:
            self.set("seed", int, noise, "seed", "noise_seed")
        self._read_sampler_object(self._end(key, "sampler")[0])
        self._read_steps(key)
        guided = self.inputs(guider)
        if not self.set("guidance_scale", float, guider, "cfg") and "negative" not in guided:
            self.recipe.values["guidance_scale"] = 1.0  # BasicGuider
        positive = next(
            (link for name in ("positive", "conditioning", "cond1") if (link := self.link(guided.get(name)))), None
        )
        encoder = self._read_prompts(positive, self.link(guided.get("negative")))
        clip = self.link(self.inputs(encoder).get("clip")) if encoder else None
        self._read_model(self.link(guided.get("model", inputs.get("model"))), clip)
        self.recipe.values |= read_sigmas(self, self._end(key, "sigmas"), self.recipe.values.get("shift", SHIFT))

    def _end(self, key: str, name: str) -> Link:
        """Return the link of a sampler's input past nodes that only pass it on, or one to the sampler itself."""
        link = self.link(self.inputs(key).get(name))
        for _ in range(MAX_DEPTH):
            if not link or not re.search(r"reroute|switch", self.kind(link[0])):
                break
            link = self.next(link[0], (name,))
        return link or (key, 0)

    def _read_steps(self, key: str) -> None:
        """Read KSamplerAdvanced's part of the steps, and whether noise is added."""
        inputs, values = self.inputs(key), self.recipe.values
        if inputs.get("add_noise") in ("disable", False) and "add_noise" not in values and "seed" in values:
            values["add_noise"] = False
        values.pop("end_at_step", None)
        if self.value(key, ("start_at_step",)) and "start_at_step" not in values:
            self.set("start_at_step", int, key, "start_at_step")
        steps = number_or(self.value(key, ("steps",)), 0)
        if "end_at_step" in inputs and number_or(self.value(key, ("end_at_step",)), steps) < steps:
            self.set("end_at_step", int, key, "end_at_step")
        values.pop("return_with_leftover_noise", None)
        if inputs.get("return_with_leftover_noise") == "enable":
            values["return_with_leftover_noise"] = True

    def _read_sampler_object(self, key: str) -> None:
        if self.kind(key) in OF_NODE:
            inputs = {name: self.value(key, (name,)) for name in self.inputs(key) if name != "model"}
            sampler, options, left = sampler_of(self.kind(key), inputs)
            self.recipe.values |= {"sampler": sampler, "sampler_options": options}
            for name in left:
                self.leave_out(key, f"whose {quoted(name)} has no equivalent here")
        elif not self.set("sampler", str, key, "sampler_name"):
            self.leave_out(key)

    # Prompts

    def _read_prompts(self, positive: Link | None, negative: Link | None) -> str | None:
        """Set both prompts, regions and the guidance interval, and return the node that encodes the positive one."""
        found = self._prompts(positive)
        if not found:
            self.recipe.messages.append("its prompt is not in its ComfyUI graph")
            return None
        texts = {each.text for each in found}
        others = [each for each in self._prompts(negative) if each.text not in texts]
        first = others[0] if others else Conditioning("", "", {})
        read_regions(self, found)
        self.recipe.values["negative_prompt"] = first.text
        if first.range != (0.0, 1.0):
            self.recipe.values["guidance_interval"] = first.range
        if any(each.text != first.text for each in others):
            self.recipe.messages.append(f"{len(others)} negative prompts are combined, the first is taken")
        if {"area", "mask"} & set(first.settings):
            self.leave_out(first.encoder, "whose negative prompt counts in the whole image here")
        return found[0].encoder

    def _prompts(
        self, link: Link | None, settings: Mapping[str, Any] | None = None, depth: int = 0
    ) -> list[Conditioning]:
        """Return the prompts of a conditioning; `settings` are those of the nodes after it."""
        settings = settings or {}
        if link is None or depth > MAX_DEPTH:
            return []
        key, index = link
        inputs, kind = self.inputs(key), self.kind(key)
        if self.link(inputs.get("clip")) and isinstance(text := self.value(key, TEXTS), str):
            return [Conditioning(text, key, settings)]
        if {"positive", "negative"} <= set(inputs):  # ControlNetApplyAdvanced: its outputs are in this order
            self.leave_out(key)
            value = inputs["negative" if index == 1 else "positive"]
            return self._prompts(self.link(value), settings, depth + 1)
        if "combine" in kind:
            links = self.links(key).values()
            return [part for link in links for part in self._prompts(link, settings, depth + 1)]
        own = settings_of(self, key, lambda key: PLAIN.search(self.kind(key)) is not None)
        if own is None and not PLAIN.search(kind):
            self.leave_out(key)
        return self._prompts(self.next(key, CONDITIONING_LINKS), {**(own or {}), **settings}, depth + 1)

    # Networks

    def _read_loader(self, file: str, link: Link | None, links: Sequence[str], names: Sequence[str]) -> list[str]:
        """Set a file from the loader at the end of a chain, and return the nodes of the chain."""
        chain = list(self.chain(link, links))
        for key in chain:
            if isinstance(name := self.value(key, names), str):
                self.recipe.files[file] = name
                break
        return chain

    def _read_model(self, link: Link | None, clip: Link | None) -> None:
        """Read transformer, text encoder, LoRAs and what changes the sampling."""
        models = self._read_loader("transformer", link, ("model",), ("unet_name", "ckpt_name", "gguf_name"))
        clips = self._read_loader("text_encoder", clip, ("clip",), ("clip_name", "clip_name1", "ckpt_name"))
        for key in [*(key for key in clips if key not in models), *models][::-1]:
            for name, model, text_encoder in self._loras(key):
                weight = lora_weight(model if key in models else 0.0, text_encoder if key in clips else 0.0)
                self.recipe.loras.append((name, weight))
        for key in [*models, *(key for key in clips if key not in models)]:
            self._read_patch(key)
            if self.inputs(key).get("weight_dtype", "default") != "default":
                self.leave_out(key, "which rounds the weights")

    def _loras(self, key: str) -> Iterator[tuple[str, float, float]]:
        """Yield name and strengths, of the model and the text encoder, for each LoRA of a node."""
        if isinstance(name := self.value(key, ("lora_name",)), str) and name != "None":
            model = number_or(self.value(key, ("strength_model", "lora_model_strength", "strength")), 1.0)
            yield name, model, number_or(self.value(key, ("strength_clip", "lora_clip_strength")), model)
        for row in self.inputs(key).values():  # rgthree's Power Lora Loader
            if isinstance(row, Mapping) and isinstance(name := row.get("lora"), str) and row.get("on"):
                model = number_or(row.get("strength"), 1.0)
                yield name, model, number_or(row.get("strengthTwo"), model)

    def _read_cache(self, key: str) -> None:
        """Read a step cache. A threshold of 0 and an interval that is empty turn it off, as in ComfyUI."""
        method, inputs = CACHES[self.kind(key)]
        threshold, start, end = (number_or(self.value(key, (name,)), default) for name, default in inputs.items())
        is_on = threshold > 0 and start <= end
        self.recipe.values["cache"] = f"{method}:{threshold!r}" if is_on else OFF
        if is_on and (start, end) != METHODS[method].interval:
            self.recipe.values["cache_interval"] = (start, end)
        if self.value(key, ("max_consecutive_cache_hits",)) not in (None, -1):
            self.leave_out(key, "whose max_consecutive_cache_hits has no equivalent here")

    def _read_patch(self, key: str) -> None:
        """Read a node between a loader and the sampler; the nearest to the sampler counts."""
        kind, inputs = self.kind(key), self.inputs(key)
        if "modelsampling" in kind and "shift" in inputs:
            if "shift" not in self.recipe.values:
                self.set("shift", float, key, "shift")
        elif kind in PATCHES:
            self.recipe.values |= {field: True for field in PATCHES[kind] if PATCHES[kind][field] == ""}
            for field, name in PATCHES[kind].items():
                if name:
                    self.set(field, float, key, name)
        elif kind in CACHES:
            if "cache" not in self.recipe.values:
                self._read_cache(key)
        elif kind == "animallliteapply":
            read_control(self, key)
        elif kind == "applycosmosreferencelatent":
            if not self.recipe.references:
                self._read_references(key)
        elif kind == "cfgoverride" and self.value(key, ("cfg",)) == 1:
            start, end = (number_or(self.value(key, (name,)), 0.0) for name in ("start_percent", "end_percent"))
            first, last = self.recipe.values.get("guidance_interval", (0.0, 1.0))
            self.recipe.values["guidance_interval"] = (end, last) if start <= first else (first, start)
        elif not any(self._loras(key)) and not PLAIN.search(kind) and not re.search(r"load", kind):
            self.leave_out(key)


def from_comfyui(path: str, graph: Mapping[str, Any]) -> Recipe:
    """Return what ComfyUI's graph, in API format, says. Raises UserError if no sampler leads to a saved image."""
    for wrapper in ("output", "prompt"):  # as the frontend has it beside `workflow`, and as it is sent to the server
        if isinstance(graph.get(wrapper), Mapping) and "class_type" not in graph[wrapper]:
            graph = graph[wrapper]
    if isinstance(graph.get("nodes"), Sequence) and "links" in graph:
        raise UserError(f"{path}: a workflow of ComfyUI's editor, expected its API format (File, Export (API))")
    return GraphReader(path, graph).read()
