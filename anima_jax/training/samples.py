"""Pictures that a run draws on its way, always of the same prompts and seeds."""

import pathlib

from anima_jax.config.main import SampleConfig
from anima_jax.models.parameters import Params, compute_copy
from anima_jax.pipeline import AnimaPipeline
from anima_jax.training import report


class Samples:
    """Draws `[sample]`'s prompts and seeds as one grid, `step000500.png` in `folder`."""

    def __init__(self, settings: SampleConfig, size_wh: tuple[int, int], pipeline: AnimaPipeline, folder: pathlib.Path):
        self._settings, self._size_wh, self._pipeline, self._folder = settings, size_wh, pipeline, folder

    def due(self, step: int, total_steps: int) -> bool:
        """Whether samples are drawn after `step` (from 1) steps."""
        return step % self._settings.every_n_steps == 0 or step == total_steps

    def draw(self, params: Params, step: int) -> pathlib.Path:
        """Draw with these parameters of the transformer; they are not kept."""
        settings, (width, height) = self._settings, self._size_wh
        self._pipeline.dit_params = compute_copy(params, self._pipeline.dtype)
        images, captions = [], []
        for seed in settings.seeds:
            images += self._pipeline(
                settings.prompts,
                width=width,
                height=height,
                steps=settings.steps,
                guidance_scale=settings.guidance_scale,
                shift=settings.shift,
                seed=seed,
            )
            captions += settings.prompts
        self._pipeline.dit_params = {}
        path = self._folder / f"step{step:06d}.png"
        report.save_picture(report.sample_grid(images, captions), path)
        return path
