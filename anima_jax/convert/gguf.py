"""Write a model as a GGUF file, for ComfyUI-GGUF and stable-diffusion.cpp.

Names are those of ComfyUI-GGUF's converter: Anima's own without a prefix (architecture `cosmos`), and llama.cpp's for
the text encoder (`qwen3`). As there, vectors are F32; matrices that are not quantised keep their dtype.
"""

from collections.abc import Callable, Collection, Mapping

import numpy as np

from anima_jax.checkpoints import copying
from anima_jax.checkpoints.accounting import StoredTensor
from anima_jax.checkpoints.names import qwen3
from anima_jax.checkpoints.names.networks import DIT, QWEN3, locate
from anima_jax.checkpoints.quantised import ggml, gguf
from anima_jax.checkpoints.quantised.gguf import PLAIN_TYPES, GgufTensor
from anima_jax.errors import UserError

_FILE_TYPES = {"f16": 1, "bf16": 32}
"""`general.file_type` of files whose matrices are not quantised; source: `gguf.LlamaFileType`."""


def write(
    target: str,
    stored: Mapping[str, StoredTensor],
    chosen: Collection[str],
    type_: str,
    blocks_of: Callable[[str], np.ndarray],
    metadata: Mapping[str, str],
) -> int:
    """Write the tensors (by name without prefix), the `chosen` as `type_`; return the bytes of their data.

    `blocks_of(name)` returns a chosen tensor as it is stored. Raises UserError for another network than a transformer
    or text encoder, and for values that a tensor's type cannot represent.
    """
    is_text = locate(QWEN3, stored) is not None
    if not is_text and locate(DIT, stored) is None:
        raise UserError(f"{target}: a GGUF file is for a transformer or a text encoder, which the tensors are not")
    own = {dtype: name for name, dtype in PLAIN_TYPES.items()}
    sources: dict[str, str] = {}
    tensors: list[GgufTensor] = []
    for name, tensor in stored.items():
        key = qwen3.to_llama_cpp(QWEN3.saved_prefix + name) if is_text else name
        kept = "bf16" if tensor.info.dtype.itemsize == 1 else own.get(tensor.written_dtype, "f32")
        matrix = type_ if name in chosen or type_ in PLAIN_TYPES else kept
        tensors.append(GgufTensor(key, tensor.info.shape, matrix if len(tensor.info.shape) > 1 else "f32"))
        sources[key] = name

    def data_of(tensor: GgufTensor, rows: slice) -> np.ndarray:
        name = sources[tensor.name]
        if name in chosen:
            return blocks_of(name)[rows]
        values = stored[name].read(rows if tensor.shape else None)
        return copying.cast(values, PLAIN_TYPES[tensor.type], stored[name].key)

    form = ggml.BLOCK_FORMATS.get(type_)
    fields = {
        "general.architecture": "qwen3" if is_text else "cosmos",
        "general.quantization_version": 2,
        "general.file_type": form.file_type if form else _FILE_TYPES[type_],
        **{key: value for key, value in metadata.items() if key != "format"},
    }
    gguf.write(target, tensors, data_of, fields)
    return sum(tensor.nbytes for tensor in tensors)
