"""What a configuration will do, in words, for who starts a run."""

import os

from anima_jax.config.main import MainConfig

PARTS = {
    "self_attn": "self-attention",
    "cross_attn": "cross-attention",
    "mlp": "the MLPs",
    "mod": "the modulation (AdaLN)",
    "base": "the layers at both ends",
}
"""Groups of the transformer's parameters; the LLM adapter has a sentence of its own."""

KINDS = {"lora": "LoRA", "lokr": "LoKr", "loha": "LoHa", "dora": "DoRA"}
"""`[adapter] type` as it is spelt."""


def start_up_words(config: MainConfig) -> list[str]:
    """Sentences: what is trained at which learning rate and what stays as it is; last, the LLM adapter."""
    groups = [group for group in PARTS if group != "base" or not config.adapter]  # no adapter is laid on the ends
    rates = {group: config.learning_rates[group] for group in groups}
    by_rate = {rate: [PARTS[group] for group in groups if rates[group] == rate] for rate in rates.values()}
    frozen = by_rate.pop(0.0, [])
    trained = [
        f"{_and(parts) if frozen or len(by_rate) > 1 else 'every part'} at {_rate(rate)}"
        for rate, parts in by_rate.items()
    ]
    what = f"Training {_subject(config)} with {config.optimizer.type}: {_and(trained)}" if trained else ""
    stays = f"Frozen: {_and(frozen)}" if frozen else ""
    return [f"{words}." for words in (what, stays, _text_encoder(config), _llm_adapter(config)) if words]


def _subject(config: MainConfig) -> str:
    if config.adapter:
        kind = KINDS[config.adapter.type]
        return f"a {kind} of rank {config.adapter.rank} on the blocks' linear layers, all else frozen,"
    if config.model.transformer_path is None:
        return "a fresh transformer"
    return f"the weights of {os.path.basename(config.model.transformer_path)}"


def _text_encoder(config: MainConfig) -> str:
    if not config.adapter or not config.adapter.text_encoder_lr:
        return ""
    kind, rate = KINDS[config.adapter.type], config.adapter.text_encoder_lr
    return f"A {kind} on the text encoder is trained at {_rate(rate)}"


def _llm_adapter(config: MainConfig) -> str:
    rate, own = config.learning_rates["llm_adapter"], config.model.llm_adapter_lr
    what = f"A {KINDS[config.adapter.type]} on the LLM adapter" if config.adapter else "The LLM adapter"
    if own is not None:
        return f"{what} is trained at {_rate(rate)}" if rate else "The LLM adapter is frozen: llm_adapter_lr = 0"
    if not rate:
        return "The LLM adapter is frozen: [optimizer] lr = 0"
    if config.model.transformer_path is None and not config.adapter:
        return f"{what} is trained at {_rate(rate)}"
    return (
        f"{what} is trained too, at {_rate(rate)}, because llm_adapter_lr is not set; llm_adapter_lr = 0 in [model] "
        "freezes it, which is better unless the data set is large and brings new words"
    )


def _rate(rate: float) -> str:
    return f"{rate:g}"


def _and(words: list[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last
