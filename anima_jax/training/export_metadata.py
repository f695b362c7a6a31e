"""Metadata of exported files that managers of models read: `modelspec.…` and sd-scripts' `ss_…`.

ModelSpec (https://github.com/Stability-AI/ModelSpec) names the file and its architecture; the `ss_` keys are those of
sd-scripts' `train_network.py`, which A1111 and ComfyUI's managers show: base model, rank, trained words. None depends
on the time or the place of a run, so that a resumed run writes the same bytes.
"""

import json
import os

from anima_jax.adapters.kinds import KINDS
from anima_jax.data.dataset import TrainingData
from anima_jax.training.intervals import RunPoint
from anima_jax.training.run import Run

ARCHITECTURE = "anima-preview"
"""Name of Anima's architecture in sd-scripts' files, which all versions share."""

IMPLEMENTATION = "https://huggingface.co/circlestone-labs/Anima"

_MIXED_PRECISION = {"bfloat16": "bf16", "float16": "fp16", "float32": "no"}


def export_metadata(run: Run, data: TrainingData, point: RunPoint, base_sha256: str | None = None) -> dict[str, str]:
    """Return the metadata of the model or adapter that a run exports at `point`.

    `base_sha256` identifies the model that an adapter was trained on.
    """
    config, adapter = run.config, run.config.adapter
    kind = KINDS.get(adapter.type) if adapter else None
    name, architecture = ("Anima", ARCHITECTURE) if kind is None else (f"Anima {kind.title}", f"{ARCHITECTURE}/lora")
    if adapter and adapter.is_control:
        name, architecture = "Anima ControlNet-LLLite", f"{ARCHITECTURE}/control-net-lllite"
    width, height = config.data.size_wh
    prefixes = {source.caption_prefix.strip(" ,") for source in config.data.sources}
    model = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": IMPLEMENTATION,
        "modelspec.title": config.output_name or name,
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.trigger_phrase": prefixes.pop() if len(prefixes) == 1 else "",
    }
    training = {
        "ss_output_name": config.output_name,
        "ss_base_model_version": "anima",
        "ss_sd_model_name": os.path.basename((config.model.transformer_path or "").rstrip("/")),
        "ss_new_sd_model_hash": base_sha256,
        "ss_learning_rate": config.optimizer.lr,
        "ss_text_encoder_lr": adapter.text_encoder_lr if adapter and config.trains_text_encoder else None,
        "ss_optimizer": config.optimizer.type,
        "ss_lr_scheduler": config.schedule.shape,
        "ss_lr_warmup_steps": config.schedule.warmup_steps,
        "ss_max_grad_norm": config.gradient_clipping,
        "ss_num_train_images": len(data.examples),
        "ss_num_epochs": config.epochs,
        "ss_epoch": point.epochs[1],
        "ss_max_train_steps": point.total_steps,
        "ss_steps": point.step,
        "ss_seed": config.seed,
        "ss_mixed_precision": _MIXED_PRECISION.get(config.compute_dtype),
        "ss_resolution": f"({width}, {height})",
        "ss_timestep_sampling": config.model.timestep_sample_method,
        "ss_sigmoid_scale": config.model.sigmoid_scale,
        "ss_discrete_flow_shift": config.model.shift,
        "ss_dataset_dirs": json.dumps(data.image_counts(), ensure_ascii=False),
        "ss_tag_frequency": json.dumps(data.tag_counts(), ensure_ascii=False),
    }
    if adapter and adapter.is_control:
        training |= {
            "ss_network_module": f"anima_jax.{adapter.type}",
            "ss_network_dropout": adapter.dropout or None,
            "ss_network_multiplier": adapter.multiplier,
        }
    elif adapter and kind:
        training |= {
            "ss_network_module": f"anima_jax.{kind.name}",
            "ss_network_dim": adapter.rank,
            "ss_network_alpha": f"{adapter.rank if adapter.alpha is None else adapter.alpha:g}",
            "ss_network_dropout": adapter.dropout or None,
            "ss_network_args": json.dumps(
                {"algo": kind.name, **{key: getattr(adapter, key) for key in kind.peft_keys}}
            ),
        }
    return {key: str(value) for key, value in (model | training).items() if value is not None and value != ""}
