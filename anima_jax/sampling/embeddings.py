"""Textual inversions: the files that `embedding:name` in a prompt stands for.

Source: `load_embed` in ComfyUI comfy/sd1_clip.py, with the keys of `AnimaTokenizer` in comfy/text_encoders/anima.py.
Axes: n source (Qwen3) tokens, d features.
"""

import contextlib
import math
import os
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from anima_jax.checkpoints.locations import PathLike, folders_below, is_remote
from anima_jax.checkpoints.safetensors import SafetensorsFile
from anima_jax.errors import NotFiniteError, UserError, one_line, show_value
from anima_jax.text.prompts import Span, TextualInversion, spans

_QWEN_KEY, _T5_KEY = "qwen3_06b", "t5xxl"
"""Names of the two encoders' tensors in a file that has one for each."""

_EXTENSIONS = ("", ".safetensors", ".pt", ".bin")
"""Of several files in a folder, the first counts. PyTorch's pickles are found too, and refused."""


class Embeddings:
    """The embeddings in a local folder and its subfolders, none if `folder` is None.

    `width` is the width of the text encoder. Raises UserError if the folder does not exist.
    """

    def __init__(self, folder: PathLike | None, width: int):
        self._folder, self._width = None if folder is None else os.path.abspath(_existing(os.fspath(folder))), width

    def spans(self, prompt: str) -> list[Span]:
        """Return the spans of a prompt with their embeddings.

        Prints one line for an unknown name and for vectors of another width; both are left out, as in ComfyUI. Raises
        UserError for a file that cannot be read and for values that are not finite.
        """

        def unknown(name: str) -> None:
            where = f"not in {self._folder}" if self._folder else "no folder of embeddings is given"
            _remark(f"prompt '{show_value(prompt)}': embedding:{name} is ignored: {where}")

        return spans(prompt, self._find, unknown)

    def listed(self) -> dict[str, tuple[int, int]]:
        """Return the embeddings that can be read: name → number of vectors and their width."""
        found: dict[str, tuple[int, int]] = {}
        for folder, names in folders_below(self._folder) if self._folder else ():
            for name in names:
                stem, extension = os.path.splitext(name)
                with contextlib.suppress(UserError, OSError):
                    if extension == ".safetensors" and stem not in found:
                        with SafetensorsFile(os.path.join(folder, name)) as file:
                            shape = _entry(file, _QWEN_KEY)[1]
                        found[stem] = math.prod(shape[:-1]), shape[-1]
        return found

    def _find(self, name: str) -> TextualInversion | None:
        path = next(self._paths(name), None)
        if path is None:
            return None
        with SafetensorsFile(path) as file:
            (qwen_names, qwen_shape), (_, t5_shape) = (_entry(file, key) for key in (_QWEN_KEY, _T5_KEY))
            t5_tokens, count = math.prod(t5_shape[:-1][:1]), math.prod(qwen_shape[:-1])
            if qwen_shape[-1] != self._width:
                found = f"vectors of width {qwen_shape[-1]}, the text encoder has {self._width}"
                _remark(f"{path}: embedding:{name} is ignored: {found}")
                return TextualInversion(np.zeros((0, self._width), np.float32), t5_tokens, padding=count)
            values = np.concatenate([file.read(one) for one in qwen_names]).astype(np.float32)
        if not np.isfinite(values).all():
            raise NotFiniteError(f"{path}: {', '.join(qwen_names)} contains NaN or infinite values")
        return TextualInversion(values.reshape(-1, self._width), t5_tokens)

    def _paths(self, name: str) -> Iterator[str]:
        """Yield the files of this name, those in the folder itself before those in its subfolders."""
        for folder, _ in folders_below(self._folder) if self._folder and name else ():
            path = os.path.normpath(os.path.join(folder, name))
            if path.startswith(os.path.join(folder, "")):
                yield from filter(os.path.isfile, (path + extension for extension in _EXTENSIONS))


def _existing(folder: str) -> str:
    if is_remote(folder) or not os.path.isdir(folder):
        raise UserError(f"{folder}: is not a folder, expected a local one with embeddings")
    return folder


def _entry(file: SafetensorsFile, key: str) -> tuple[Sequence[str], tuple[int, ...]]:
    """Return the names of the tensors that are an encoder's embedding, and the shape of them together.

    These are the encoder's own, those of a bundle in a LoRA, or the first of the file.
    """
    names = sorted(file.tensors, key=lambda name: file.tensors[name].start)
    bundle = [name for name in names if name.startswith("bundle_emb.")]
    choices = [
        [name for name in names if name == key],
        *([name for name in bundle if name.endswith(ending)] for ending in (".string_to_param.*", f".{key}")),
        names[:1],
    ]
    chosen = next(filter(None, choices), None)
    if chosen is None:
        raise UserError(f"{file.path}: has no tensor, expected the vectors of an embedding")
    shapes = [file.tensors[name].shape for name in chosen]
    if not all(shapes) or len({shape[1:] for shape in shapes}) > 1:
        found = ", ".join(f"{name} {list(shape)}" for name, shape in zip(chosen, shapes, strict=True))
        raise UserError(f"{file.path}: {found}, expected the vectors of an embedding, [n, width]")
    return chosen, (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _remark(text: str) -> None:
    print(one_line(text), file=sys.stderr)
