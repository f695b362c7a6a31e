"""The sentences about what will be trained."""

import pytest

from anima_jax.config import load_config
from anima_jax.config.summary import start_up_words
from tests.config.files import REMOVE, write

LORA = {"adapter": {"type": "lora", "rank": 8}}


@pytest.fixture
def words(tmp_path):
    return lambda changes=None: start_up_words(load_config(write(tmp_path, changes)))


def test_without_a_rate_of_its_own_the_llm_adapter_is_said_to_train_and_how_to_freeze_it(words):
    transformer, adapter = words()
    assert transformer == "Training the weights of dit.safetensors with adamw_optimi: every part at 2e-05."
    assert adapter.startswith("The LLM adapter is trained too, at 2e-05, because llm_adapter_lr is not set; ")
    assert "llm_adapter_lr = 0 in [model] freezes it" in adapter
    assert words({**LORA, "optimizer.lr": 1e-4})[-1].startswith("A LoRA on the LLM adapter is trained too, at 0.0001,")


def test_a_rate_that_is_set_is_all_that_is_said_of_the_llm_adapter(words):
    assert words({"model.llm_adapter_lr": 0})[-1] == "The LLM adapter is frozen: llm_adapter_lr = 0."
    assert words({"model.llm_adapter_lr": 1e-6})[-1] == "The LLM adapter is trained at 1e-06."
    assert words({**LORA, "model.llm_adapter_lr": 1e-6})[-1] == "A LoRA on the LLM adapter is trained at 1e-06."


def test_parts_are_named_by_their_rates(words):
    changes = {"model.self_attn_lr": 1e-4, "model.mlp_lr": 0, "model.mod_lr": 0}
    assert words(changes)[:2] == [
        "Training the weights of dit.safetensors with adamw_optimi: self-attention at 0.0001 and cross-attention and "
        "the layers at both ends at 2e-05.",
        "Frozen: the MLPs and the modulation (AdaLN).",
    ]


def test_a_forced_rate_is_the_one_that_is_named(words):
    transformer, adapter = words({"force_constant_lr": 1e-3, "model.self_attn_lr": 1e-4})
    assert transformer.endswith(": every part at 0.001.")
    assert adapter.startswith("The LLM adapter is trained too, at 0.001")


def test_a_lora_leaves_the_rest_and_the_ends_alone(words):
    first, *_ = words(LORA)
    assert first.startswith("Training a LoRA of rank 8 on the blocks' linear layers, all else frozen, with ")
    assert words({**LORA, "model.mlp_lr": 0})[1] == "Frozen: the MLPs."
    assert "ends" not in "".join(words({**LORA, "model.mlp_lr": 0}))


def test_a_fresh_network_has_an_adapter_to_train(words):
    fresh = {"model.transformer_path": REMOVE, "model.config": {}}
    assert words(fresh) == [
        "Training a fresh transformer with adamw_optimi: every part at 2e-05.",
        "The LLM adapter is trained at 2e-05.",
    ]


def test_nothing_to_train_is_said_so(words):
    frozen, adapter = words({"optimizer.lr": 0})
    assert frozen.startswith("Frozen: self-attention, ")
    assert adapter == "The LLM adapter is frozen: [optimizer] lr = 0."
