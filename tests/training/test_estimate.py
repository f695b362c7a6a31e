"""Estimates of FLOPs and memory, compared with JAX's programs and the compiler, and runs that do not fit."""

import math
import re
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from anima_jax.adapters import modules
from anima_jax.checkpoints.names import dit, file_tensors
from anima_jax.config.load import load_config
from anima_jax.diffusion.objective import TimeDistribution
from anima_jax.errors import UserError
from anima_jax.models import parameters
from anima_jax.models.control import LAYERS, ControlConfig, ControlNetwork
from anima_jax.models.dit import AnimaDiT, DiTConfig
from anima_jax.models.llm_adapter import LLMAdapterConfig
from anima_jax.models.parameters import merge
from anima_jax.parallel.devices import device_bytes
from anima_jax.platform import compiling_for
from anima_jax.training import control, estimate
from anima_jax.training.estimate import abstract_partition, flops
from anima_jax.training.flops import Workload
from anima_jax.training.memory import WORKSPACE, abstract_batch, memory
from anima_jax.training.state import ParamPartition, prepare
from anima_jax.training.step import StepConfig, init_state, loss_fn
from anima_jax.training.tables import estimate_table
from anima_jax.training.target import COMMON
from tests.parallel.meshes import MESHES
from tests.parallel.meshes import name as mesh_name
from tests.small_run import write_config, write_transformer

CONFIG = DiTConfig(128, 4, 2, 512, 64, 16, adapter=LLMAdapterConfig(64, 2, 2, 128, 64, 64, 512))
WORK = Workload("256", 4, 2, 256, (1, 16, 16), 32, 48)
FLOAT32 = StepConfig(compute_dtype=jnp.float32)


def full() -> ParamPartition:
    graphdef, params = parameters.abstract(lambda rngs: AnimaDiT(CONFIG, rngs=rngs))
    return ParamPartition(CONFIG, graphdef, params, {}, file_tensors(dit.RULES, params), None)


def low_rank(adapter: bool, kind: str = "lora") -> ParamPartition:
    """Return shapes of an adapter on every layer that can have one, optionally without the LLM adapter's."""

    def build(rngs):
        model = AnimaDiT(CONFIG, rngs=rngs)
        shapes = modules.target_shapes(model)
        chosen = {path: shape for path, shape in shapes.items() if adapter or not path.startswith("llm_adapter.")}
        modules.attach(
            model, {path: modules.adapter_spec(kind, shape, [8] * shape[0]) for path, shape in chosen.items()}
        )
        return model

    graphdef, params = parameters.abstract(build)
    frozen = {path: leaf for path, leaf in params.items() if not modules.is_factor(path)}
    return ParamPartition(
        CONFIG,
        graphdef,
        {p: v for p, v in params.items() if modules.is_factor(p)},
        frozen,
        [],
        {"": modules.AdapterSpec("lora", {}, (8,))},
    )


def steered() -> ParamPartition:
    """Return shapes of a frozen model with a control network that has every part."""
    network = ControlConfig(3, 64, 32, 64, 2, (1, 2), LAYERS, CONFIG.blocks, width=CONFIG.width)

    def build(rngs):
        model = AnimaDiT(CONFIG, rngs=rngs)
        model.control = nnx.data(ControlNetwork(network, rngs=rngs))
        return model

    graphdef, params = parameters.abstract(build)
    trained = {path: leaf for path, leaf in params.items() if path.startswith(control.PREFIX)}
    frozen = {path: leaf for path, leaf in params.items() if path not in trained}
    return ParamPartition(CONFIG, graphdef, trained, frozen, [], None, control=network)


def gradient_of(trained: ParamPartition, settings: StepConfig):
    """Return the gradient function of one example's loss, and the shapes of its arguments."""

    def loss(params, frozen, batch):
        return loss_fn(merge(trained.graphdef, frozen | params), batch, None, settings)

    work = WORK._replace(control_channels=trained.control.channels if trained.control else 0)
    return jax.grad(loss), (trained.params, trained.frozen, abstract_batch(work, 1, CONFIG, jnp.float32))


def products(jaxpr) -> float:
    """Return the FLOPs of all matrix products in a program; the body of a scan counts as often as it runs."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((left, _), _) = equation.params["dimension_numbers"]
            contracted = math.prod(equation.invars[0].aval.shape[axis] for axis in left)
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * contracted
        inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
        once = sum(products(body) for body in inner if hasattr(body, "eqns"))
        total += once * equation.params.get("length", 1)
    return total


@pytest.mark.parametrize(
    ("trained", "options"),
    [
        (full, {"remat": "none"}),
        (full, {"remat": "full"}),
        (full, {"remat": "dots"}),
        (full, {"remat": "attention"}),
        (full, {"remat": "full", "remat_every": 2}),
        (lambda: low_rank(True), {"remat": "full"}),
        (lambda: low_rank(False), {"remat": "none"}),
        (lambda: low_rank(True, "lokr"), {"remat": "none"}),
        (lambda: low_rank(True, "loha"), {"remat": "full"}),
        (lambda: low_rank(True, "dora"), {"remat": "full"}),
        (steered, {"remat": "none"}),
    ],
    ids=[
        "none",
        "full",
        "dots",
        "attention",
        "pairs",
        "lora",
        "lora without the adapter",
        "lokr",
        "loha",
        "dora",
        "control",
    ],
)
def test_flops_equal_those_of_the_programs_matrix_products(trained, options):
    trained, settings = trained(), StepConfig(compute_dtype=jnp.float32, **options)
    gradient, shapes = gradient_of(trained, settings)
    # On a CPU, the backward pass of a product is our own, and also computes gradients that nobody wants.
    with compiling_for("gpu"):
        counted = products(jax.make_jaxpr(gradient)(*shapes).jaxpr)
    found = flops(CONFIG, trained.params, WORK, **options)
    # 3 %: a block's last product is not recomputed, and the single row of the times counts as trained throughout.
    assert sum(found) == pytest.approx(counted, rel=0.03)


def test_flops_agree_with_xlas_cost_analysis():
    trained, settings = full(), StepConfig(compute_dtype=jnp.float32, remat="none", scan_unroll=CONFIG.blocks)
    gradient, shapes = gradient_of(trained, settings)
    analysed = jax.jit(gradient).lower(*shapes).cost_analysis()["flops"]
    found = sum(flops(CONFIG, trained.params, WORK, "none"))
    # XLA also counts other operations, and the body of the adapter's scan once instead of twice.
    assert 0.97 * found < analysed < 1.2 * found


def test_the_released_models_forward_needs_two_flops_per_weight_and_token():
    config = DiTConfig()
    params = parameters.abstract(lambda rngs: AnimaDiT(config, rngs=rngs))[1]
    work = Workload("1024", 1, 1, 4096, (1, 64, 64), 512, 512)
    weights = sum(
        leaf.size for path, leaf in params.items() if re.match(r"blocks\.(self_attn|cross_attn\.[qo]|mlp)", path)
    )
    attention = 4 * config.blocks * config.width * 4096 * (4096 + 512)
    found = flops(config, params, work, "full")
    # 4 %: the adapter, context projections, patches and modulation, which are not per token.
    assert found.forward == pytest.approx(2 * weights * 4096 + attention, rel=0.04)
    assert found.model == pytest.approx(3 * found.forward, rel=0.01)


def test_memory_equals_the_states_size_and_shrinks_with_the_micro_batch():
    trained, optimizer = full(), optax.adamw(1e-3)
    settings = StepConfig(compute_dtype=jnp.float32, ema_decay=0.9, remat="none")
    counted = memory(trained, optimizer, settings, WORK, jnp.float32, measure=False)
    zeros = {path: jnp.zeros(leaf.shape) for path, leaf in trained.params.items()}
    state = init_state(zeros, optimizer, settings)
    held = {"trained parameters": state.params, "optimizer": state.opt_state, "moving average": state.ema}
    for name, part in held.items():
        assert counted.rows[name] == sum(array.nbytes for array in jax.tree.leaves(part))
    assert counted.rows["gradients"] == 2 * counted.rows["trained parameters"]  # a sum over two micro-batches
    assert counted.total == sum(counted.rows.values())
    whole = memory(trained, optimizer, settings, WORK._replace(accumulation=1), jnp.float32, measure=False)
    assert whole.rows["gradients"] == counted.rows["trained parameters"]
    beyond = whole.rows["activations"] - WORKSPACE
    assert beyond == 2 * (counted.rows["activations"] - WORKSPACE)


@pytest.mark.slow
def test_activations_are_near_those_of_the_compiled_program():
    # Of so small a program that recomputes, attention's own memory is the larger part; see test_memory.py for others.
    settings = StepConfig(compute_dtype=jnp.float32, remat="none")
    work = Workload("1024", 2, 1, 1024, (1, 32, 32), 16, 16)
    counted, compiled = (
        memory(full(), optax.adamw(1e-3), settings, work, jnp.float32, measure=measure) for measure in (False, True)
    )
    assert compiled.measured
    # 25 %: how XLA reuses buffers is only known after compiling.
    assert counted.rows["activations"] == pytest.approx(compiled.rows["activations"], rel=0.25)


def test_remat_saves_less_and_offload_moves_the_inputs_of_blocks():
    found = {}
    for remat in ("offload", "full", "none"):
        settings = StepConfig(compute_dtype=jnp.float32, remat=remat)
        counted = memory(full(), optax.adamw(1e-3), settings, WORK, jnp.float32, measure=False)
        found[remat] = counted.rows["activations"]
    assert found["full"] < found["none"]
    assert found["full"] - found["offload"] == WORK.micro_batch * CONFIG.blocks * WORK.tokens * CONFIG.width * 4


def test_a_run_that_does_not_fit_is_an_error_with_the_numbers():
    device = jax.devices()[0]
    limit = device_bytes(device)
    assert limit > 2**28
    estimate.check_memory(limit, limit, "cpu", "an adapter needs less")
    estimate.check_memory(2**40, None, "cpu", "an adapter needs less")
    with pytest.raises(
        UserError, match=r"needs about 1024\.0 GiB of memory on each device, cpu has 2\.0 GiB; .*adapter"
    ):
        estimate.check_memory(2**40, 2**31, "cpu", "an adapter needs less")


@pytest.mark.parametrize("sizes", MESHES[1:], ids=mesh_name)
def test_memory_per_device_is_divided_by_the_mesh(sizes):
    """State by fsdp × tensor, approximately; activations of a replica by the context axis at least."""
    one = memory(full(), optax.adamw(1e-3), FLOAT32, WORK, jnp.float32, measure=False)
    work = WORK._replace(batch=WORK.batch * sizes["data"] * sizes["fsdp"])
    found = memory(full(), optax.adamw(1e-3), FLOAT32, work, jnp.float32, sizes=sizes, measure=False)
    parts = sizes["fsdp"] * sizes["tensor"]
    for row in ("trained parameters", "gradients", "optimizer"):
        assert one.rows[row] / parts <= found.rows[row] <= 2 * one.rows[row] / parts
    assert found.rows["batch"] == one.rows["batch"]
    beyond, of_one = (each.rows["activations"] - WORKSPACE for each in (found, one))
    assert of_one / sizes["context"] / sizes["tensor"] * 0.99 <= beyond <= of_one / sizes["context"]


def test_peak_flops_follow_from_the_device_kind():
    class Device:
        def __init__(self, kind):
            self.device_kind = kind

    kinds = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "TPU v5 lite": 197e12, "TPU v5p": 459e12}
    for kind, peak in {**kinds, "TPU v6 lite": 918e12, "NVIDIA A100-SXM4-80GB": 312e12, "cpu": None}.items():
        assert estimate.peak_flops([Device(kind)], jnp.bfloat16) == peak
    assert estimate.peak_flops([Device("TPU v4")], jnp.float32) is None


def test_time_quantiles_are_one_row_unless_times_depend_on_the_size():
    logistic = [1 / (1 + math.exp(-statistics.NormalDist().inv_cdf(n / 10))) for n in range(1, 10)]
    workloads = [WORK, WORK._replace(tier="1024", grid=(1, 64, 64))]
    shown = estimate.time_quantiles(StepConfig(), workloads)
    np.testing.assert_allclose(shown["all sizes"], logistic, rtol=1e-5)
    by_size = estimate.time_quantiles(StepConfig(times=TimeDistribution(flux_shift=True)), workloads)
    e_mu = math.exp(1.15)  # at 4096 tokens
    np.testing.assert_allclose(by_size["1024"], [e_mu / (e_mu + 1 / t - 1) for t in logistic], rtol=1e-5)
    assert by_size["256"][4] < by_size["1024"][4]


LOW_RANK = {"adapter": "type = 'lora'\nrank = 4"}


@pytest.mark.parametrize(("adapter", "storage"), [({}, []), (LOW_RANK, ["model.transformer_dtype='int8'"])])
def test_abstract_shapes_equal_those_of_loaded_arrays(tmp_path, adapter, storage):
    (tmp_path / "pictures").mkdir()
    write_transformer(tmp_path / "base.safetensors")
    path = write_config(tmp_path, tmp_path / "pictures", "epochs = 1", **adapter)
    config = load_config(path, ["model.dtype=bfloat16", "model.mlp_lr=0", *storage])
    shapes, loaded = abstract_partition(config), prepare(config)
    for found, wanted in ((shapes.params, loaded.params), (shapes.frozen, loaded.frozen)):
        described = (jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), part) for part in (found, wanted))
        assert next(described) == next(described)
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(found))
    assert (shapes.tensors, shapes.adapter_specs, shapes.config) == (
        loaded.tensors,
        loaded.adapter_specs,
        loaded.config,
    )


def test_quantised_weights_count_in_their_stored_size(tmp_path):
    (tmp_path / "pictures").mkdir()
    write_transformer(tmp_path / "base.safetensors")
    path = write_config(tmp_path, tmp_path / "pictures", "epochs = 1", **LOW_RANK)
    found = {}
    for storage in ("float32", "int8"):
        trained = abstract_partition(load_config(path, [f"model.transformer_dtype='{storage}'"]))
        settings = StepConfig(compute_dtype=jnp.float32, remat="none")
        found[storage] = memory(trained, optax.sgd(1.0), settings, WORK, jnp.float32, measure=False).rows
    # A quarter, plus a float32 scale per output channel, of which a narrow network has many; 1-D weights stay.
    assert 0.25 < found["int8"]["frozen parameters"] / found["float32"]["frozen parameters"] < 0.5
    assert found["int8"]["activations"] == pytest.approx(found["float32"]["activations"], rel=0.05)


@pytest.mark.parametrize("name", ["offload", "off_load", "OffLoad"])
def test_offloaded_moments_need_no_device_memory_however_the_name_is_written(tmp_path, name):
    (tmp_path / "pictures").mkdir()
    write_transformer(tmp_path / "base.safetensors")
    config = load_config(write_config(tmp_path, tmp_path / "pictures", "epochs = 1"), [f"optimizer.type='{name}'"])
    partition = abstract_partition(config)
    with compiling_for("gpu"):
        found = estimate.estimate(config, FLOAT32, partition, optax.adamw(1e-3), [WORK], measure=False)
    assert found.memory.rows["optimizer"] == 0


def test_the_estimate_prints_memory_flops_and_times(tmp_path):
    (tmp_path / "pictures").mkdir()
    write_transformer(tmp_path / "base.safetensors")
    config = load_config(write_config(tmp_path, tmp_path / "pictures", "epochs = 1"))
    trained = abstract_partition(config)
    found = estimate.estimate(config, FLOAT32, trained, optax.adamw(1e-3), [WORK], measure=False)
    text = estimate_table(found)
    total = sum(leaf.size * 4 for leaf in jax.tree.leaves(trained.params))
    assert re.search(rf"^optimizer +{2 * total / 2**30:.3f}$", text, re.M)
    whole = WORK.batch * sum(flops(trained.config, trained.params, WORK, "full")) / 1e12
    assert re.search(rf"^256 .* {whole:.4g}$", text, re.M)
    assert re.search(r"^all sizes .* 0\.500 .*$", text, re.M)


def test_flops_are_counted_once_per_tier_and_memory_for_each_platform(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    write_transformer(tmp_path / "base.safetensors")
    config = load_config(write_config(tmp_path, tmp_path / "pictures", "epochs = 1"))
    trained, optimizer, counted = abstract_partition(config), optax.adamw(1e-3), []
    monkeypatch.setattr(estimate, "flops", lambda *a: counted.append(a) or flops(*a))
    found = estimate.estimate(
        config, FLOAT32, trained, optimizer, [WORK, WORK._replace(tier="512")], device_specs=COMMON, platform="cpu"
    )
    assert len(counted) == 2
    of = {
        platform: estimate.run_memory(config, FLOAT32, trained, optimizer, [WORK], platform=platform, measure=False)
        for platform in ("cpu", "gpu", "tpu")
    }
    # A machine without a known kind of device is judged as what it is, beside the common kinds, each by its own figure.
    assert found.by_platform == of
    assert found.memory == of["cpu"]
    assert of["cpu"].total != of["tpu"].total
