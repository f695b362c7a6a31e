"""Which sizes a picture or clip is trained at."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anima_jax.config.sizes import Size
from anima_jax.data.buckets import Bucket, Bucketing, spaced_ratios

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "buckets.json").read_text())


def bucketing_of(config: dict[str, Any]) -> Bucketing:
    """diffusion-pipe's keys, as its own code reads them."""
    sides = [math.sqrt(math.prod(side)) if isinstance(side, list) else side for side in config["resolutions"]]
    if "ar_buckets" in config:
        ratios = [ratio[0] / ratio[1] if isinstance(ratio, list) else ratio for ratio in config["ar_buckets"]]
    else:
        ratios = spaced_ratios(config["min_ar"], config["max_ar"], config["num_ar_buckets"])
    return Bucketing(tuple(sides), tuple(ratios), tuple(config["frame_buckets"]))


@pytest.mark.parametrize("golden", GOLDEN, ids=[str(part["config"]["resolutions"]) for part in GOLDEN])
def test_buckets_are_those_of_diffusion_pipe(golden):
    bucketing = bucketing_of(golden["config"])
    for width, height, frames, expected in golden["rows"]:
        sizes = [list(bucket.size) for bucket in bucketing.place(width, height, frames)]
        assert sizes == (expected or []), (width, height, frames)


SIDES = st.integers(16, 8000)
RATIOS = st.floats(0.25, 4.0)
BUCKETINGS = st.builds(
    Bucketing,
    resolutions=st.lists(st.floats(256, 2048), min_size=1, max_size=3).map(tuple),
    aspect_ratios=st.lists(RATIOS, min_size=1, max_size=13).map(tuple),
    frame_buckets=st.lists(st.integers(1, 100), max_size=3).map(tuple),
)


@given(bucketing=BUCKETINGS, width=SIDES, height=SIDES, frames=st.integers(1, 200))
def test_every_resolution_gets_a_bucket_of_the_longest_length_that_fits(bucketing, width, height, frames):
    buckets = bucketing.place(width, height, frames)
    lengths = [length for length in bucketing.frame_buckets if length <= frames and (length > 1 or frames == 1)]
    assert [bucket.resolution for bucket in buckets] == (list(bucketing.resolutions) if lengths else [])
    assert {bucket.size for bucket in buckets} <= set(bucketing.sizes)
    for bucket in buckets:
        assert bucket.size.frames == max(lengths)


@given(bucketing=BUCKETINGS, width=SIDES, height=SIDES, frames=st.integers(1, 200))
def test_a_bucket_has_the_area_of_its_resolution_and_the_nearest_ratio(bucketing, width, height, frames):
    ratio = min(bucketing.aspect_ratios, key=lambda ratio: abs(math.log(width / height / ratio)))
    for size, resolution, _ in bucketing.place(width, height, frames):
        assert resolution is not None
        assert size.width % 16 == size.height % 16 == 0
        # Rounding moves a side by 8 pixels at most.
        nearest = [
            math.sqrt(other) * resolution for other in bucketing.aspect_ratios if _as_near(other, ratio, width / height)
        ]
        assert min(abs(size.width - side) for side in nearest) <= 8.001
        sides = size.width - 8, size.height - 8
        assert math.prod(sides) <= resolution**2 * 1.0001 <= math.prod(side + 16 for side in sides) * 1.0002


def _as_near(ratio: float, nearest: float, wanted: float) -> bool:
    return math.isclose(abs(math.log(wanted / ratio)), abs(math.log(wanted / nearest)), abs_tol=1e-9)


@given(bucketing=BUCKETINGS, width=SIDES, height=SIDES)
def test_an_image_always_has_a_bucket_and_a_clip_never_one_of_images(bucketing, width, height):
    assert {bucket.size.frames for bucket in bucketing.place(width, height, 1)} == {1}
    assert 1 not in {bucket.size.frames for bucket in bucketing.place(width, height, 50)}


@given(bucketing=BUCKETINGS, data=st.data(), width=SIDES, height=SIDES, frames=st.integers(1, 200))
def test_the_order_of_the_keys_lists_does_not_matter(bucketing, data, width, height, frames):
    def shuffled(values):
        return tuple(data.draw(st.permutations([*values, *values])))

    other = Bucketing(
        shuffled(bucketing.resolutions), shuffled(bucketing.aspect_ratios), shuffled(bucketing.frame_buckets)
    )
    assert other == bucketing
    assert other.place(width, height, frames) == bucketing.place(width, height, frames)


def test_of_two_equally_near_ratios_the_first_is_chosen():
    (bucket,) = Bucketing((512,), (2.0, 0.5), (1,)).place(640, 640, 1)
    assert bucket.size == (368, 720, 1)  # √(512² · 0.5) = 362.04, 512² / 362.04 = 724.08


def test_ratios_and_resolutions_are_told_apart_by_three_decimals():
    bucketing = Bucketing((512.0004, 512.0, 256), (1.0, 1.0004, 0.33333), (33, 1, 33))
    assert bucketing.resolutions == (256.0, 512.0)
    assert bucketing.aspect_ratios == (0.333, 1.0)
    assert bucketing.frame_buckets == (1, 33)


def test_spaced_ratios_are_a_geometric_series():
    ratios = spaced_ratios(0.5, 2.0, 7)
    assert ratios[0] == pytest.approx(0.5)
    factors = [after / before for before, after in itertools.pairwise(ratios)]
    assert factors == pytest.approx([4 ** (1 / 6)] * 6)
    assert spaced_ratios(1.5, 1.5, 1) == (1.5,)


SQUARE, WIDE, TALL = Size(512, 512, 1), Size(640, 384, 33), Size(384, 640, 33)
SIZE_BUCKETS = (SQUARE, WIDE, Size(640, 384, 65), TALL, Size(512, 512, 17))


@pytest.mark.parametrize(
    ("media", "size"),
    [
        ((1000, 300, 1), SQUARE),  # the only one for pictures
        ((1920, 1080, 16), None),  # shorter than every one for clips
        ((1920, 1080, 17), Size(512, 512, 17)),
        ((1920, 1080, 40), WIDE),
        ((1920, 1080, 65), Size(640, 384, 65)),  # of the same ratio, the longest
        ((1080, 1920, 500), TALL),
        ((500, 500, 500), Size(512, 512, 17)),  # the ratio counts before the length
    ],
)
def test_size_buckets_are_chosen_by_ratio_then_by_length(media, size):
    buckets = Bucketing((), (), (1,), SIZE_BUCKETS).place(*media)
    assert buckets == (() if size is None else (Bucket(size, None),))


@given(st.permutations(SIZE_BUCKETS), SIDES, SIDES, st.integers(2, 100))
def test_the_order_of_size_buckets_does_not_matter(order, width, height, frames):
    # Away from the ratios that two buckets are as near to.
    log_ratio = math.log(width / height)
    distances = sorted({round(abs(log_ratio - math.log(size.width / size.height)), 9) for size in SIZE_BUCKETS})
    if len(distances) > 1 and distances[1] - distances[0] < 1e-6:
        return
    placed = Bucketing((), (), (1,), tuple(order)).place(width, height, frames)
    assert placed == Bucketing((), (), (1,), SIZE_BUCKETS).place(width, height, frames)


def test_sizes_are_all_that_can_be_chosen():
    assert Bucketing((512,), (1.0, 1.0001, 1.5), (33,)).sizes == (
        (512, 512, 1),
        (512, 512, 33),
        (624, 416, 1),  # √(512² · 1.5) = 627.07, 512² / 627.07 = 418.05
        (624, 416, 33),
    )
    assert Bucketing((), (), (), SIZE_BUCKETS).sizes == SIZE_BUCKETS


def test_a_huge_resolution_allocates_nothing():
    (bucket,) = Bucketing((1e9,), (1.0,), (1,)).place(640, 384, 1)
    assert (bucket.size, bucket.resolution) == ((10**9, 10**9, 1), 1e9)


def test_an_image_has_no_bucket_among_those_of_clips():
    assert Bucketing((), (), (1,), (WIDE,)).place(640, 384, 1) == ()


@pytest.mark.parametrize(
    ("size", "grid", "tokens"),
    [
        (Size(1024, 1024, 1), (1, 64, 64), 4096),
        (Size(640, 384, 1), (1, 24, 40), 960),
        (Size(640, 384, 33), (9, 24, 40), 8640),
        (Size(640, 384, 36), (9, 24, 40), 8640),
        (Size(16, 16, 5), (2, 1, 1), 2),
    ],
)
def test_tokens_are_patches_of_the_latents(size, grid, tokens):
    assert (size.grid, size.tokens) == (grid, tokens)
