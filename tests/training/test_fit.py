"""`memory = "fit"`: which keys it sets, which it leaves alone, and that a resumed run sets the same."""

import json
import re

import pytest

from anima_jax.train import main as train
from anima_jax.training import target
from tests.test_resume_run import small_config


@pytest.fixture
def config(tmp_path):
    return small_config(tmp_path)


@pytest.fixture
def fit_in(monkeypatch, capsys):
    """Run training with these flags on a device with this much memory, and return what it prints."""

    def run(config, memory: float, *flags: str) -> str:
        monkeypatch.setattr(target, "device_bytes", lambda _: int(memory))
        train(["--config", str(config), "--set", "memory=fit", *flags])
        return capsys.readouterr().out

    return run


def needed(out: str) -> float:
    """Return the bytes in a dry run's table of memory."""
    return float(re.search(r"^total +([\d.]+)", out, re.MULTILINE)[1]) * 2**30


def test_keys_that_are_not_set_are_chosen_so_that_the_run_fits(config, fit_in):
    plenty = fit_in(config, 2**40, "--dry_run")
    assert re.search(r"^memory = 'fit': .*: nothing is changed$", plenty, re.MULTILINE)
    limit = needed(plenty) - 2e5
    out = fit_in(config, limit, "--dry_run")
    chosen = re.search(r"^memory = 'fit': .*: (--set .*)$", out, re.MULTILINE)[1]
    assert needed(out) <= limit
    assert fit_in(config, limit, "--dry_run") == out
    # The cheapest lever that is enough is recomputation; once it is set, the next one is 16-bit weights.
    assert chosen.startswith("--set remat=")
    given = fit_in(config, limit, "--dry_run", "--set", "activation_checkpointing=false")
    assert "--set param_dtype=bfloat16" in given
    assert "rounded stochastically" in given
    assert "--set remat" not in given


@pytest.mark.slow
def test_a_resumed_run_has_the_keys_with_which_it_began(config, fit_in, tmp_path):
    limit = needed(fit_in(config, 2**40, "--dry_run")) - 2e5
    flags = ("--set", "activation_checkpointing=false")
    fit_in(config, limit, *flags, "--set", "max_steps=5")
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "fitted.json").read_text())["param_dtype"] == "bfloat16"
    out = fit_in(config, 2**40, *flags, "--set", "max_steps=9", "--resume_from_checkpoint", run.name)
    assert "memory = 'fit': as when the run began: --set param_dtype=bfloat16" in out
    assert "bfloat16" in re.search(r"^ +total .*$", out, re.MULTILINE)[0]
    assert " was " not in out.split("resumed")[1].splitlines()[1]
