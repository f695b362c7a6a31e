"""The adapters of orders: each image is drawn with its own, whatever the other images of its batch use.

An image whose adapters are products of narrow matrices, with a rank of at most `rank` together, shares its batch with
any other such image: the network's layers choose by row (adapters/rows.py). The store on the devices has room for
`slots` times that rank; adapters stay in it until others need the room. The parameters of an image with other adapters
(DoRA, large ranks, differences, norms) are merged, and it shares its batch with those of the same adapters and weights;
one such set is on the devices at a time. The LLM adapter and the text encoder are merged for the prompts of one
image at a time. All of these are arguments of programs, so no adapter compiles one.

An image that finds no room waits, and later ones that need room wait behind it, so that none waits for ever.
"""

import collections
import copy
import dataclasses
import itertools
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from anima_jax.adapters.dialects import module_names
from anima_jax.adapters.file import Adapter, fit_to_weights
from anima_jax.adapters.low_rank import adapter_rank, low_ranks
from anima_jax.adapters.merge import AdapterStack, Weight, strengths
from anima_jax.adapters.rows import CHOSEN, PAGE, WEIGHTS, attached, pages_of, target_shapes
from anima_jax.checkpoints.names import dit, file_tensors, qwen3
from anima_jax.checkpoints.names.networks import TEXT_ENCODER
from anima_jax.errors import UserError, show_value
from anima_jax.models.parameters import Params
from anima_jax.parallel.mesh import replicate
from anima_jax.sampling.pipeline import AnimaPipeline
from anima_jax.sampling.scaling import is_number
from anima_jax.serving.adapter_room import MergedSets, RowStore
from anima_jax.serving.lora_library import Fingerprint, LoraLibrary

LORA_SLOTS, LORA_RANK = 4, 64
"""Defaults of `OrderAdapters`: the store takes 1.1 GB for the released model in bfloat16."""

KEPT_CONTEXTS = 2
"""Sets of merged parameters of LLM adapter and text encoder that stay for the next prompts."""

COMPUTED = 4
"""Adapters whose pages are in host memory before there is room for them."""

KEPT_ROWS = 32
"""Batches whose rows' pages and weights stay on the devices."""

OF_PROMPTS = (TEXT_ENCODER, dit.ADAPTER)
"""Prefixes of the modules on which only the context rows of prompts depend."""

LARGEST = 1e4
"""Largest weight: float16 holds what it multiplies."""

Loras = Sequence[tuple[str, Weight]]


@dataclasses.dataclass(frozen=True, eq=False)
class ReadAdapter:
    """An adapter in host memory: its changes of the blocks and all else that sees latents, and those of prompts.

    `rank` is that of the former, or None if they have to be merged.
    """

    key: Fingerprint
    whole: Adapter
    network: Adapter
    prompts: Adapter
    rank: int | None
    values: list[list[Params]] = dataclasses.field(default_factory=list[list[Params]])

    @property
    def pages(self) -> int:
        """Pages that it takes in the store."""
        return -(-(self.rank or 0) // PAGE)


Weighted = tuple[ReadAdapter, Mapping[str, float]]
"""An adapter and the strength of each of its modules."""


@dataclasses.dataclass(frozen=True, eq=False)
class OwnAdapters:
    """The adapters of one image, without those whose weight is 0.

    `pool` is None if the transformer's own parameters draw it, `BY_ROW` if its rows choose their adapters, or `MERGED`;
    then `merged_key` says with which images it may share a batch: those of the same. `prompts_key` tells the context
    rows of its prompts from those with other adapters.
    """

    pool: str | None = None
    merged_key: Hashable = None
    prompts_key: Hashable = ()
    network: tuple[Weighted, ...] = ()
    prompts: tuple[Weighted, ...] = ()
    number: int = 0
    """Tells images with adapters apart, without keeping those in memory."""


NO_ADAPTERS = OwnAdapters()

BY_ROW, MERGED = "by row", "merged"


class AdapterStatistics(NamedTuple):
    """Pages of the store and those in use, adapters in the store, sets of merged parameters, and images that wait."""

    pages: int
    used_pages: int
    adapters: int
    merged: int
    waiting: int


class OrderAdapters:
    """What the engine asks about adapters. `check`, `read` and `prompt_params` may be called from any thread.

    The others are for the thread that uses the devices. `wake` is called when merged parameters are ready. `slots` and
    `rank` are those of the module's docstring.
    """

    def __init__(
        self,
        pipeline: AnimaPipeline,
        library: LoraLibrary | None = None,
        *,
        slots: int = LORA_SLOTS,
        rank: int = LORA_RANK,
        wake: Callable[[], None] = lambda: None,
    ):
        self._pipeline, self._library = pipeline, library or LoraLibrary()
        self._targets = target_shapes(pipeline.dit_params)
        self._layers = {path: shape[0] for path, shape in self._targets.items()}
        self._names = module_names(self._layers)
        tensors = {tensor.name: tensor.shape for tensor in file_tensors(dit.RULES, pipeline.dit_params)}
        text = file_tensors(qwen3.RULES, pipeline.text_encoder_params)
        self._shapes = tensors | {TEXT_ENCODER + tensor.name: tensor.shape for tensor in text}
        self.row_pages = -(-rank // PAGE)
        self._lock = threading.Lock()
        self._read: weakref.WeakValueDictionary[Fingerprint, ReadAdapter] = weakref.WeakValueDictionary()
        self._prompt_params: collections.OrderedDict[Hashable, tuple[Params, Params]] = collections.OrderedDict()
        self._store = RowStore(self._targets, slots * self.row_pages, pipeline.dtype)
        self._merged = MergedSets(self._merge, wake)
        self._graphdef = attached(pipeline.dit_graphdef, pipeline.dit_params)
        self._waiting: dict[str, list[OwnAdapters]] = {BY_ROW: [], MERGED: []}
        self._row_params_of: dict[tuple[int, ...], Params] = {}
        self._numbers = itertools.count(1)

    def check(self, loras: Loras) -> None:
        """Raise UserError unless the library has these adapters and the weights are numbers in range."""
        for name, weight in loras:
            values = weight.values() if isinstance(weight, Mapping) else [weight]
            if not all(is_number(value) and abs(value) <= LARGEST for value in values):
                shown = show_value(weight)
                raise UserError(f"lora '{show_value(name)}': weight {shown}, expected a number of at most {LARGEST:g}")
            self._library.lora(name)

    def read(self, loras: Loras) -> OwnAdapters:
        """Return the adapters of an order, which may have to be read from files.

        Raises UserError for an adapter that cannot be read or is for another network.
        """
        network: list[Weighted] = []
        prompts: list[Weighted] = []
        for name, weight in loras:
            one = self._adapter(name)
            own = strengths(one.whole, weight)
            for part, found in ((one.network, network), (one.prompts, prompts)):
                if any(own[module] for module in part.patches):
                    found.append((one, {module: own[module] for module in part.patches}))
        pages = sum(one.pages for one, _ in network)
        pool = MERGED if network else None
        if network and all(one.rank is not None for one, _ in network) and pages <= self.row_pages:
            pool = BY_ROW
            for one, _ in network:
                with self._lock:
                    computed = sum(bool(other.values) for other in self._read.values())
                if one.key not in self._store.pages and computed < COMPUTED:
                    self._compute_pages(one)  # here, so that the thread of the devices does not wait for it
        key = _key(network) if pool == MERGED else None
        return OwnAdapters(pool, key, _key(prompts), tuple(network), tuple(prompts), next(self._numbers))

    def prompt_params(self, own: OwnAdapters) -> tuple[Params, Params]:
        """Return the parameters of transformer and text encoder with which the image's prompts are encoded."""
        if not own.prompts:
            return self._pipeline.dit_params, self._pipeline.text_encoder_params
        with self._lock:
            base = self._pipeline.dit_params, self._pipeline.text_encoder_params
            if own.prompts_key in self._prompt_params:
                self._prompt_params.move_to_end(own.prompts_key)
            else:
                self._prompt_params[own.prompts_key] = self._merged_into(
                    base, [(one.prompts, w) for one, w in own.prompts]
                )
                while len(self._prompt_params) > KEPT_CONTEXTS:
                    self._prompt_params.popitem(last=False)
            return self._prompt_params[own.prompts_key]

    def enter(self, own: OwnAdapters) -> bool:
        """Make room for an image's adapters. Return False if it has to wait: ask again, or call `leave`."""
        if own.pool is None:
            return True
        waiting = self._waiting[own.pool]
        if own not in waiting:
            waiting.append(own)
        if waiting[0] is not own:
            return False
        try:
            has_room = self._take_pages(own) if own.pool == BY_ROW else self._merged.take(own.merged_key, own)
        except BaseException:
            waiting.remove(own)
            raise
        if has_room:
            waiting.remove(own)
        return has_room

    def leave(self, own: OwnAdapters) -> None:
        """Give back the room of an image that has entered, or is not going to."""
        if own.pool is None:
            return
        waiting = self._waiting[own.pool]
        if own in waiting:
            waiting.remove(own)
        elif own.pool == BY_ROW:
            self._store.release([one.key for one, _ in own.network])
        else:
            self._merged.release(own.merged_key)

    def network(self, pool: str | None, rows: Sequence[OwnAdapters]) -> tuple[Params, Any]:
        """Return parameters and structure of the transformer for a batch with these adapters in its rows.

        All images have entered and are of the `pool`; a row without an image has `NO_ADAPTERS`. A single row counts for
        a batch of any size. For any thread.
        """
        base, key = self._pipeline.dit_params, next((own.merged_key for own in rows if own.merged_key), None)
        if pool == BY_ROW:
            return base | self._store.params | self._row_params(tuple(rows)), self._graphdef
        return self._merged.params(key) if key else base, self._pipeline.dit_graphdef

    def alone(self, own: OwnAdapters) -> AnimaPipeline:
        """Return a pipeline with all of an image's adapters merged, for images that do not share evaluations."""
        pipeline = self.encoder(own)
        if own.network:
            merged = self._merge(own)
            of_prompts = {path: value for path, value in pipeline.dit_params.items() if path.startswith(dit.ADAPTER)}
            pipeline.dit_params = merged | of_prompts
        return pipeline

    def encoder(self, own: OwnAdapters) -> AnimaPipeline:
        """Return a pipeline that encodes the prompts of an image. For any thread."""
        pipeline = copy.copy(self._pipeline)
        pipeline.dit_params, pipeline.text_encoder_params = self.prompt_params(own)
        return pipeline

    def statistics(self) -> "AdapterStatistics":
        """Return what the adapters take on the devices."""
        waiting = sum(map(len, self._waiting.values()))
        return AdapterStatistics(self._store.size, self._store.used, len(self._store.pages), len(self._merged), waiting)

    def forget(self) -> None:
        """Forget merged parameters, when the pipeline's own have been replaced. No image has adapters then."""
        with self._lock:
            self._prompt_params.clear()
        self._merged.forget()

    def close(self) -> None:
        """End the thread that merges."""
        self._merged.close()

    def _row_params(self, rows: tuple[OwnAdapters, ...]) -> Params:
        """Return each row's pages and their weights in every layer."""
        numbers = tuple(own.number for own in rows)
        if numbers in self._row_params_of:
            return self._row_params_of[numbers]
        pages_bp = np.zeros((len(rows), self.row_pages), np.int32)
        shape = len(rows), self.row_pages
        scales = {path: np.zeros((n, *shape), np.float32) for path, (n, _, _) in self._targets.items()}
        for row, own in enumerate(rows):
            first = 0
            for one, weights in own.network:
                own_pages = self._store.pages[one.key]
                pages_bp[row, first : first + len(own_pages)] = own_pages
                for module, weight in weights.items():
                    path, layer = self._names[module]
                    scales[path][layer, row, first : first + len(own_pages)] = weight
                first += len(own_pages)
        params: Params = {f"{path}.{WEIGHTS}": values for path, values in scales.items()}
        for path, (n, _, _) in self._targets.items():
            params[f"{path}.{CHOSEN}"] = np.broadcast_to(pages_bp, (n, *shape))
        found = jax.device_put(replicate(params))
        self._row_params_of = dict([*self._row_params_of.items(), (numbers, found)][-KEPT_ROWS:])
        return found

    def _adapter(self, name: str) -> ReadAdapter:
        key, whole = self._library.adapter(name)
        with self._lock:
            if (known := self._read.get(key)) is not None:
                return known
        whole = fit_to_weights(whole, self._shapes, allow_unused=self._library.allow_unused)
        of_prompts = {module: patch for module, patch in whole.patches.items() if module.startswith(OF_PROMPTS)}
        others = {module: patch for module, patch in whole.patches.items() if module not in of_prompts}
        network, prompts = (dataclasses.replace(whole, patches=own) for own in (others, of_prompts))
        rank = adapter_rank(network, self._layers)
        found = ReadAdapter(key, whole, network, prompts, rank)
        with self._lock:
            return self._read.setdefault(key, found)

    def _compute_pages(self, one: ReadAdapter) -> list[Params]:
        """Return the values of an adapter's pages, on the host, and keep them until they are in the store."""
        if not one.values:
            one.values.append(pages_of(low_ranks(one.network, self._layers), self._targets, self._pipeline.dtype))
        return one.values[0]

    def _take_pages(self, own: OwnAdapters) -> bool:
        if not self._store.take({one.key: one.pages for one, _ in own.network}):
            return False
        try:
            for one, _ in own.network:
                if one.key in self._store.unwritten:
                    self._store.write(one.key, self._compute_pages(one))
                one.values.clear()
        except BaseException:
            self._store.release([one.key for one, _ in own.network])
            raise
        return True

    def _merge(self, own: OwnAdapters) -> Params:
        weighted = [(one.network, weights) for one, weights in own.network]
        return self._merged_into((self._pipeline.dit_params, {}), weighted)[0]

    def _merged_into(
        self, params: tuple[Params, Params], weighted: Sequence[tuple[Adapter, Mapping[str, float]]]
    ) -> tuple[Params, Params]:
        """Return parameters of transformer and text encoder with these adapters merged, in order."""
        stack = AdapterStack([one for one, _ in weighted], *params, comfyui_dora=self._library.comfyui_dora)
        transformer, text_encoder = stack.params_for([weights for _, weights in weighted])
        return params[0] | transformer, params[1] | text_encoder


def _key(weighted: Sequence[Weighted]) -> Hashable:
    """Return what tells adapters with their weights from others."""
    return tuple((one.key, tuple(weights.items())) for one, weights in weighted)
