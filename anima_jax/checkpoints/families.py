"""What a safetensors file contains if it is not Anima's: the family of a model or adapter, by names and shapes.

Tools write the same module with dots or underscores and under many prefixes, so names are compared with a dot for every
`.` and `_`. Sources: ComfyUI's `model_detection.py` and `lora.py`, diffusers' `lora_conversion_utils.py`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from anima_jax.adapters.kinds import adapter_kind

_UNET = (
    r"\b(input|output|middle|down|up|mid)\.blocks?\.(\d+\.)*(attentions|resnets|transformer\.blocks|in\.layers|1\.proj)"
)
_LLM = r"\blayers\.\d+\.(input\.layernorm|self\.attn\.q\.proj)\b"

FAMILIES: tuple[tuple[str, str], ...] = (
    # Control networks and other files that are neither a model nor its adapter.
    ("an Anima ControlNet-LLLite control network", r"^lllite\.(dit|conditioning1|modules)\."),
    ("an SDXL ControlNet-LLLite control network", r"^lllite\.unet\."),
    ("a VACE control network of Wan", r"\bvace\.(blocks|patch)"),
    (
        "a ControlNet",
        r"\bcontrol(net)?\.(model|blocks|cond|down|mid|add|x\.embedder|mode|net)|\b(input\.hint\.block|zero\.convs)\b",
    ),
    ("an IP-Adapter", r"\b(ip\.adapter|image\.proj(\.model)?)\.|\bto\.[kv]\.ip\b"),
    ("an AnimateDiff motion module", r"\bmotion\.modules\."),
    ("the semantic connector of Anima-3.8B v1.1", r"\b(anima\.v2\.connector|semantic\.resampler|quality\.anchor)\."),
    # Transformers.
    ("Chroma", r"\bdistilled\.guidance\.layer\."),
    ("Flux.2", r"\b(double|single)\.stream\.modulation\b|\bto\.qkv\.mlp\.proj\b"),
    (
        "HunyuanVideo",
        r"\bindividual\.token\.refiner\b|\bdouble\.blocks\.\d+\.(img|txt)\.mlp\.fc[12]\b|\bdouble\.blocks\.(19|[2-9]\d)\.",
    ),
    ("Kandinsky 5", r"\b(visual|text)\.transformer\.blocks\.\d"),
    ("AuraFlow", r"\b(double|single)\.layers\.\d|\bjoint\.transformer\.blocks\.\d"),
    ("HiDream", r"\b(double|single)\.stream\.blocks\.\d"),
    (
        "Qwen-Image",
        r"(?<!single\.)\btransformer\.blocks\.(\d+\.(img|txt)\.(mod|mlp)|(3[89]|[45]\d)\.attn\.(add|to))\b",
    ),
    ("Flux", r"\bdouble\.blocks\.\d+\.(img|txt)|\bsingle\.(transformer\.)?blocks\.\d"),
    (
        "Stable Diffusion 3",
        r"\bjoint\.blocks\.\d|\btransformer\.blocks\.\d+\.(attn2?\.(add|to\.add)|ff\.context|norm1\.context)",
    ),
    ("LTX-Video", r"\bpatchify\.proj\b|\baudio\.(attn|to\.video)"),
    ("PixArt", r"\bscale\.shift\.table\b(?=[\s\S]*\b(adaln\.single|y\.embedder))|\bcross\.attn\.(q|kv)\.linear\b"),
    ("Sana", r"\bff\.conv\.(inverted|depth|point)|\bmlp\.(inverted|depth|point)\.conv"),
    ("HunyuanDiT", r"\battn[12]\.(Wqkv|q\.proj|kv\.proj)\b|\bmlp\.t5\."),
    ("Mochi", r"\bblocks\.\d+\.attn\.(qkv|proj)\.[xy]\b"),
    ("Wan", r"\bblocks\.\d+\.((self|cross)\.attn\.[qkvo]\b(?!\.(proj|norm))|attn[12]\.to\.[qkv]\b|ffn\.(net|0|2)\b)"),
    ("CogVideoX", r"\btransformer\.blocks\.\d+\.norm[12]\.linear\.(weight|lora|bias)|\bpatch\.embed\.text\.proj\b"),
    ("Cosmos 1", r"\bblocks\.block\d+\."),
    ("Stable Cascade", r"\bclip\.txt\.pooled\.mapper\b|\bdown\.blocks\.\d+\.\d+\.channelwise\b"),
    ("OmniGen2", r"\bref\.image\.refiner\b"),
    ("Lumina 2 or Z-Image", r"\blayers\.\d+\.(attention\.|feed\.forward\.w|adaLN)|\b(noise|context)\.refiner\.\d"),
    # UNets; see `_unet` for which.
    ("UNet", _UNET),
    # Text encoders and VAEs.
    ("a Qwen3.5 text encoder, which only the connector of Anima-3.8B v1.1 uses", r"\blayers\.\d+\.linear\.attn\."),
    ("a T5 text encoder", r"\bblock\.\d+\.layer\.\d\.(SelfAttention|DenseReluDense)\."),
    ("a CLIP vision encoder", r"\bvision\.model\.(encoder|embeddings)\.|\bvisual\.transformer\.resblocks\."),
    ("a CLIP text encoder", r"\btext\.model\.(encoder|embeddings)\.|\btransformer\.resblocks\."),
    ("a BERT text encoder", r"\bencoder\.layer\.\d+\.attention\.self\."),
    ("a vision-language model", rf"{_LLM}(?=[\s\S]*\bvisual\.)|\bvisual\.(?=[\s\S]*{_LLM})"),
    ("a Gemma text encoder", r"\blayers\.\d+\.pre\.feedforward\.layernorm\b"),
    ("a Qwen2 or Qwen2.5 text encoder", r"\blayers\.\d+\.self\.attn\.q\.proj\.bias\b"),
    ("a Qwen3 text encoder", r"\blayers\.\d+\.self\.attn\.q\.norm\b"),
    ("a Llama or Mistral text encoder", _LLM),
    ("the VAE of Wan 2.2", r"\bencoder\.downsamples\.\d+\.downsamples\."),
    ("the VAE of LTX-Video", r"\b(down|up)\.blocks\.\d+\.res\.blocks\."),
    ("a VAE of Stable Diffusion or Flux", r"\bdecoder\.(up\.\d+\.block|up\.blocks\.\d+\.resnets)\."),
    ("a tiny VAE (TAESD)", r"^(taes?d?\w*\.)?((en|de)coder\.)?(layers\.)?\d+\.conv\.\d"),
    ("an upscaler", r"\b(RDB\d|rdb\d)\.|\bupsampler?\.\d\.weight|^layers\.\d+\.residual\.group\."),
)
"""(what the file contains, pattern for one of its names); the first match applies."""

_CROSS_WIDTHS = {768: "Stable Diffusion 1.5", 1024: "Stable Diffusion 2", 2048: "SDXL"}
"""Width of the text states that a UNet's cross-attention reads → family."""

_EMBEDDING = re.compile(r"emb_params|clip_[lgh]|t5xxl|qwen3_06b|string_to_param\.\*|<[^>]*>")

Shapes = Mapping[str, tuple[int, ...]]


def family(shapes: Shapes) -> str | None:
    """Return what a file with tensors of these `shapes` contains, such as "Flux (LoRA)"; None if it is not known.

    Names of Anima's own networks match no row: for these, see `networks.locate`.
    """
    if 0 < len(shapes) <= 4 and all(_EMBEDDING.fullmatch(name) for name in shapes):
        return "a textual-inversion embedding, expected under a name in a prompt"
    text = "\n".join(_dotted(name) for name in shapes)
    found = next((title for title, pattern in FAMILIES if re.search(pattern, text, re.MULTILINE)), None)
    if found is None:
        found = _cosmos(shapes)
    if found == "UNet":
        found = _unet(text, shapes)
    if found is None or found.startswith(("a ", "an ", "the ")):
        return found
    kind = adapter_kind(shapes)
    return f"{found} ({kind.title if kind else 'a model'})"


def _dotted(name: str) -> str:
    return re.sub(r"[._]+", ".", name)


def _unet(text: str, shapes: Shapes) -> str:
    """Return which Stable Diffusion a UNet or its adapter belongs to, from its cross-attention and text encoders."""
    widths = _widths(shapes, r"attn2\.to\.[kv]\.(weight|lora\.(A|down)\b.*)$")
    is_xl = re.search(
        r"\b(te2|label\.emb|add\.embedding|text\.encoder\.2|embedders\.1)\b|\.transformer\.blocks\.[2-9]\.", text
    )
    return next(filter(None, map(_CROSS_WIDTHS.get, widths)), "SDXL" if is_xl else "Stable Diffusion (a UNet)")


def _cosmos(shapes: Shapes) -> str | None:
    """Return the size of a Cosmos-Predict2 model or adapter, whose names are Anima's, if it has another width."""
    widths = _widths(shapes, r"\bblocks\.\d+\.self\.attn\.[qkv]\.proj\.(weight|lora\.(A|down)\b.*)$")
    return "Cosmos-Predict2 14B" if 5120 in widths else None


def _widths(shapes: Shapes, pattern: str) -> Iterable[int]:
    """Return the input widths of the matrices whose names match."""
    return {shape[1] for name, shape in shapes.items() if len(shape) > 1 and re.search(pattern, _dotted(name))}


def from_metadata(metadata: Mapping[str, Any]) -> str | None:
    """Return the base model that a file's header names, if it is not Anima; None if it names none."""
    keys = ("modelspec.architecture", "ss_base_model_version", "base_model", "general.architecture")
    named = next((str(metadata[key]) for key in keys if metadata.get(key)), "")
    return named[:80] if named and "anima" not in named.lower() else None
