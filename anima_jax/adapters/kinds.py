"""Names of an adapter's parts: how a key of an adapter file ends, after the name of the module that it changes."""

import re
from collections.abc import Iterable, Mapping

PARTS: Mapping[str, str] = {
    "lora_A": r"\.(lora_A|lora_down|lora\.down|lora_linear_layer\.down)(\.default)?(\.weight)?",
    "lora_B": r"\.(lora_B|lora_up|lora\.up|lora_linear_layer\.up)(\.default)?(\.weight)?",
    "dora_scale": r"\.(dora_scale|lora_magnitude_vector)(\.default)?(\.weight)?",
    **{part: rf"\.{part}(\.default)?" for part in ("lokr_w1", "lokr_w1_a", "lokr_w1_b")},
    **{part: rf"\.{part}(\.default)?" for part in ("lokr_w2", "lokr_w2_a", "lokr_w2_b")},
    **{part: rf"\.{part}(\.default)?" for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    "alpha": r"\.alpha",
    "diff": r"\.(diff|w_norm)",
    "diff_b": r"\.(diff_b|b_norm)",
}
"""Part, by ComfyUI's name → the endings that it has. `alpha` is a number, `diff` is added to a weight, `diff_b` to a
bias."""

TITLES = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr", "loha": "LoHa", "diff": "differences of weights"}
"""Kinds of adapters for a person. A DoRA is a LoRA with a `dora_scale`."""

_KINDS = {"lora": "lora", "lokr": "lokr", "hada": "loha", "diff": "diff"}
_PART = re.compile("|".join(f"(?P<{part}>{ending}$)" for part, ending in PARTS.items()))


def split_key(key: str) -> tuple[str, str] | None:
    """The module's spelling and the part in an adapter file's key; None if it ends in no known part."""
    match = _PART.search(key)
    return (key[: match.start()], match.lastgroup) if match and match.lastgroup else None


def kind_of(parts: Iterable[str]) -> str | None:
    """Which of `TITLES` these parts make up; None if they make up none."""
    parts = set(parts)
    found = (kind for beginning, kind in _KINDS.items() if any(part.startswith(beginning) for part in parts))
    kind = next(found, None)
    return "dora" if kind == "lora" and "dora_scale" in parts else kind


def adapter_kind(keys: Iterable[str]) -> str | None:
    """Which of `TITLES` a file with these keys is; None if it is no adapter."""
    return kind_of(split[1] for key in keys if (split := split_key(key)))
