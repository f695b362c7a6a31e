"""Slow: the picture that another program draws with our exported files against ours, of the same noise and prompt."""

import pathlib
import types

import numpy as np
import pytest

from anima_jax.checkpoints.folders import beside
from anima_jax.convert.__main__ import main as convert
from anima_jax.sampling.pipeline import AnimaPipeline
from anima_jax.sampling.request import ImageRequest, SamplingParams
from tests.small_run import ASSETS, write_transformer

SIZE, SEED, STEPS, PROMPT = 64, 3, 6, "a red circle, a blue square"
NEGATIVE = "a green square"  # the empty prompt is a pad token here, as in ComfyUI, and none in diffusers


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """The quick start's networks with random weights in the transformer, as a diffusers folder."""
    root = tmp_path_factory.mktemp("programs")
    write_transformer(root / "base.safetensors")
    arguments = ["checkpoint", root / "base.safetensors", root / "anima", "--to", "diffusers"]
    arguments += ["--text_encoder", ASSETS / "tiny_qwen3.safetensors", "--vae", ASSETS / "tiny_vae.safetensors"]
    convert([*map(str, arguments), "--tokenizers", str(ASSETS / "tokenizers")])
    return root / "anima"


@pytest.mark.slow
def test_diffusers_draws_our_folder_as_we_do(folder, monkeypatch):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    # torchvision, which need not be installed, only resizes the padding mask, whose values are all 0.
    functional = types.SimpleNamespace(
        resize=lambda mask, size, interpolation: mask.new_zeros((*mask.shape[:-2], *size))
    )
    resizing = types.SimpleNamespace(functional=functional, InterpolationMode=types.SimpleNamespace(NEAREST="nearest"))
    monkeypatch.setattr("diffusers.models.transformers.transformer_cosmos.transforms", resizing, raising=False)
    theirs = diffusers.ModularPipeline.from_pretrained(str(folder))
    theirs.load_components(torch_dtype=torch.float32)  # the tokenizers, too
    noise = torch.randn((1, 16, 1, SIZE // 8, SIZE // 8), generator=torch.Generator().manual_seed(SEED))
    size = {"width": SIZE, "height": SIZE}
    images = theirs(
        prompt=PROMPT, negative_prompt=NEGATIVE, latents=noise, num_inference_steps=STEPS, output_type="np", **size
    ).images
    sigmas = tuple(theirs.scheduler.sigmas.double().tolist())
    ours = AnimaPipeline.load(transformer=folder, dtype=np.float32)
    assert beside(folder)["tokenizers"] == str(folder)
    scale = theirs.guider.guidance_scale
    params = SamplingParams(sampler="euler", sigmas=sigmas, guidance_scale=scale, negative_prompt=NEGATIVE)
    (latents,) = ours.draw_latents([ImageRequest(PROMPT, seed=SEED, **size)], params)
    (pixels,) = ours.decode([latents])
    found, expected = np.clip(np.asarray(pixels[0]) / 2 + 0.5, 0, 1), np.asarray(images[0])
    error = float(np.mean((found.astype(np.float64) - expected) ** 2))
    assert -10 * np.log10(error) > 100  # float32 in both programs, each with its own order of additions
