"""`[model]`: the networks' files and dtype, training times, and a learning rate for each part."""

import json
import os
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from anima_jax.checkpoints.folders import (
    TRANSFORMER,
    ModelFiles,
    beside,
    check_variant,
    component_files,
    model_files,
)
from anima_jax.config.network import TransformerSizes
from anima_jax.config.schema import (
    Count,
    Dtype,
    InputFolder,
    NotNegative,
    Positive,
    TypedSection,
    documented_as,
    existing,
    invalid,
    is_address,
    only_one_of,
)
from anima_jax.errors import UserError
from anima_jax.models.dit import DiTConfig
from anima_jax.models.quantised import storage_for
from anima_jax.text.tokenizers import TRAINING_LENGTH, tokenizer_folders


def _check_tokenizers(folder: str) -> str:
    missing = [name for name, path in tokenizer_folders(folder).items() if not path.is_dir()]
    if missing and not is_address(folder):
        raise invalid(f"{folder} does not contain {' and '.join(missing)}, expected qwen/ and t5/ in it")
    return folder


def _check_variant(variant: str) -> str:
    try:
        return check_variant(variant)
    except UserError as error:
        raise invalid(str(error).removeprefix("variant: ")) from None


def _resolved(component: str) -> AfterValidator:
    """Return a validator that replaces the local folder of a component by the file or index in it.

    The transformer's folder stays, as it may also contain the LLM adapter and the tokenizers.
    """

    def check(path: str, info: ValidationInfo) -> str:
        if is_address(path) or not os.path.isdir(path):
            return path
        try:
            found = component_files(path, component, info.data.get("variant"))
        except UserError as error:
            raise invalid(str(error)) from None
        return path if component == TRANSFORMER[0] else str(found)

    return AfterValidator(check)


def _check_is_qwen3(path: str) -> str:
    """Raise an error for a folder of transformers that contains another model; return any other path unchanged."""
    described = os.path.join(path, "config.json")
    if not os.path.isfile(described):
        return path
    try:
        with open(described, encoding="utf-8") as file:
            description = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise invalid(f"{described} cannot be read as JSON: {error}") from error
    found = description.get("model_type") if isinstance(description, dict) else None
    if found != "qwen3":
        raise invalid(f"{described} has model_type {found!r}, expected 'qwen3': Anima's text encoder is a Qwen3")
    return path


_TEXT_ENCODER = existing("a Qwen3 text encoder, as a .safetensors file or its folder", os.path.exists)
_NETWORK = existing("a file or folder", os.path.exists)
_DOCUMENTED = documented_as("file or folder")

Transformer = Annotated[str, _NETWORK, _resolved("transformer"), _DOCUMENTED]
LLMAdapterPath = Annotated[str, _NETWORK, _resolved("text_conditioner"), _DOCUMENTED]
VAEPath = Annotated[str, _NETWORK, _resolved("vae"), _DOCUMENTED]
TextEncoder = Annotated[str, _TEXT_ENCODER, AfterValidator(_check_is_qwen3), _resolved("text_encoder"), _DOCUMENTED]
FrozenDtype = Literal["float8", "float8_e4m3fn", "float8_e5m2", "int8", "nf4", "bfloat16", "float16", "float32"]


class ModelConfig(TypedSection):
    """The networks: which files, which dtype, how training times are drawn, and a learning rate for each part."""

    type: Literal["anima"] = Field(description="'anima'")
    variant: Annotated[str, AfterValidator(_check_variant)] | None = Field(
        None,
        description="ours; which files of folders are read, such as 'fp16' for model.fp16.safetensors; networks other "
        "than the transformer may lack it",
    )
    transformer_path: Transformer | None = Field(
        None,
        description="the diffusion transformer: its .safetensors or .gguf file, a diffusers folder, or a repository "
        "(hf://owner/repo)",
    )
    config: TransformerSizes | None = Field(
        None,
        validate_default=True,
        description="ours, instead of transformer_path: the sizes of a transformer that is trained from scratch",
    )
    vae_path: VAEPath = Field(description="the VAE: its .safetensors file (qwen_image_vae), or a diffusers folder")
    llm_path: TextEncoder = Field(
        description="the Qwen3 text encoder: its .safetensors or .gguf file (qwen_3_06b_base), or a folder in the "
        "format of transformers or diffusers"
    )
    llm_adapter_path: LLMAdapterPath | None = Field(
        None, description="the LLM adapter's own .safetensors file or folder; unset: it is in transformer_path"
    )
    tokenizer_path: Annotated[InputFolder, AfterValidator(_check_tokenizers)] | None = Field(
        None,
        description="ours; a folder with the tokenizers qwen/ and t5/; unset: those of the diffusers folder, or else "
        "of the package",
    )
    dtype: Dtype = Field(
        "bfloat16", description="dtype of the computation and of frozen weights; trained weights: see param_dtype"
    )
    transformer_dtype: FrozenDtype | None = Field(
        None,
        description="dtype in which the frozen matrices of the transformer's blocks are stored, to train an adapter "
        "in less memory; 'float8' is 'float8_e4m3fn', 'int8' and 'nf4' are ours; unset: dtype, or as the file has them "
        "quantised",
    )
    compute: Literal["int8", "fp8"] | None = Field(
        None,
        description="ours; under an adapter: the frozen matrices of the transformer's blocks are stored in int8 (or "
        "float8); in the MLPs each token's activations are rounded to it too, and the product is taken in 8 bits; "
        "gradients are computed in dtype; unset: products in dtype",
    )
    text_encoder_fp8: bool = Field(False, description="store the text encoder's matrices in float8_e4m3fn")
    text_encoder_nf4: Annotated[bool, only_one_of("text_encoder_fp8", "text_encoder_nf4")] = Field(
        False, description="store the text encoder's matrices in 4 bits (NF4, blocks of 64)"
    )
    cache_text_embeddings: bool = Field(
        True,
        description="true: captions are encoded once, before training; false: in every step, as tag_dropout requires",
    )
    max_caption_tokens: Count = Field(
        TRAINING_LENGTH, description="ours; captions are truncated to this many tokens, of Qwen3 and of T5"
    )
    timestep_sample_method: Literal["logit_normal", "uniform"] = Field(
        "logit_normal",
        description="how training times t in [0, 1] are drawn: sigmoid of a normally distributed number, or uniformly",
    )
    sigmoid_scale: Positive = Field(1.0, description="logit_normal: factor of the normally distributed number")
    shift: Positive | None = Field(None, description="shifts times: t → s·t / (1 + (s − 1)·t); overrides flux_shift")
    flux_shift: bool = Field(False, description="shifts times by the image's size, as Flux does")
    multiscale_loss_weight: NotNegative | None = Field(
        None, description="weight of the same loss at half the resolution, for images of about 1024² pixels and more"
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

    @property
    def transformer_files(self) -> ModelFiles | None:
        """The transformer's files, with its LLM adapter's in a folder of both; None if it is trained from scratch."""
        return model_files(self.transformer_path, TRANSFORMER, self.variant) if self.transformer_path else None

    @property
    def vae_files(self) -> ModelFiles:
        """The VAE's files."""
        return component_files(self.vae_path, "vae", self.variant)

    @property
    def llm_files(self) -> ModelFiles:
        """The text encoder's files."""
        return component_files(self.llm_path, "text_encoder", self.variant)

    @property
    def tokenizers(self) -> str | None:
        """The folder of the tokenizers; None for those of the package."""
        return self.tokenizer_path or beside(self.transformer_path or "").get("tokenizers")

    @property
    def text_encoder_storage(self) -> str | None:
        """The storage format of the text encoder's matrices, or None for `dtype`."""
        return "float8_e4m3fn" if self.text_encoder_fp8 else "nf4" if self.text_encoder_nf4 else None

    @field_validator("compute")
    @classmethod
    def _multiplies_its_storage(cls, compute: str | None, info: ValidationInfo) -> str | None:
        try:
            storage_for(info.data.get("transformer_dtype"), compute)
        except UserError as error:
            raise invalid(str(error)) from None
        return compute

    @field_validator("config")
    @classmethod
    def _one_of_two(cls, config: DiTConfig | None, info: ValidationInfo) -> DiTConfig | None:
        if "transformer_path" in info.data and (info.data["transformer_path"] is None) == (config is None):
            found = "neither" if config is None else "both"
            raise invalid(f"expected exactly one of transformer_path and config, found {found}")
        return config
