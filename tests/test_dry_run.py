"""--dry_run of the shipped configurations, at the released networks' real sizes: headers are read, weights never."""

import json
import re
import shlex

import pytest

from anima_jax import train as train_module
from anima_jax.parallel.devices import DEVICE_SPECS
from anima_jax.parallel.topologies import Topology
from anima_jax.train import main as train
from anima_jax.training import dry_run as dry_run_module
from anima_jax.training import target
from anima_jax.training.compiled_run import CompiledRun
from tests import dry_runs
from tests.dry_runs import ASSETS, CONFIGS, NAMES, ROOT, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with everything that the shipped configurations name."""
    return write_folder(tmp_path_factory.mktemp("work") / "folder")


@pytest.fixture(autouse=True)
def hub_cache(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))


@pytest.mark.parametrize("name", ["anima_full", "anima_lora", "anima_video", "shapes"])
def test_a_shipped_configuration_dry_runs(folder, name, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(target, "device_bytes", lambda _: 80 * 2**30)  # a GPU's, whatever this machine has
    before = sorted(folder.rglob("*"))
    options = [] if name == "shapes" else ["--set", f"model.tokenizer_path={ASSETS / 'tokenizers'}"]
    train(["--config", str(CONFIGS / f"{name}.toml"), "--dry_run", *options])
    out = capsys.readouterr().out
    assert sorted(folder.rglob("*")) == before
    assert "compiled programs: " in out
    total = re.search(r"^  total +([\d,]+) +([\d,]+)", out, re.MULTILINE)
    assert total is not None
    parameters_, trained = (int(number.replace(",", "")) for number in total.groups())
    if name != "shapes":
        size = next(folder.rglob("anima-base-v1.0.safetensors")).stat().st_size
        assert 0 <= size - 2 * (parameters_ - (0 if name == "anima_full" else trained)) < 2**18  # the header
    gib = float(re.search(r"^total +([\d.]+)", out, re.MULTILINE)[1])
    assert gib > 4 if name != "shapes" else gib < 1


def test_the_shipped_pod_is_256_chips_of_which_each_has_its_eighth(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    devices = ["--devices", "256", "--device_kind", "TPU v5p"]
    options = ["--set", f"model.tokenizer_path={ASSETS / 'tokenizers'}"]
    train(["--config", str(CONFIGS / "pod.toml"), "--dry_run", *devices, *options])
    out = capsys.readouterr().out
    assert "data 32, fsdp 8" in out
    gib = float(re.search(r"^total +([\d.]+)", out, re.MULTILINE)[1])
    # Parameters, their average and two moments in float32, an eighth of each; what a step of 2 examples takes.
    assert 16 * 2.09e9 / 8 / 2**30 < gib < 16
    # 2.09 billion weights in bfloat16: each eighth's gradient is summed over 32 replicas, and over 8 neighbours weights
    # are gathered twice and gradients scattered once.
    sent = re.search(r"^GB sent per device.*\n1024 +([\d.]+) +([\d.]+) ", out, re.MULTILINE)
    assert sent is not None
    data, fsdp = map(float, sent.groups())
    assert data == pytest.approx(2 * 31 / 32 * 2 * 2.09 / 8, rel=0.01)
    assert fsdp == pytest.approx(3 * 7 / 8 * 2 * 2.09, rel=0.01)
    assert re.search(r"^1024: [\d.]+ to [\d.]+ s per step", out, re.MULTILINE)


def test_devices_of_no_kind_are_timed_as_each_kind_that_has_the_memory(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    options = ["--set", f"model.tokenizer_path={ASSETS / 'tokenizers'}", "--set", "mesh.fsdp=2"]
    train(["--config", str(CONFIGS / "pod.toml"), "--dry_run", "--devices", "64", *options])
    out = capsys.readouterr().out
    assert "mesh of 64 devices (of any kind; --device_kind names one)" in out
    need = float(re.search(r"^total +([\d.]+)", out, re.MULTILINE)[1]) * 2**30
    timed = re.findall(r"^1024: [\d.]+ to [\d.]+ s per step on (.*) \(seconds", out, re.MULTILINE)
    assert timed == [kind.name for kind in DEVICE_SPECS if kind.memory > need and kind.platform != "cpu"]
    assert 0 < len(timed) < len(DEVICE_SPECS)


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (["--devices", "8"], "--devices: is for --dry_run"),
        (["--device_kind", "H100"], "--device_kind: is for --dry_run"),
        (["--device_memory", "12GiB"], "--device_memory: is for --dry_run"),
        (["--dry_run", "--devices", "0"], "--devices 0: expected at least 1"),
        (["--compile", "v5e:1x1"], "--compile: is for --dry_run"),
        (
            ["--dry_run", "--compile", "v5e:2x4", "--devices", "8"],
            "--devices: --compile v5e:2x4 says for which devices",
        ),
        (
            ["--dry_run", "--compile", "v5e:3x3"],
            "--compile v5e:3x3: TPU v5e has no such slice; the nearest are v5e:2x2",
        ),
    ],
)
def test_devices_that_are_not_here_are_for_a_dry_run(flags, found, capsys):
    with pytest.raises(SystemExit) as exit_:
        train(["--config", "none.toml", *flags])
    assert exit_.value.code == 2
    assert found in capsys.readouterr().err


@pytest.mark.parametrize(
    ("storage", "limit"),
    [("int8", 7.0), *(pytest.param(*row, marks=pytest.mark.slow) for row in (("bfloat16", 9.0), ("float8", 7.0)))],
)
def test_a_lora_of_rank_32_on_every_block_fits_a_small_gpu(folder, storage, limit, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    keys = (f"model.tokenizer_path={ASSETS / 'tokenizers'}", f"model.transformer_dtype={storage}")
    keys += ("model.llm_adapter_lr=1e-5", "adapter.rank=32")
    train(["--config", str(CONFIGS / "anima_lora.toml"), "--dry_run", *(x for key in keys for x in ("--set", key))])
    out = capsys.readouterr().out
    assert "LoRA of rank 32 on 508 modules" in out
    assert "4,112" in out  # tokens of 1024 × 1024 pixels, and a few of padding
    # What the estimate counts is compared with a compiled program's in tests/training/test_estimate.py.
    assert 3.0 < float(re.search(r"^total +([\d.]+)", out, re.MULTILINE)[1]) < limit


def test_a_run_is_not_refused_because_this_machine_is_small(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(target, "device_bytes", lambda _: 8 * 2**30)
    options = ["--set", f"model.tokenizer_path={ASSETS / 'tokenizers'}"]
    train(["--config", str(CONFIGS / "anima_full.toml"), "--dry_run", *options])
    out = capsys.readouterr().out
    assert re.search(r"^it does not fit: .* has 8\.0 GiB$", out, re.MULTILINE)
    kinds = {row[0]: row[1:] for row in re.findall(r"^(.{22}) +\d+ +(yes|no) *([\d.]*)", out, re.MULTILINE)}
    assert kinds["RTX 3060".ljust(22)] == ("no", "")
    assert kinds["H100".ljust(22)][0] == "yes"


@pytest.mark.parametrize(
    ("name", "device", "needs"),
    [
        ("anima_full", ["--device_kind", "NVIDIA GeForce RTX 4090"], {"param_dtype"}),
        ("anima_lora", ["--device_memory", "6.2GiB"], {"model.transformer_dtype"}),
    ],
)
def test_what_does_not_fit_does_with_the_printed_flags(folder, name, device, needs, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    options = ["--set", f"model.tokenizer_path={ASSETS / 'tokenizers'}", *device]
    command = ["--config", str(CONFIGS / f"{name}.toml"), "--dry_run", *options]
    with pytest.raises(SystemExit) as exit_:
        train(command)
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    (line,) = re.findall(r"^  (--set .*)$", out, re.MULTILINE)
    assert line in err
    train([*command, *shlex.split(line)])
    again = capsys.readouterr().out
    assert re.search(r"^it fits: the run needs about [\d.]+ GiB", again, re.MULTILINE)
    assert needs <= {flag.split("=")[0] for flag in shlex.split(line)}


GOLDEN = json.loads((ROOT / "tests/golden/dry_runs.json").read_text())


@pytest.mark.parametrize("name", ["anima_full", "anima_lora"])
def test_memory_and_time_on_every_kind_of_device_are_those_of_the_golden_table(folder, name, monkeypatch):
    monkeypatch.chdir(folder)
    found = dry_runs.rows(name, levers=False)
    assert found == {kind: {key: row[key] for key in row if key != "flags"} for kind, row in GOLDEN[name].items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_flags_for_every_kind_of_device_are_those_of_the_golden_table(folder, name, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert dry_runs.rows(name) == GOLDEN[name]


@pytest.fixture
def compilers(monkeypatch):
    """Let --compile go as far as the compilers, which are not needed: each program needs 1.3 times what is counted."""

    def needs(*_):
        return lambda variant: CompiledRun({}, int(1.3 * variant.found.total))

    monkeypatch.setattr(train_module, "use_compilers", lambda: None)
    monkeypatch.setattr(Topology, "devices", lambda _: [])
    monkeypatch.setattr(dry_run_module, "RunCompiler", needs)


def test_a_mesh_that_the_topology_cannot_hold_is_refused_before_anything_is_read(compilers, capsys):
    with pytest.raises(SystemExit) as exit_:
        train(["--config", "shapes", "--dry_run", "--compile", "v5e:2x4", "--set", "mesh.fsdp=3"])
    assert exit_.value.code == 2
    assert "[mesh] data -1 × fsdp 3" in (err := capsys.readouterr().err)
    assert "expected a product of 8, the number of devices" in err


def test_the_compilers_memory_decides_whether_a_run_fits_and_which_flags_make_it_fit(
    compilers, folder, monkeypatch, capsys
):
    monkeypatch.chdir(folder)
    command = ["--config", str(CONFIGS / "anima_lora.toml"), "--dry_run", "--compile", "RTX 3060"]
    command += ["--set", f"model.tokenizer_path={ASSETS / 'tokenizers'}", "--device_memory", "8.5GiB"]
    with pytest.raises(SystemExit) as exit_:
        train(command)
    assert exit_.value.code == 2
    out = capsys.readouterr().out
    counted, needed = (float(re.search(pattern, out, re.MULTILINE)[1]) for pattern in (r"^total +([\d.]+)", NEEDS))
    assert needed == pytest.approx(1.3 * counted, abs=0.06)
    with_flags = float(
        re.search(r"^it fits with ([\d.]+) GiB if these flags are added:\n  --set", out, re.MULTILINE)[1]
    )
    assert counted < 8.5 < needed
    assert with_flags <= 8.5


NEEDS = r"^it does not fit: the run needs about ([\d.]+) GiB"
