"""The matrix of conversions between adapters' dialects: kind × dialect × dtype × alpha, each to every dialect.

`python -m tests.adapters.conversions` tries all of it and prints how many are lossless (the same change of a weight,
bit for bit), rounded (with a message), refused (with one line) or silent: changed without a message.
"""

import collections
import itertools
import json
import pathlib
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from anima_jax.adapters.dialects import DIALECTS
from anima_jax.adapters.file import open_adapter, write_adapter
from anima_jax.errors import UserError

MODULE, PEER = "blocks.0.self_attn.q_proj", "transformer_blocks.0.attn1.to_q"
OUT, IN, RANK = 16, 24, 3

KINDS: dict[str, dict[str, tuple[int, ...]]] = {
    "lora": {"lora_A": (RANK, IN), "lora_B": (OUT, RANK)},
    "lora of 1x1 convolutions": {"lora_A": (RANK, IN, 1, 1), "lora_B": (OUT, RANK, 1, 1)},
    "dora": {"lora_A": (RANK, IN), "lora_B": (OUT, RANK), "dora_scale": (OUT, 1)},
    "dora by input": {"lora_A": (RANK, IN), "lora_B": (OUT, RANK), "dora_scale": (1, IN)},
    "loha": {"hada_w1_a": (OUT, RANK), "hada_w1_b": (RANK, IN), "hada_w2_a": (OUT, RANK), "hada_w2_b": (RANK, IN)},
    "lokr": {"lokr_w1": (4, 4), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 6)},
    "lokr of two matrices": {"lokr_w1": (4, 4), "lokr_w2": (4, 6)},
    "lokr of two pairs": {"lokr_w1_a": (4, 1), "lokr_w1_b": (1, 4), "lokr_w2_a": (4, 1), "lokr_w2_b": (1, 6)},
    "glora": {"a1": (RANK, IN), "a2": (IN, RANK), "b1": (RANK, IN), "b2": (OUT, RANK)},
    "oft": {"oft_blocks": (4, 4, 4)},
    "boft": {"oft_blocks": (2, 4, 4, 4)},
    "diff": {"diff": (OUT, IN), "diff_b": (OUT,)},
    "set": {"set_weight": (OUT, IN)},
}
"""Shapes of the parts of an adapter of each kind, as ComfyUI names them."""

OF_PEFT = {"lora": "LORA", "dora": "LORA", "loha": "LOHA", **{kind: "LOKR" for kind in KINDS if "lokr" in kind}}
"""The kinds that PEFT has too."""

DTYPES = {"f32": np.dtype("f4"), "bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype("f2")}
ALPHAS = (None, 2.0, 5.0)
"""Alphas: of none, or those whose quotient with the rank is exact or is not."""


class Case(NamedTuple):
    kind: str
    dialect: str
    dtype: str
    alpha: float | None


def cases() -> Iterator[Case]:
    """Every file that a program may have written."""
    for case in itertools.starmap(Case, itertools.product(KINDS, DIALECTS, DTYPES, ALPHAS)):
        of_peft = OF_PEFT.get(case.kind)
        if not DIALECTS[case.dialect].settings or (of_peft and (of_peft, case.dialect) != ("LOHA", "diffusers")):
            yield case


def write(folder: pathlib.Path, case: Case) -> pathlib.Path:
    """The file of a case, written without the code under test, and what is beside it."""
    rng, dialect = np.random.default_rng(zlib.crc32(case.kind.encode())), case.dialect
    factors = {part: rng.standard_normal(shape).astype(DTYPES[case.dtype]) for part, shape in KINDS[case.kind].items()}
    names = {"comfyui": f"diffusion_model.{MODULE}", "kohya": f"lora_unet_{MODULE.replace('.', '_')}"}
    names |= {"diffusers": f"transformer.{PEER}", "peft": f"base_model.model.{PEER}"}
    name = names.get(dialect, f"base_model.model.{MODULE}")
    endings = {"lora_A": ".weight", "lora_B": ".weight", **dict.fromkeys(("a1", "a2", "b1", "b2"), ".weight")}
    renamed = {"kohya": {"lora_A": "lora_down", "lora_B": "lora_up"}}.get(dialect, {})
    tensors = {f"{name}.{renamed.get(part, part)}{endings.get(part, '')}": values for part, values in factors.items()}
    metadata, settings = {"format": "pt"}, peft_settings(case)
    if DIALECTS[dialect].settings and f"{name}.dora_scale" in tensors:
        tensors[f"{name}.lora_magnitude_vector"] = tensors.pop(f"{name}.dora_scale").reshape(-1)
    if dialect == "diffusers":
        metadata["lora_adapter_metadata"] = json.dumps({f"transformer.{key}": value for key, value in settings.items()})
    elif DIALECTS[dialect].settings:
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    elif case.alpha:
        tensors[f"{name}.alpha"] = np.array(case.alpha, DTYPES[case.dtype])
    save_file(tensors, folder / "adapter_model.safetensors", metadata)
    return folder / "adapter_model.safetensors"


def peft_settings(case: Case) -> dict[str, Any]:
    """The settings with which PEFT would have written the case."""
    rank = {"lokr": 2, "lokr of two pairs": 1, "lokr of two matrices": 6}.get(case.kind, RANK)
    key = "lora_alpha" if OF_PEFT.get(case.kind) == "LORA" else "alpha"
    own = {"use_dora": True} if case.kind == "dora" else {"decompose_both": True} if "pairs" in case.kind else {}
    return {"peft_type": OF_PEFT.get(case.kind), "r": rank, key: case.alpha or rank, **own}


def changed(path: pathlib.Path) -> list[np.ndarray]:
    """A weight and a bias with the adapter of a file."""
    rng = np.random.default_rng(1)
    weight, bias = rng.standard_normal((OUT, IN), np.float32), rng.standard_normal(OUT, np.float32)
    with open_adapter(path) as adapter:
        (patch,) = adapter.patches.values()
        return [patch.applied(weight, 1.0), patch.applied_to_bias(bias, 1.0) if "diff_b" in patch.parts else bias]


def outcome(source: pathlib.Path, target: pathlib.Path, dialect: str) -> str:
    """What becomes of a file in another dialect: lossless, rounded, refused or silent."""
    try:
        with open_adapter(source) as adapter:
            messages = write_adapter(target, adapter.patches, DIALECTS[dialect], metadata=adapter.metadata)
    except UserError as error:
        return "refused" if len(error.messages) == 1 and not target.exists() else "silent"
    if all(map(np.array_equal, changed(source), changed(target))):
        return "lossless"
    return "rounded" if any("float32" in message for message in messages) else "silent"


def outcomes(chosen: list[Case], folder: pathlib.Path) -> Iterator[tuple[Case, str, str]]:
    """Each case and dialect, and the outcome."""
    for number, case in enumerate(chosen):
        for dialect in DIALECTS:
            own = folder / f"{number}_{dialect}"
            own.mkdir()
            target = own / ("out" if DIALECTS[dialect].settings == "beside" else "out.safetensors")
            yield case, dialect, outcome(write(own, case), target, dialect)
            shutil.rmtree(own)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        rows = list(outcomes(list(cases()), pathlib.Path(scratch)))
    print(f"{len(list(cases()))} files, {len(rows)} conversions: {dict(collections.Counter(row[2] for row in rows))}")
    for (kind, dialect, result), count in sorted(collections.Counter((c.kind, d, r) for c, d, r in rows).items()):
        print(f"{kind:28} to {dialect:14} {result:10} {count}")
