"""A run's figures and pictures for others to watch: TensorBoard, and Weights & Biases if it is asked for.

Tags are diffusion-pipe's (train.py): `train/loss`, `train/grad_norm`, `train/epoch_loss`,
`<eval>/loss_quantile_0.10`…, `<eval>/loss`, `eval/eval_time_sec`; ours stand beside them.
"""

import importlib.util
import logging
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from PIL import Image

from anima_jax.config.main import MainConfig
from anima_jax.errors import UserError
from anima_jax.training.figures import RetryingFile

logging.getLogger("tensorboardX").setLevel(logging.ERROR)  # the run itself says what is not finite


def check_monitoring(config: MainConfig) -> None:
    """Raise UserError if wandb is asked for and not installed; before anything is loaded or written."""
    if config.monitoring.enable_wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"{config.path}: [monitoring] enable_wandb = true, but wandb is not installed "
            "(pip install wandb, or set it to false)"
        )


_PATIENTLY = "patiently"


class _Patiently:
    """How tensorboardX opens files whose path begins with `_PATIENTLY` and a colon."""

    @staticmethod
    def directory_check(path: str) -> None:
        os.makedirs(_path(path), exist_ok=True)

    @staticmethod
    def open(path: str) -> RetryingFile:
        return RetryingFile(_path(path), "ab")


def _path(path: str) -> str:
    return path.removeprefix(f"{_PATIENTLY}:")


class Monitor:
    """Writes to every place that the configuration names, from process 0 alone.

    `resumed_after` is the step that the run goes on from: what an earlier attempt wrote beyond it is hidden. Raises
    UserError where wandb cannot be used.
    """

    def __init__(self, folder: pathlib.Path, config: MainConfig, *, resumed_after: tuple[int, int] | None = None):
        self._by_examples = config.x_axis_examples
        self._writer: Any = None
        self._wandb: Any = None
        if jax.process_index():
            return
        if config.monitoring.enable_tensorboard:
            from tensorboardX import SummaryWriter, record_writer

            record_writer.register_writer_factory(_PATIENTLY, _Patiently)
            purged = None if resumed_after is None else self._x(*resumed_after) + 1
            self._writer = SummaryWriter(f"{_PATIENTLY}:{folder}", purge_step=purged, flush_secs=10)
        if config.monitoring.enable_wandb:
            self._wandb = _start_wandb(folder, config)

    def scalars(self, step: int, examples: int, values: Mapping[str, float]) -> None:
        """Figures after `step` steps that took `examples` examples. Those that are not finite are left out of W&B."""
        self.at(self._x(step, examples), values, step)

    def at(self, x: int, values: Mapping[str, float], step: int | None = None) -> None:
        """Figures at a point `x` of their own axis, such as an epoch; `step` is what W&B is told besides."""
        if self._writer:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, x)
        if self._wandb and values:
            finite = {tag: value for tag, value in values.items() if math.isfinite(value)}
            self._wandb.log({**finite, "step": x if step is None else step})

    def pictures(self, step: int, name: str, image: Image.Image, examples: int | None = None) -> None:
        """A picture under `name`; with `examples` it takes its place on their axis, if that is the one in use."""
        if self._writer:
            x = step if examples is None else self._x(step, examples)
            self._writer.add_image(name, np.asarray(image.convert("RGB")), x, dataformats="HWC")
        if self._wandb:
            self._wandb.log({name: self._wandb.Image(image), "step": step})

    def close(self) -> None:
        """Write what is still held back."""
        if self._writer:
            self._writer.close()
        if self._wandb:
            self._wandb.finish()

    def _x(self, step: int, examples: int) -> int:
        return examples if self._by_examples else step


def _start_wandb(folder: pathlib.Path, config: MainConfig) -> Any:
    check_monitoring(config)
    import wandb  # pyright: ignore[reportMissingImports] - optional

    settings = config.monitoring
    shown = config.model_dump(mode="json", exclude={"monitoring": {"wandb_api_key"}})
    try:
        if settings.wandb_api_key:
            wandb.login(key=settings.wandb_api_key)
        wandb.init(
            project=settings.wandb_tracker_name or None,
            name=settings.wandb_run_name or None,
            config=shown,
            dir=str(folder),
        )
    except Exception as error:  # whatever wandb or its network raises, the user's line is the same
        raise UserError(f"{config.path}: [monitoring] enable_wandb: wandb does not start: {error}") from error
    return wandb
