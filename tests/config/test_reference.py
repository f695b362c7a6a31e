"""docs/configuration.md agrees with the schema."""

import re
from pathlib import Path

import pytest

from anima_jax.config.dataset import DirectorySource, TfdsSource
from anima_jax.config.main import MainConfig
from anima_jax.config.reference import HEADINGS, reference
from anima_jax.config.schema import key_table
from anima_jax.training import optimizers

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
SCHEDULES = "'constant', 'linear', 'cosine', 'constant_with_warmup', 'cosine_with_restarts', 'polynomial' or 'rex'"


def test_the_page_is_fresh():
    expected = reference()
    assert PAGE.read_text(encoding="utf-8") == expected, (
        "stale: run python -m anima_jax.config.reference > docs/configuration.md"
    )


def rows_of(page: str) -> dict[str, list[list[str]]]:
    """Heading → the cells of its table's rows."""
    tables: dict[str, list[list[str]]] = {}
    heading = ""
    for line in page.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("| `"):
            tables.setdefault(heading, []).append([cell.strip() for cell in line.strip("|").split(" | ")])
    return tables


def test_every_key_has_one_row_in_the_table_of_its_section():
    tables = rows_of(PAGE.read_text(encoding="utf-8"))
    found = [row[0].strip("` ") for heading in HEADINGS.values() for row in tables[heading]]
    sections = {key for key, node in key_table(MainConfig).items() if node["table"]}
    for name in sections:
        heading = f"`[[{name}]]`" if name == "eval_datasets" else f"`[{name}]`"
        found += [f"{name}.{row[0].strip('` ')}" for row in tables[heading]]
    assert sorted(found) == sorted({*key_table(MainConfig)} - sections | {"eval_datasets"})


@pytest.mark.parametrize(("name", "source"), [("directory", DirectorySource), ("tfds", TfdsSource)])
def test_every_key_of_a_source_has_one_row(name, source):
    tables = rows_of(PAGE.read_text(encoding="utf-8"))
    found = [row[0].strip("` ") for heading in ("Every source", f"`[[{name}]]`") for row in tables[heading]]
    assert sorted(found) == sorted(source.model_fields)


def test_rows_have_a_type_a_default_and_a_meaning():
    for heading, rows in rows_of(PAGE.read_text(encoding="utf-8")).items():
        columns = 2 if heading.startswith("Keys") else 4
        assert all(len(row) == columns and all(row) for row in rows)


@pytest.mark.parametrize(
    ("heading", "row"),
    [
        ("Files and length", ["`epochs`", "whole number ≥ 1", "required", "number of passes over the data"]),
        ("Evaluation", ["`eval_before_first_step`", "true or false", "`true`"]),
        ("Optimizer steps", ["`lr_scheduler`", SCHEDULES, "`'constant'`"]),
        ("`[sample]`", ["`prompts`", "[string, …]", "required", "what to draw"]),
        ("`[optimizer]`", ["`betas`", "[number ≥ 0 and ≤ 1, …]", "–"]),
        ("`[[directory]]`", ["`default_mask_file`", "file", "–"]),
    ],
)
def test_a_row_says_what_a_user_may_write(heading, row):
    table = rows_of(PAGE.read_text(encoding="utf-8"))[heading]
    assert row in [found[: len(row)] for found in table]


def test_what_diffusion_pipe_does_not_have_is_marked():
    meanings = {row[0]: row[-1] for rows in rows_of(PAGE.read_text(encoding="utf-8")).values() for row in rows}
    for key in ("seed", "ema_decay", "max_checkpoints", "remat", "param_dtype", "alpha", "tag_dropout"):
        assert meanings[f"`{key}`"].startswith("**ours**")
    for key in ("epochs", "save_dtype", "llm_adapter_lr", "mask_path", "eval_every_n_steps"):
        assert "**ours**" not in meanings[f"`{key}`"]


def test_the_optimizers_that_are_named_can_be_built():
    rows = rows_of(PAGE.read_text(encoding="utf-8"))["`[optimizer]`"]
    named = {name.lower() for row in rows for name in re.findall(r"'(\w+)'", row[-1])}
    assert {"adamw", "adamw8bitkahan", "muon", "prodigy"} <= named
    assert all(optimizers.find(name) for name in named)
