"""The TOML schema: typed and frozen, with every key documented once.

`load_config` is how a program reads its configuration; the code below it gets only these typed values.
"""

from anima_jax.config.dataset import DatasetConfig, DirectorySource, TfdsSource
from anima_jax.config.load import load_config
from anima_jax.config.main import EvalDataset, MainConfig, MeshConfig, MonitoringConfig, SampleConfig
from anima_jax.config.model import ModelConfig
from anima_jax.config.optimizer import AdapterConfig, OptimizerConfig

__all__ = [
    "AdapterConfig",
    "DatasetConfig",
    "DirectorySource",
    "EvalDataset",
    "MainConfig",
    "MeshConfig",
    "ModelConfig",
    "MonitoringConfig",
    "OptimizerConfig",
    "SampleConfig",
    "TfdsSource",
    "load_config",
]
