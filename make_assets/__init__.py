"""How the files in `anima_jax/assets` were made: the quick start's VAE, text encoder and tokenizers. Not installed."""
