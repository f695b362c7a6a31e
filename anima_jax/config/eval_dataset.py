"""An entry of `eval_datasets`: a dataset that is evaluated."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, SkipValidation
from pydantic.json_schema import SkipJsonSchema

from anima_jax.config.dataset import DatasetConfig
from anima_jax.config.schema import LocalFile, Section, invalid


class EvalDataset(Section):
    """A dataset that is evaluated and not trained on; a path alone is its `config`."""

    config: LocalFile = Field(description="its dataset TOML")
    name: Annotated[str, Field(min_length=1)] = Field(
        default_factory=lambda table: Path(table["config"]).stem,
        description="prefix of its metrics; unset: the file's name without .toml",
    )
    data: SkipJsonSchema[SkipValidation[DatasetConfig]]
    """The contents of `config`."""


def check_names_differ(datasets: tuple[EvalDataset, ...]) -> tuple[EvalDataset, ...]:
    """Raise an error if two of the datasets have the same name."""
    names = [each.name for each in datasets]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise invalid(f"two of them are called '{twice}', expected different names, as in {{name = …, config = …}}")
    return datasets
