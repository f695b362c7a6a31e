"""Make the quick start's text encoder: a Qwen3 with random weights, 2 layers of width 64.

It is not trained: its causal attention mixes each word with the words before it, which is enough for the LLM adapter to
learn from.

    python -m make_assets.tiny_qwen3 --output anima_jax/assets/tiny_qwen3.safetensors
"""

import argparse

import jax.numpy as jnp
from flax import nnx

from anima_jax.checkpoints.models import save_network
from anima_jax.checkpoints.names.networks import QWEN3
from anima_jax.models.parameters import split
from anima_jax.models.qwen3 import Qwen3, Qwen3Config

CONFIG = Qwen3Config(width=64, layers=2, heads=4, key_heads=2, head_size=16, mlp_width=128, vocabulary=512)


def main() -> None:
    """Draw the weights from seed 0 and write them in bfloat16."""
    parser = argparse.ArgumentParser(description="Make the quick start's text encoder.")
    parser.add_argument("--output", required=True, metavar="FILE.safetensors")
    _, params = split(Qwen3(CONFIG, rngs=nnx.Rngs(0)))
    save_network(QWEN3, parser.parse_args().output, params, dtype=jnp.bfloat16)


if __name__ == "__main__":
    main()
