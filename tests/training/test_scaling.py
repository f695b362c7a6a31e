"""Traffic and time of a step, compared with sums done by hand."""

import pytest

from anima_jax.models import parameters
from anima_jax.models.dit import AnimaDiT, DiTConfig
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


def test_fsdp_gathers_weights_twice_and_scatters_their_gradients():
    found = sent(sizes(fsdp=8))
    kept = {
        path: leaf for path, leaf in PARAMS.items() if not any(rules.partition_spec(path, leaf.shape, sizes(fsdp=8)))
    }
    shared = 2 * (parameters.count(PARAMS) - parameters.count(kept))
    assert found.fsdp == pytest.approx((3 * shared + 2 * 2 * parameters.count(kept)) * 7 / 8)
    twice = sent(sizes(fsdp=8), work=WORK._replace(accumulation=2))
    assert twice.fsdp == pytest.approx(2 * found.fsdp)


def test_frozen_weights_are_gathered_and_have_no_gradients():
    assert sent(sizes(data=8), {}, PARAMS).total == 0
    assert sent(sizes(fsdp=8), {}, PARAMS).fsdp == pytest.approx(
        2
        * 2
        * 7
        / 8
        * sum(leaf.size for p, leaf in PARAMS.items() if any(rules.partition_spec(p, leaf.shape, sizes(fsdp=8))))
    )


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
    assert seconds.least == max(seconds.compute, seconds.data + seconds.fsdp)
    assert seconds.most == pytest.approx(seconds.compute + seconds.data + seconds.fsdp)


def test_device_specs_are_found_by_jaxs_name_and_by_a_users():
    for found, expected in {"NVIDIA H100 PCIe": "H100 PCIe", "TPU v5 lite": "TPU v5e", "TPU v5p": "TPU v5p"}.items():
        assert find_device_spec(found).name == expected
    assert find_device_spec("cpu") is None
    assert find_device_spec("v5p") is find_device_spec("TPU V5P") is find_device_spec("TPU v5")
    assert {find_device_spec(kind.name) for kind in DEVICE_SPECS} == set(DEVICE_SPECS)
