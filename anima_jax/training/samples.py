"""Images sampled during training, always from the same prompts and seeds."""

import itertools
import json
import pathlib
from collections.abc import Sequence

from PIL import Image, ImageDraw

from anima_jax.checkpoints.names.networks import TEXT_ENCODER
from anima_jax.config.main import MainConfig
from anima_jax.config.sample import SampleConfig
from anima_jax.data.encoders import Encoders
from anima_jax.data.images import is_transparent
from anima_jax.errors import UserError
from anima_jax.models.control import ControlConfig
from anima_jax.models.parameters import Params, cast_to_compute, merge
from anima_jax.parallel.hosts import is_process_0
from anima_jax.parallel.mesh import current_mesh, replicas
from anima_jax.sampling.captions import LINE_HEIGHT, draw_line, wrapped
from anima_jax.sampling.controls import WITH_MASK, Control
from anima_jax.sampling.images import read_picture, save_image
from anima_jax.sampling.pipeline import AnimaPipeline
from anima_jax.sampling.references import Reference
from anima_jax.sampling.request import SamplingParams, batch_of_requests, batches
from anima_jax.training.control import network_with
from anima_jax.training.intervals import Every, RunPoint
from anima_jax.training.state import ParamPartition
from anima_jax.training.step import TrainState, trained_weights
from anima_jax.training.writer import Writer, warn_and_continue

_MIN_TILE, _MARGIN, _LINES = 128, 4, 6
"""Sizes in a grid: minimum width of an image and gap between images, in pixels, and the most lines of a caption."""

COLUMNS = 8
"""Most images in a row of a grid."""

TAG = "samples"
"""Tag of the grids in TensorBoard and W&B."""


class Samples:
    """Samples the prompts and seeds of `[sample]` into one grid, such as `step000500.png` in `folder`.

    `writer` shows the grid on the dashboards. `pipeline` is that of the trained model, `frozen` its frozen parameters.
    `control` are the sizes of the trained control network and its strength.
    """

    def __init__(
        self,
        config: SampleConfig,
        size_wh: tuple[int, int],
        pipeline: AnimaPipeline,
        frozen: Params,
        folder: pathlib.Path,
        writer: Writer,
        control: tuple[ControlConfig, float] | None = None,
    ):
        self._config, self._size_wh, self._pipeline, self._frozen = config, size_wh, pipeline, frozen
        self._folder, self._writer = folder, writer
        self._references, self._control = reference_pictures(config), control
        self._pictures = control_pictures(config)
        self._every = Every(config.every_n_steps, config.every_n_epochs, at_start=True, at_end=True)

    def due(self, point: RunPoint) -> bool:
        """Return whether the run samples at this point."""
        return self._every.due(point)

    def done(self, point: RunPoint) -> bool:
        """Return whether an earlier attempt saved the samples of this point, from which the run resumes."""
        return point.step > 0 and self._path(point).exists()

    def perform(self, point: RunPoint, state: TrainState) -> None:
        """Sample with the averaged weights if there are any, else with the trained ones."""
        self._writer.flush()
        with warn_and_continue():
            weights = trained_weights(state) if state.ema is None else state.ema
            self._writer.image(point, TAG, self._draw(point, self._frozen | weights))
            self._writer.print(f"drew {self._path(point)}")

    def _path(self, point: RunPoint) -> pathlib.Path:
        return self._folder / f"step{point.step:06d}.png"

    def _draw(self, point: RunPoint, params: Params) -> Image.Image:
        """Sample with these parameters, save the grid and return it.

        The text chunks of the PNG are `prompt` and `seed` (one line per tile, row by row), `step`, and `parameters`,
        the settings of the sampler.
        """
        config, (width, height) = self._config, self._size_wh
        self._pipeline.dit_params = cast_to_compute(params, self._pipeline.dtype)
        text_encoder = {
            path.removeprefix(TEXT_ENCODER): value for path, value in params.items() if path.startswith(TEXT_ENCODER)
        }
        if text_encoder:
            self._pipeline.text_encoder_params = text_encoder
        try:
            images = self._images(width, height, self._controls(params))
        finally:
            self._pipeline.dit_params = {}  # training donates them, so the pipeline must not keep them
        tiles = [(prompt, seed) for seed in config.seeds for prompt in config.prompts]
        grid = sample_grid(images, [prompt for prompt, _ in tiles])
        settings = {"prompts": config.prompts, "seeds": config.seeds, "step": point.step} | config.sampling
        settings |= {"negative_prompts": config.negative_prompts, "references": config.references}
        if self._control and config.control:
            settings |= {"control": config.control, "control_strength": self._control[1]}
        text = {"anima_jax_samples": json.dumps(settings)}
        if is_process_0():
            save_image(grid, self._path(point), text)
        return grid

    def _controls(self, params: Params) -> list[tuple[Control, ...]]:
        """Return the controls of each prompt, with the trained network as it is in `params`."""
        if self._control is None or not self._pictures:
            return [()] * len(self._config.prompts)
        sizes, strength = self._control
        network = network_with(sizes, params)
        return [(Control(network, picture, strength),) for picture in self._pictures]

    def _images(self, width: int, height: int, controls: Sequence[tuple[Control, ...]]) -> list[Image.Image]:
        """Draw all prompts with the first seed, then with the second, and so on, `at_once` images on a device.

        The prompts of a seed are one ComfyUI batch, however many are drawn at once.
        """
        config, images = self._config, list[Image.Image]()
        at_once = config.at_once * replicas(current_mesh().shape)
        for seed in config.seeds:
            inputs = {"references": self._references, "controls": controls}
            requests = batch_of_requests(config.prompts, width, height, seed, 1, **inputs)
            for part in batches(config.negative_prompts, at_once):
                params = SamplingParams(config.negative_prompts[part.start], **config.sampling)
                images += self._pipeline.draw(requests[part], params)
        return images


def reference_pictures(config: SampleConfig | None) -> list[tuple[Reference, ...]]:
    """Return the references of each prompt. Raises UserError if one cannot be read."""
    if config is None:
        return []
    return [tuple(map(Reference.of, paths)) for paths in config.references or ((),) * len(config.prompts)]


def control_pictures(config: SampleConfig | None) -> list[Image.Image]:
    """Return the control picture of each prompt, none without. Raises UserError if one cannot be read."""
    return [read_picture(path) for path in config.control] if config else []


def check_pictures(config: MainConfig) -> None:
    """Raise UserError, with a line for each, if pictures of `[sample]` cannot be used, before hours of encoding."""
    sample, lines = config.sample, list[str]()
    if sample is None:
        return
    for key, paths in {"control": sample.control, "references": itertools.chain(*sample.references)}.items():
        for path in dict.fromkeys(paths):
            try:
                picture = read_picture(path)
                if key == "control" and config.control_channels == WITH_MASK and not is_transparent(picture):
                    raise UserError(f"{path}: has no transparent part, which says what is drawn anew")
            except UserError as error:
                lines += [f"{config.path}: sample.{key}: {line}" for line in error.messages]
    if lines:
        raise UserError(*lines)


def make_samples(
    config: MainConfig,
    partition: ParamPartition,
    state: TrainState,
    encoders: Encoders,
    folder: pathlib.Path,
    writer: Writer,
) -> list[Samples]:
    """Return the `Samples` of the configuration in a list, empty without `[sample]`."""
    if config.sample is None:
        return []
    model = merge(partition.graphdef, partition.frozen | state.params)
    text_encoder = encoders.text_encoder if model.text_encoder is None else model.text_encoder
    pipeline = AnimaPipeline(
        model,
        encoders.vae,
        text_encoder,
        encoders.tokenizers,
        embeddings=config.sample.embeddings,
        dtype=config.compute_dtype,
    )
    pipeline.dit_params = {}  # each drawing sets its own; a copy of these would take memory until the first one
    strength, control = config.sample.control_strength, None
    if partition.control and config.adapter:
        control = partition.control, config.adapter.multiplier if strength is None else strength
    size, folder = config.sample_size_wh, folder / "samples"
    return [Samples(config.sample, size, pipeline, partition.frozen, folder, writer, control)]


def sample_grid(images: Sequence[Image.Image], captions: Sequence[str], columns: int = COLUMNS) -> Image.Image:
    """Return a grid of the images, each above its caption. Small images are enlarged so that captions are readable."""
    scale = -(-_MIN_TILE // images[0].width)
    width, height = images[0].width * scale, images[0].height * scale
    texts = [wrapped(caption, width - 4, _LINES) for caption in captions]
    cell = (width + _MARGIN, height + _MARGIN + LINE_HEIGHT * max(map(len, texts), default=0))
    columns = min(columns, len(images))
    grid = Image.new("RGB", (cell[0] * columns, cell[1] * -(-len(images) // columns)), "white")
    pen = ImageDraw.Draw(grid)
    for index, (image, lines) in enumerate(zip(images, texts, strict=True)):
        x, y = cell[0] * (index % columns), cell[1] * (index // columns)
        grid.paste(image.resize((width, height), Image.Resampling.NEAREST), (x, y))
        for number, line in enumerate(lines):
            draw_line(pen, x + 2, y + height + LINE_HEIGHT * number, line)
    return grid
