"""The check that the networks and tokenizers of a pipeline match."""

from anima_jax.errors import UserError
from anima_jax.models.dit import OUT_CHANNELS, DiTConfig
from anima_jax.models.qwen3 import Qwen3Config
from anima_jax.text.tokenizers import Tokenizers


def check_networks(dit: DiTConfig, text_encoder: Qwen3Config, tokenizers: Tokenizers) -> None:
    """Raise UserError unless transformer, text encoder and tokenizers match."""
    adapter = dit.adapter
    if adapter is None:
        raise UserError(
            "the transformer has no LLM adapter (llm_adapter.…), without which it cannot read prompts: it is that of "
            "Cosmos-Predict2, or its adapter is in a file of its own"
        )
    if dit.latent_channels != OUT_CHANNELS:
        raise UserError(f"the transformer expects {dit.latent_channels} latent channels, the VAE has {OUT_CHANNELS}")
    for what, found, needed in (
        ("width of the text encoder", text_encoder.width, adapter.source_width),
        ("width of the LLM adapter's output", adapter.target_width, dit.context_width),
    ):
        if found != needed:
            raise UserError(f"{what} is {found}, the transformer expects {needed} (Anima's text encoder is Qwen3-0.6B)")
    for what, rows, ids in (
        ("text encoder's", text_encoder.vocabulary, tokenizers.qwen_vocabulary),
        ("LLM adapter's", adapter.vocabulary, tokenizers.t5_vocabulary),
    ):
        if ids > rows:
            raise UserError(f"the tokenizer has {ids} tokens, the {what} table only {rows} rows: they do not match")
