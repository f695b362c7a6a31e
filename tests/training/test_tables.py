"""The tables that a person reads before a run."""

import pytest

from anima_jax.config.load import load_config
from anima_jax.training import tables
from anima_jax.training.estimate import abstract_partition
from anima_jax.training.state import prepare
from tests.small_run import write_config, write_transformer


@pytest.fixture
def config(tmp_path):
    (tmp_path / "pictures").mkdir()
    write_transformer(tmp_path / "base.safetensors")
    return lambda *overrides, **tables: load_config(
        write_config(tmp_path, tmp_path / "pictures", "epochs = 1", **tables), overrides
    )


def test_the_table_counts_each_groups_parameters(config):
    text = tables.start_up_table(
        settings := config("model.mlp_lr=0", "model.dtype=bfloat16"), prepare(settings), "8 pictures"
    )
    trained = prepare(settings)
    everything = {**trained.params, **trained.frozen}
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith("  ")}
    mlp = sum(value.size for path, value in everything.items() if path.startswith("blocks.mlp."))
    assert rows["mlp"][1:] == [f"{mlp:,}", "0", "frozen", "bfloat16"]
    adapter = sum(value.size for path, value in everything.items() if path.startswith("llm_adapter."))
    assert rows["llm_adapter"][1:] == [f"{adapter:,}", f"{adapter:,}", "0.001", "float32"]
    total = sum(value.size for value in everything.values())
    halves = tables.parameter_table(trained, settings.learning_rates, "bfloat16").splitlines()
    assert halves[1].split() == [*rows["llm_adapter"][:4], "bfloat16"]
    assert rows["total"][1:3] == [f"{total:,}", f"{total - mlp:,}"]
    assert "2 blocks of width 64" in text
    assert "8 pictures" in text


def test_the_table_of_a_lora_shows_what_lies_frozen_under_it(config):
    trained = prepare(settings := config(adapter="type = 'lora'\nrank = 4"))
    rows = {
        line.split()[0]: line.split() for line in tables.parameter_table(trained, settings.learning_rates).splitlines()
    }
    factors = sum(value.size for path, value in trained.params.items() if path.startswith("blocks.mlp."))
    frozen = sum(value.size for path, value in trained.frozen.items() if path.startswith("blocks.mlp."))
    assert rows["mlp"][1:3] == [f"{factors + frozen:,}", f"{factors:,}"]
    assert rows["base"][2:4] == ["0", "frozen"]


def test_the_table_counts_quantised_weights_as_the_weights_they_stand_for(config):
    settings = config("model.transformer_dtype='int8'", adapter="type = 'lora'\nrank = 4")
    plain, small = (
        tables.parameter_table(abstract_partition(c), c.learning_rates).splitlines()
        for c in (config(adapter="type = 'lora'\nrank = 4"), settings)
    )
    for before, after in zip(plain[1:], small[1:], strict=True):
        assert before.split()[:3] == after.split()[:3]
    assert "int8" in small[4]  # the MLPs'
