"""`[monitoring]`: where metrics are reported."""

from pydantic import Field

from anima_jax.config.schema import Section


class MonitoringConfig(Section):
    """Where metrics are reported besides the console and the run's metrics.jsonl."""

    enable_tensorboard: bool = Field(True, description="ours; write TensorBoard's files into the run's folder")
    enable_wandb: bool = Field(False, description="report to Weights & Biases too, for which wandb must be installed")
    wandb_api_key: str = Field("", description="key for Weights & Biases; empty: that of `wandb login`")
    wandb_tracker_name: str = Field("", description="project of the run; empty: chosen by Weights & Biases")
    wandb_run_name: str = Field("", description="name of the run; empty: chosen by Weights & Biases")
