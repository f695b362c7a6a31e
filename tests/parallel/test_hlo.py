"""Figures that are read from compiled programs, for programs whose FLOPs and traffic are known by arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from anima_jax.training.hlo import Program, collectives
from anima_jax.training.hlo_costs import Cost, rows_of

LAYERS, ROWS, WIDTH = 5, 64, 256


def text_of(function, *args):
    return jax.jit(function).lower(*args).compile().as_text()


def layers(x, weights):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def test_a_loops_products_count_as_often_as_it_runs():
    x, weights = jnp.ones((ROWS, WIDTH)), jnp.ones((LAYERS, WIDTH, WIDTH))
    rows = rows_of(Program(text_of(layers, x, weights)))
    flops = sum((row.cost for row in rows), Cost()).flops
    assert flops == 2 * LAYERS * ROWS * WIDTH * WIDTH


def gathering_text():
    """A program on 4 devices that gathers each layer's weights in a loop, and sums the results."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("fsdp",))

    def place(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec)))

    def function(x, weights):
        def layer(x, w):
            return jnp.tanh(x @ jax.lax.all_gather(w, "fsdp", tiled=True)), None

        return jax.lax.psum(jax.lax.scan(layer, x, weights)[0], "fsdp")

    sharded = jax.shard_map(
        function, mesh=mesh, in_specs=(P("fsdp"), P(None, "fsdp")), out_specs=P(None), check_vma=False
    )
    return text_of(sharded, place((4 * ROWS, WIDTH), "fsdp"), place((LAYERS, WIDTH, WIDTH), None, "fsdp"))


def test_collectives_are_read_with_their_bytes_and_loops(on_eight):
    found = {one.kind: one for one in collectives(Program(on_eight(gathering_text)))}
    gather, total = found["all-gather"], found["all-reduce"]
    assert gather.sent == LAYERS * 3 / 4 * WIDTH * WIDTH * 4  # three quarters come from the others
    assert total.sent == 2 * 3 / 4 * ROWS * WIDTH * 4
    assert (gather.loops, total.loops) == ((LAYERS,), ())
    assert (gather.group, gather.times, gather.dtype) == (4, LAYERS, "f32")


TPU = """
HloModule jit_step, is_scheduled=true

%async (p: bf16[8,128]) -> bf16[64,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  ROOT %ag.1 = bf16[64,128]{1,0} all-gather(%p), replica_groups=[2,8]<=[16], dimensions={0}
}

%scatter (q: bf16[64,128]) -> bf16[8,128] {
  %q = bf16[64,128]{1,0} parameter(0)
  %ar = bf16[64,128]{1,0} all-reduce(%q), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %ds = bf16[8,128]{1,0} dynamic-slice(%ar, %i), dynamic_slice_sizes={8,128}
}

ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %start = ((bf16[8,128]{1,0}), bf16[64,128]{1,0}, s32[]) async-start(%a), calls=%async
  %done = bf16[64,128]{1,0} async-done(%start), calls=%async
  %ags = (bf16[8,128]{1,0}, bf16[64,128]{1,0}) all-gather-start(%a), replica_groups=[2,8]<=[16], dimensions={0}
  %big = bf16[64,128]{1,0} fusion(%done), kind=kLoop, calls=%x, backend_config={"estimated_cycles":"700"}
  ROOT %rs = bf16[8,128]{1,0} fusion(%big), kind=kCustom, calls=%scatter
}
"""


def test_what_a_tpu_does_asynchronously_and_its_fused_sums_are_told_apart():
    program = Program(TPU)
    found = [(one.kind, one.blocking, one.sent) for one in collectives(program)]
    whole = 64 * 128 * 2 * 7 / 8
    assert sorted(found) == [
        ("all-gather", False, 2 * whole),
        ("reduce-scatter", True, whole),
    ]
    assert sum(row.cost.cycles for row in rows_of(program)) == 700
