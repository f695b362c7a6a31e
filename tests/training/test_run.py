"""Batch sizes and intervals of a run follow from its configuration and its replicas."""

import pytest

from anima_jax.config.load import load_config
from anima_jax.config.sizes import Size
from anima_jax.errors import UserError
from anima_jax.training.run import Run
from tests.config.files import write

IMAGE, CLIP = Size(512, 512, 1), Size(512, 512, 33)


@pytest.fixture
def load(tmp_path):
    """Return the run of the small configuration with changes, on one replica unless told otherwise."""

    def loaded(changes=None, dataset=None, **replicas):
        return Run(load_config(write(tmp_path, changes, dataset)), **({"replicas": 1} | replicas))

    return loaded


def test_one_example_makes_a_step_and_nothing_is_saved_or_evaluated_by_steps_unless_set(load):
    run = load()
    assert [run.global_batch(IMAGE), run.eval_micro_batch(IMAGE), run.eval_micro_batch(CLIP)] == [1, 1, 1]
    assert (run.save_every_steps, run.eval_every_steps) == (None, None)


def test_evaluation_takes_the_batches_of_the_training_unless_set(load):
    train = {"micro_batch_size_per_gpu": 2, "image_micro_batch_size_per_gpu": 8}
    assert [load(train).eval_micro_batch(size) for size in (IMAGE, CLIP)] == [8, 2]
    run = load(train | {"eval_micro_batch_size_per_gpu": 3})
    assert [run.eval_micro_batch(size) for size in (IMAGE, CLIP)] == [3, 3]


def test_accumulation_follows_from_the_global_batch(load):
    run = load({"micro_batch_size_per_gpu": 4, "global_batch_size": 32})
    assert (run.global_batch(IMAGE), run.accumulation_of(IMAGE)) == (32, 8)


def test_batches_are_those_of_the_nearest_side_and_of_pictures_or_clips(load):
    run = load({"micro_batch_size_per_gpu": [[1024, 1], [512, 4]], "gradient_accumulation_steps": 3})
    wide, large = Size(768, 432, 1), Size(1280, 720, 33)  # squares of 576 and of 960
    assert [run.micro_batch(size) for size in (wide, large)] == [4, 1]
    assert [run.global_batch(size) for size in (wide, large)] == [12, 3]
    assert [run.accumulation_of(size) for size in (wide, large)] == [3, 3]
    assert run.micro_batch(Size(768, 768, 1)) == 1  # as near to both: the first, as in diffusion-pipe
    apart = load({"micro_batch_size_per_gpu": 2, "image_micro_batch_size_per_gpu": [[512, 8], [1024, 4]]})
    assert [apart.micro_batch(size) for size in (wide, Size(1024, 1024, 1), large)] == [8, 4, 2]


def test_one_global_batch_for_every_size_accumulates_as_each_needs(load):
    run = load({"micro_batch_size_per_gpu": [[512, 8], [1024, 2]], "global_batch_size": 16})
    small, large = Size(512, 512, 1), Size(1024, 1024, 1)
    assert [run.global_batch(size) for size in (small, large)] == [16, 16]
    assert [run.accumulation_of(size) for size in (small, large)] == [2, 8]


@pytest.mark.parametrize(("examples", "steps"), [(800, 100), (3, 1), (15, 1), (16, 2)])
def test_saving_by_examples_counts_whole_steps(load, examples, steps):
    changes = {"save_every_n_examples": examples, "micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}
    assert load(changes).save_every_steps == steps


def test_saving_by_examples_counts_steps_of_the_largest_batch_that_the_data_can_have(load):
    changes = {"save_every_n_examples": 240, "micro_batch_size_per_gpu": [[512, 8], [1024, 2]]}
    assert load(changes, {"resolutions": [512, 1024]}).save_every_steps == 30
    assert load(changes, {"resolutions": [1024]}).save_every_steps == 120
    apart = changes | {"image_micro_batch_size_per_gpu": 3}
    assert load(apart, {"resolutions": [1024]}).save_every_steps == 80
    assert load(apart, {"resolutions": [512], "frame_buckets": [1, 33]}).save_every_steps == 30


def test_a_resumed_run_keeps_the_examples_of_its_steps_on_other_replicas(load):
    changes = {"micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}
    resumed = load(changes, replicas=6, restored_replicas=4)
    assert load(changes, replicas=4).global_batch(IMAGE) == resumed.global_batch(IMAGE) == 24
    assert [load(changes, replicas=4).accumulation_of(IMAGE), resumed.accumulation_of(IMAGE)] == [3, 2]
    assert [load(changes, replicas=4).eval_batch(IMAGE), resumed.eval_batch(IMAGE)] == [8, 12]


@pytest.mark.parametrize(
    ("changes", "replicas", "line"),
    [
        ({"global_batch_size": 8}, {}, r"must divide the 8 examples of a step \(global_batch_size\)"),
        ({}, {"restored_replicas": 8}, r"must divide the 8 examples of a step \(the run began with it\)"),
    ],
)
def test_replicas_that_do_not_divide_a_step_are_refused_with_those_that_do(load, changes, replicas, line):
    run = load(changes, replicas=3, **replicas)
    with pytest.raises(UserError, match=rf"\[mesh\] data × fsdp = 3 {line}; .* one of 1, 2, 4, 8$"):
        run.accumulation_of(IMAGE)
