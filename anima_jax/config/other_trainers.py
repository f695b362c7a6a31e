"""What the keys of sd-scripts, OneTrainer, SimpleTuner and other trainers are called here.

Their files are laid out differently and have other defaults, so that their keys are answered with ours and not taken.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from anima_jax.config.schema import Place

NAMED: Mapping[str, str] = {
    # The networks' files and dtypes.
    "transformer_path in [model]": "pretrained_model_name_or_path pretrained_transformer_model_name_or_path dit unet "
    "base_model_name model_name_or_path transformer dit_path unet_path base_model_path",
    "vae_path in [model]": "vae pretrained_vae_model_name_or_path vae_model_path",
    "llm_path in [model]": "qwen qwen3 qwen3_path text_encoder text_encoder1 text_encoder_path "
    "text_encoder_model_path qwen_model_path",
    "tokenizer_path in [model]": "t5_tokenizer_path t5_tokenizer_dir tokenizer_cache_dir",
    "max_caption_tokens in [model]": "qwen3_max_token_length t5_max_token_length max_token_length tokenizer_max_length",
    "type = 'anima' in [model]": "model_type model_family",
    "dtype in [model], as 'bfloat16', and param_dtype for trained weights": "mixed_precision train_dtype weight_dtype "
    "full_bf16 full_fp16 base_model_default_dtype fallback_train_dtype vae_dtype",
    "transformer_dtype in [model], as 'float8'": "fp8_base fp8_scaled fp8_base_unet base_model_precision",
    "save_dtype": "save_precision output_dtype",
    # Length and batches.
    "epochs": "max_train_epochs num_train_epochs num_epochs max_epochs epoch",
    "max_steps": "max_train_steps num_steps total_steps train_steps max_training_steps",
    "micro_batch_size_per_gpu": "train_batch_size batch_size per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation accumulate_grad_batches grad_accum",
    "activation_checkpointing, true or 'unsloth' (in the host's memory)": "gradient_checkpointing "
    "unsloth_offload_checkpointing cpu_offload_checkpointing gradient_checkpointing_interval grad_checkpoint",
    # The adapter.
    "[adapter] type, 'lora', 'dora', 'lokr', 'loha' or 'lllite'; without [adapter] every weight is trained": ""
    "network_module network_args network_type lora_type LoRA_type peft_type training_method lycoris_config",
    "type = 'dora' in [adapter]": "lora_decompose",
    "dtype in [adapter]": "lora_weight_dtype",
    "rank in [adapter]": "network_dim lora_rank linear lokr_dim",
    "alpha in [adapter]": "network_alpha lora_alpha linear_alpha",
    "dropout in [adapter]": "network_dropout lora_dropout dropout_probability",
    "decompose_factor in [adapter]": "lokr_factor",
    "alpha in [adapter], one for every module": "network_reg_alphas",
    "rank_pattern in [adapter]": "network_reg_dims",
    "lr_pattern in [adapter]": "network_reg_lrs",
    "init_from_existing in [adapter]": "network_weights init_lora lora_model_name dim_from_weights resume_lora",
    "target_modules in [adapter]": "layer_filter include_patterns lora_layers lora_layer_preset",
    "exclude_modules in [adapter]": "exclude_patterns",
    "[adapter] type = 'lllite', and the same key there without lllite_": "lllite_mlp_dim lllite_target_layers "
    "lllite_cond_dim lllite_cond_resblocks lllite_use_aspp lllite_dropout lllite_multiplier lllite_cond_in_channels "
    "lllite_inpaint_masked_input",
    "text_encoder_lr in [adapter]; unless it is set, the text encoder is frozen": "network_train_unet_only "
    "network_train_text_encoder_only train_text_encoder text_encoder_lr learning_rate_te learning_rate_te1 "
    "learning_rate_te2 stop_text_encoder_training",
    # The optimizer.
    "lr in [optimizer]": "learning_rate unet_lr",
    "type in [optimizer], as 'adamw8bit'": "optimizer_type use_8bit_adam use_lion_optimizer optim",
    "betas in [optimizer], as [0.9, 0.99]": "optimizer_beta1 optimizer_beta2 adam_beta1 adam_beta2",
    "eps in [optimizer]": "adam_epsilon",
    "weight_decay in [optimizer]": "adam_weight_decay",
    "[optimizer] itself: each argument is a key, as weight_decay = 0.01": "optimizer_args optimizer_config",
    "lr_scheduler": "lr_scheduler_type learning_rate_scheduler lr_scheduler_args lr_decay_steps lr_scheduler_timescale "
    "custom_learning_rate_scheduler scheduler_params",
    "lr_scheduler_num_cycles": "learning_rate_cycles lr_num_cycles",
    "lr_scheduler_power": "lr_power",
    "lr_scheduler_min_lr": "lr_end lr_scheduler_min_lr_ratio learning_rate_min_factor min_lr_ratio",
    "warmup_steps": "lr_warmup_steps learning_rate_warmup_steps warmup_ratio",
    "gradient_clipping": "max_grad_norm clip_grad_norm grad_clip_method",
    "ema_decay": "ema use_ema ema_update_step_interval ema_device",
    # Loss and times.
    "huber_delta, smooth_l1_beta or pseudo_huber_c; without them, the mean squared error (l2)": "loss_type "
    "huber_c huber_schedule huber_scale loss_fn mse_strength mae_strength log_cosh_strength huber_strength",
    "timestep_sample_method in [model], 'logit_normal' (sigmoid) or 'uniform', and shift or flux_shift": ""
    "timestep_type timestep_sampling timestep_distribution weighting_scheme flow_use_uniform_schedule content_or_style "
    "flow_use_beta_schedule",
    "shift in [model]": "discrete_flow_shift flow_schedule_shift flow_shift timestep_shift min_timestep max_timestep "
    "min_noising_strength max_noising_strength logit_mean mode_scale noising_bias",
    "flux_shift in [model]": "flow_schedule_auto_shift dynamic_timestep_shifting",
    "sigmoid_scale in [model]": "logit_std flow_sigmoid_scale noising_weight",
    # Saving, resuming, reports and samples.
    "max_checkpoints": "save_last_n_epochs save_last_n_steps save_last_n_epochs_state save_last_n_steps_state "
    "checkpoints_total_limit max_step_saves_to_keep rolling_backup rolling_backup_count",
    "save_every_n_epochs or save_every_n_steps": "save_n_epoch_ratio save_every save_every_unit "
    "checkpoint_step_interval checkpointing_steps checkpoint_epoch_interval save_every_steps",
    "checkpoint_every_n_epochs or checkpoint_every_n_minutes": "save_state save_state_on_train_end save_state_every "
    "backup_after backup_before_save",
    "resume_from_checkpoint": "continue_last_backup initial_epoch initial_step skip_until_initial_step",
    "output_name": "output_model_destination save_model_name save_filename_prefix",
    "output_dir": "workspace_dir",
    "enable_tensorboard in [monitoring]": "logging_dir tensorboard tensorboard_expose report_to log_with "
    "tensorboard_always_on",
    "wandb_tracker_name in [monitoring]": "log_tracker_name wandb_project tracker_project_name",
    "wandb_run_name in [monitoring]": "wandb_run_name tracker_run_name log_prefix",
    "wandb_api_key in [monitoring]": "wandb_api_key",
    "prompts in [sample]": "sample_prompts validation_prompt sample_definition_file_name validation_prompt_library "
    "samples sample_prompt",
    "negative_prompt in [sample]": "validation_negative_prompt sample_negative_prompt sample_negative sample_neg",
    "guidance_scale in [sample]": "validation_guidance sample_cfg_scale sample_cfg sample_guidance_scale",
    "steps in [sample]": "validation_num_inference_steps sample_infer_steps sample_steps",
    "width and height in [sample]": "validation_resolution sample_width sample_height",
    "seeds in [sample]": "validation_seed sample_seed",
    "every_n_steps in [sample]": "sample_after validation_steps validation_step_interval sample_every",
    "eval_datasets, with eval_every_n_epochs or eval_every_n_steps": "validation_split eval_data_dir validation "
    "validate_every_n_steps validate_every_n_epochs max_validation_steps validate_after validate_after_unit",
    "map_num_proc": "max_data_loader_n_workers persistent_data_loader_workers dataloader_threads num_workers "
    "dataloader_prefetch",
    # Data.
    "dataset, the path of a TOML": "dataset_config data_backend_config concept_file_name config_file",
    "path in a [[directory]] of the dataset TOML": "train_data_dir image_dir image_directory instance_data_dir "
    "concepts folder_path video_directory data_dir dataset_dir train_data_path",
    "num_repeats in the dataset TOML": "dataset_repeats repeats balancing",
    "resolutions in the dataset TOML, as [1024]": "resolution max_resolution resolution_type target_downsample_size",
    "enable_ar_bucket in the dataset TOML": "enable_bucket aspect_ratio_bucketing",
    "min_ar, max_ar and num_ar_buckets in the dataset TOML": "min_bucket_reso max_bucket_reso bucket_reso_steps "
    "bucket_no_upscale aspect_bucket_rounding aspect_bucket_alignment",
    "cache_shuffle_delimiter in the dataset TOML": "caption_separator secondary_separator",
    "shuffle_tags in the dataset TOML": "shuffle_caption shuffle_tokens",
    "tag_dropout in the dataset TOML": "caption_tag_dropout_rate tag_dropout_rate token_dropout_rate",
    "caption_extension in the dataset TOML": "caption_extension caption_extention caption_ext caption_strategy",
    "captions_file in the dataset TOML": "metadata_file in_json",
    "keep_tokens in the dataset TOML": "keep_tokens",
    "keep_tokens_separator in the dataset TOML": "keep_tokens_separator",
    "uncond_fraction in the main TOML": "caption_dropout_rate caption_dropout_probability "
    "caption_dropout_every_n_epochs",
    "caption_prefix in the dataset TOML": "class_tokens instance_prompt trigger_word caption_suffix",
    "control_path, or mask_path for masks of the loss, in the dataset TOML": "conditioning_data_dir conditioning_data "
    "conditioning_image_dir control_directory control_dir control_images_dir",
    "mask_path in the dataset TOML": "masked_loss masked_training alpha_mask mask_dir "
    "unmasked_weight unmasked_probability normalize_masked_area_loss",
    "cache_dir": "cache_directory latent_cache_dir cache_dir_vae cache_dir_text",
    "cache_text_embeddings in [model]": "cache_text_encoder_outputs cache_text_encoder_outputs_to_disk",
    "caching_batch_size": "vae_batch_size text_encoder_batch_size write_batch_size latent_cache_batch_size",
}
"""Our key → keys of other trainers that mean it, in any table."""

ABSENT: Mapping[str, str] = {
    "models are saved as safetensors, and `python -m anima_jax.convert` writes every other format": "save_model_as "
    "output_model_format use_safetensors",
    "noise and loss are those of rectified flow, as diffusion-pipe trains Anima": "noise_offset min_snr_gamma "
    "snr_gamma noise_offset_type noise_offset_random_strength multires_noise_iterations multires_noise_discount "
    "adaptive_noise_scale "
    "ip_noise_gamma ip_noise_gamma_random_strength zero_terminal_snr debiased_estimation_loss "
    "scale_v_pred_loss_like_noise_pred v_pred_like_loss offset_noise_weight perturbation_noise_weight "
    "input_perturbation loss_weight_fn loss_weight_strength vb_loss_strength offset_noise generalized_offset_noise "
    "rescale_noise_scheduler_to_zero_terminal_snr force_v_prediction model_prediction_type guidance_embed",
    "it belongs to Stable Diffusion": "v2 v_parameterization clip_skip weighted_captions no_half_vae "
    "text_encoder_layer_skip effnet_encoder block_lr block_alphas block_dims sdxl",
    "images of one kind are trained: add a [[directory]] of the others, with its num_repeats": "prior_loss_weight "
    "reg_data_dir is_reg reg_captions network_multiplier",
    "both factors of an adapter have one rate": "loraplus_unet_lr_ratio loraplus_text_encoder_lr_ratio",
    "no rate is scaled by the batch size": "loss_scaler learning_rate_scaler",
    "messages go to the terminal, numbers to metrics.jsonl": "console_log_level console_log_file console_log_simple "
    "verbose debug_mode debug_dir no_progress no_live_curve loss_curve_steps",
    "adapters are never rescaled; weight_decay in [optimizer] keeps them small": "scale_weight_norms",
    "set transformer_path in [model] to a file with the adapters merged": "base_weights base_weights_multiplier",
    "gradients and updates are already one program": "fused_backward_pass fused_optimizer_groups "
    "blockwise_fused_optimizers",
    "every run keeps its configuration in its folder and in its exports": "log_config log_tracker_config "
    "training_comment metadata_title metadata_author metadata_description metadata_license metadata_tags no_metadata "
    "metadata_usage_hint metadata_thumbnail metadata_merged_from metadata_trigger_phrase metadata_preprocessor "
    "metadata_is_negative_embedding output_config include_train_config custom_attributes additional_parameters",
    "sampler in [sample]": "sample_sampler",
    "schedule in [sample]": "sample_scheduler",
    "nothing is uploaded; `hf upload OWNER/REPO RUN/epochN` does that": "huggingface_repo_id huggingface_token "
    "huggingface_path_in_repo huggingface_repo_type huggingface_repo_visibility async_upload push_to_hub hub_model_id "
    "save_state_to_huggingface resume_from_huggingface push_checkpoints_to_hub",
    "every step is compiled by XLA, which chooses the attention; [mesh] spreads it over devices": "xformers sdpa "
    "mem_eff_attn attn_mode split_attn attention_mechanism flash_attn torch_compile dynamo_backend deepspeed "
    "zero_stage ddp_timeout ddp_gradient_as_bucket_view ddp_static_graph dynamo_mode diffusers_xformers allow_tf32 "
    "disable_benchmark num_cpu_threads_per_process train_device temp_device zero3_init_flag zero3_save_16bit_model",
    "activation_checkpointing, transformer_dtype in [model] and [mesh] save memory": "lowram highvram vae_chunk_size "
    "vae_disable_cache layer_offload_fraction offload_optimizer_device disable_mmap_load_safetensors "
    "offload_optimizer_nvme_path offload_param_device offload_param_nvme_path fp16_master_weights_and_gradients "
    "enable_async_offloading enable_activation_offloading quantize_via",
    "every image is used: leave small ones out of the folder": "skip_image_resolution minimum_image_size",
    "captions change only by shuffle_tags, tag_dropout and nl_shuffle_sentences (dataset TOML)": "token_warmup_min "
    "token_warmup_step enable_wildcard",
    "images are cropped around the centre: prepare flipped or other versions as files": "flip_aug color_aug "
    "flip_augment random_crop face_crop_aug_range random_flip crop_jitter resize_interpolation",
    "latents are always cached; cache_dir says where": "cache_latents cache_latents_to_disk latent_caching "
    "skip_cache_check cache_info compress_disk_cache preserve_data_backend_cache metadata_update_interval "
    "delete_unwanted_images enable_autocast_cache",
    "--regenerate_cache fills the cache anew": "clear_cache_before_training",
    "--cache_only fills the cache and ends": "only_cache",
    "--dump_dataset DIR decodes what is trained": "debug_dataset",
}
"""Why there is no such key here → keys of other trainers, in any table."""

HERE: Mapping[str, str] = {
    **{key: f"here it is {ours}" for ours, keys in NAMED.items() for key in keys.split()},
    **{key: reason for reason, keys in ABSENT.items() for key in keys.split()},
}
"""Key of another trainer → its name here, or why there is none."""

ASK_IF_FALSE = frozenset(
    ("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "max_grad_norm", "unet_lr")
)
"""Keys of `HERE` whose `false` or 0 is not our default. Of all others, such a value asks for nothing."""

TABLES: Mapping[str, str] = {
    "datasets": "each folder is a [[directory]] here, with path; resolutions are at the top of the file",
    "subsets": "each folder is a [[directory]] here, with path",
    "general": "keys for all folders are at the top of the file here",
    **dict.fromkeys(("lora", "network"), "here it is [adapter]"),
}
"""Tables of sd-scripts' dataset TOML → what stands for them here."""


def answers(table: dict[str, Any], own: Mapping[str, Any], above: Place = ()) -> Iterator[tuple[Place, str]]:
    """Remove the keys of other trainers from `table` and yield the place of each, with what it is called here.

    `own` has our keys that may be in `table`: key → those of its table, empty if it is not one. Tables that are not
    ours are searched, and removed if they have keys of other trainers.
    """
    for key, value in list(table.items()):
        place = (*above, key)
        if key in own:
            for at, inner in _tables(place, value) if own[key] else ():
                yield from answers(inner, own[key], at)
        elif value and (tables := _tables(place, value)):
            found = [answer for at, inner in tables for answer in answers(inner, {}, at)]
            text = TABLES.get(key, HERE.get(key))
            if found or text:
                del table[key]
                yield from [(place, text)] if text else []
                yield from found
                yield from ((((*at, name), "")) for at, inner in tables for name in inner)
        elif key in HERE:
            del table[key]
            if value or key in ASK_IF_FALSE:
                yield place, HERE[key]


def _tables(place: Place, value: Any) -> list[tuple[Place, dict[str, Any]]]:
    """Return the place and contents of a table, or of the tables in a list."""
    if isinstance(value, dict):
        return [(place, value)]
    entries = enumerate(value) if isinstance(value, list) else ()
    return [((*place, index), entry) for index, entry in entries if isinstance(entry, dict)]
