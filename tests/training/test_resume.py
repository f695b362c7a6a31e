"""Resuming equals never having stopped; where it cannot, it says what changed."""

import json
import multiprocessing
import os
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from anima_jax.checkpoints.orbax import RunCheckpoints, errors_reported_once
from anima_jax.data.batch_plan import BatchPlan, Tier
from anima_jax.errors import UserError
from anima_jax.models.quantised import quantise
from anima_jax.training.intervals import Every
from anima_jax.training.loss_scale import LossScale
from anima_jax.training.resume import (
    Checkpointer,
    Position,
    differences,
    frozen_fingerprint,
    run_metadata,
    training_settings,
)
from anima_jax.training.run_folder import alone_in, find_run
from anima_jax.training.step import TrainState
from tests.training import killed_run
from tests.training.killed_run import GROUPS, IDS, OPTIMIZER, PLAN, SHAPES, STEPS, fresh_state, resumable


def bits(tree) -> list[tuple[str, bytes]]:
    return [(str(leaf.dtype), np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def damage(checkpoint) -> None:
    """Flip a bit in the middle of the largest file, as a failing disk does."""
    largest = max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)


def losses_of(folder) -> dict[int, str]:
    """Step → loss, exact. What several attempts wrote of a step must agree; a kill may cut a line short."""
    losses: dict[int, str] = {}
    for line in (folder / "losses").read_text().splitlines():
        if line.endswith("]"):
            step, loss = json.loads(line)
            assert losses.setdefault(step, loss) == loss
    return losses


@pytest.fixture(
    scope="module", params=[2, pytest.param(10, marks=pytest.mark.slow)], ids=lambda kills: f"{kills} kills"
)
def two_runs(request, tmp_path_factory):
    """Folders of an undisturbed run, and of one that was killed at random moments, also while saving."""
    tmp_path = tmp_path_factory.mktemp("killed")
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
    for kill in range(request.param):
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
    checkpoints = RunCheckpoints(disturbed / "checkpoints", keep=None)
    if len(steps := checkpoints.steps()) > 1:  # else the run would begin again
        damage(checkpoints.folder / str(steps[-1]))
    last = context.Process(target=killed_run.main, args=(str(disturbed), 0.0))
    last.start()
    last.join(120)
    one.join(120)
    assert (one.exitcode, last.exitcode) == (0, 0)
    assert while_saving >= 1
    return undisturbed, disturbed


def test_a_run_that_is_killed_at_random_moments_has_the_losses_of_the_undisturbed_one(two_runs):
    undisturbed, disturbed = two_runs
    assert losses_of(disturbed) == losses_of(undisturbed)
    assert len(losses_of(undisturbed)) == STEPS


def test_a_run_that_is_killed_at_random_moments_ends_in_the_state_of_the_undisturbed_one(two_runs):
    ends = [resumable(folder).restore(fresh_state(), OPTIMIZER.init)[0] for folder in two_runs]
    assert bits(ends[0]) == bits(ends[1])
    assert int(ends[0].step) == STEPS


def losses_after(folder) -> list[str]:
    path = folder / "losses"
    return path.read_text().splitlines() if path.exists() else []


def saving(folder) -> bool:
    return any((folder / "checkpoints").glob("*.orbax-checkpoint-tmp"))


def advanced(folder, steps: int, **options) -> TrainState:
    """The state after `steps` steps of the small run, saved in `folder`."""
    checkpointer, state = resumable(folder, **options), fresh_state()
    jitted = jax.jit(killed_run.step)
    for number in range(steps):
        batch = PLAN.batch(number)
        state, _ = jitted(state, IDS[batch.indices], batch.epochs)
    assert checkpointer.save(steps, state, wait=True)
    checkpointer.close()
    return state


def metadata(params=None, groups=GROUPS, plan=PLAN, ids=IDS, **settings) -> dict:
    return run_metadata(fresh_state().params if params is None else params, groups, plan, ids, settings)


def changes(old, new) -> list[str]:
    return [difference.message for difference in differences(old, new)]


def refusal(folder, new_metadata, plan=PLAN, state=None, **options) -> list[str]:
    with pytest.raises(UserError) as refused:
        Checkpointer(folder, plan, new_metadata).restore(state or fresh_state(), OPTIMIZER.init, **options)
    assert all(str(folder) in fault for fault in refused.value.messages)
    return list(refused.value.messages)


def test_the_state_and_the_position_come_back_and_nothing_is_said_when_nothing_changed(tmp_path):
    state = advanced(tmp_path, 9)
    checkpointer = resumable(tmp_path)
    found, messages = checkpointer.restore(fresh_state(), OPTIMIZER.init)
    assert bits(found) == bits(state)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert messages == []
    assert checkpointer.start == Position(9, 9, 9)
    assert checkpointer.total_steps(3) == PLAN.steps_for(3)
    assert checkpointer.total_steps(3, max_steps=11) == 11


def test_reset_dataloader_begins_the_epoch_anew_and_later_resumes_remember_it(tmp_path):
    # Epoch 1 is steps 0 to 6, epoch 2 steps 7 to 12: after 9 steps the second one is under way.
    assert [PLAN.steps_for(epochs) for epochs in (1, 2)] == [7, 12]
    advanced(tmp_path, 9)
    checkpointer = resumable(tmp_path)
    state, messages = checkpointer.restore(fresh_state(), OPTIMIZER.init, reset_dataloader=True)
    assert checkpointer.start == Position(9, 7, 9)
    assert messages == ["the data restart at epoch 2"]
    assert checkpointer.total_steps(2) == 9 + (12 - 7)
    assert checkpointer.save(11, state, wait=True)
    again = resumable(tmp_path)
    again.restore(fresh_state(), OPTIMIZER.init)
    assert again.start == Position(11, 9, 11)


def test_reset_optimizer_keeps_the_weights_and_begins_the_optimizer_and_its_rates_anew(tmp_path):
    state = advanced(tmp_path, 6)
    checkpointer = resumable(tmp_path)
    found, messages = checkpointer.restore(fresh_state(), OPTIMIZER.init, reset_optimizer=True)
    assert bits(found.params) == bits(state.params)
    assert bits(found.ema) == bits(state.ema)
    assert bits(found.opt_state) == bits(OPTIMIZER.init(state.params))
    assert checkpointer.start == Position(6, 6, 0)
    assert len(messages) == 1


def test_later_resumes_remember_that_the_optimizer_was_reset(tmp_path):
    advanced(tmp_path, 6)
    checkpointer = resumable(tmp_path)
    found, _ = checkpointer.restore(fresh_state(), OPTIMIZER.init, reset_optimizer=True)
    assert checkpointer.save(8, found, wait=True)
    again = resumable(tmp_path)
    again.restore(fresh_state(), OPTIMIZER.init)
    assert again.start == Position(8, 8, 2)


def test_hyper_parameters_in_the_state_are_the_checkpoints_unless_they_are_reset(tmp_path):
    def state_with(rate):
        optimizer = optax.inject_hyperparams(optax.adamw)(learning_rate=rate)
        return fresh_state()._replace(opt_state=optimizer.init(fresh_state().params)), optimizer.init

    saved, init = state_with(1e-3)
    saved = saved._replace(opt_state=saved.opt_state._replace(count=jnp.array(5, jnp.int32)))
    checkpointer = resumable(tmp_path)
    assert checkpointer.save(5, saved, wait=True)
    for reset, rate in ((False, 1e-3), (True, 7e-3)):
        found, _ = resumable(tmp_path).restore(state_with(7e-3)[0], init, reset_optimizer_params=reset)
        assert float(found.opt_state.hyperparams["learning_rate"]) == pytest.approx(rate, rel=1e-6)
        assert int(found.opt_state.count) == 5


def test_an_average_can_begin_and_end_with_a_resume(tmp_path):
    state = advanced(tmp_path / "with", 4)
    found, messages = resumable(tmp_path / "with").restore(fresh_state()._replace(ema=None), OPTIMIZER.init)
    assert found.ema is None
    assert "ema_decay is not set" in messages[0]
    assert bits(found.params) == bits(state.params)

    assert resumable(tmp_path / "without").save(4, state._replace(ema=None), wait=True)
    found, messages = resumable(tmp_path / "without").restore(fresh_state(), OPTIMIZER.init)
    assert bits(found.ema) == bits(state.params)
    assert "starts here" in messages[0]


def test_a_changed_data_set_is_named():
    larger = BatchPlan([Tier("64", np.arange(11), 16, 4), Tier("96", np.arange(11, 18), 36, 2)], seed=4)
    said = changes(metadata(), metadata(plan=larger, ids=np.arange(18) * 1000 + 7))
    assert said == [
        "seed was 3, now 4",
        "the data set had 10 examples in tier 64, now 11",
        "the 7 examples of tier 96 are not the same as before",
    ]
    shuffled = IDS.copy()
    shuffled[:2] = shuffled[1::-1]
    assert changes(metadata(), metadata(ids=shuffled)) == ["the examples of tier 64 are the same in another order"]


def test_another_batch_size_is_refused_unless_the_epoch_restarts(tmp_path):
    advanced(tmp_path, 9)
    one_tier = BatchPlan([Tier("64", np.arange(17), 16, 2)], seed=3)
    checkpointer = Checkpointer(tmp_path, one_tier, metadata(plan=one_tier))
    (error,) = refusal(tmp_path, metadata(plan=one_tier), one_tier)
    assert "a step of tier 64 took 4 examples, now 2" in error
    assert "= 4, or --reset_dataloader to restart epoch 2" in error
    messages = checkpointer.restore(fresh_state(), OPTIMIZER.init, reset_dataloader=True)[1]
    assert "a step of tier 64 took 4 examples, now 2" in messages
    assert checkpointer.start.data_step == one_tier.steps_for(1)


def test_a_position_between_the_batches_of_the_changed_data_is_refused(tmp_path):
    advanced(tmp_path, 9)
    position = PLAN.position(9)
    other = BatchPlan([Tier("128", np.arange(17), 64, 2 * position)], seed=3)
    (error,) = refusal(tmp_path, metadata(plan=other), other)
    assert "the data set had 10 examples in tier 64, now 0" in error
    assert f"begins after {position} examples" in error


def test_captions_masks_and_frozen_weights_that_changed_are_named():
    contents = {"captions": np.arange(17, dtype=np.uint64), "masks": np.zeros(17, np.uint64)}
    frozen = {"blocks.mlp.kernel": jnp.ones((4, 8), jnp.bfloat16), "x": quantise(jnp.ones((64, 8)), "int8")}
    old = run_metadata(fresh_state().params, GROUPS, PLAN, IDS, {}, contents=contents, files=frozen_fingerprint(frozen))
    assert changes(old, old) == []
    edited = {**contents, "captions": contents["captions"] + (np.arange(17) == 12)}
    touched = {**frozen, "blocks.mlp.kernel": frozen["blocks.mlp.kernel"].at[2, 3].set(1.01)}
    new = run_metadata(fresh_state().params, GROUPS, PLAN, IDS, {}, contents=edited, files=frozen_fingerprint(touched))
    assert changes(old, new) == ["captions of tier 96 changed", "the frozen weights changed"]
    assert frozen_fingerprint({}) == {}


def test_one_process_at_a_time_trains_a_run(tmp_path):
    with (
        alone_in(tmp_path),
        pytest.raises(UserError, match=rf"{tmp_path}: is being trained by process {os.getpid()} on "),
        alone_in(tmp_path),
    ):
        pass
    with alone_in(tmp_path):
        pass


def test_a_group_that_is_not_trained_any_more_is_refused(tmp_path):
    advanced(tmp_path, 4)
    own = {path: fresh_state().params[path] for path in ("blocks.mlp.kernel", "x_embedder.kernel")}
    less = fresh_state()._replace(params=own, ema=own, opt_state=OPTIMIZER.init(own))
    (gone, _) = refusal(tmp_path, metadata(less.params), state=less)
    assert "self_attn: 1 parameter (blocks.self_attn.kernel) was trained and now is not" in gone


def test_a_new_group_needs_a_new_optimizer(tmp_path):
    state, fresh = advanced(tmp_path, 4), fresh_state()
    params = fresh.params | {"blocks.new.kernel": jnp.ones((2, 2))}
    more = fresh._replace(params=params, ema=jax.tree.map(jnp.copy, params), opt_state=OPTIMIZER.init(params))
    more_metadata = metadata(params, GROUPS | {"blocks.new.kernel": "mod"})
    (added, _) = refusal(tmp_path, more_metadata, state=more)
    assert "mod: 1 parameter (blocks.new.kernel) was not trained and now is" in added
    assert "--reset_optimizer" in added
    found, messages = Checkpointer(tmp_path, PLAN, more_metadata).restore(more, OPTIMIZER.init, reset_optimizer=True)
    assert bits({path: found.params[path] for path in SHAPES}) == bits(state.params)
    np.testing.assert_array_equal(found.params["blocks.new.kernel"], np.ones((2, 2)))
    assert "mod: 1 parameter (" in messages[0]


def test_another_optimizer_is_refused_and_named(tmp_path):
    advanced(tmp_path, 4)
    sgd = fresh_state()._replace(opt_state=optax.sgd(1.0).init(fresh_state().params))
    (error,) = refusal(tmp_path, metadata() | {"settings": {"optimizer.type": "sgd"}}, state=sgd)
    assert "the optimizer's state has a different layout (optimizer.type was not set, now sgd)" in error
    assert "--reset_optimizer" in error


def test_an_adapters_rank_is_named_as_such():
    def lora(rank):
        shapes = {"blocks.q.lora_a": (2, 8, rank), "blocks.q.lora_b": (2, rank, 8)}
        return metadata(
            {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()},
            dict.fromkeys(shapes, "base"),
        )

    assert changes(lora(16), lora(32)) == ["the adapter's rank was 16, now 32"]


def test_settings_that_matter_to_training_are_compared_and_others_are_not():
    old = {
        "lr_scheduler": "constant",
        "optimizer": {"lr": 1e-4, "betas": [0.9, 0.99]},
        "output_dir": "a",
        "save_every_n_epochs": 1,
        "data": {"directory": [{"path": "a"}, {"path": "b", "num_repeats": 1.0}]},
    }
    new = {
        "lr_scheduler": "cosine",
        "optimizer": {"lr": 2e-4, "betas": [0.9, 0.99]},
        "output_dir": "b",
        "ema_decay": 0.9,
        "data": {"directory": [{"path": "a"}, {"path": "b", "num_repeats": 2.0}]},
    }
    assert changes(metadata(**training_settings(old)), metadata(**training_settings(new))) == [
        "data.directory.1.num_repeats was 1.0, now 2.0",
        "ema_decay was not set, now 0.9",
        "lr_scheduler was constant, now cosine",
        "optimizer.lr was 0.0001, now 0.0002",
    ]


def test_checkpoints_are_due_after_so_many_epochs_or_minutes(tmp_path):
    now = [0.0]
    checkpointer = resumable(tmp_path)
    due = [step for step in range(1, 40) if Every(epochs=2).due(checkpointer.point_after(step, 40))]
    assert due == [PLAN.steps_for(epochs) for epochs in (2, 4, 6) if PLAN.steps_for(epochs) < 40]
    checkpointer = resumable(tmp_path, every_n_minutes=2, clock=lambda: now[0])
    now[0] = 119.0
    assert not checkpointer.overdue()
    now[0] = 120.0
    assert checkpointer.overdue()
    checkpointer.save(2, fresh_state(), wait=True)
    assert not checkpointer.overdue()
    checkpointer.close()


NAMES = ("20260101_10-00-00", "20260101_10-00-00-2", "20260101_10-00-00-10", "20260102_10-00-00", "notes")


@pytest.fixture
def runs(tmp_path):
    """Folders of `NAMES`, of which the first three have a checkpoint."""
    for name in NAMES[:3]:
        advanced(tmp_path / name, 1)
    (tmp_path / NAMES[3] / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    (tmp_path / NAMES[4] / "global_step20").mkdir(parents=True)


@pytest.mark.usefixtures("runs")
def test_the_run_to_resume_is_the_newest_with_a_checkpoint_or_the_one_named(tmp_path):
    newest = tmp_path / "20260101_10-00-00-10"
    assert find_run(tmp_path, "") == newest
    assert find_run(tmp_path, NAMES[0]) == tmp_path / NAMES[0]
    assert find_run(tmp_path / "elsewhere", str(newest)) == newest
    assert find_run(tmp_path, str(newest / "checkpoints")) == newest


@pytest.mark.usefixtures("runs")
def test_a_run_that_cannot_be_resumed_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no run in .* has a checkpoint \(there is no run\)"):
        find_run(tmp_path / NAMES[3], "")
    with pytest.raises(UserError, match="did you mean '20260101_10-00-00'"):
        find_run(tmp_path, "20260101_10-00-01")
    with pytest.raises(UserError, match="20260102_10-00-00 has no checkpoint"):
        find_run(tmp_path, "20260102_10-00-00")
    with pytest.raises(UserError, match="DeepSpeed"):
        find_run(tmp_path, "notes")


def test_the_newest_run_is_named_if_none_has_a_checkpoint(tmp_path):
    for name in NAMES:
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"no run in .* has a checkpoint .*20260102_10-00-00"):
        find_run(tmp_path, "")


def test_a_damaged_checkpoint_without_checksums_is_kept_aside_and_the_one_before_is_taken(tmp_path, caplog):
    """As an earlier version wrote it: only reading its arrays shows the damage."""
    before = advanced(tmp_path, 1)
    advanced(tmp_path, 2)
    folder = tmp_path / "checkpoints"
    for step in ("1", "2"):
        (folder / step / "checksums.json").unlink()
    for part in (folder / "2" / "params").rglob("d/*"):
        part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    checkpointer = resumable(tmp_path)
    with errors_reported_once():
        state, _ = checkpointer.restore(fresh_state(), OPTIMIZER.init)
    checkpointer.close()
    assert checkpointer.start.step == 1
    assert bits(state) == bits(before)
    (line,) = (record.message for record in caplog.records if record.name.startswith("anima_jax"))
    assert line == (
        f"{folder}/2: cannot be read (its files are damaged); the one before is taken, and this is kept as 2.damaged"
    )


def test_the_loss_scale_is_part_of_a_checkpoint_and_fresh_where_one_has_none(tmp_path):
    scaled = fresh_state()._replace(loss_scale=LossScale(jnp.float32(64.0), jnp.int32(7)))
    for state, folder in ((scaled, tmp_path / "float16"), (fresh_state(), tmp_path / "float32")):
        checkpointer = resumable(folder)
        assert checkpointer.save(1, state, wait=True)
        for fresh, expected in ((64.0, 64.0), (2.0**16, 64.0)):
            own = fresh_state()._replace(loss_scale=LossScale(jnp.float32(fresh), jnp.int32(0)))
            found, _ = checkpointer.restore(own, OPTIMIZER.init)
            assert float(found.loss_scale.scale) == (expected if state is scaled else fresh)
            assert int(found.loss_scale.applied) == (7 if state is scaled else 0)
        assert checkpointer.restore(fresh_state(), OPTIMIZER.init)[0].loss_scale is None
        checkpointer.close()
