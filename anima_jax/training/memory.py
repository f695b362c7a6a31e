"""Memory of a training step on each device, counted from shapes, or as XLA reports it for the compiled step.

The bytes of activations are those that the backward pass saves. By default XLA's are not used on a CPU, whose programs
keep 16-bit weights in float32. What compilers for TPUs and GPUs report is set beside these numbers in docs/scaling.md.
Axes: b batch, l image tokens, n source and m target text tokens, d features.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from anima_jax.config.sizes import PIXEL_MULTIPLE
from anima_jax.diffusion.objective import PIXELS
from anima_jax.models.dit import IN_PLACE, OUT_CHANNELS, DiTConfig
from anima_jax.models.llm_adapter import Text
from anima_jax.models.parameters import Params, cast_to_compute, merge
from anima_jax.parallel import rules
from anima_jax.parallel.mesh import batch_sharding, current_mesh, replicas, replicated
from anima_jax.platform import compiling_for, lower, platform
from anima_jax.training.flops import Workload
from anima_jax.training.optimizers.layers import ONE_AT_A_TIME
from anima_jax.training.state import ParamPartition
from anima_jax.training.step import StepConfig, TrainBatch, compile_step, init_state, loss_fn, opt_state_shardings

WORKSPACE = 64 * 2**20
"""Bytes that attention needs at any size: a 16 MiB block each of scores, weights and their two gradients."""

_UPDATED = 5
"""Float32 arrays in the update of a layer at once: gradient, old value, change and two moments."""

_LANES = 128
"""Multiple to which a TPU pads the last axis of an array."""

_STACKS = ("blocks.", "control.blocks.")
"""Beginnings of the paths of parameters of which the scan over the blocks has a slice in each turn."""

_MANY = 1009
"""Examples of an abstract batch: a prime, so that an axis is a multiple of it only if examples are along it."""


def abstract_batch(
    work: Workload, size: int, config: DiTConfig, dtype: Any, *, masked: bool = False, text_ids: bool = False
) -> TrainBatch:
    """Return the shapes of `size` examples, latents and text states in `dtype`; `text_ids`: token ids, not states."""

    def shape(dtype: Any, *sizes: int) -> Any:
        return jax.ShapeDtypeStruct((size, *sizes), dtype)

    features = PIXEL_MULTIPLE**2 * work.control_channels
    return TrainBatch(
        latents_blc=shape(dtype, work.tokens, PIXELS * OUT_CHANNELS),
        grid_b3=shape(jnp.int32, 3),
        ids_b2=shape(jnp.uint32, 2),
        epochs_b=shape(jnp.int32),
        text=_abstract_text(work, size, config, dtype, text_ids),
        mask_blp=shape(jnp.float32, work.tokens, PIXELS) if masked else None,
        full=() if work.full else None,
        control_blp=shape(jnp.uint8, work.tokens, features) if features else None,
    )


def _abstract_text(work: Workload, size: int, config: DiTConfig, dtype: Any, ids: bool) -> Text:
    assert config.adapter is not None
    source, target = (size, work.source_rows), (size, work.target_rows)
    states = jax.ShapeDtypeStruct((*source, config.adapter.source_width), dtype)
    return Text(
        jax.ShapeDtypeStruct(source, jnp.int32) if ids else states,
        *(jax.ShapeDtypeStruct(rows, jnp.int32) for rows in (source, target, target)),
    )


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes by purpose: on each device (`rows`) and in host memory per device (`on_host`).

    `measured` says whether the activations are those of the compiled program.
    """

    rows: Mapping[str, int]
    on_host: Mapping[str, int]
    measured: bool = False

    @property
    def total(self) -> int:
        """Bytes per device."""
        return sum(self.rows.values())


@dataclasses.dataclass(frozen=True)
class Besides:
    """What a run needs besides its training step, on each device.

    `resident` are the bytes of encoders that stay in memory for samples or captions. `forward` are the tokens that
    evaluation and sampling have in a forward pass at once, the largest number of the two. `platform` is "cpu", "gpu" or
    "tpu". `together` says whether the optimizer updates all parameters at once, instead of layer by layer.
    `host_moments` are optimizer states in host memory.
    """

    resident: int = 0
    forward: int = 0
    platform: str = "gpu"
    together: bool = False
    host_moments: bool = False


def memory(
    partition: ParamPartition,
    optimizer: optax.GradientTransformation,
    config: StepConfig,
    work: Workload,
    dtype: Any,
    *,
    sizes: Mapping[str, int] | None = None,
    masked: bool = False,
    besides: Besides = Besides(),
    measure: bool | None = None,
) -> Memory:
    """Return the memory of a run whose largest step is `work`; `dtype` is the dtype of cached examples.

    `partition` may contain shapes. `sizes` are the mesh sizes, by default those of the current mesh. `measure` compiles
    the step for the current mesh to get the exact bytes; by default only without `sizes`, and not on a CPU.
    """
    measure = measure if measure is not None else sizes is None and platform() != "cpu"
    sizes = sizes or current_mesh().shape
    batch = abstract_batch(work, work.batch, partition.config, dtype, masked=masked, text_ids=partition.text_ids)
    bytes_of = functools.partial(rules.shard_bytes, params=partition.params, sizes=sizes)
    wide, stored = (shapes_in(partition.params, dtype) for dtype in (jnp.float32, config.param_dtype))
    computed = jax.eval_shape(lambda params: cast_to_compute(params, config.compute_dtype), wide)
    moments, in_float32 = bytes_of(jax.eval_shape(optimizer.init, wide)), bytes_of(wide)
    rows = {
        "trained parameters": bytes_of(stored),
        "frozen parameters": rules.shard_bytes(partition.frozen, partition.frozen, sizes),
        "gradients": bytes_of(computed),
        "optimizer": 0 if besides.host_moments else moments,
        "moving average": 0 if config.ema_decay is None else in_float32,
        "batch": num_bytes(batch) // replicas(sizes),
        "encoders": besides.resident,
    }
    shape = _Trace.of(partition, config, work, dtype, masked, "none", besides.platform)
    saved = _saved(shape)
    examples = -(-work.micro_batch // replicas(sizes))
    inputs = saved.inputs // sizes["context"]
    on_host = {"optimizer": moments} if besides.host_moments else {}
    on_host |= {"inputs of blocks": examples * inputs} if config.remat == "offload" else {}
    if measure and (temporary := _compiled_bytes(lowered_step(partition, optimizer, config, work, batch))) is not None:
        return Memory(rows | {"activations": max(0, temporary - rows["gradients"])}, on_host, measured=True)
    copies = _compute_copies(partition, config)
    if work.accumulation > 1:
        rows["gradients"] += in_float32  # the sum over the micro-batches
    elif config.remat in IN_PLACE or config.remat_every > 1:
        # Gradients of blocks are written over the weights (models/stack.py).
        copies = {path: copy for path, copy in copies.items() if not path.startswith(_STACKS)}
    rows["compute copies"] = bytes_of(copies)
    rows["gathered weights"] = _gathered_bytes(partition, config, sizes) if sizes["fsdp"] > 1 else 0
    kept = _kept(shape, config) // sizes["context"]
    # Between blocks, every device of the tensor axis has all features; inside a block, only its shard.
    between = 0 if config.remat == "offload" else min(kept, inputs)
    working = examples * _working_bytes(partition, config, work) // sizes["context"] // sizes["tensor"]
    rows["activations"] = examples * between + examples * (kept - between) // sizes["tensor"] + max(WORKSPACE, working)
    if besides.platform == "tpu":
        rows["weights in another layout"] = _layout_bytes(partition, config, sizes)
    # What the backward pass holds is free again while the optimizer runs, and all of it while samples are drawn.
    passing = sum(rows.get(name, 0) for name in _PASSING)
    update = _update_bytes(partition, config, sizes, moments / max(1, in_float32), besides) - passing
    rows["optimizer's update"] = max(0, update)
    forward = besides.forward * saved.of_block // work.tokens // sizes["context"] // sizes["tensor"]
    idle = passing + rows["gradients"] + rows["batch"] + rows["optimizer's update"]
    forward += bytes_of(_compute_copies(partition, config)) + rows["gathered weights"] if forward else 0
    rows["samples and evaluation"] = max(0, forward - idle)
    return Memory(rows, on_host)


_PASSING = ("compute copies", "gathered weights", "activations", "weights in another layout")


def shapes_in(params: Params, dtype: Any) -> Params:
    """Return the shapes of `params` in another dtype."""
    return {path: jax.ShapeDtypeStruct(leaf.shape, dtype) for path, leaf in params.items()}


def _compute_copies(partition: ParamPartition, config: StepConfig) -> Params:
    """Return the shapes of the trained parameters that are copied for the computation, because it has another dtype."""
    copies = jax.eval_shape(lambda params: cast_to_compute(params, config.compute_dtype), partition.params)
    return {path: copy for path, copy in copies.items() if copy.dtype != config.param_dtype}


def _gathered_bytes(partition: ParamPartition, config: StepConfig, sizes: Mapping[str, int]) -> int:
    """Return the bytes of two blocks' weights gathered over `fsdp`: the current block's and the next one's."""
    weights: Params = {**partition.frozen, **partition.params}
    block = {
        path: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), config.compute_dtype)
        for path, leaf in weights.items()
        if path.startswith(_STACKS)
    }
    return 2 * rules.shard_bytes(block, block, {**sizes, "fsdp": 1})


def _layout_bytes(partition: ParamPartition, config: StepConfig, sizes: Mapping[str, int]) -> int:
    """Return the bytes that a TPU's program needs for weights in another layout than ours.

    It copies the stacks of self-attention's q, k and v, and pads the last axis of the gradients and compute copies of
    narrow factors to 128. So counted, a LoRA on a bfloat16 or int8 base is within 2 % of what libtpu reports.
    """
    copies = _compute_copies(partition, config)
    weights: Params = {**partition.frozen, **copies}
    stacks = {path: leaf for path, leaf in weights.items() if re.match(r"blocks\.self_attn\.[qkv]_proj\.kernel", path)}
    padded = {
        path: jax.ShapeDtypeStruct((*leaf.shape[:-1], _LANES - leaf.shape[-1]), jnp.float32)
        for path, leaf in partition.params.items()
        if leaf.ndim > 2 and leaf.shape[-1] < _LANES
    }
    narrow = {path: leaf.update(dtype=config.compute_dtype) for path, leaf in padded.items() if path in copies}
    return sum(rules.shard_bytes(part, weights | padded, sizes) for part in (stacks, padded, narrow))


def _working_bytes(partition: ParamPartition, config: StepConfig, work: Workload) -> int:
    """Return the bytes that the backward pass of one example's block needs besides what its forward pass saves.

    They are largest in the MLP: the gradients before and after GELU, and under an adapter the adapter's own part of
    the former, which XLA adds in a kernel of its own.
    """
    adapted = any(path.startswith("blocks.mlp.layer2.") for path in partition.params.keys() - partition.frozen.keys())
    arrays = 3 if adapted and "blocks.mlp.layer2.kernel" in partition.frozen else 2
    return arrays * work.tokens * partition.config.mlp_width * jnp.dtype(config.compute_dtype).itemsize


def _update_bytes(
    partition: ParamPartition, config: StepConfig, sizes: Mapping[str, int], moments: float, besides: Besides
) -> int:
    """Return the bytes that the optimizer needs besides its state and gradients; `moments` are per byte of float32.

    One that updates layer by layer needs a few float32 arrays of the largest layer; those in host memory come to the
    device while the layer before them is updated. One that updates all parameters together needs float32 gradients and
    updates of all, and of 16-bit weights a float32 copy.
    """
    wide = shapes_in(partition.params, jnp.float32)
    if besides.together:
        narrow = jnp.dtype(config.param_dtype).itemsize < 4
        return (2 + narrow) * rules.shard_bytes(wide, wide, sizes)

    def at_once(leaf: Any) -> Any:
        layer = leaf.size // max(1, leaf.shape[0]) if leaf.ndim > 2 else 0
        return leaf.update(shape=(1, *leaf.shape[1:])) if layer >= ONE_AT_A_TIME else leaf

    layers = ({path: at_once(leaf)} for path, leaf in wide.items())
    largest = max((rules.shard_bytes(layer, layer, sizes) for layer in layers), default=0)
    return int(largest * (_UPDATED + (2 * moments if besides.host_moments else 0)))


class Saved(NamedTuple):
    """Bytes that the backward pass saves for one example without recomputation, and those of the blocks' inputs.

    `blocks` are inside the blocks, `outside` before and after them, `attention` the results of attention.
    """

    blocks: int
    outside: int
    inputs: int
    attention: int
    number: int

    @property
    def of_block(self) -> int:
        """Bytes of one block."""
        return (self.blocks + self.outside) // self.number


def _kept(shape: "_Trace", config: StepConfig) -> int:
    """Return the bytes that the backward pass saves for one example, including those of blocks being recomputed.

    `shape` is without remat, which is that of `config`. With "offload", inputs of blocks are in host memory.
    """
    saved = _saved(shape)
    inside = {
        "none": saved.blocks,
        "full": saved.inputs,
        "attention": saved.inputs + saved.attention,
        "offload": 0,
    }.get(config.remat)
    if inside is None:
        inside = _traced(dataclasses.replace(shape, config=dataclasses.replace(shape.config, remat=config.remat)))[0]
    every, outside = config.remat_every, saved.outside
    if every > 1:  # the inputs of the groups, and what the blocks of one group keep
        inside = saved.inputs // every + (outside + inside) * every // saved.number
    return outside + inside + (saved.of_block if config.remat != "none" else 0)


def _saved(shape: "_Trace") -> Saved:
    """Return what the backward pass of one example saves. The program is traced once for equal shapes."""
    blocks, outside = _traced(shape)
    model, itemsize = shape.partition.config, jnp.dtype(shape.config.compute_dtype).itemsize
    # As in AnimaDiT.velocity.
    stream = 4 if jnp.dtype(shape.config.compute_dtype) == jnp.float16 else itemsize
    tokens = model.blocks * shape.work.tokens
    # Self- and cross-attention: the result, and the logarithm of each query's and head's sum in float32.
    attention = 2 * tokens * (model.width * itemsize + 4 * model.heads)
    return Saved(blocks, outside, tokens * model.width * stream, attention, model.blocks)


@dataclasses.dataclass(frozen=True)
class _Trace:
    """What a program's saved bytes depend on; `partition` has the shapes for it, of weights in any storage dtype."""

    partition: ParamPartition = dataclasses.field(compare=False)
    trained: tuple[tuple[str, tuple[int, ...]], ...]
    graphdef: Any
    config: StepConfig
    work: Workload
    dtype: Any
    masked: bool
    platform: str

    @classmethod
    def of(
        cls,
        partition: ParamPartition,
        config: StepConfig,
        work: Workload,
        dtype: Any,
        masked: bool,
        remat: str,
        platform: str,
    ) -> "_Trace":
        """Return the key of these arguments, without those that make no difference to one example."""
        trained = tuple(sorted((path, tuple(leaf.shape)) for path, leaf in partition.params.items()))
        config = dataclasses.replace(
            config, remat=remat, remat_every=1, scan_unroll=1, seed=0, ema_decay=None, param_dtype=jnp.dtype("float32")
        )
        work = work._replace(tier="", batch=1, accumulation=1, grid=(1, 1, 1))
        return cls(partition, trained, partition.graphdef, config, work, jnp.dtype(dtype), masked, platform)


@functools.lru_cache(maxsize=64)
def _traced(trace: _Trace) -> tuple[int, int]:
    """Return the bytes that the backward pass saves for one example, inside the stacked blocks and outside them."""
    partition, config, work = trace.partition, trace.config, trace.work

    def backward(params: Params, frozen: Params, batch: TrainBatch) -> Any:
        def loss_of(params: Params):
            model = merge(partition.graphdef, cast_to_compute(frozen | params, config.compute_dtype))
            return loss_fn(model, batch, None, config)

        return jax.vjp(loss_of, params)[1]

    ids = partition.text_ids
    batch = abstract_batch(work, _MANY, partition.config, trace.dtype, masked=trace.masked, text_ids=ids)
    params = shapes_in(partition.params, jnp.float32)
    with compiling_for(trace.platform):
        leaves = jax.tree.leaves(jax.eval_shape(backward, params, partition.frozen, batch))
    of_examples = [leaf for leaf in leaves if any(size and size % _MANY == 0 for size in leaf.shape)]
    inside = [leaf for leaf in of_examples if leaf.shape[0] == partition.config.blocks]
    total, blocks = num_bytes(of_examples) // _MANY, num_bytes(inside) // _MANY
    return blocks, total - blocks


def lowered_step(
    partition: ParamPartition,
    optimizer: optax.GradientTransformation,
    config: StepConfig,
    work: Workload,
    batch: TrainBatch,
) -> Any:
    """Return the run's step for `batch` (shapes), lowered for the current mesh and the hardware of `compiling_for`."""
    dtype, mesh = batch.latents_blc.dtype, current_mesh()
    state = jax.eval_shape(lambda params: init_state(params, optimizer, config, mesh), partition.params)
    empty = _abstract_text(work, 1, partition.config, dtype, partition.text_ids) if config.uncond_fraction else None
    shardings = rules.shardings(state, partition.params, mesh)
    moments = opt_state_shardings(optimizer, shapes_in(partition.params, jnp.float32), mesh)
    shardings = shardings._replace(opt_state=moments)
    arguments = (state, partition.frozen, batch, empty)
    placement = (
        shardings,
        rules.shardings(partition.frozen, partition.frozen, mesh),
        jax.tree.map(lambda _: batch_sharding(mesh, work.batch), batch),
        jax.tree.map(lambda _: replicated(mesh), empty),
    )
    step = compile_step(partition.graphdef, optimizer, config, partition.groups, shardings=shardings)
    return lower(step, *rules.placed(arguments, placement), work.accumulation)


def _compiled_bytes(lowered: Any) -> int | None:
    """Return the bytes that a compiled step needs besides its arguments; None if the backend does not report it."""
    found = lowered.compile().memory_analysis()
    return found and found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes


def num_bytes(tree: Any) -> int:
    """Return the total bytes of the arrays (or their shapes) in `tree`."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
