"""`memory = "fit"`: which keys it sets, which it leaves alone, and that a resumed run sets the same."""

import json
import re
from unittest import mock

import pytest

import anima_jax.train as anima_train
from anima_jax.errors import NotFiniteError
from anima_jax.train import main as train
from anima_jax.training import estimate, target
from tests.test_resume_run import small_config

pytestmark = pytest.mark.usefixtures("compiled_quickly")

FLAGS = ("--set", "memory=fit", "--set", "model.dtype=bfloat16", "--set", "remat=full")


@pytest.fixture
def config(tmp_path):
    return small_config(tmp_path)


@pytest.fixture
def fit_in(monkeypatch, capsys):
    """Run training with these flags on a device with this much memory; return what it prints, and the bytes needed."""
    needs, need = [], estimate.need

    def recorded(total: float, limit: float, name: str) -> str:
        needs.append(total)
        return need(total, limit, name)

    def run(config, memory: float, *flags: str) -> tuple[str, float]:
        monkeypatch.setattr(estimate, "need", recorded)
        monkeypatch.setattr(target, "device_bytes", lambda _: int(memory))
        train(["--config", str(config), *FLAGS, *flags])
        return capsys.readouterr().out, needs[-1] if needs else 0

    return run


def test_keys_that_are_not_set_are_chosen_so_that_the_run_fits(config, fit_in):
    plenty, needed = fit_in(config, 2**40, "--dry_run")
    assert re.search(r"^memory = 'fit': .*: nothing is changed$", plenty, re.MULTILINE)
    out, left = fit_in(config, needed - 1, "--dry_run")
    key, value = re.search(r"^memory = 'fit': .*: --set ([\w.]+)=(\w+)$", out, re.MULTILINE).groups()
    assert (key, value) == ("param_dtype", "bfloat16")  # remat is set
    assert "rounded stochastically" in out
    assert left < needed
    # A key that is set stays as it is, and the next lever is tried.
    given, left = fit_in(config, needed - 1, "--dry_run", "--set", "param_dtype=float32")
    assert re.search(r"^memory = 'fit': .*: --set optimizer.type=adamw8bit$", given, re.MULTILINE)
    assert left < needed


@pytest.mark.slow
def test_a_resumed_run_has_the_keys_with_which_it_began(config, fit_in, tmp_path):
    _, needed = fit_in(config, 2**40, "--dry_run")
    fit_in(config, needed - 1, "--set", "max_steps=5")
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "fitted.json").read_text()) == {"param_dtype": "bfloat16"}
    out, _ = fit_in(config, 2**40, "--set", "max_steps=9", "--resume_from_checkpoint", run.name)
    assert "memory = 'fit': as when the run began: --set param_dtype=bfloat16" in out
    assert "param_dtype was" not in out


def test_a_run_that_is_far_too_large_ends_before_it_encodes_and_says_which_batch_fits(config, monkeypatch, capsys):
    def exit_code(batch: int, memory: float) -> int:
        monkeypatch.setattr(target, "device_bytes", lambda _: int(memory))
        with pytest.raises(SystemExit) as ended:
            train(["--config", str(config), "--set", f"micro_batch_size_per_gpu={batch}"])
        return ended.value.code

    # The next thing after the check: a run that comes to it was not refused.
    monkeypatch.setattr(anima_train, "Encoders", mock.Mock(side_effect=NotFiniteError("encoders")))
    assert exit_code(50_000, estimate.GIB) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    most = int(re.search(r"the run needs about .* at most (\d+) of its 50000 examples fit", line)[1])
    # Nearly all of it is per example; twice the memory is the margin.
    assert exit_code(int(1.9 * most), estimate.GIB) == 1
