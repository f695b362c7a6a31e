"""Sentences say what will be trained."""

import pytest

from anima_jax.config.load import load_config
from anima_jax.config.summary import summary
from tests.config.files import REMOVE, write

LORA = {"adapter": {"type": "lora", "rank": 8}}


@pytest.fixture
def sentences(tmp_path):
    return lambda changes=None: summary(load_config(write(tmp_path, changes)))


def test_without_its_own_rate_the_llm_adapter_is_trained_and_the_sentence_says_how_to_freeze_it(sentences):
    transformer, adapter = sentences()
    assert transformer == "Training the weights of dit.safetensors with adamw_optimi: every part at 2e-05."
    assert adapter.startswith("The LLM adapter is trained too, at 2e-05, because llm_adapter_lr is not set; ")
    assert "llm_adapter_lr = 0 in [model] freezes it" in adapter
    assert sentences({**LORA, "optimizer.lr": 1e-4})[-1].startswith(
        "A LoRA on the LLM adapter is trained too, at 0.0001,"
    )


def test_with_its_own_rate_the_llm_adapters_sentence_names_only_that(sentences):
    assert sentences({"model.llm_adapter_lr": 0})[-1] == "The LLM adapter is frozen: llm_adapter_lr = 0."
    assert sentences({"model.llm_adapter_lr": 1e-6})[-1] == "The LLM adapter is trained at 1e-06."
    assert sentences({**LORA, "model.llm_adapter_lr": 1e-6})[-1] == "A LoRA on the LLM adapter is trained at 1e-06."


def test_parts_are_named_by_their_rates(sentences):
    changes = {"model.self_attn_lr": 1e-4, "model.mlp_lr": 0, "model.mod_lr": 0}
    assert sentences(changes)[:2] == [
        "Training the weights of dit.safetensors with adamw_optimi: self-attention at 0.0001 and cross-attention and "
        "the input and output layers at 2e-05.",
        "Frozen: the MLPs and the modulation (AdaLN).",
    ]


def test_a_forced_rate_is_the_one_that_is_named(sentences):
    transformer, adapter = sentences({"force_constant_lr": 1e-3, "model.self_attn_lr": 1e-4})
    assert transformer.endswith(": every part at 0.001.")
    assert adapter.startswith("The LLM adapter is trained too, at 0.001")


def test_a_lora_freezes_the_rest_and_is_not_on_the_input_and_output_layers(sentences):
    first, *_ = sentences(LORA)
    assert first.startswith(
        "Training a LoRA of rank 8 on the blocks' linear layers, with everything else frozen, with "
    )
    assert sentences({**LORA, "model.mlp_lr": 0})[1] == "Frozen: the MLPs."
    assert "input" not in "".join(sentences({**LORA, "model.mlp_lr": 0}))


def test_a_newly_initialised_network_trains_its_adapter(sentences):
    fresh = {"model.transformer_path": REMOVE, "model.config": {}}
    assert sentences(fresh) == [
        "Training a newly initialised transformer with adamw_optimi: every part at 2e-05.",
        "The LLM adapter is trained at 2e-05.",
    ]


def test_frozen_parts_are_named_if_nothing_is_trained(sentences):
    frozen, adapter = sentences({"optimizer.lr": 0})
    assert frozen.startswith("Frozen: self-attention, ")
    assert adapter == "The LLM adapter is frozen: [optimizer] lr = 0."


def test_a_control_network_is_trained_alone_and_samples_without_a_picture_are_named(sentences):
    # Inpainting needs no control pictures.
    changes = {"adapter": {"type": "lllite", "cond_in_channels": 4}, "model.mlp_lr": 1e-4}
    first, *others = sentences({**changes, "sample": {"prompts": ["a cat"]}})
    assert first == (
        "Training a control network (ControlNet-LLLite at self_attn_q) with adamw_optimi, at 2e-05. "
        "The model is frozen."
    )
    assert others == [
        "A control network has the rate of [optimizer]: mlp_lr in [model] does nothing.",
        "Samples are drawn without the control network: [sample] control is not set.",
    ]
