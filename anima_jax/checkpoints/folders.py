"""Models in folders: which files belong to a network, in diffusers' and transformers' folders and in repositories.

A diffusers folder has a subfolder for each component; transformers' has one network. An index
(`model.safetensors.index.json`) says which files a network consists of: other files, such as another variant's, never
belong to it. Folders may be local, `gs://…` or `hf://owner/repo[/folder]`.
"""

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from anima_jax.checkpoints import locations
from anima_jax.checkpoints.locations import MODEL_SUFFIXES, PathLike
from anima_jax.errors import UserError, did_you_mean, first_line, shorten
from anima_jax.text.tokenizers import TOKENIZER_FOLDERS

COMPONENTS = ("transformer", "text_conditioner", "text_encoder", "vae")
"""Subfolders of the networks in a diffusers folder. The LLM adapter is `text_conditioner`."""

TRANSFORMER = COMPONENTS[:2]
"""Components of the transformer with its LLM adapter."""

INDEXES = ("modular_model_index.json", "model_index.json")
"""Files that a diffusers folder has, of which one says what its components are; ours have the first."""

_STANDARD = ("diffusion_pytorch_model", "model")
"""Names of weights without suffix in diffusers' and in transformers' folders."""

_OF_TRANSFORMERS = ("text_encoder",)
"""Components that transformers loads; diffusers loads the others."""

_INDEX = re.compile(r"(?P<stem>.+)\.safetensors\.index(\.(?P<variant>[\w-]+))?\.json")

_LARGEST_INDEX = 50_000_000
"""Bytes of an index; a model of 10,000 tensors has about 1 MB."""


@dataclasses.dataclass(frozen=True)
class NetworkFiles:
    """The files of one network. `prefix` is prepended to the names of their tensors.

    `index`, if there is one, says which tensors (keys) are in which of the files; `where` is its path.
    """

    files: tuple[str, ...]
    prefix: str = ""
    where: str = ""
    index: Mapping[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class ModelFiles(os.PathLike[str]):
    """The files that one path stands for: usually one. As a path it is the file, the index, or the folder.

    `given` is what the user wrote.
    """

    given: str
    parts: tuple[NetworkFiles, ...]

    def __fspath__(self) -> str:
        return (self.parts[0].where or self.parts[0].files[0]) if len(self.parts) == 1 else self.given

    def __str__(self) -> str:
        return os.fspath(self)

    @property
    def has_prefixes(self) -> bool:
        """Whether names of tensors begin with the component that they are of."""
        return any(part.prefix for part in self.parts)

    @property
    def files(self) -> list[str]:
        """The paths or addresses of all files."""
        return [file for part in self.parts for file in part.files]

    def sha256(self) -> bytes:
        """Return the SHA-256 of the file, or of the files' SHA-256 if there are several."""
        hashes = [_file_sha256(*_local_and_changed(file)) for file in self.files]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256(b"".join(hashes)).digest()


def _local_and_changed(file: str) -> tuple[str, int | None]:
    local = locations.resolve(file)
    if locations.is_remote(local) or not os.path.exists(local):
        return local, None
    return local, os.stat(local).st_mtime_ns


@functools.lru_cache(maxsize=64)
def _file_sha256(path: str, changed: int | None) -> bytes:
    del changed
    return locations.file_sha256(path)


def model_files(path: PathLike, components: Sequence[str] = COMPONENTS, variant: str | None = None) -> ModelFiles:
    """Return the files of these `components` at `path`: a file, a network's folder, or a diffusers folder.

    Of a diffusers folder, these are the components that it has; if there are several, their names have the component's
    as prefix. A transformer's folder in a diffusers folder comes with the LLM adapter's next to it. `variant`, such as
    "fp16", chooses between the files of a folder; only the first component must have it. Raises UserError if a folder
    has none of the components, no such variant, or files of which it is not clear what they are.
    """
    if isinstance(path, ModelFiles):
        return path
    given = os.fspath(path)
    variant = variant if variant is None else check_variant(variant)
    names = locations.files_in(given)
    if names is None:
        return ModelFiles(given, (_indexed(given) if _INDEX.fullmatch(_split(given)[1]) else NetworkFiles((given,)),))
    folder, folders = given, _components(names)
    if not folders:
        above, name = _split(given)
        beside = _components(locations.files_in(above) or ()) if name == TRANSFORMER[0] else {}
        if not (set(TRANSFORMER) <= beside.keys() and set(TRANSFORMER) <= set(components)):
            own = [name for name in names if "/" not in name]
            return ModelFiles(given, (_part(given, own, components[0] if len(components) == 1 else name, variant),))
        folder, folders, components = above, beside, TRANSFORMER
    present = [component for component in components if component in folders]
    if not present:
        listed = " or ".join(f"{component}/" for component in components)
        raise UserError(f"{given}: has no {listed}, only {', '.join(f'{name}/' for name in folders)}")
    chosen = [variant if name == present[0] or _has_variant(folders[name], variant) else None for name in present]
    parts = [
        _part(f"{folder.rstrip('/')}/{name}", folders[name], name, own)
        for name, own in zip(present, chosen, strict=True)
    ]
    if len(parts) > 1:
        parts = [dataclasses.replace(part, prefix=f"{name}.") for part, name in zip(parts, present, strict=True)]
    return ModelFiles(given, tuple(parts))


def components_in(path: PathLike) -> list[str]:
    """Return the networks of a diffusers folder; [] for other folders and for files."""
    return list(_components(locations.files_in(path) or ()))


def is_index(name: str) -> bool:
    """Return whether a file of this name is the index of a network in several files."""
    return _INDEX.fullmatch(name) is not None


def is_network(names: Iterable[str]) -> bool:
    """Return whether a folder with these files is that of one network, rather than a collection of files."""
    names = list(names)
    weights = any(name.endswith(MODEL_SUFFIXES) and "/" not in name for name in names)
    described = "config.json" in names or any(_INDEX.fullmatch(name) for name in names)
    return not _components(names) and weights and described


def component_files(path: PathLike, component: str, variant: str | None = None) -> ModelFiles:
    """Return the files of a component; other components than the transformer may lack the `variant`."""
    if variant is not None and component != TRANSFORMER[0] and not isinstance(path, ModelFiles):
        names = locations.files_in(path) or ()
        if not _has_variant(_components(names).get(component, names), variant):
            variant = None
    return model_files(path, (component,), variant)


def check_variant(variant: str) -> str:
    """Return `variant`. Raises UserError unless it can be a part of a file's name."""
    if not re.fullmatch(r"[\w-]+", variant):
        raise UserError(f"variant: found {variant!r}, expected a part of files' names, such as 'fp16'")
    return variant


def beside(transformer: PathLike) -> dict[str, str]:
    """Return the folders of the VAE, the text encoder and the tokenizers in the diffusers folder of a transformer.

    They are the arguments `vae`, `text_encoder` and `tokenizers` of `AnimaPipeline.load`, without those that the folder
    does not have. `transformer` is the diffusers folder or the transformer's in it; any other path gives {}. Tokenizers
    of a repository are downloaded.
    """
    folder = os.fspath(transformer)
    names = locations.files_in(folder)
    if names and not _components(names) and _split(folder)[1] in COMPONENTS:
        folder = _split(folder)[0]
        names = locations.files_in(folder)
    names = names or []
    found = {name: folder for name in ("vae", "text_encoder") if name in _components(names)}
    files = [[name for name in names if re.match(f"{own}/[^/]+$", name)] for own in TOKENIZER_FOLDERS.values()]
    if all(files) and _components(names):
        paths = [f"{folder}/{name}" for name in itertools.chain(*files)]
        local = [locations.resolve(path) for path in paths] if locations.is_remote(folder) else paths
        found["tokenizers"] = os.path.dirname(os.path.dirname(local[0]))
    return found


def complete(
    transformer: PathLike,
    vae: PathLike | None,
    text_encoder: PathLike | None,
    tokenizers: PathLike | None,
    variant: str | None = None,
) -> tuple[ModelFiles, ModelFiles, ModelFiles, PathLike | None]:
    """Return the files of a pipeline's networks and its tokenizers, those that are None from the transformer's folder.

    The transformer must have the `variant`; the other networks have it if their folders do. Raises UserError for a
    network that is missing, and as `model_files` does.
    """
    others = beside(transformer) if None in (vae, text_encoder, tokenizers) else {}
    found: dict[str, ModelFiles] = {}
    for name, path in {"vae": vae, "text_encoder": text_encoder}.items():
        chosen = others.get(name) if path is None else path
        if chosen is None:
            raise UserError(f"{name}: missing, and {os.fspath(transformer)} is not a diffusers folder with one")
        found[name] = component_files(chosen, name, variant)
    tokenizers = others.get("tokenizers") if tokenizers is None else tokenizers
    return model_files(transformer, TRANSFORMER, variant), found["vae"], found["text_encoder"], tokenizers


def _components(names: Iterable[str]) -> dict[str, list[str]]:
    """Return component → its files, for the components with weights in a diffusers folder; {} for other folders.

    A folder with weights of its own is a diffusers folder only if it has the index of one.
    """
    names = list(names)
    if any(name.endswith(MODEL_SUFFIXES) and "/" not in name for name in names) and not {*INDEXES} & {*names}:
        return {}
    found: dict[str, list[str]] = {}
    for path in names:
        component, _, name = path.partition("/")
        if component in COMPONENTS and "/" not in name:
            found.setdefault(component, []).append(name)
    return {
        component: found[component]
        for component in COMPONENTS
        if any(name.endswith(MODEL_SUFFIXES) or _INDEX.fullmatch(name) for name in found.get(component, ()))
    }


def _split(path: str) -> tuple[str, str]:
    """Return the folder that a path is in, and its name; a repository is in no folder and has no name."""
    if path.startswith("hf://") and path.rstrip("/").count("/") <= 3:
        return path, ""
    above, _, name = (
        os.path.normpath(path).rpartition(os.sep) if "://" not in path else path.rstrip("/").rpartition("/")
    )
    return above or ".", name


def _variant(name: str) -> str | None:
    """Return the variant of a file with weights: `fp16` of `model.fp16.safetensors`; None if it has none."""
    match = re.fullmatch(rf"(?:{'|'.join(_STANDARD)})\.([\w-]+?)(-\d+-of-\d+)?\.safetensors", name)
    return match[1] if match else None


def _variant_of_index(name: str) -> str | None:
    match = _INDEX.fullmatch(name)
    return (match["variant"] or _variant(f"{match['stem']}.safetensors")) if match else None


def _has_variant(names: Iterable[str], variant: str | None) -> bool:
    return any(variant in (_variant(name), _variant_of_index(name)) for name in names)


def _part(folder: str, names: Sequence[str], component: str, variant: str | None) -> NetworkFiles:
    """Return the files of the one network in a folder. Raises UserError if it is not clear which they are."""
    indexes = [name for name in names if _INDEX.fullmatch(name) and _variant_of_index(name) == variant]
    files = [name for name in names if name.endswith(MODEL_SUFFIXES)]
    own = [name for name in files if _variant(name) == variant] if variant else files
    standard = _STANDARD[::-1] if component in _OF_TRANSFORMERS else _STANDARD
    for stem in standard:
        if chosen := [name for name in indexes if name.partition(".")[0] == stem]:
            return _indexed(f"{folder}/{chosen[0]}")
    if len(indexes) == 1:
        return _indexed(f"{folder}/{indexes[0]}")
    for stem in standard:
        if (name := f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors") in own:
            return NetworkFiles((f"{folder}/{name}",))
    others = [name for name in names if _INDEX.fullmatch(name)]
    if len(own) == 1 and not others:
        return NetworkFiles((f"{folder}/{own[0]}",))
    if len(others) == 1 and not variant and not indexes:
        return _indexed(f"{folder}/{others[0]}")
    there = shorten([*others, *files], 8) if files or others else "no file with weights"
    variants = sorted({*map(_variant, files), *map(_variant_of_index, others)} - {None}, key=str)
    if variant:
        known = f" (its variants: {', '.join(map(str, variants))})" if variants else ""
        raise UserError(f"{folder}: has no variant '{variant}'{known}; it contains {there}")
    expected = "an index, a file with a standard name such as model.safetensors, or only one file"
    raise UserError(f"{folder}: contains {there}; expected {expected}" + (", or choose a variant" if variants else ""))


# ---- indexes ---------------------------------------------------------------------------------------------------------


def _indexed(path: str) -> NetworkFiles:
    """Return the files that an index lists, with their tensors. Raises UserError for an index that is broken."""
    opened, size = locations.open_for_reading(locations.resolve(path))
    with opened:
        try:
            if size > _LARGEST_INDEX:
                raise ValueError(f"it has {size} bytes")
            index = json.loads(opened.read().decode("utf-8"), object_pairs_hook=_without_repeats)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: cannot be read as an index: {first_line(error)}") from error
    keys = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(keys, dict) or not keys or not all(isinstance(name, str) for name in keys.values()):
        raise UserError(f"{path}: has no weight_map from tensors to files, as the index of a model has")
    folder = _folder_of(path)
    for name in (files := list(dict.fromkeys(keys.values()))):
        if posixpath.normpath(name) != name or name.startswith(("/", "..")) or re.search(r"[\\:\0]", name):
            raise UserError(f"{path}: names the file {shorten([name])}, expected one in its own folder")
        if not name.endswith(MODEL_SUFFIXES):
            raise UserError(f"{path}: names the file {shorten([name])}, expected .safetensors files")
    present = {*(locations.files_in(folder) or ())}
    if missing := [name for name in files if name not in present]:
        known = [name for name in present if name.endswith(MODEL_SUFFIXES)]
        raise UserError(
            f"{path}: names {shorten(missing)}, which {folder} does not have{did_you_mean(missing[0], known)}"
        )
    return NetworkFiles(tuple(f"{folder}/{name}" for name in files), where=path, index=keys)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        raise ValueError(f"{shorten([name for name, count in counts.items() if count > 1])} is there twice")
    return found


def _folder_of(path: str) -> str:
    return path.rpartition("/")[0] if locations.is_remote(path) else os.path.dirname(path) or "."
