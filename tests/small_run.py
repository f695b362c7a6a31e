"""A training run small enough for a test: real files, with the quick start's VAE, text encoder and tokenizers."""

import pathlib
import textwrap

import numpy as np

from anima_jax import assets
from anima_jax.checkpoints.models import save_dit
from anima_jax.models import parameters
from anima_jax.models.dit import AnimaDiT, DiTConfig
from anima_jax.models.llm_adapter import LLMAdapterConfig
from tests.models.networks import random_params

ASSETS = pathlib.Path(assets.__file__).parent

CONFIG = DiTConfig(64, 2, 4, 128, 32, 8, adapter=LLMAdapterConfig(32, 1, 2, 64, 64, 32, 512))


def write_transformer(path: pathlib.Path) -> dict:
    """Write a random transformer without zeros, named `net.…`; return its parameters."""
    params = random_params(parameters.abstract(lambda rngs: AnimaDiT(CONFIG, rngs=rngs))[1])
    save_dit(path, params)
    return params


def write_config(folder: pathlib.Path, images: pathlib.Path, main: str = "", **tables: str) -> pathlib.Path:
    """Write a main and a dataset TOML to `folder`; `main` is added at the top, `tables` are tables and their keys."""
    (folder / "dataset.toml").write_text(f"resolutions = [64]\n[[directory]]\npath = '{images}'\n")
    model = f"""
        type = 'anima'
        transformer_path = '{folder / "base.safetensors"}'
        vae_path = '{ASSETS / "tiny_vae.safetensors"}'
        llm_path = '{ASSETS / "tiny_qwen3.safetensors"}'
        tokenizer_path = '{ASSETS / "tokenizers"}'
        dtype = 'float32'
    """
    tables = {"optimizer": "type = 'adamw'\nlr = 1e-3", "model": "", **tables}
    tables["model"] = model + tables["model"]
    text = f"output_dir = '{folder / 'runs'}'\ndataset = '{folder / 'dataset.toml'}'\n{main}\n"
    text += "".join(f"[{name}]\n{keys}\n" for name, keys in tables.items())
    path = folder / "main.toml"
    path.write_text("\n".join(line.strip() for line in textwrap.dedent(text).splitlines()))
    return path


def psnr(first, second) -> float:
    """Peak signal-to-noise ratio of two images of 8 bits, in dB."""
    error = np.mean((np.asarray(first, np.float64) - np.asarray(second, np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
