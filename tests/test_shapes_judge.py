"""The judge of the quick start's images recognises scenes that were drawn, blurred and shifted in colour."""

import dataclasses

import numpy as np

from anima_jax.data.shapes import draw, sample_placement, scenes
from tests.shapes_judge import overlap, score


def test_the_judge_recognises_every_scene_through_blur_and_noise():
    rng = np.random.default_rng(0)
    wanted = scenes(held_out=False) + scenes(held_out=True)
    images = []
    for scene in wanted:
        drawn = draw(scene, *sample_placement(rng)).astype(np.float32)
        blurred = (drawn + np.roll(drawn, 1, 0) + np.roll(drawn, 1, 1) + np.roll(drawn, (1, 1), (0, 1))) / 4
        images.append(np.clip(blurred + rng.normal(0, 12, drawn.shape) + 8, 0, 255).astype(np.uint8))
    assert score(images, wanted) == {"shape": 1.0, "colour": 1.0, "background": 1.0}


def test_the_overlap_of_a_drawn_scene_is_nearly_one_and_that_of_another_shape_is_not():
    # Places and radii are searched in steps of half a pixel; between two of them the overlap is above 0.97.
    rng = np.random.default_rng(1)
    for scene in scenes(held_out=True):
        image = draw(scene, *sample_placement(rng))
        assert overlap(image, scene) > 0.97
        other = dataclasses.replace(scene, shape="circle" if scene.shape == "cross" else "cross")
        assert overlap(image, other) < 0.75
