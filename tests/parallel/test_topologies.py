"""Names of devices to compile for, and what a compiler is told of NVIDIA's GPUs. No compiler is needed."""

import re

import pytest

from anima_jax.errors import UserError
from anima_jax.parallel import topologies
from anima_jax.parallel.devices import DEVICE_SPECS, find_device_spec
from anima_jax.parallel.gpus import hardware_of, target_config
from anima_jax.parallel.topologies import parse_topology


@pytest.mark.parametrize(
    ("text", "name", "devices"),
    [
        ("v5p:8x8x4", "v5p:8x8x4", 256),
        ("v5e:1x1", "v5e:1x1", 1),
        ("TPU v6e: 4 x 4", "v6e:4x4", 16),
        ("v4:2x2x1", "v4:2x2x1", 4),
        ("v5e:8", "v5e:2x4", 8),
        ("v5litepod-16", "v5e:4x4", 16),  # of these Google counts chips,
        ("v5p-8", "v5p:2x2x1", 4),  # of these cores
        ("v3:2x2", "v3:2x2", 8),  # two devices a chip
        ("H100", "H100", 1),
        ("rtx4090:2", "RTX 4090:2", 2),
        ("H100:16", "H100:16", 16),
    ],
)
def test_a_name_says_which_devices_and_how_many(text, name, devices):
    found = parse_topology(text)
    assert (found.name, found.count) == (name, devices)


def test_a_gpu_has_the_memory_that_its_name_says():
    assert parse_topology("A100 40GB:8").spec.memory == 40e9


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("v5e:3x3", r"TPU v5e has no such slice; the nearest are v5e:2x2, v5e:2x4"),
        ("v5e:16x32", r"no such slice; .*v5e:16x16$"),
        ("v5p:4x4x3", r"no such slice; .*v5p:4x4x4"),
        ("v5e:0x0", r"no such slice"),
        ("v9:2x2", r"not a known device; the nearest are TPU7x"),
        ("H1000", r"not a known device; the nearest are H100"),
        ("", r"not a known device"),
        ("MI300X", r"no compiler for MI300X; expected a TPU or an NVIDIA GPU"),
        ("V100", r"no compiler for V100; .*7\.5"),  # CUDA 13 has dropped it
        ("Apple M4", r"no compiler for Apple M4"),
        ("H100:12", r"8 are in a server; expected a number such as 8"),
        ("H100:0", r"8 are in a server"),
    ],
)
def test_devices_that_do_not_exist_are_refused_with_the_nearest_that_do(text, line):
    with pytest.raises(UserError, match=line) as error:
        parse_topology(text)
    assert len(error.value.messages) == 1


@pytest.mark.parametrize(
    ("versions", "line"),
    [
        ({"libtpu": None}, r"libtpu is not installed: pip install 'anima_jax\[aot-tpu\]'"),
        ({"libtpu": "0.0.1"}, r"found libtpu 0\.0\.1, but jax .* needs [\d.]+\*: pip install"),
        ({"jax-cuda13-plugin": None}, r"jax-cuda13-plugin is not installed: pip install 'anima_jax\[aot-gpu\]'"),
        ({"jax-cuda13-plugin": "0.1.0"}, r"found jax-cuda13-plugin 0\.1\.0, but jax .* needs"),
    ],
)
def test_a_compiler_that_is_missing_or_of_another_version_is_named_with_what_to_install(monkeypatch, versions, line):
    monkeypatch.setattr(topologies, "_version", versions.get)
    with pytest.raises(UserError, match=line):
        parse_topology("v5e:1x1" if "libtpu" in versions else "H100").devices()


def test_every_nvidia_gpu_of_the_table_can_be_compiled_for():
    amd = re.compile(r"MI\d|RX ")
    rows = [spec for spec in DEVICE_SPECS if spec.platform == "gpu" and not amd.match(spec.name)]
    assert [spec.name for spec in rows if hardware_of(spec) is None] == []
    assert [spec.name for spec in DEVICE_SPECS if spec not in rows and hardware_of(spec)] == []


@pytest.mark.parametrize(
    ("name", "boost_ghz", "capability"),
    # NVIDIA's data sheets: boost clocks.
    [
        *[("H100", 1.98, "9.0"), ("A100", 1.41, "8.0"), ("T4", 1.59, "7.5"), ("L4", 2.04, "8.9")],
        *[("RTX 4090", 2.52, "8.9"), ("RTX 3060", 1.777, "8.6"), ("RTX 5090", 2.407, "12.0"), ("A10", 1.695, "8.6")],
    ],
)
def test_the_clock_that_follows_from_speed_and_multiprocessors_is_the_data_sheets(name, boost_ghz, capability):
    spec = find_device_spec(name)
    text = target_config(spec, (9, 12, 0))
    clock = float(re.search(r"clock_rate_ghz: ([\d.]+)", text)[1])
    assert clock == pytest.approx(boost_ghz, rel=0.02)
    assert hardware_of(spec).capability == capability
    assert 'dnn_version: "9.12.0"' in text
