"""Settings with which a run fits its devices' memory: the levers that a dry run suggests and `memory = "fit"` uses.

Levers are tried in order of their cost: first those that change no number (recomputation, smaller micro-batches,
weights sharded over the devices), then those that change some (16-bit weights, 8-bit moments, a base in 8 bits), then
memory of the host, which is slow. All follows from shapes: the same run and memory always give the same settings.
"""

import bisect
import copy
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from anima_jax.checkpoints.locations import replacing
from anima_jax.config.main import MainConfig
from anima_jax.data.dataset import TrainingData
from anima_jax.errors import UserError
from anima_jax.parallel.mesh import check_mesh, replicas, resolve_sizes
from anima_jax.training import estimate, optimizers
from anima_jax.training.flops import Workload
from anima_jax.training.run import Run
from anima_jax.training.state import ParamPartition, build_optimizer
from anima_jax.training.step import StepConfig
from anima_jax.training.target import Target

STORED = "fitted.json"
"""Name of the file in a run's folder with the keys that `memory = "fit"` chose, which a resumed run uses again."""

Keys = Mapping[str, Any]
"""Dotted key of the configuration → value."""

Reload = Callable[[Sequence[str]], MainConfig]
"""Loads the configuration with more overrides, in the form of `--set`."""

Lever = Callable[[MainConfig, int, str], Iterator[Keys]]
"""A way to need less memory, for a configuration, a number of devices and their platform.

It yields keys from the cheapest to the most effective, none if it is of no use.
"""


def _remat(config: MainConfig, devices: int, platform: str) -> Iterator[Keys]:
    names = ("none", "dots", "attention", "full", "offload")
    for name in ("attention", "full"):
        if names.index(name) > names.index(config.remat):
            yield {"remat": name}


def _micro_batch(config: MainConfig, devices: int, platform: str) -> Iterator[Keys]:
    """Yield smaller micro-batches with as many examples per step as before."""
    keys = ("micro_batch_size_per_gpu", "image_micro_batch_size_per_gpu")
    given = {key: value for key in keys if (value := getattr(config, key)) is not None}
    sizes = [size for value in given.values() for size in ([value] if isinstance(value, int) else dict(value).values())]
    for part in range(2, max(sizes) + 1):
        if config.global_batch_size is None:
            if any(size % part for size in sizes):
                continue
            more: Keys = {"gradient_accumulation_steps": config.gradient_accumulation_steps * part}
        else:
            more = {}

        def smaller(size: int, part: int = part) -> int:
            return max(n for n in range(1, size + 1) if size % n == 0 and n <= max(1, size // part))

        yield {
            key: smaller(value) if isinstance(value, int) else [[side, smaller(size)] for side, size in value]
            for key, value in given.items()
        } | more


def _mesh(config: MainConfig, devices: int, platform: str) -> Iterator[Keys]:
    """Yield larger `fsdp` axes on as many replicas as before."""
    mesh = config.mesh
    if devices == 1 or mesh.fsdp == -1:
        return
    rest = devices // (mesh.tensor * mesh.context)
    more = {} if mesh.data == -1 else {"mesh.data": -1}
    for size in range(mesh.fsdp + 1, rest + 1):
        if rest % size == 0:
            yield {"mesh.fsdp": size, **more}


def _param_dtype(config: MainConfig, devices: int, platform: str) -> Iterator[Keys]:
    if config.param_dtype == "float32":
        yield {"param_dtype": "bfloat16"}


_ADAMS = {
    **dict.fromkeys(("adam", "adamw", "adamw_optimi", "offload"), "adamw8bit"),
    "stableadamw": "adamw8bitkahan",
    "lion": "lion8bit",
}
"""Optimizer → the same with moments in 8 bits."""


def _eight_bit_moments(config: MainConfig, devices: int, platform: str) -> Iterator[Keys]:
    if name := _ADAMS.get(optimizers.find(config.optimizer.type).name):
        yield {"optimizer.type": name}


def _eight_bit_base(config: MainConfig, devices: int, platform: str) -> Iterator[Keys]:
    if config.adapter is not None and config.model.transformer_dtype in {None, "bfloat16", "float16", "float32"}:
        yield {"model.transformer_dtype": "int8"}


def _inputs_on_host(config: MainConfig, devices: int, platform: str) -> Iterator[Keys]:
    if platform != "cpu":
        yield {"remat": "offload"}


def _moments_on_host(config: MainConfig, devices: int, platform: str) -> Iterator[Keys]:
    if platform != "cpu" and optimizers.find(config.optimizer.type).name in {*_ADAMS, "adamw8bit"} - {"lion"}:
        yield {"optimizer.type": "offload"}


LEVERS: tuple[Lever, ...] = (
    *(_remat, _micro_batch, _mesh),
    *(_param_dtype, _eight_bit_moments, _eight_bit_base),
    *(_inputs_on_host, _moments_on_host),
)

CHANGES = {
    "param_dtype": "trained weights have 16 bits, and each update is rounded stochastically",
    "model.transformer_dtype": "frozen weights have 8 bits",
    "model.dtype": "it is computed in float16",
    "optimizer.type": "the optimizer is another one",
}
"""Key → what it does to the numbers of a run; keys that are not here leave them as they are, but for rounding."""


MARGIN = 2
"""How many times the devices' memory a run must need to be refused: the estimate is not exact, and hosts can swap."""

_MOST_SAVED = 1000
"""Bytes per token, feature and block, and per weight, that no step comes near to."""


class RunVariant(NamedTuple):
    """A run with some keys changed, and what it needs."""

    config: MainConfig
    partition: ParamPartition
    found: estimate.Memory


class RunVariants:
    """The same run with other keys: `of(keys)` estimates one; equal parts are computed once.

    `text_rows` are those of `data`, `platform` is that of the devices.
    """

    def __init__(
        self,
        run: Run,
        partition: ParamPartition,
        data: TrainingData,
        text_rows: tuple[int, int],
        reload: Reload,
        *,
        devices: int = 1,
        platform: str = "gpu",
    ):
        self._run, self._data, self._rows, self._reload = run, data, text_rows, reload
        self._partitions = {self._frozen_keys(run.config): partition}
        self.devices, self.platform = devices, platform
        self._found: dict[tuple[str, ...], RunVariant | None] = {}
        self._optimizers: dict[str, Any] = {}

    @property
    def config(self) -> MainConfig:
        """The configuration without other keys."""
        return self._run.config

    def on(self, platform: str) -> "RunVariants":
        """Return the same variants on devices of another platform."""
        other = copy.copy(self)
        other.platform, other._found = platform, {}
        return other

    def of(self, keys: Keys) -> RunVariant | None:
        """Return the variant with these keys, None if they cannot be set together or change the examples of a step."""
        overrides = tuple(sorted(overrides_of(keys)))
        if overrides not in self._found:
            try:
                self._found[overrides] = self._variant(overrides)
            except UserError:
                self._found[overrides] = None
        return self._found[overrides]

    def _variant(self, overrides: tuple[str, ...]) -> RunVariant | None:
        config = self._reload(overrides) if overrides else self._run.config
        run, data = dataclasses.replace(self._run, config=config), self._data
        if any(run.global_batch(size) != self._run.global_batch(size) for size in data.largest_sizes):
            return None
        key = self._frozen_keys(config)
        if key not in self._partitions:
            self._partitions[key] = estimate.abstract_partition(config)
        partition = self._partitions[key]
        sizes = resolve_sizes(config.mesh.sizes, self.devices)
        check_mesh(sizes, partition.config.width, partition.config.heads)
        if partition.config.blocks % config.remat_every or replicas(sizes) != run.replicas:
            return None
        trained = f"{config.optimizer!r} {config.learning_rates}"
        if trained not in self._optimizers:
            self._optimizers[trained] = build_optimizer(config, partition, data.plan)
        workloads = estimate.step_workloads(run, data, *self._rows)
        found = self._memory(config, partition, self._optimizers[trained], workloads, sizes)
        return RunVariant(config, partition, found)

    def _memory(
        self,
        config: MainConfig,
        partition: ParamPartition,
        optimizer: Any,
        workloads: Sequence[Workload],
        sizes: Mapping[str, int],
    ) -> estimate.Memory:
        step, masked = StepConfig.of(config), self._data.masked
        return estimate.run_memory(
            config, step, partition, optimizer, workloads, sizes=sizes, masked=masked, platform=self.platform
        )

    def check_size(self, limit: float, name: str) -> None:
        """Raise UserError if the run needs more than `MARGIN` times the `limit` of a device called `name`.

        It says which micro-batch fits. Runs that are certainly small enough are not estimated, which takes a second.
        """
        config, (partition, *_) = self.config, self._partitions.values()
        network, sizes = partition.config, resolve_sizes(config.mesh.sizes, self.devices)
        workloads = estimate.step_workloads(self._run, self._data, *self._rows)
        work = max(workloads, key=lambda work: work.micro_batch * work.tokens)
        examples = work.micro_batch // self._run.replicas
        rows = examples * (work.tokens + work.source_rows + work.target_rows)
        rows += estimate.besides_of(config, sizes, self.platform).forward
        weights = sum(leaf.size for leaf in (*partition.params.values(), *partition.frozen.values()))
        if _MOST_SAVED * (rows * network.width * network.blocks + weights) <= MARGIN * limit:
            return
        optimizer = build_optimizer(config, partition, self._data.plan)

        def total(number: int) -> int:
            batch = number * work.accumulation * self._run.replicas
            return self._memory(config, partition, optimizer, [work._replace(batch=batch)], sizes).total

        needed = total(examples)
        if needed > MARGIN * limit:
            most = bisect.bisect_right(range(1, examples), limit, key=total)
            fits = f"at most {most} of its {examples} examples fit at once" if most else "not even one example fits"
            raise UserError(
                f"{config.path}: {estimate.need(needed, limit, name)}; {fits}: expected a smaller "
                f"micro_batch_size_per_gpu, or memory = 'fit'; --dry_run says what else would help"
            )

    @staticmethod
    def _frozen_keys(config: MainConfig) -> tuple[Any, ...]:
        return config.model.transformer_dtype, config.model.dtype


def overrides_of(keys: Keys) -> list[str]:
    """Return keys and values in the form of `--set`."""
    return [
        f"{key}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"
        for key, value in keys.items()
    ]


def fitting_keys(
    variants: RunVariants, limit: float, *, given: Keys = MappingProxyType({}), fixed: frozenset[str] = frozenset()
) -> Keys | None:
    """Return the cheapest keys with which the run needs at most `limit` bytes a device, None if no lever is enough.

    `given` are keys that are set in any case; no key in `fixed` is changed.
    """

    def fits(keys: Keys) -> bool:
        variant = variants.of({**given, **keys})
        return variant is not None and variant.found.total <= limit

    if fits({}):
        return given
    chosen: dict[str, Any] = {}
    tried: list[Keys] = []
    for lever in LEVERS:
        before = variants.of({**given, **chosen})
        if before is None:
            return None
        best = before.found.total
        for keys in lever(before.config, variants.devices, variants.platform):
            if fixed & keys.keys():
                continue
            variant = variants.of({**given, **chosen, **keys})
            if variant is None or variant.found.total >= best:
                continue
            best = variant.found.total
            tried = [one for one in tried if one.keys() != keys.keys()] + [keys]
            if variant.found.total <= limit:
                return {**given, **_without_needless(tried, fits)}
        chosen = _merged(tried)
    return None


def float16_keys(config: MainConfig, target: Target) -> Keys:
    """Return the key for computing in float16 if that is faster on the devices, else none."""
    return {"model.dtype": "float16"} if target.lacks_bfloat16 and config.compute_dtype == "bfloat16" else {}


def _without_needless(tried: Sequence[Keys], fits: Callable[[Keys], bool]) -> Keys:
    """Return the keys of the settings that are needed: each is left out, the dearest first, if the rest is enough."""
    needed = list(tried)
    for keys in reversed(tried):
        rest = [one for one in needed if one is not keys]
        needed = rest if fits(_merged(rest)) else needed
    return _merged(needed)


def _merged(settings: Sequence[Keys]) -> dict[str, Any]:
    return {key: value for keys in settings for key, value in keys.items()}


def choose(
    variants: RunVariants, target: Target, stored: Keys | None = None, *, required: bool = True
) -> tuple[Keys, RunVariant]:
    """Return the keys that `memory = "fit"` sets for the devices, and the run with them; print them.

    Keys that the configuration sets are kept, except for `optimizer.type`, which every configuration sets. `stored` are
    the keys of a resumed run, which uses them again. Raises UserError if no setting fits but one is `required`.
    """
    config, limit = variants.config, target.memory
    fixed = _given_keys(config)
    if stored is not None:
        keys = {key: value for key, value in stored.items() if key not in fixed}
        why = "as when the run began"
    elif limit is None:
        keys, why = {}, f"the memory of {target.name} is not known"
    else:
        now = variants.of({})
        assert now is not None
        why = estimate.need(now.found.total, limit, target.name)
        given = {key: value for key, value in float16_keys(config, target).items() if key not in fixed}
        found = fitting_keys(variants, limit, given=given, fixed=fixed)
        if found is None:
            why = f"{why}, and no key that is not set already changes that; expected an [adapter], smaller images, or "
            why += "fewer keys such as remat and param_dtype in the file"
            if required:
                raise UserError(f"{config.path}: memory = 'fit': {why}")
        keys = found or {}
    variant = variants.of(keys)
    if variant is None:
        raise UserError(f"{config.path}: memory = 'fit': {set_line(keys)} cannot be set with the other keys")
    print(f"memory = 'fit': {why}: {set_line(keys) or 'nothing is changed'}")
    for line in changes(keys):
        print(f"  {line}")
    return keys, variant


def _given_keys(config: MainConfig) -> frozenset[str]:
    """Return the dotted keys that the configuration sets, without `optimizer.type`."""
    keys = set(config.model_fields_set)
    for table in ("model", "mesh"):
        keys |= {f"{table}.{key}" for key in getattr(config, table).model_fields_set}
    return frozenset(keys | ({"remat"} if "activation_checkpointing" in keys else set()))


def stored_keys(run_folder: pathlib.Path) -> Keys | None:
    """Return the keys that were chosen when the run began, None if none are stored."""
    try:
        found = json.loads((run_folder / STORED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def store_keys(run_folder: pathlib.Path, keys: Keys) -> None:
    """Store the chosen keys in the run's folder."""
    with replacing(run_folder / STORED) as file:
        file.write(json.dumps(keys).encode())


def changes(keys: Keys) -> list[str]:
    """Return what these keys do to the numbers of a run, empty if nothing."""
    return [f"{key} = {keys[key]}: {words}" for key, words in CHANGES.items() if key in keys]


def set_line(keys: Keys) -> str:
    """Return the flags that set these keys, to paste after a command."""
    return " ".join(f"--set {_quoted(text)}" for text in overrides_of(keys))


def _quoted(text: str) -> str:
    return f'"{text}"' if any(character in text for character in "[] ") else text
