"""Programs that made the quick start's VAE, text encoder and tokenizers in `anima_jax/assets`. Not installed."""
