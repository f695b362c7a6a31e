"""Errors of a configuration: one line each, with the file, the key, what was found and what was expected."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anima_jax.config.errors import TomlFile
from anima_jax.config.load import load_config
from anima_jax.config.main import MainConfig
from anima_jax.config.schema import key_table
from anima_jax.config.unsupported_keys import MAIN
from anima_jax.errors import UserError, one_line
from anima_jax.train import main as train
from tests.config.files import REMOVE, changed, write


@pytest.fixture
def errors(tmp_path, monkeypatch):
    """The error lines of the small configuration with these changes."""
    monkeypatch.chdir(tmp_path)

    def lines(changes=None, dataset=None, overrides=()):
        with pytest.raises(UserError) as caught:
            load_config(write(tmp_path, changes, dataset).name, overrides)
        assert [one_line(line) for line in str(caught.value).splitlines()] == list(caught.value.messages)
        return caught.value.messages

    return lines


ADAPTER = {"type": "lora", "rank": 4}
SAMPLE = {"prompts": ["a"]}
SIZES = {"model.transformer_path": REMOVE, "model.config": {}}

MAIN_ERRORS = [
    # wrong types: nothing is converted
    ({"epochs": "3"}, 'epochs: found "3" (a string), expected a whole number'),
    ({"epochs": True}, "epochs: found true (a boolean), expected a whole number"),
    ({"epochs": 3.5}, "epochs: found 3.5 (a number), expected a whole number"),
    ({"optimizer.lr": "2e-5"}, 'optimizer.lr: found "2e-5" (a string), expected a number'),
    ({"optimizer.lr": True}, "optimizer.lr: found true (a boolean), expected a number"),
    ({"model.flux_shift": 1}, "model.flux_shift: found 1 (a whole number), expected true or false"),
    ({"output_dir": 3}, "output_dir: found 3 (a whole number), expected a string"),
    ({"model": 3}, "model: found 3 (a whole number), expected a table"),
    ({"model": [{}]}, "model: found [{}] (a list), expected a table"),
    ({"optimizer.betas": 0.9}, "optimizer.betas: found 0.9 (a number), expected a list"),
    ({"optimizer.betas": [0.9, "x"]}, 'optimizer.betas[1]: found "x" (a string), expected a number'),
    ({"sample.prompts": "a"}, 'sample.prompts: found "a" (a string), expected a list'),
    (
        {"micro_batch_size_per_gpu": True},
        "micro_batch_size_per_gpu: found True, expected a whole number, at least 1, or",
    ),
    (
        {"image_micro_batch_size_per_gpu": [[512, 0]]},
        "found [[512, 0]], expected a whole number, at least 1, or [[side",
    ),
    ({"image_micro_batch_size_per_gpu": []}, "image_micro_batch_size_per_gpu: found [], expected a whole number, at l"),
    ({"video_clip_mode": "all"}, "found \"all\" (a string), expected 'single_beginning' or 'single_middle'"),
    ({"cache_dtype": "int8"}, "found \"int8\" (a string), expected 'bfloat16', 'float16' or 'float32'"),
    ({"model.max_caption_tokens": 0}, "model.max_caption_tokens: found 0 (a whole number), expected at least 1"),
    ({"activation_checkpointing": "yes"}, "activation_checkpointing: found 'yes', expected false, true or 'unsloth'"),
    # out of range
    ({"epochs": 0}, "epochs: found 0 (a whole number), expected at least 1"),
    ({"optimizer.lr": -1}, "optimizer.lr: found -1 (a whole number), expected at least 0"),
    ({"optimizer.eps": 0}, "optimizer.eps: found 0, expected more than 0, or a list of such numbers"),
    ({"optimizer.betas": [0.9, 1.5]}, "optimizer.betas[1]: found 1.5 (a number), expected at most 1"),
    ({"uncond_fraction": 1.5}, "uncond_fraction: found 1.5 (a number), expected at most 1"),
    ({"ema_decay": 1.0}, "ema_decay: found 1.0 (a number), expected less than 1"),
    ({"adapter": {"type": "lora", "rank": 2**31}}, "adapter.rank: found 2147483648, expected at most 2147483647"),
    ({"max_steps": 10**400}, "max_steps: found 1000"),
    ({"pseudo_huber_c": 1e300}, "pseudo_huber_c: found 1e+300, expected a number from 1e-30 to 1e+18 in size, or 0"),
    ({"model.shift": 1e-320}, "model.shift: found 1e-320, expected a number from 1e-30 to 1e+18 in size, or 0"),
    ({"seed": 2**32}, "seed: found 4294967296 (a whole number), expected less than 4294967296"),
    ({"sample": SAMPLE | {"width": 500, "height": 512}}, "sample.width: found 500, expected a multiple of 16 (the nea"),
    ({"sample": SAMPLE | {"seeds": []}}, "sample.seeds: found an empty list, expected at least one value"),
    ({"model.dtype": "bfloat1"}, "expected 'bfloat16', 'float16' or 'float32' (did you mean 'bfloat16'?)"),
    ({"lr_scheduler": "cosin"}, "'polynomial' or 'rex' (did you mean 'cosine'?)"),
    ({"lr_scheduler": "COSINE"}, "'polynomial' or 'rex' (did you mean 'cosine'?)"),
    (
        {"lr_scheduler_power": 2.0},
        "lr_scheduler_power: has no effect with lr_scheduler = 'constant', expected 'polynomial'",
    ),
    ({"model.type": "wan"}, "model.type: found 'wan', expected 'anima'"),
    ({"optimizer.type": " "}, "optimizer.type: found an empty string, expected the optimizer's name, as 'adamw'"),
    ({"optimizer.betas": []}, "optimizer.betas: found an empty list, expected at least one value"),
    ({"optimizer.beta2_half_life": 0}, "optimizer.beta2_half_life: found 0 (a whole number), expected more than 0"),
    ({"remat": "dot"}, "'none', 'full', 'dots', 'attention' or 'offload' (did you mean 'dots'?)"),
    ({"param_dtype": "float16"}, "param_dtype: found \"float16\" (a string), expected 'float32' or 'bfloat16'"),
    ({"model.transformer_dtype": "nf3"}, "model.transformer_dtype: found \"nf3\" (a string), expected 'float8', 'floa"),
    ({"model.compute": "int4"}, "model.compute: found \"int4\" (a string), expected 'int8' or 'fp8'"),
    (
        {"model.compute": "int8", "model.transformer_dtype": "nf4"},
        "compute = 'int8' multiplies weights stored as int8, found",
    ),
    ({"model.compute": "int8"}, "adapter: missing, expected one with [model] compute = 'int8'"),
    ({"checkpoint_every_n_minutes": 0}, "checkpoint_every_n_minutes: found 0 (a whole number), expected more than 0"),
    ({"resume_from_checkpoint": 3}, "resume_from_checkpoint: found 3, expected a run's folder, or true for the newest"),
    ({"sample": SAMPLE | {"every_n_epochs": "2"}}, 'sample.every_n_epochs: found "2" (a string), expected a whole num'),
    (
        {"monitoring": {"enable_wandb": "yes"}},
        'monitoring.enable_wandb: found "yes" (a string), expected true or false',
    ),
    ({"eval_datasets": "dataset.toml"}, 'eval_datasets: found "dataset.toml" (a string), expected a list'),
    ({"eval_datasets": [{"name": "a"}]}, "eval_datasets[0].config: missing, expected its dataset TOML"),
    ({"eval_datasets": [3]}, "eval_datasets[0]: found 3 (a whole number), expected a table"),
    ({"eval_datasets": ["no.toml"]}, "eval_datasets[0].config: expected a file, found nothing at "),
    ({"eval_datasets": [{"config": ""}]}, "eval_datasets[0].config: found an empty path, expected a file"),
    ({"eval_datasets": [{"config": 3}]}, "eval_datasets[0].config: found 3 (a whole number), expected a string"),
    ({"eval_datasets": [{"config": "dataset.toml", "name": ""}]}, 'eval_datasets[0].name: found "" (a string), expect'),
    ({"eval_datasets": [{"config": "dataset.toml", "nam": "a"}]}, "datasets[0].nam: unknown key (did you mean 'name'"),
    (
        {"model.llm_path": "a\0b"},
        "model.llm_path: expected a Qwen3 text encoder, as a .safetensors file or its folder",
    ),
    (
        {"eval_datasets": ["dataset.toml", {"name": "dataset", "config": "dataset.toml"}]},
        "two of them are called 'data",
    ),
    # keys
    ({"data": "dataset.toml"}, "data: unknown key"),
    ({"messages": []}, "messages: unknown key"),
    ({"eval_datasets": [{"config": "dataset.toml", "data": {}}]}, "eval_datasets[0].data: unknown key"),
    ({"optimiser": {}}, "optimiser: unknown key (did you mean 'optimizer'?)"),
    ({"model.vae_pth": "x"}, "model.vae_pth: unknown key (did you mean 'vae_path'?)"),
    ({"rank": 4}, "rank: unknown key (did you mean 'adapter.rank'?)"),
    ({"self_attn_lr": 1e-5}, "self_attn_lr: unknown key (did you mean 'model.self_attn_lr'?)"),
    ({"optimizer": "AdamW8bit"}, "expected a table, [optimizer], with type = 'AdamW8bit' in it"),
    ({"pipeline_stage": 2}, "pipeline_stage: unknown key (did you mean 'pipeline_stages'?)"),
    ({"quite_something_else": 1}, "quite_something_else: unknown key"),
    ({"optimizer.lr": REMOVE}, "optimizer.lr: missing, expected learning rate"),
    ({"model": REMOVE}, "model: missing, expected the networks"),
    # files
    ({"model.vae_path": "no.safetensors"}, "model.vae_path: expected a file or folder, found nothing at "),
    ({"model.vae_path": "pictures"}, "/pictures: contains no file with weights; expected an index, a file"),
    ({"model.vae_path": ""}, "model.vae_path: found an empty path, expected a file or folder"),
    ({"model.vae_path": "a\0b"}, "model.vae_path: expected a file or folder, found nothing at "),
    ({"model.vae_path": "x" * 5000}, "model.vae_path: expected a file or folder, found nothing at "),
    (
        {"model.tokenizer_path": "pictures"},
        "/pictures does not contain qwen and t5, expected qwen/ and t5/ in it",
    ),
    ({"output_dir": "dit.safetensors"}, "/dit.safetensors is a file, expected a folder to write to"),
    ({"output_dir": "hf://owner/repo"}, "output_dir: found hf://owner/repo, expected a local path or gs://"),
    ({"output_dir": "gs://bucket/runs"}, "output_dir: found gs://bucket/runs, expected a path on this machine"),
    ({"dataset": "no.toml"}, "dataset: expected a file, found nothing at "),
    ({"dataset": "gs://bucket/d.toml"}, "dataset: found gs://bucket/d.toml, expected a path on this machine"),
    # keys that depend on each other
    (
        {"model.transformer_path": REMOVE},
        "model.config: expected exactly one of transformer_path and config, found nei",
    ),
    ({"model.config": {}}, "model.config: expected exactly one of transformer_path and config, found both"),
    ({"huber_delta": 1, "pseudo_huber_c": 1}, "pseudo_huber_c: huber_delta is set too, expected at most one of"),
    (
        {"save_every_n_steps": 1, "save_every_n_examples": 9},
        "save_every_n_steps is set too, expected at most one of",
    ),
    (
        {"micro_batch_size_per_gpu": 3, "global_batch_size": 32},
        "global_batch_size: found 32, expected a multiple of micr",
    ),
    (
        {
            "micro_batch_size_per_gpu": 2,
            "image_micro_batch_size_per_gpu": [[512, 8], [1024, 3]],
            "global_batch_size": 16,
        },
        "global_batch_size: found 16, expected a multiple of image_micro_batch_size_per_gpu = 3 (the nearest is 15)",
    ),
    (
        {"gradient_accumulation_steps": 3, "global_batch_size": 32},
        "found 32, but 1 × gradient_accumulation_steps = 3 is 3, expected only one of gradient_accumulation_steps and",
    ),
    (
        {"cache_dir": "gs://bucket/cache"},
        "cache_local_dir: missing, expected a folder on this machine for copies of cache_dir = gs://bucket/cache",
    ),
    (
        {"cache_local_dir": "gs://bucket/cache"},
        "cache_local_dir: found gs://bucket/cache, expected a path on this ma",
    ),
    ({"sample": SAMPLE | {"width": 64}}, "sample.height: expected both width and height, or neither"),
    ({"mesh": {"fsdp": -1}}, "mesh.context: at most one of data, fsdp, tensor and context may be -1"),
    # sizes of a fresh network
    (
        SIZES | {"model.config": {"width": 192, "heads": 5}},
        "model.config.heads: found 5, expected a divisor of width = 1",
    ),
    (
        SIZES | {"model.config": {"width": 64, "heads": 16}},
        "16 heads of width = 64 have size 4, expected an even",
    ),
    (
        SIZES | {"model.config": {"width": 66, "heads": 6}},
        "6 heads of width = 66 have size 11, expected an even s",
    ),
    (
        SIZES | {"model.config": {"width": 63}},
        "model.config.width: found 63 (a whole number), expected a multiple of 2",
    ),
    (
        SIZES | {"model.config": {"adapter": {"target_width": 8}}},
        "target_width: found 8, expected context_width = 1024",
    ),
    (
        SIZES | {"model.config": {"adapter": {"width": 9, "heads": 3}}},
        "model.config.adapter.heads: 3 heads of width = 9",
    ),
    # adapters
    (
        {"adapter": {"type": "lokra", "rank": 4}},
        "adapter.type: found 'lokra', expected 'lora', 'dora', 'lokr', 'loha' or 'lllite'",
    ),
    ({"adapter": ADAPTER | {"dropout": 1.0}}, "adapter.dropout: found 1.0 (a number), expected less than 1.0"),
    (
        {"adapter": ADAPTER | {"exclude_modules": "blocks.("}},
        "adapter.exclude_modules: 'blocks.(' is not a valid regular expression",
    ),
    (
        {"adapter": ADAPTER | {"init_from_existing": "absent"}},
        "adapter.init_from_existing: expected an adapter's .safetensors file, or the folder that contains it, found",
    ),
    (
        {"adapter": ADAPTER | {"text_encoder_lr": 1e-5}},
        "adapter.text_encoder_lr: the states of a trained text encoder cannot be cached",
    ),
    # devices
    ({"mesh": {"fsdp": 0}}, "mesh.fsdp: found 0, expected a number of devices, or -1 for the rest"),
    # another model's, or too much
    (
        {"model.t5_path": "dit.safetensors"},
        "model.t5_path: belongs to Cosmos-Predict2; Anima's text encoder is llm_path",
    ),
    ({"model.train_mlp": "no"}, "model.train_mlp: found 'no', expected false"),
    (
        {"model.caption_dropout_percent": 5},
        "model.caption_dropout_percent: as uncond_fraction: found 5 (a whole number), e",
    ),
    ({"adapter": ADAPTER | {"fuse_adapters": []}}, "adapter.fuse_adapters: belongs to Flux and Chroma"),
    (
        {"model.text_encoder_fp8": True, "model.text_encoder_nf4": True},
        "text_encoder_nf4: text_encoder_fp8 is set too,",
    ),
    (
        {"eval_every_n_steps": 1, "eval_every_n_examples": 9},
        "eval_every_n_steps is set too, expected at most one of",
    ),
    (
        {"eval_image_micro_batch_size_per_gpu": 2, "image_eval_micro_batch_size_per_gpu": 1},
        "image_eval_micro_batch_size_per_gpu: is taken as eval_image_micro_batch_size_per_gpu, which is set too",
    ),
]


@pytest.mark.parametrize(("changes", "line"), MAIN_ERRORS, ids=[line[:50] for _, line in MAIN_ERRORS])
def test_an_error_in_the_main_file_is_one_line(errors, changes, line):
    (found,) = errors(changes)
    assert found.startswith("main.toml: ")
    assert line in found


DATASET_ERRORS = [
    ({"resolutions": REMOVE}, "resolutions: found none, expected at least one side in pixels, as in [1024], or size_b"),
    ({"resolutions": 512}, "resolutions: found 512 (a whole number), expected a list"),
    ({"resolutions": []}, "resolutions: found none, expected at least one side in pixels"),
    ({"resolutions": [True]}, "resolutions[0]: found True, expected a side in pixels or [width, height]"),
    ({"resolutions": [-512]}, "resolutions[0]: found -512, expected a side in pixels or [width, height]"),
    (
        {"resolutions": [[8, 512]]},
        "resolutions[0]: found [8, 512], expected a side in pixels or [width, height], 16 to",
    ),
    ({"resolutions": [[1, 2, 3]]}, "resolutions[0]: found [1, 2, 3], expected a side in pixels or [width, height]"),
    (
        {"resolutions": [256, 512, 768, 1024]},
        "resolutions: found 4 of them: every image is trained at every resolutio",
    ),
    ({"resolutions": [256, 512, 768, 1024]}, "start with --i_know_what_i_am_doing"),
    ({"directory": [{"path": "pictures", "resolutions": []}]}, "directory[0].resolutions: found none, expected at"),
    ({"size_buckets": [[512, 512]]}, "size_buckets[0]: found [512, 512], expected [width, height, frames]"),
    ({"size_buckets": [[512, 512, 0]]}, "size_buckets[0]: found [512, 512, 0], expected [width, height, frames]"),
    ({"size_buckets": []}, "size_buckets: found an empty list, expected at least one value"),
    (
        {"enable_ar_bucket": True},
        "enable_ar_bucket: expected ar_buckets, or min_ar, max_ar and num_ar_buckets; missing: min_ar, max_ar, num_",
    ),
    ({"enable_ar_bucket": True, "min_ar": 0.5, "max_ar": 2}, "num_ar_buckets; missing: num_ar_buckets"),
    (
        {"enable_ar_bucket": True, "ar_buckets": [0]},
        "ar_buckets[0]: found 0, expected width / height or [width, height]",
    ),
    (
        {"enable_ar_bucket": True, "ar_buckets": [[1, 0]]},
        "ar_buckets[0]: found [1, 0], expected width / height or [wid",
    ),
    ({"enable_ar_bucket": True, "ar_buckets": [[1, 5000]]}, "ar_buckets[0]: found [1, 5000], expected width / height "),
    ({"min_ar": 0}, "min_ar: found 0 (a whole number), expected at least 0.001"),
    ({"num_ar_buckets": 0}, "num_ar_buckets: found 0 (a whole number), expected at least 1"),
    ({"frame_buckets": [0]}, "frame_buckets[0]: found 0 (a whole number), expected at least 1"),
    ({"frame_buckets": []}, "frame_buckets: found an empty list, expected at least one value"),
    ({"cache_shuffle_num": -1}, "cache_shuffle_num: found -1 (a whole number), expected at least 0"),
    ({"cache_shuffle_delimiter": ""}, 'cache_shuffle_delimiter: found "" (a string), expected at least 1 character'),
    ({"caption_choice": "all"}, "caption_choice: found \"all\" (a string), expected 'each' or 'random'"),
    ({"subsample_ratio": 0}, "subsample_ratio: found 0 (a whole number), expected more than 0"),
    ({"subsample_ratio": 1.5}, "subsample_ratio: found 1.5 (a number), expected at most 1"),
    ({"tag_dropout": 1}, "tag_dropout: found 1 (a whole number), expected less than 1"),
    ({"tag_dropout": 0.1}, "tag_dropout: found 0.1, but cached text is the same in every epoch; set cache_text_embed"),
    ({"directory": [{"path": "pictures", "tag_dropout": 0.1}]}, "directory[0].tag_dropout: found 0.1, but cached text"),
    ({"directory": [{"path": "pictures", "mask_path": "m"}]}, "directory[0].mask_path: expected a folder, found noth"),
    ({"default_mask_file": "pictures"}, "/pictures is a folder, expected a file"),
    ({"control_path": "pictures"}, "control_path: nothing uses the control pictures, expected [adapter] type = "),
    ({"directory": [{"path": "pictures", "control_path": "no"}]}, "directory[0].control_path: expected a folder, "),
    ({"directory": [{"path": "pictures", "control_path": 3}]}, "directory[0].control_path: found 3, expected a folder"),
    ({"control_path": []}, "control_path: found [], expected a folder, or a list of them"),
    ({"inpaint_masks": {"boxes": 1}}, "inpaint_masks: nothing uses it, expected [adapter] type = 'lllite' and cond_i"),
    ({"inpaint_mask_path": "pictures"}, "inpaint_mask_path: nothing uses it, expected [adapter] type = 'lllite' and"),
    ({"inpaint_masks": {"box": 1}}, "inpaint_masks: found 'box', expected 'boxes', 'strokes' or 'whole' (did you mea"),
    (
        {"tfds": [{"name": "a", "mask_path": "pictures"}]},
        "tfds[0].mask_path: belongs to a [[directory]], whose images",
    ),
    (
        {"directory": REMOVE, "tfds": [{"name": "a"}], "online_captions": True},
        "online_captions: belongs to a [[directo",
    ),
    ({"directory": REMOVE}, "tfds: expected at least one [[directory]] or [[tfds]], found none"),
    ({"directory": {"path": "pictures"}}, "directory: found {…} (a table), expected a list"),
    ({"directory": [{"path": "no"}]}, "directory[0].path: expected a folder, found nothing at "),
    ({"directory": [{"path": "dit.safetensors"}]}, "/dit.safetensors is a file, expected a folder"),
    ({"directory": [{"pth": "pictures", "path": "pictures"}]}, "directory[0].pth: unknown key (did you mean 'path'?)"),
    ({"resolution": [512]}, "resolution: unknown key; here it is resolutions, as [1024]"),
    (
        {"directory": [{"path": "pictures", "num_repeats": 0}]},
        "directory[0].num_repeats: found 0 (a whole number), exp",
    ),
    ({"num_repeats": 0}, ": num_repeats: found 0 (a whole number), expected more than 0"),
    ({"tfds": [{"name": "a", "builder_dir": "pictures"}]}, "tfds[0].builder_dir: expected exactly one of name and bui"),
    ({"tfds": [{}]}, "tfds[0].builder_dir: expected exactly one of name and builder_dir, found neither"),
    (
        {"tfds": [{"name": "a", "num_repeats": 0}]},
        "tfds[0].num_repeats: found 0 (a whole number), expected more than 0",
    ),
]


@pytest.mark.parametrize(("changes", "line"), DATASET_ERRORS, ids=[line[:50] for _, line in DATASET_ERRORS])
def test_an_error_in_the_dataset_file_is_one_line(errors, tmp_path, changes, line):
    (found,) = errors(dataset=changes)
    assert found.startswith(f"{tmp_path}/dataset.toml: ")
    assert line in found


def test_an_error_in_a_shared_key_is_reported_once(errors):
    (found,) = errors(dataset={"num_repeats": -1, "directory": [{"path": "pictures"}, {"path": "pictures"}]})
    assert "dataset.toml: num_repeats: found -1" in found


def test_all_errors_of_both_files_are_reported_at_once(errors):
    found = errors(
        {"epochs": "3", "optimiser": {}, "model.vae_path": "no.safetensors", "checkpoint_every_n_epochs": 0},
        {"resolutions": ["500"], "enable_ar_bucket": True},
        ["micro_batch_size_per_gpu=0", "nonsense"],
    )
    assert {error.split(": ")[1] for error in found if "nonsense" not in error} == {
        "checkpoint_every_n_epochs",
        "enable_ar_bucket",
        "epochs",
        "micro_batch_size_per_gpu",
        "model.vae_path",
        "optimiser",
        "resolutions[0]",
    }
    assert len(found) == 8


def test_arguments_that_the_optimizer_does_not_have_are_reported_with_the_other_errors(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"epochs": 0, "optimizer.weight_dcay": 0.1, "optimizer.nesterof": True})
    with pytest.raises(SystemExit):
        train(["--config", "main.toml"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("error: main.toml: ") for line in lines)
    assert "epochs" in lines[0]
    assert "weight_dcay: not an argument of 'adamw_optimi' (did you mean 'weight_decay'?)" in lines[1]
    assert "nesterof" in lines[2]


def test_errors_of_an_evaluated_dataset_are_reported_with_the_others(errors, tmp_path):
    (tmp_path / "eval.toml").write_text("resolutions = []\n[[directory]]\npath = 'no'")
    found = errors({"eval_datasets": ["eval.toml"], "epochs": 0})
    assert [error.split(": ")[:2] for error in found] == [
        ["main.toml", "epochs"],
        [f"{tmp_path}/eval.toml", "resolutions"],
        [f"{tmp_path}/eval.toml", "directory[0].path"],
    ]


@pytest.mark.parametrize(
    ("description", "files", "line"),
    [
        ('{"model_type": "llama"}', ["model.safetensors"], "/llm/config.json has model_type 'llama', expected 'qwen3'"),
        ("[1]", ["model.safetensors"], "/llm/config.json has model_type None, expected 'qwen3'"),
        ("{", ["model.safetensors"], "/llm/config.json cannot be read as JSON: "),
        (
            '{"model_type": "qwen3"}',
            ["pytorch_model.bin"],
            "/llm: contains no file with weights; expected an index, a file with a standard name",
        ),
        (
            '{"model_type": "qwen3"}',
            [
                "model-00001-of-00003.safetensors",
                "model-00002-of-00003.safetensors",
                "model-00003-of-00003.safetensors",
            ],
            "/llm: contains model-00001-of-00003.safetensors, model-00002-of-00003.safetensors, model-00003-of-00003.",
        ),
    ],
)
def test_a_folder_without_the_files_of_a_qwen3_is_refused(errors, tmp_path, description, files, line):
    (tmp_path / "llm").mkdir()
    for name in files:
        (tmp_path / "llm" / name).touch()
    if description is not None:
        (tmp_path / "llm" / "config.json").write_text(description)
    (found,) = errors({"model.llm_path": "llm"})
    assert found.startswith(f"main.toml: model.llm_path: {tmp_path}")
    assert line in found


def test_both_paths_that_were_tried_are_named(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    path = write(tmp_path, {"model.vae_path": "no.safetensors"})
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert f"nothing at {tmp_path}/here/no.safetensors or at {tmp_path}/no.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optimiser.lr=1", "--set: optimiser: unknown key (did you mean 'optimizer'?)"),
        ("model.dtpe=1", "--set: model.dtpe: unknown key (did you mean 'dtype'?)"),
        ("epochs=many", '--set: epochs: found "many" (a string), expected a whole number'),
        ("epochs.x=1", "--set: epochs.x: epochs is not a table"),
        ("epochs", "--set: found 'epochs', expected key=value, as in optimizer.lr=1e-4"),
        ("=3", "--set: found '=3', expected key=value"),
        ("model.t5_path=x", "--set: model.t5_path: belongs to Cosmos-Predict2"),
    ],
)
def test_an_error_in_an_override_names_the_override(errors, override, line):
    (found,) = errors(overrides=[override])
    assert found.startswith(line)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"epochs = 3\nseed = \n", "main.toml: is not valid TOML: Invalid value (at line 2, column 8)"),
        (b"a = 1\na = 2\n", "main.toml: is not valid TOML: Cannot overwrite a value (at line 2, column 6)"),
        (b"x = '\xff'", "main.toml: byte 5 is 0xff, expected UTF-8 text; save the file as UTF-8"),
        (b"x = " + b"[" * 5000, "main.toml: is not valid TOML: "),
        (b"x = " + b"9" * 5000, "main.toml: is not valid TOML: "),
    ],
)
@pytest.mark.parametrize("name", ["main.toml", "dataset.toml"])
def test_an_invalid_toml_file_is_one_line_with_the_position(tmp_path, monkeypatch, name, content, line):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_config(path.name)
    (found,) = caught.value.messages
    assert line.removeprefix("main.toml") in found
    assert name in found


def test_a_missing_file_a_folder_and_an_address_have_different_errors(tmp_path):
    with pytest.raises(UserError, match=r"no\.toml: no such file"):
        load_config(tmp_path / "no.toml")
    with pytest.raises(UserError, match=r"is a folder, expected a TOML file"):
        load_config(tmp_path)
    with pytest.raises(UserError, match=r"^hf://a/b/c\.toml: is an address, expected a TOML file on this machine"):
        load_config("hf://a/b/c.toml")


def test_a_long_value_is_cut_short_and_stays_on_one_line(errors):
    (found,) = errors({"epochs": "line\n" * 1000})
    assert len(found) < 200


KNOWN = [*key_table(MainConfig), *(key for key in MAIN if "*" not in key)]


@settings(max_examples=150, deadline=None)
@given(key=st.sampled_from(KNOWN), data=st.data())
def test_a_key_with_one_typing_error_is_suggested(key, data):
    *above, last = key.split(".")
    siblings = {other.split(".")[-1] for other in KNOWN if other.split(".")[:-1] == above}
    place = data.draw(st.integers(0, len(last) - 1))
    kind = data.draw(st.sampled_from(["drop", "double", "swap"]))
    typed = {
        "drop": last[:place] + last[place + 1 :],
        "double": last[: place + 1] + last[place:],
        "swap": last[:place] + last[place : place + 2][::-1] + last[place + 2 :],
    }[kind]
    if len(last) < 4 or typed in siblings:
        return
    file = TomlFile("main.toml", MainConfig, MAIN)
    suggestion = file.suggestion((*above, typed))
    assert any(f"'{sibling}'" in suggestion for sibling in siblings)
    # Another name may be as near (self_attn_lr, …); the only one of about its length is the one that was meant.
    if sum(abs(len(sibling) - len(last)) <= 2 for sibling in siblings) == 1:
        assert f"'{last}'" in suggestion


def test_every_key_is_described():
    assert [key for key, node in key_table(MainConfig).items() if not node.get("description")] == []


def test_changing_one_table_leaves_the_template_alone():
    template = {"model": {"type": "anima"}}
    assert changed(template, {"model.type": "wan"}) == {"model": {"type": "wan"}}
    assert template == {"model": {"type": "anima"}}
