"""A summary of what a configuration trains, in sentences for the user."""

import os
from collections.abc import Mapping, Sequence

from anima_jax.adapters.kinds import KINDS
from anima_jax.checkpoints.names.groups import CONTROL, GROUPS
from anima_jax.config.main import MainConfig

PARTS: Mapping[str, str] = {
    "self_attn": "self-attention",
    "cross_attn": "cross-attention",
    "mlp": "the MLPs",
    "mod": "the modulation (AdaLN)",
    "base": "the input and output layers",
}
"""Parameter groups of the transformer → their names in the summary. The LLM adapter has a sentence of its own."""


def summary(config: MainConfig) -> list[str]:
    """Return sentences on what is trained at which learning rate and what is frozen; the last is on the LLM adapter."""
    adapter = config.adapter
    if adapter and adapter.is_control:
        where = ", ".join(adapter.target_layers)
        sentence = f"Training a control network (ControlNet-LLLite at {where}) with {config.optimizer.type}"
        rate = f"{sentence}, at {config.learning_rates[CONTROL]:g}. The model is frozen."
        sentences = [rate, *_own_rate(config)]
        if ignored := [f"{group}_lr" for group, _ in GROUPS if getattr(config.model, f"{group}_lr", None)]:
            sentences.append(
                f"A control network has the rate of [optimizer]: {_listed(ignored)} in [model] does nothing."
            )
        if config.sample and not config.sample.control:
            sentences.append("Samples are drawn without the control network: [sample] control is not set.")
        return sentences
    groups = [group for group in PARTS if group != "base" or not adapter]  # adapters change only the blocks
    rates = {group: config.learning_rates[group] for group in groups}
    by_rate = {rate: [PARTS[group] for group in groups if rates[group] == rate] for rate in rates.values()}
    frozen = by_rate.pop(0.0, [])
    trained = [
        f"{_listed(parts) if frozen or len(by_rate) > 1 else 'every part'} at {rate:g}"
        for rate, parts in by_rate.items()
    ]
    sentences: list[str] = []
    if trained:
        sentences.append(f"Training {_subject(config)} with {config.optimizer.type}: {_listed(trained)}.")
    sentences += _own_rate(config)
    if frozen:
        sentences.append(f"Frozen: {_listed(frozen)}.")
    if adapter and adapter.text_encoder_lr:
        sentences.append(
            f"A {KINDS[adapter.type].title} on the text encoder is trained at {adapter.text_encoder_lr:g}."
        )
    return [*sentences, _llm_adapter(config)]


def _own_rate(config: MainConfig) -> list[str]:
    if config.optimizer.type != "adafactor" or not config.optimizer.options.get("relative_step", True):
        return []
    return ["AdaFactor uses a rate of its own, at most 0.01: relative_step = false in [optimizer] uses lr."]


def _subject(config: MainConfig) -> str:
    if config.adapter:
        kind = KINDS[config.adapter.type].title
        return f"a {kind} of rank {config.adapter.rank} on the blocks' linear layers, with everything else frozen,"
    if config.model.transformer_path is None:
        return "a newly initialised transformer"
    return f"the weights of {os.path.basename(config.model.transformer_path.rstrip('/'))}"


def _llm_adapter(config: MainConfig) -> str:
    rate, own = config.learning_rates["llm_adapter"], config.model.llm_adapter_lr
    what = f"A {KINDS[config.adapter.type].title} on the LLM adapter" if config.adapter else "The LLM adapter"
    if not rate:
        return f"The LLM adapter is frozen: {'[optimizer] lr' if own is None else 'llm_adapter_lr'} = 0."
    if own is not None or (config.model.transformer_path is None and not config.adapter):
        return f"{what} is trained at {rate:g}."
    return (
        f"{what} is trained too, at {rate:g}, because llm_adapter_lr is not set; llm_adapter_lr = 0 in [model] freezes "
        "it, which is better unless the dataset is large and contains new words."
    )


def _listed(words: Sequence[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last
