"""Pictures that a run draws on its way, always of the same prompts and seeds."""

import pathlib

from anima_jax.adapters.dialects import TEXT_ENCODER
from anima_jax.config.main import SampleConfig
from anima_jax.models.parameters import Params, cast_to_compute
from anima_jax.parallel.hosts import is_process_0
from anima_jax.sampling.images import save_image
from anima_jax.sampling.pipeline import AnimaPipeline
from anima_jax.training import report
from anima_jax.training.intervals import crosses_multiple
from anima_jax.training.monitor import Monitor

TAG = "samples"
"""Under which the grids are in TensorBoard."""


class Samples:
    """Draws `[sample]`'s prompts and seeds as one grid, `step000500.png` in `folder`, and shows it to `monitor`."""

    def __init__(
        self,
        settings: SampleConfig,
        size_wh: tuple[int, int],
        pipeline: AnimaPipeline,
        folder: pathlib.Path,
        monitor: Monitor | None = None,
    ):
        self._settings, self._size_wh, self._pipeline, self._folder = settings, size_wh, pipeline, folder
        self._monitor = monitor

    def due(self, step: int, total_steps: int, epochs_before: int = 0, epochs_after: int = 0) -> bool:
        """Whether samples are drawn after `step` steps, the last of which took finished epochs from before to after.

        They are at the start and the end in any case.
        """
        settings = self._settings
        return (
            crosses_multiple(settings.every_n_steps, step - 1, step)
            or crosses_multiple(settings.every_n_epochs, epochs_before, epochs_after)
            or step in {0, total_steps}
        )

    def path(self, step: int) -> pathlib.Path:
        """The grid drawn after `step` steps."""
        return self._folder / f"step{step:06d}.png"

    def draw(self, params: Params, step: int, examples: int | None = None) -> pathlib.Path:
        """Draw with these parameters of the transformer; they are not kept.

        The PNG says in text chunks what it shows: `prompt` and `seed` (one line for each tile, row by row), `step`, and
        the sampler's settings.
        """
        settings, (width, height) = self._settings, self._size_wh
        self._pipeline.dit_params = cast_to_compute(params, self._pipeline.dtype)
        own = {path.removeprefix(TEXT_ENCODER): one for path, one in params.items() if path.startswith(TEXT_ENCODER)}
        if own:
            self._pipeline.text_encoder_params = own
        images = []
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
        self._pipeline.dit_params = {}
        tiles = [(prompt, seed) for seed in settings.seeds for prompt in settings.prompts]
        grid = report.sample_grid(images, [prompt for prompt, _ in tiles])
        path = self.path(step)
        text = {
            "prompt": "\n".join(prompt for prompt, _ in tiles),
            "seed": "\n".join(str(seed) for _, seed in tiles),
            "step": str(step),
            "parameters": f"steps {settings.steps}, guidance_scale {settings.guidance_scale}, shift {settings.shift}",
        }
        if is_process_0():
            save_image(grid, path, text)
        if self._monitor:
            self._monitor.pictures(step, TAG, grid, examples)
        return path
