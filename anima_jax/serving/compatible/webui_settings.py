"""A1111's settings ("options") as this server has them: what they are, which may change, and what they cannot be.

Source: modules/shared_options.py of AUTOMATIC1111/stable-diffusion-webui. A request changes them for itself
(`override_settings`) or, as in A1111, for all that follow (`POST /sdapi/v1/options`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from anima_jax.errors import UserError, did_you_mean, show_value
from anima_jax.serving.http.routes import NotFoundError

FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
"""Value of samples_format → PIL's name of the format."""

CHANGEABLE: dict[str, Any] = {
    "samples_format": "png",
    "jpeg_quality": 95,
    "webp_lossless": False,
    "enable_pnginfo": True,
    "live_previews_enable": True,
    "show_progress_every_n_steps": 5,
    "eta_ancestral": 1.0,
    "s_noise": 1.0,
}
"""Settings that a request may change, with their values at the start; other values must have the same type."""

WITHOUT_EFFECT: dict[str, Any] = {
    "CLIP_stop_at_last_layers": 1,
    "randn_source": "CPU",
    "eta_noise_seed_delta": 0,
    "img2img_fix_steps": True,
    "samples_save": False,
    "grid_save": False,
    "return_grid": False,
    "live_previews_image_format": "png",
    "show_progress_type": "Approx cheap",
    "inpainting_mask_weight": 1.0,
    "img2img_background_color": "#ffffff",
    "img2img_color_correction": False,
    "samples_filename_pattern": "",
}
"""Settings that change nothing here: other values are taken, and a note says so."""

FIXED: dict[str, Any] = {
    "sd_hypernetwork": "None",
    "sd_lora": "None",
    "face_restoration": False,
    "face_restoration_model": "None",
    "tiling": False,
    "initial_noise_multiplier": 1.0,
    "upscaler_for_img2img": "None",
    "token_merging_ratio": 0.0,
    "s_min_uncond": 0.0,
}
"""Settings that cannot have another value."""

NEUTRAL = (None, "", "None", "Automatic", [], {})
"""Values that ask for nothing, whatever the setting is."""


class WebuiSettings:
    """The settings of a server."""

    def __init__(self) -> None:
        self._names: dict[str, tuple[str, ...]] = {}
        self._values = CHANGEABLE | WITHOUT_EFFECT

    def name(self, setting: str, names: Sequence[str | None]) -> None:
        """Say by which names the only value of a setting may be called; the first is shown."""
        self._names[setting] = tuple(name for name in names if name)

    def all(self) -> dict[str, Any]:
        """Return all settings."""
        return {name: names[0] if names else "" for name, names in self._names.items()} | FIXED | self._values

    def changed(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Return the settings with these changes, and notes about changes that have no effect.

        Raises UserError for a model or a value that this server does not have, and for an unknown setting.
        """
        values, notes = dict(self._values), list[str]()
        for name, value in given.items():
            if name in self._names:
                self._check_name(name, value)
            elif name in CHANGEABLE:
                values[name] = _checked(name, value)
            elif name in WITHOUT_EFFECT:
                if value not in (self._values[name], *NEUTRAL):
                    notes.append(f"{name} {show_value(value)} changes nothing here")
            elif name in FIXED:
                if value not in (FIXED[name], *NEUTRAL):
                    raise UserError(f"{name} {show_value(value)}: this server has only {show_value(FIXED[name])}")
            elif value not in NEUTRAL:
                raise UserError(f"there is no setting '{show_value(name)}' here{did_you_mean(name, self.all())}")
        return values, notes

    def change(self, given: Mapping[str, Any]) -> list[str]:
        """Change the settings for all requests that follow, and return notes. Raises UserError as `changed` does."""
        self._values, notes = self.changed(given)
        return notes

    def _check_name(self, name: str, value: Any) -> None:
        known = {each.casefold() for each in self._names[name]}
        if value not in NEUTRAL and str(value).casefold() not in known:
            found = f"{name} '{show_value(value)}'"
            raise NotFoundError(f"{found} not found: this server has only '{self.all()[name]}'")


def _checked(name: str, value: Any) -> Any:
    """Return the value of a changeable setting. Raises UserError for another type or a value out of range."""
    before = CHANGEABLE[name]
    if value is None:
        return before
    allowed = (int, float) if isinstance(before, float) else type(before)
    if not isinstance(value, allowed) or isinstance(value, bool) != isinstance(before, bool):
        raise UserError(f"{name} {show_value(repr(value))}, expected a value such as {before!r}")
    if name == "samples_format" and value.casefold() not in FORMATS:
        raise UserError(f"samples_format '{show_value(value)}', expected one of {', '.join(FORMATS)}")
    if name == "jpeg_quality" and not 1 <= value <= 100:
        raise UserError(f"jpeg_quality {value}, expected 1 to 100")
    if name in ("show_progress_every_n_steps", "eta_ancestral", "s_noise") and not -1 <= value <= 1000:
        raise UserError(f"{name} {value}, expected 0 to 1000")
    return value
