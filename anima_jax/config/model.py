"""`[model]`: the networks' files and dtype, training times, and a learning rate for each part."""

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from anima_jax.config.network import NetworkSizes
from anima_jax.config.schema import (
    Count,
    Dtype,
    InputFile,
    InputFolder,
    NotNegative,
    Positive,
    TypedSection,
    fault,
    is_address,
)
from anima_jax.text.tokenizers import TRAINING_LENGTH

GROUPS = ("llm_adapter", "self_attn", "cross_attn", "mlp", "mod")
"""Parameter groups that may have a learning rate of their own; everything else is the group `base`."""

TOKENIZER_FOLDERS = ("qwen", "t5")


def _complete_tokenizers(folder: str) -> str:
    missing = [name for name in TOKENIZER_FOLDERS if not os.path.isdir(os.path.join(folder, name))]
    if missing and not is_address(folder):
        raise fault(f"{folder} has no folder {' and no folder '.join(missing)}, expected qwen/ and t5/ in it")
    return folder


class ModelConfig(TypedSection):
    """The networks: which files, which dtype, how training times are drawn, and a learning rate for each part."""

    TYPES = ("anima",)

    type: Literal["anima"] = Field(description="'anima'")
    transformer_path: InputFile | None = Field(None, description="the diffusion transformer's .safetensors file")
    config: NetworkSizes | None = Field(
        None,
        validate_default=True,
        description="ours, instead of transformer_path: sizes; the training starts from scratch",
    )
    vae_path: InputFile = Field(description="the VAE's .safetensors file (qwen_image_vae)")
    llm_path: InputFile = Field(description="the Qwen3 text encoder's .safetensors file (qwen_3_06b_base)")
    llm_adapter_path: InputFile | None = Field(
        None, description="the LLM adapter's own .safetensors file; unset: it is in transformer_path"
    )
    tokenizer_path: Annotated[InputFolder, AfterValidator(_complete_tokenizers)] | None = Field(
        None, description="ours; a folder with the tokenizers qwen/ and t5/; unset: those of the Hugging Face hub"
    )
    dtype: Dtype = Field(
        "bfloat16", description="dtype of the computation and of frozen weights; trained weights are float32"
    )
    cache_text_embeddings: bool = Field(
        True, description="true: captions are encoded once, before training; false: in every step, as tag_dropout needs"
    )
    max_caption_tokens: Count = Field(
        TRAINING_LENGTH, description="ours; captions are cut at so many tokens, of Qwen3 and of T5"
    )
    timestep_sample_method: Literal["logit_normal", "uniform"] = Field(
        "logit_normal", description="how training times t in [0, 1] are drawn: sigmoid of a normal number, or evenly"
    )
    sigmoid_scale: Positive = Field(1.0, description="logit_normal: the normal number is multiplied by this")
    shift: Positive | None = Field(None, description="moves times: t → s·t / (1 + (s − 1)·t); wins over flux_shift")
    flux_shift: bool = Field(False, description="moves times by the picture's size, as Flux does")
    multiscale_loss_weight: NotNegative | None = Field(
        None, description="weight of the same loss at half the resolution, for pictures of about 1024² and more"
    )
    self_attn_lr: NotNegative | None = Field(None, description="learning rate of self-attention; 0 freezes; unset: lr")
    cross_attn_lr: NotNegative | None = Field(
        None, description="learning rate of cross-attention; 0 freezes; unset: lr"
    )
    mlp_lr: NotNegative | None = Field(None, description="learning rate of the MLPs; 0 freezes; unset: lr")
    mod_lr: NotNegative | None = Field(
        None, description="learning rate of the modulation (AdaLN); 0 freezes; unset: lr"
    )
    llm_adapter_lr: NotNegative | None = Field(
        None, description="learning rate of the LLM adapter; 0 freezes; unset: lr"
    )

    @field_validator("config")
    @classmethod
    def _one_of_two(cls, config: NetworkSizes | None, info: ValidationInfo) -> NetworkSizes | None:
        if "transformer_path" in info.data and (info.data["transformer_path"] is None) == (config is None):
            found = "neither" if config is None else "both"
            raise fault(f"expected exactly one of transformer_path and config, found {found}")
        return config
