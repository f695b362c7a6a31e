"""What a safetensors file contains if it is not Anima's: the family of a model or adapter, by names and shapes.

Tools write the same module with dots or underscores and under many prefixes, so names are compared with a dot for every
`.` and `_`; only `transformer_blocks` stays one word (`tblocks`), to tell it from `blocks` in a module `transformer`.
Sources: ComfyUI's `model_detection.py` and `lora.py`, and the state dicts of diffusers' models.
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any

from anima_jax.adapters.kinds import adapter_kind

_LLM = r"\blayers\.\d+\.(input\.layernorm|self\.attn\.q\.proj)\b"
_OF_UNET = "a UNet of Stable Diffusion"

FAMILIES: tuple[tuple[str, ...], ...] = (
    # Files that are neither a model nor its adapter.
    ("an older Anima ControlNet-LLLite control network, of another architecture", r"^lllite\.modules\."),
    ("an Anima ControlNet-LLLite control network, for --control", r"^lllite\.(dit|conditioning1)\."),
    ("an SDXL ControlNet-LLLite control network", r"^lllite\.unet\."),
    ("a VACE control network of Wan", r"\bvace\.(blocks|patch)"),
    ("an IP-Adapter", r"\b(ip\.adapter|image\.proj(\.model)?)\.|\bto\.[kv]\.ip\b"),
    ("a T2I-Adapter", r"^adapter\.body\.|^body\.\d+\.(in\.conv|block1)\."),
    ("an AnimateDiff motion module", r"\bmotion\.modules\."),
    (
        "a ControlNet",
        r"\bcontrol(net)?\.(model|(single\.)?t?blocks|layers|cond|down|mid|add|all|noise|patch|mask|x\.embedder|mode|net|img"
        r"|proj)\b|\b(input\.hint\.block|zero\.convs)\b",
    ),
    ("the semantic connector of Anima-3.8B v1.1", r"\banima\.v2\.connector\.|^(semantic\.resampler|quality\.anchor)\."),
    # UNets: `_unet` tells which.
    (
        _OF_UNET,
        r"(?<!coder\.)\b(input|output|middle|down|up|mid)\.blocks?\.(\d+\.)*(attentions|resnets|tblocks|in\.layers|1\.proj)",
    ),
    ("Stable Cascade", r"\bclip\.txt\.pooled\.mapper\b|\b(down|up)\.blocks\.\d+\.\d+\.(channelwise|attention)\b"),
    # Transformers.
    ("Chroma", r"\bdistilled\.guidance\.layer\."),
    ("Flux.2", r"\b(double|single)\.stream\.modulation\b|\bto\.qkv\.mlp\.proj\b"),
    (
        "HunyuanVideo",
        r"\b(individual\.)?token\.refiner\.|\bdouble\.blocks\.(\d+\.(img|txt)\.mlp\.fc[12]\b|(19|[2-9]\d)\.)"
        r"|\bsingle\.(t?blocks)\.(3[89]|[4-9]\d)\.",
    ),
    ("Kandinsky 5", r"\b(visual|text)\.tblocks\.\d"),
    (
        "AuraFlow",
        r"\b(double|single)\.layers\.\d|\b(joint|single)\.tblocks\.\d+\.(attn\.add|ff\.(linear|out))|\bjoint\.tblocks\.\d",
    ),
    ("HiDream", r"\b(double|single)\.stream\.blocks\.\d"),
    ("Qwen-Image", r"(?<!single\.)\btblocks\.(\d+\.(img|txt)\.(mod|mlp)\b|(3[89]|[45]\d)\.attn\.(add|to)\b)"),
    ("Flux", r"\bdouble\.blocks\.\d+\.(img|txt)|\bsingle\.t?blocks\.\d"),
    ("Mochi", r"\btblocks\.\d+\.attn1\.(add|to\.add)\b|\bblocks\.\d+\.attn\.(qkv|proj)\.[xy]\b"),
    ("Stable Diffusion 3", r"\bjoint\.blocks\.\d|\btblocks\.\d+\.(attn2?\.(add|to\.add)\b|ff\.context|norm1\.context)"),
    ("LTX-Video", r"\bpatchify\.proj\b|\baudio\.(attn|to\.video)"),
    ("Sana", r"\bff\.conv\.(inverted|depth|point)|\bmlp\.(inverted|depth|point)\.conv"),
    ("PixArt", r"\b(adaln\.single|y\.embedder)\.|\bcross\.attn\.(q|kv)\.linear\b"),
    ("LTX-Video", r"\btblocks\.\d+\.scale\.shift\.table\b"),
    ("HunyuanDiT", r"\battn[12]\.(Wqkv|q\.proj|kv\.proj)\b|\bmlp\.t5\.|\bblocks\.\d+\.skip\.(linear|norm)\b"),
    ("CogVideoX", r"\btblocks\.\d+\.norm[12]\.linear\.(weight|lora|bias)|\bpatch\.embed\.text\.proj\b"),
    ("Wan", r"\bblocks\.\d+\.((self|cross)\.attn\.[qkvo]\b(?!\.(proj|norm))|attn[12]\.to\.[qkv]\b|ffn\.(net|0|2)\b)"),
    ("Cosmos 1", r"\bblocks\.block\d+\."),
    ("OmniGen2", r"\bref\.image\.refiner\b"),
    ("Lumina 2 or Z-Image", r"\blayers\.\d+\.(attention\.|feed\.forward\.w|adaLN)|\b(noise|context)\.refiner\.\d"),
    # VAEs, text encoders and others.
    (
        "the VAE of Wan 2.2",
        r"\b(down|up)samples\.\d+\.(down|up)samples\.|\bdown\.blocks\.\d\.resnets\.\d\.norm1\.gamma",
    ),
    (
        "a VAE of Stable Diffusion or Flux",
        r"coder\.((down|up)\.\d+\.block|(down|up)\.blocks\.\d\.resnets\.\d\.norm1\.weight)",
    ),
    (
        "a VAE of another model",
        r"\b(en|de)coder\.(mid\.block|(down|up)\.blocks|stages)\.\d*\.?(resnets|res\.blocks|op\.list|\d)\b(?!.*gamma)",
    ),
    ("a tiny VAE (TAESD)", r"^(taes?d?\w*\.)?((en|de)coder\.)?(layers\.)?\d+\.conv\.\d"),
    (
        "the Qwen3.5 text encoder of Anima-3.8B's semantic connector, which is not supported",
        r"\blayers\.\d+\.linear\.attn\.",
    ),
    ("a T5 text encoder", r"\bblock\.\d+\.layer\.\d\.(SelfAttention|DenseReluDense)\."),
    ("a T5 text encoder", r"^(.*\.)?token\.embedding\.weight$", r"\bpos\.embedding\b"),
    ("a CLIP vision encoder", r"\bvision\.model\.(encoder|embeddings)\.|\bvisual\.transformer\.resblocks\."),
    ("a CLIP text encoder", r"\btext\.model\.(encoder|embeddings)\.|\btransformer\.resblocks\."),
    ("a BERT text encoder", r"\bencoder\.layer\.\d+\.attention\.self\."),
    ("a vision-language model's encoder", _LLM, r"\bvisual\."),
    ("a Gemma text encoder", r"\blayers\.\d+\.pre\.feedforward\.layernorm\b"),
    ("a Qwen2 or Qwen2.5 text encoder", r"\blayers\.\d+\.self\.attn\.q\.proj\.bias\b"),
    ("a Qwen3 text encoder", r"\blayers\.\d+\.self\.attn\.q\.norm\b"),
    ("a Llama or Mistral text encoder", _LLM),
    ("an upscaler", r"\b(RDB\d|rdb\d)\.|\bupsampler?\.\d\.weight|^layers\.\d+\.residual\.group\."),
)
"""(what the file contains, patterns that each match one of its names); the first row that applies counts."""

_BY_WIDTH: tuple[tuple[str, Mapping[int, str]], ...] = (
    (
        r"\btblocks\.\d+\.attn\.to\.[qkv]\b",
        {1536: "Stable Diffusion 3", 2432: "Stable Diffusion 3", 3072: "Flux or Qwen-Image"},
    ),
    (r"\btblocks\.\d+\.attn2\.to\.[kv]\b", {2048: "LTX-Video"}),
    (r"\btblocks\.\d+\.attn1\.to\.[qkv]\b", {1152: "PixArt", 1920: "CogVideoX", 2240: "Sana", 3072: "CogVideoX"}),
    (r"\bblocks\.\d+\.self\.attn\.[qkv]\.proj\b", {5120: "Cosmos-Predict2 14B"}),
    (r"\btblocks\.\d+\.attn1\.to\.[qkv]\b", {4096: "LTX-Video or Cosmos 1", 5120: "Cosmos 14B"}),
)
"""(pattern for a matrix, its input width → family), for names that several families share; the first match applies."""

_CROSS_WIDTHS = {768: "Stable Diffusion 1.5", 1024: "Stable Diffusion 2", 2048: "SDXL"}
"""Width of the text states that a UNet's cross-attention reads → family."""

_EMBEDDING = re.compile(r"emb_params|clip_[lgh]|t5xxl|qwen3_06b|string_to_param\.\*|<[^>]*>")

_MATRIX = r"\.(weight|lora\.(A|down)\b.*)$"

_MOST_NAMES, _LONGEST = 20_000, 300
"""Number of names that are compared, and of characters of each: a header can have 100 MB of names."""

Shapes = Mapping[str, tuple[int, ...]]


def family(shapes: Shapes) -> str | None:
    """Return what a file with tensors of these `shapes` contains, such as "Flux (LoRA)"; None if it is not known.

    Names of Anima's own networks match no row, except the text encoder's: for these, see `networks.locate`.
    """
    if 0 < len(shapes) <= 4 and all(_EMBEDDING.fullmatch(name) for name in shapes):
        return "a textual-inversion embedding, which belongs in a prompt (embedding:name)"
    kind = adapter_kind(shapes)
    text = "\n".join(_dotted(name[:_LONGEST]) for name in itertools.islice(shapes, _MOST_NAMES))
    rows = [row for row in FAMILIES if not (kind and row[0].startswith("a ") and row[0].endswith(" encoder"))]
    searched = ((title, (re.search(pattern, text, re.MULTILINE) for pattern in patterns)) for title, *patterns in rows)
    found = next((title for title, matches in searched if all(matches)), None)
    if found is None:
        found = next((titles[w] for rule, titles in _BY_WIDTH for w in _widths(shapes, rule) if w in titles), None)
    if found == _OF_UNET:
        found = _unet(text, shapes)
    if found is None or found.startswith(("a ", "an ", "the ")):
        return found
    return f"{found} ({kind.title if kind else 'a model'})"


def _dotted(name: str) -> str:
    return re.sub(r"[._]+", ".", name.replace("transformer_blocks", "tblocks"))


def _unet(text: str, shapes: Shapes) -> str:
    """Return which Stable Diffusion a UNet or its adapter belongs to, from its cross-attention and text encoders."""
    titles = [_CROSS_WIDTHS[width] for width in _widths(shapes, r"\battn2\.to\.[kv]\b") if width in _CROSS_WIDTHS]
    is_xl = re.search(r"\b(te2|label\.emb|add\.embedding|text\.encoder\.2|embedders\.1)\b|\btblocks\.[2-9]\.", text)
    return titles[0] if titles else "SDXL" if is_xl else "Stable Diffusion"


def _widths(shapes: Shapes, pattern: str) -> list[int]:
    """Return the input widths of the matrices whose names match, sorted."""
    matrix = re.compile(pattern + _MATRIX)
    return sorted({shape[1] for name, shape in shapes.items() if len(shape) > 1 and matrix.search(_dotted(name))})


def from_metadata(metadata: Mapping[str, Any]) -> str | None:
    """Return the base model that a file's header names, if it is not Anima; None if it names none."""
    keys = ("modelspec.architecture", "ss_base_model_version")
    named = next((str(metadata[key]) for key in keys if metadata.get(key)), "")
    return named[:80] if named and "anima" not in named.lower() else None
