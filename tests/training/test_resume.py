"""Resuming equals never having stopped; where it cannot, it says what changed."""

import json
import multiprocessing
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from anima_jax.data.plan import Plan, Tier
from anima_jax.errors import UserError
from anima_jax.training.fingerprints import changes, facts_of, settings_of
from anima_jax.training.resume import Position, Resume, find_run
from anima_jax.training.step import TrainState
from tests.training import killed_run
from tests.training.killed_run import GROUPS, IDS, OPTIMIZER, PLAN, SHAPES, STEPS, fresh_state, resumable


def bits(tree) -> list[tuple[str, bytes]]:
    return [(str(leaf.dtype), np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def losses_of(folder) -> dict[int, str]:
    """Step → loss, exact. What several attempts wrote of a step must agree; a kill may cut a line short."""
    losses: dict[int, str] = {}
    for line in (folder / "losses").read_text().splitlines():
        if line.endswith("]"):
            step, loss = json.loads(line)
            assert losses.setdefault(step, loss) == loss
    return losses


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_random_moments_also_while_saving_equals_the_undisturbed_one(tmp_path, kills):
    # Forked from a process that has imported everything: a start takes a tenth of a second.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([killed_run.__name__])
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    undisturbed.mkdir()
    disturbed.mkdir()
    one = context.Process(target=killed_run.main, args=(str(undisturbed), 0.0))
    one.start()

    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng, while_saving = random.Random(seed), 0
    for kill in range(kills):
        process = context.Process(target=killed_run.main, args=(str(disturbed), 0.01))
        process.start()
        before, until = len(losses_after(disturbed)), rng.randint(1, 6)
        while len(losses_after(disturbed)) < before + until and process.is_alive():
            time.sleep(0.001)
        if kill % 2:
            deadline = time.monotonic() + 5
            while not saving(disturbed) and process.is_alive() and time.monotonic() < deadline:
                time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.02))
        while_saving += saving(disturbed)
        assert process.is_alive()
        process.kill()
        process.join()
    last = context.Process(target=killed_run.main, args=(str(disturbed), 0.0))
    last.start()
    last.join(120)
    one.join(120)
    assert (one.exitcode, last.exitcode) == (0, 0)
    assert while_saving >= 1
    assert losses_of(disturbed) == losses_of(undisturbed)
    assert len(losses_of(undisturbed)) == STEPS
    ends = [resumable(folder).restore(fresh_state(), OPTIMIZER.init)[0] for folder in (undisturbed, disturbed)]
    assert bits(ends[0]) == bits(ends[1])
    assert int(ends[0].step) == STEPS


def losses_after(folder) -> list[str]:
    path = folder / "losses"
    return path.read_text().splitlines() if path.exists() else []


def saving(folder) -> bool:
    return any((folder / "checkpoints").glob("*.orbax-checkpoint-tmp"))
