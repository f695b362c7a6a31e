"""Traffic and time of a step, compared with sums done by hand."""

import jax
import pytest

from anima_jax.models import parameters
from anima_jax.models.dit import AnimaDiT, DiTConfig
from anima_jax.models.quantised import quantise
from anima_jax.parallel import rules
from anima_jax.parallel.devices import DEVICE_SPECS, find_device_spec
from anima_jax.training.flops import Flops, Workload
from anima_jax.training.scaling import EFFICIENCY, bandwidths, step_seconds, traffic

CONFIG = DiTConfig(64, 3, 8, 128, 32, 16, adapter=None)
PARAMS = parameters.abstract(lambda rngs: AnimaDiT(CONFIG, rngs=rngs))[1]
WORK = Workload("512", 16, 1, 256, (1, 16, 16), 32, 32)


def sizes(**given):
    return {"data": 1, "fsdp": 1, "tensor": 1, "context": 1, **given}


def sent(mesh, trained=PARAMS, frozen=None, work=WORK):
    return traffic(CONFIG, trained, frozen or {}, mesh, work, remat="full", itemsize=2)


def test_replicas_only_all_reduce_gradients():
    found = sent(sizes(data=8))
    assert found.data == pytest.approx(2 * 2 * parameters.count(PARAMS) * 7 / 8)
    assert (found.fsdp, found.tensor, found.context) == (0, 0, 0)


def gathered(mesh, of_blocks):
    """Return the bytes of the 16-bit weights of the blocks, or of the others, that are sharded over `fsdp`."""
    return 2 * sum(
        leaf.size
        for path, leaf in PARAMS.items()
        if path.startswith("blocks.") == of_blocks and any(rules.partition_spec(path, leaf.shape, mesh))
    )


def test_fsdp_gathers_weights_and_scatters_their_gradients():
    mesh = sizes(fsdp=8)
    blocks, others = gathered(mesh, True), gathered(mesh, False)
    rest = 2 * parameters.count(PARAMS) - blocks - others
    # As compiled: a block's weights are gathered in both passes, others are kept, and unsharded gradients all-reduced.
    assert sent(mesh).fsdp == pytest.approx((3 * blocks + 2 * others + 2 * rest) * 7 / 8)
    assert sent(mesh, work=WORK._replace(accumulation=2)).fsdp == pytest.approx(2 * sent(mesh).fsdp)
    again = traffic(CONFIG, PARAMS, {}, mesh, WORK, remat="full", remat_every=3, itemsize=2)
    assert again.fsdp - sent(mesh).fsdp == pytest.approx(blocks * 7 / 8)


def test_frozen_weights_are_gathered_as_stored_and_have_no_gradients():
    assert sent(sizes(data=8), {}, PARAMS).total == 0
    mesh = sizes(fsdp=8)
    blocks, others = gathered(mesh, True), gathered(mesh, False)
    assert sent(mesh, {}, PARAMS).fsdp == pytest.approx((2 * blocks + others) * 7 / 8)
    path = "blocks.mlp.layer1.kernel"
    stored = jax.eval_shape(lambda kernel: quantise(kernel, "int8"), PARAMS[path])
    saved = sent(mesh, {}, PARAMS).fsdp - sent(mesh, {}, PARAMS | {path: stored}).fsdp
    assert saved == pytest.approx(2 * 7 / 8 * (2 * PARAMS[path].size - stored.nbytes))


def test_tensor_all_reduces_and_context_exchanges_activations():
    tokens = 16 * 256 * 64 * 2
    over_tensor = sent(sizes(tensor=4), {}, PARAMS).tensor
    assert over_tensor == pytest.approx(
        2 * tokens * 3 / 4 * 3 * 3 * 3
    )  # three sums a block, three blocks, three passes
    over_context = sent(sizes(context=4), {}, PARAMS).context
    assert over_context == pytest.approx(tokens / 4 * 3 / 4 * 4 * 3 * 3)


def test_an_axis_within_a_domain_has_the_intra_bandwidth():
    h100 = find_device_spec("NVIDIA H100 80GB HBM3")
    assert bandwidths(h100, sizes(data=4, fsdp=8)) == {"data": 50e9, "fsdp": 450e9, "tensor": 450e9, "context": 450e9}
    assert bandwidths(h100, sizes(fsdp=16))["fsdp"] == 50e9
    mesh, one = sizes(data=2, fsdp=8), Flops(1e12, 2e12, 1e12)
    seconds = step_seconds(h100, mesh, WORK, one, sent(mesh))
    assert seconds.compute == pytest.approx(16 * 4e12 / 16 / (EFFICIENCY * 989e12))
    in_int8 = step_seconds(h100, mesh, WORK, one, sent(mesh), in_8_bits="int8")
    assert in_int8.compute / seconds.compute == pytest.approx(1.036, abs=1e-3)  # as compiled for a v5e (RESULTS.md)
    assert seconds.least == max(seconds.compute, seconds.data + seconds.fsdp)
    assert seconds.most == pytest.approx(seconds.compute + seconds.data + seconds.fsdp)


def test_device_specs_are_found_by_jaxs_name_and_by_a_users():
    for found, expected in {"NVIDIA H100 PCIe": "H100 PCIe", "TPU v5 lite": "TPU v5e", "TPU v5p": "TPU v5p"}.items():
        assert find_device_spec(found).name == expected
    assert find_device_spec("cpu") is None
    assert find_device_spec("v5p") is find_device_spec("TPU V5P") is find_device_spec("TPU v5")
    assert {find_device_spec(kind.name) for kind in DEVICE_SPECS} == set(DEVICE_SPECS)
