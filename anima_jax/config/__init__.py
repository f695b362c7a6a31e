"""The TOML schema: typed, frozen, every key documented once.

`load_config` is how a program reads its configuration; below it only these typed values travel.
"""

from anima_jax.config.dataset import DatasetConfig, DirectorySource, TfdsSource
from anima_jax.config.load import load_config, load_dataset
from anima_jax.config.main import GROUPS, MainConfig
from anima_jax.config.model import ModelConfig
from anima_jax.config.network import AdapterSizes, NetworkSizes
from anima_jax.config.optimizer import AdapterConfig, OptimizerConfig
from anima_jax.config.sections import EvalDataset, MeshConfig, MonitoringConfig, SampleConfig

__all__ = [
    "GROUPS",
    "AdapterConfig",
    "AdapterSizes",
    "DatasetConfig",
    "DirectorySource",
    "EvalDataset",
    "MainConfig",
    "MeshConfig",
    "ModelConfig",
    "MonitoringConfig",
    "NetworkSizes",
    "OptimizerConfig",
    "SampleConfig",
    "TfdsSource",
    "load_config",
    "load_dataset",
]
