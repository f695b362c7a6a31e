"""The model and optimizer of a run: its trained parameters, their learning rates and their initial values."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from anima_jax.adapters import modules, planning
from anima_jax.adapters.dialects import ADAPTER_RULES
from anima_jax.adapters.opening import files_of
from anima_jax.checkpoints.locations import PathLike
from anima_jax.checkpoints.models import load_text_encoder, open_dit, open_text_encoder, print_messages
from anima_jax.checkpoints.names import FileTensor, dit, file_tensors
from anima_jax.checkpoints.names.networks import TEXT_ENCODER
from anima_jax.checkpoints.stored import Storage
from anima_jax.checkpoints.values import first_problem
from anima_jax.config.main import MainConfig
from anima_jax.config.schema import MOST
from anima_jax.data.batch_plan import BatchPlan
from anima_jax.errors import NotFiniteError, UserError
from anima_jax.models import parameters, quantised
from anima_jax.models.control import ControlConfig, ControlNetwork
from anima_jax.models.dit import AnimaDiT, DiTConfig
from anima_jax.models.parameters import Params
from anima_jax.models.qwen3 import Qwen3
from anima_jax.parallel import rules
from anima_jax.parallel.mesh import current_mesh, replicate, replicated
from anima_jax.training import control, optimizers
from anima_jax.training.optimizers import groups_by_path


@dataclasses.dataclass(frozen=True)
class ParamPartition:
    """A transformer whose parameters are divided into trained (float32) and frozen ones.

    `params` are the trained parameters, with their initial values. `frozen` have the compute dtype or the storage dtype
    of `[model] transformer_dtype`, which makes some of them `Quantised`.
    `tensors` are the tensors of the trained parameters in an exported file; `adapter_specs` are the adapters by module
    path, None in full training and with a control network, which is `control`, else None. `rates` maps parameters with
    learning rates per layer to these, relative to their group's. `messages` are for the user.
    """

    config: DiTConfig
    graphdef: nnx.GraphDef
    params: Params
    frozen: Params
    tensors: list[FileTensor]
    adapter_specs: Mapping[str, modules.AdapterSpec] | None
    rates: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    messages: Sequence[str] = ()
    control: ControlConfig | None = None

    @property
    def is_adapter(self) -> bool:
        """Whether an export has an adapter or control network, not the full model."""
        return self.adapter_specs is not None or self.control is not None

    @property
    def groups(self) -> dict[str, str]:
        """The group of each trained parameter, by path."""
        return groups_by_path(self.tensors)

    @property
    def text_ids(self) -> bool:
        """Whether the step trains the text encoder, so that its batches contain token ids instead of text states."""
        return any(path.startswith(TEXT_ENCODER) for path in self.params)


def prepare(
    config: MainConfig,
    text_encoder: Callable[[], Qwen3] | None = None,
    mesh: Mesh | None = None,
    *,
    sizes: DiTConfig | None = None,
) -> ParamPartition:
    """Load the transformer of the configuration, or initialise a new one, and divide its parameters.

    If `sizes` is given, a transformer of these sizes is initialised even if the configuration names a file, of which
    only the header counts: it says which parameters are quantised.
    Parameters are sharded over `mesh` (by default the current one); no device or host ever has more than its shards.
    `text_encoder` is called to load the text encoder if an adapter on it is trained; the default loads its file.
    Raises UserError if a file does not fit, if nothing would be trained, if `transformer_dtype` would round trained
    parameters, or if `remat_every` does not divide the number of blocks; NotFiniteError if a file of the base model or
    the adapter has NaN or infinite values.
    """
    mesh = mesh or current_mesh()
    model_config, graphdef, base = _base(config, sizes or config.model.config, mesh)
    if model_config.blocks % config.remat_every:
        divisors = [n for n in range(1, model_config.blocks + 1) if model_config.blocks % n == 0]
        raise UserError(
            f"{config.path}: remat_every = {config.remat_every}, expected a divisor of the transformer's "
            f"{model_config.blocks} blocks: {', '.join(map(str, divisors))}"
        )
    if config.adapter is None:
        trained = _trained_paths(config, base)
        tensors = [tensor for tensor in file_tensors(dit.RULES, base) if tensor.path in trained]
        params = {path: base[path].astype(jnp.float32) for path in base if path in trained}
        frozen = {path: value for path, value in base.items() if path not in trained}
        return ParamPartition(model_config, graphdef, params, frozen, tensors, None)
    if config.adapter.is_control:
        return _with_control(config, model_config, base, mesh)
    return _with_adapter(config, model_config, base, text_encoder or (lambda: _text_encoder(config)), mesh)


def _with_adapter(
    config: MainConfig, model_config: DiTConfig, base: Params, load_text_encoder: Callable[[], Qwen3], mesh: Mesh
) -> ParamPartition:
    """Return the partition of the frozen base model with trained adapters."""
    qwen = load_text_encoder() if config.trains_text_encoder else None
    if qwen is not None:
        base = base | {TEXT_ENCODER + path: value for path, value in parameters.split(qwen)[1].items()}

    def bare(rngs) -> AnimaDiT:
        model = AnimaDiT(model_config, rngs=rngs)
        if qwen is not None:
            model.text_encoder = nnx.data(Qwen3(qwen.config, rngs=rngs))
        return model

    targets = modules.target_shapes(nnx.eval_shape(lambda: bare(nnx.Rngs(0))))
    adapter_specs, rates = planning.plan(config, targets)

    def build(rngs) -> AnimaDiT:
        model = bare(rngs)
        modules.attach(model, adapter_specs)
        return model

    graphdef, abstract = parameters.abstract(build)
    factors = {path: leaf for path, leaf in abstract.items() if modules.is_factor(path)}
    params = modules.initial(abstract | base, adapter_specs, config.seed, rules.shardings(factors, factors, mesh))
    scales = planning.scales(config, adapter_specs)
    messages = planning.idle_exclusions(config, targets)
    if config.adapter and config.adapter.init_from_existing:
        loaded, more = planning.existing(config, adapter_specs, scales, params)
        _check_finite(
            [_is_finite(mesh)(value) for value in loaded.values()],
            list(files_of(config.adapter.init_from_existing).values()),
        )
        params |= loaded
        messages += more
    tensors = file_tensors(ADAPTER_RULES, params)
    frozen = base | replicate(scales, mesh)
    return ParamPartition(model_config, graphdef, params, frozen, tensors, adapter_specs, rates, messages)


def _with_control(config: MainConfig, model_config: DiTConfig, base: Params, mesh: Mesh) -> ParamPartition:
    """Return the partition of the frozen base model with a trained control network."""
    network, rates = control.network_of(config, model_config)

    def build(rngs) -> AnimaDiT:
        model = AnimaDiT(model_config, rngs=rngs)
        model.control = nnx.data(ControlNetwork(network, rngs=rngs))
        return model

    params, messages = control.initial(network, config.seed, mesh), list[str]()
    if config.adapter and config.adapter.init_from_existing:
        loaded, messages = control.existing(config, network, params, mesh)
        params |= loaded
    tensors = control.tensors_of(network, params)
    graphdef = parameters.abstract(build)[0]
    return ParamPartition(model_config, graphdef, params, base, tensors, None, rates, messages, network)


def _text_encoder(config: MainConfig) -> Qwen3:
    loaded = load_text_encoder(config.model.llm_files, config.compute_dtype, allow_unused=config.allow_unused)
    return _stored_text(config, loaded)


def blank_text_encoder(config: MainConfig) -> Qwen3:
    """Return the text encoder with weights of zero; only the header of its file is read."""
    with open_text_encoder(config.model.llm_files, allow_unused=config.allow_unused) as checkpoint:
        zeros = {path: jnp.zeros(leaf.shape, config.compute_dtype) for path, leaf in checkpoint.abstract.items()}
        return _stored_text(config, parameters.merge(checkpoint.graphdef, zeros))


def _stored_text(config: MainConfig, model: Qwen3) -> Qwen3:
    storage = config.model.text_encoder_storage
    return quantised.quantise_text_encoder(model, storage) if storage else model


def dit_config(config: MainConfig) -> DiTConfig:
    """Return the sizes of the transformer, from the configuration or from the header of its file.

    Raises UserError if the file does not fit.
    """
    if config.model.config is not None:
        return config.model.config
    path, adapter_path = config.model.transformer_files, config.model.llm_adapter_path
    assert path is not None
    with open_dit(path, adapter_path=adapter_path, allow_unused=config.allow_unused) as checkpoint:
        return checkpoint.config


def _base(config: MainConfig, sizes: DiTConfig | None, mesh: Mesh) -> tuple[DiTConfig, nnx.GraphDef, Params]:
    """Return the sizes, graphdef and parameters of the transformer without adapter.

    It is initialised with `sizes` or, if None, loaded from its file. Frozen parameters have their storage dtype,
    trained ones float32.
    """
    storage = Storage(config.compute_dtype, config.model.transformer_dtype, config.model.compute)
    if sizes is not None:
        graphdef, shapes = parameters.abstract(lambda rngs: AnimaDiT(sizes, rngs=rngs))
        shardings = rules.shardings(shapes, shapes, mesh)
        base = parameters.initial(lambda rngs: AnimaDiT(sizes, rngs=rngs), config.seed, shardings)[1]
        trained = _trained_in_base(config, base)
        base |= _as_stored(config, storage, trained)
        return sizes, graphdef, {p: v if p in trained else storage.stored(p, v, mesh) for p, v in base.items()}
    path, adapter_path = config.model.transformer_files, config.model.llm_adapter_path
    assert path is not None
    with open_dit(path, adapter_path=adapter_path, allow_unused=config.allow_unused) as checkpoint:
        print_messages(checkpoint)
        trained = _trained_in_base(config, checkpoint.abstract)
        base, shardings = {}, rules.shardings(checkpoint.abstract, checkpoint.abstract, mesh)
        finite: list[jax.Array] = []
        for name, value in checkpoint.parameters(storage, shardings, wide=trained):
            finite.append(_is_finite(mesh)(value))
            base[name] = value if name in trained else storage.stored(name, value, mesh)
        _check_finite(finite, filter(None, (path, adapter_path)))
        return checkpoint.config, checkpoint.graphdef, base


def _as_stored(config: MainConfig, storage: Storage, trained: frozenset[str]) -> Params:
    """Return zeros for the parameters that the transformer's file, if there is one, has quantised and devices keep."""
    path, adapter_path = config.model.transformer_files, config.model.llm_adapter_path
    if path is None:
        return {}
    with open_dit(path, adapter_path=adapter_path, allow_unused=config.allow_unused) as checkpoint:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), checkpoint.kept(storage, trained))


@functools.cache
def _is_finite(mesh: Mesh) -> Callable[[Any], jax.Array]:
    def all_finite(value: Any) -> jax.Array:  # of quantised weights, of the scales and of codes that can be NaN
        return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(value)]).all()

    return jax.jit(all_finite, out_shardings=replicated(mesh))


def _check_finite(finite: Sequence[jax.Array], files: Iterable[PathLike]) -> None:
    """Raise NotFiniteError, naming the first of `files` that has NaN or infinite values, unless all are `finite`."""
    if not all(map(bool, jax.device_get(list(finite)))):
        files = list(files)
        problem = first_problem(files) or f"{files[0]}: NaN or infinite values"
        raise NotFiniteError(f"{problem}; nothing can be trained on them")


def _trained_in_base(config: MainConfig, base: Params) -> frozenset[str]:
    """Return the paths of the transformer's own trained parameters: none with an adapter.

    Raises UserError if `transformer_dtype` would round them, or if there is no adapter and every rate is 0.
    """
    if config.adapter is not None:
        return frozenset()
    trained, storage = _trained_paths(config, base), config.model.transformer_dtype
    rounded = sorted({path for path in trained if quantised.in_transformer_dtype(path)})
    if storage in quantised.STORED and rounded:
        groups = groups_by_path([tensor for tensor in file_tensors(dit.RULES, base) if tensor.path in rounded])
        raise UserError(
            f"{config.path}: model.transformer_dtype = '{storage}' is for frozen weights, but those of the groups "
            f"{', '.join(sorted(set(groups.values())))} are trained; expected an [adapter], or no transformer_dtype"
        )
    return trained


def _trained_paths(config: MainConfig, base: Params) -> frozenset[str]:
    """Return the paths of the parameters whose group has a rate above 0. Raises UserError if there are none."""
    groups = groups_by_path(file_tensors(dit.RULES, base))
    trained = frozenset(path for path, group in groups.items() if config.learning_rates[group] > 0)
    if not trained:
        raise UserError(f"{config.path}: every learning rate is 0, so nothing would be trained")
    return trained


def learning_rates(config: MainConfig, plan: BatchPlan | None = None) -> optimizers.LearningRates:
    """Return the learning rates of a run. Schedules span all epochs, regardless of `max_steps`.

    Without a plan, the number of steps is unknown, which is enough to check the optimizer but not to train. Raises
    UserError for more steps than the device can count.
    """
    schedule = config.schedule
    steps = plan.steps_for(config.epochs) if plan else 1
    if min(steps, config.max_steps or steps) > MOST:
        found = f"epochs = {config.epochs} of this data set are {steps} steps, expected at most {MOST} steps"
        raise UserError(f"{config.path}: {found}; max_steps ends the run earlier")
    steps = min(steps, MOST)
    return optimizers.LearningRates(
        config.learning_rates,
        schedule.shape,
        schedule.warmup_steps,
        steps,
        schedule.num_cycles,
        schedule.power,
        schedule.min_lr,
    )


def build_optimizer(
    config: MainConfig, partition: ParamPartition, plan: BatchPlan | None = None
) -> optax.GradientTransformation:
    """Return the optimizer of a run; without a plan, it serves only to check the configuration."""
    return optimizers.build(
        config.optimizer,
        learning_rates(config, plan),
        partition.tensors,
        clip_norm=config.gradient_clipping,
        global_batch=max(tier.batch_size for tier in plan.tiers) if plan else 1,
        layer_rates=partition.rates,
        seed=config.seed,
    )
