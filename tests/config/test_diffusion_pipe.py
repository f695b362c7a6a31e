"""TOMLs as diffusion-pipe's users have them load unchanged and mean the same here."""

import operator

import pytest

from anima_jax.config.load import load_config
from anima_jax.config.optimizer import Schedule
from anima_jax.config.sizes import Size
from anima_jax.data.buckets import Bucketing
from anima_jax.training.run import Run
from tests.config.files import MAIN, MODEL, toml, write

IMAGE, CLIP = Size(512, 512, 1), Size(640, 384, 33)

LORA = f"""
output_dir = '/data/diffusion_pipe_training_runs/anima_test'
dataset = 'dataset.toml'
epochs = 1000
micro_batch_size_per_gpu = 2
pipeline_stages = 1
gradient_accumulation_steps = 4
gradient_clipping = 1.0
warmup_steps = 100
lr_scheduler = 'linear'
blocks_to_swap = 20
eval_every_n_epochs = 1
eval_before_first_step = true
eval_micro_batch_size_per_gpu = 1
eval_gradient_accumulation_steps = 1
save_every_n_epochs = 2
checkpoint_every_n_minutes = 120
activation_checkpointing = true
partition_method = 'parameters'
save_dtype = 'bfloat16'
caching_batch_size = 1
steps_per_print = 1
video_clip_mode = 'single_beginning'
{MODEL}
transformer_dtype = 'float8'
timestep_sample_method = 'logit_normal'
llm_adapter_lr = 0

[adapter]
type = 'lora'
rank = 32
dtype = 'bfloat16'

[optimizer]
type = 'adamw_optimi'
lr = 2e-5
betas = [0.9, 0.99]
weight_decay = 0.01
eps = 1e-8

[monitoring]
enable_wandb = false
wandb_api_key = ''
wandb_tracker_name = ''
wandb_run_name = ''
"""

FULL = f"""
output_dir = 'runs'
dataset = 'dataset.toml'
epochs = 40
max_steps = 20000
micro_batch_size_per_gpu = 4
gradient_accumulation_steps = 8
warmup_steps = 50
lr_scheduler = 'cosine'
save_every_n_steps = 500
checkpoint_every_n_epochs = 1
activation_checkpointing = 'unsloth'
uncond_fraction = 0.1
pseudo_huber_c = 0.3
regenerate_cache = true
resume_from_checkpoint = '20260101_12-00-00'
{MODEL}
shift = 3
sigmoid_scale = 1.3
multiscale_loss_weight = 0.5
self_attn_lr = 2e-5
llm_adapter_lr = 1e-6

[optimizer]
type = 'AdamW8bitKahan'
lr = 1e-5
betas = [0.9, 0.99]
weight_decay = 0.01
stabilize = false
gradient_release = true
"""

VIDEO = f"""
output_dir = 'runs'
dataset = 'dataset.toml'
epochs = 10
micro_batch_size_per_gpu = [[512, 2], [1024, 1]]
image_micro_batch_size_per_gpu = [[512, 16], [1024, 4]]
save_every_n_examples = 1600
activation_checkpointing = true
reentrant_activation_checkpointing = true
map_num_proc = 32
video_clip_mode = 'single_middle'
{MODEL}
flux_shift = true

[optimizer]
type = 'Prodigy'
lr = 1
betas = [0.9, 0.99]
weight_decay = 0.01
d_coef = 0.5
use_bias_correction = true
"""

EVAL = f"""
output_dir = 'runs'
dataset = 'dataset.toml'
eval_datasets = [
    {{name = 'held out', config = 'eval.toml'}},
    'dataset.toml',
]
epochs = 10
micro_batch_size_per_gpu = 8
gradient_accumulation_steps = 2
eval_every_n_examples = 320
eval_micro_batch_size_per_gpu = [[512, 4], [1024, 1]]
image_eval_micro_batch_size_per_gpu = 6
eval_gradient_accumulation_steps = 1
disable_block_swap_for_eval = true
save_every_n_epochs = 1
logging_steps = 5
x_axis_examples = true
{MODEL}

[optimizer]
type = 'adamw'
lr = 1e-5
beta2_half_life = 1000

[monitoring]
enable_wandb = true
wandb_api_key = '0123'
wandb_tracker_name = 'anima'
wandb_run_name = 'first'
"""

DATASET = """
resolutions = [512]
enable_ar_bucket = true
min_ar = 0.5
max_ar = 2.0
num_ar_buckets = 7
frame_buckets = [1, 33]
cache_shuffle_num = 10
cache_shuffle_delimiter = ", "
skip_empty_caption = false

[[directory]]
path = 'pictures'
mask_path = 'pictures'
num_repeats = 1

[[directory]]
path = 'pictures'
ar_buckets = [[448, 576]]
resolutions = [[448, 576]]
frame_buckets = [1]
num_repeats = 5
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load a main TOML of this text, beside the files that all of them name."""
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path)
    (tmp_path / "eval.toml").write_text("resolutions = [256]\n[[directory]]\npath = 'pictures'\n")

    def loaded(text):
        path.write_text(text)
        return load_config(path)

    return loaded


MEANINGS = {
    LORA: {
        "output_dir": "/data/diffusion_pipe_training_runs/anima_test",
        "optimizer.lr": 2e-5,
        "optimizer.betas": (0.9, 0.99),
        "optimizer.eps": 1e-8,
        "schedule": Schedule("linear", 100),
        "remat": "full",
        "model.transformer_dtype": "float8",
        "adapter.rank": 32,
        "adapter.scale": 1.0,
        "checkpoint_every_n_epochs": None,
        "checkpoint_every_n_minutes": 120.0,
        "eval_datasets": (),
        "eval_every_n_epochs": 1,
        "data.size_wh": (512, 512),
    },
    FULL: {
        "adapter": None,
        "max_steps": 20000,
        "remat": "offload",
        "loss": ("pseudo_huber_c", 0.3),
        "regenerate_cache": True,
        "resume_from_checkpoint": "20260101_12-00-00",
        "checkpoint_every_n_epochs": 1,
        "uncond_fraction": 0.1,
        "optimizer.type": "adamw8bitkahan",
        "optimizer.eps": None,
        "optimizer.options": {"stabilize": False},
        "learning_rates": {
            "llm_adapter": 1e-6,
            "self_attn": 2e-5,
            **dict.fromkeys(("cross_attn", "mlp", "mod", "base"), 1e-5),
        },
    },
    VIDEO: {
        "video_clip_mode": "single_middle",
        "map_num_proc": 32,
        "model.flux_shift": True,
        "optimizer.type": "prodigy",
        "optimizer.lr": 1.0,
        "optimizer.betas": (0.9, 0.99),
        "optimizer.eps": None,
        "optimizer.options": {"d_coef": 0.5, "use_bias_correction": True},
    },
    EVAL: {
        "logging_steps": 5,
        "x_axis_examples": True,
        "eval_before_first_step": True,
        "optimizer.beta2_half_life": 1000.0,
        "monitoring.enable_wandb": True,
        "monitoring.enable_tensorboard": True,
        "monitoring.wandb_api_key": "0123",
        "monitoring.wandb_tracker_name": "anima",
        "monitoring.wandb_run_name": "first",
    },
}
NAMES = {LORA: "a LoRA", FULL: "a full fine-tune", VIDEO: "a video run", EVAL: "a run with evaluation"}


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        pytest.param(text, key, value, id=f"{NAMES[text]}: {key}")
        for text, meanings in MEANINGS.items()
        for key, value in meanings.items()
    ],
)
def test_a_key_means_what_it_means_in_diffusion_pipe(load, text, key, value):
    assert operator.attrgetter(key)(load(text)) == value


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        (LORA, ["pipeline_stages", "blocks_to_swap", "partition_method"]),
        (FULL, ["optimizer.gradient_release"]),
        (VIDEO, ["reentrant_activation_checkpointing"]),
        (EVAL, ["disable_block_swap_for_eval"]),
    ],
    ids=NAMES.values(),
)
def test_keys_that_do_nothing_here_have_a_message(load, text, keys):
    messages = [message for message in load(text).messages if "does nothing here" in message]
    assert [message.split(": ")[1] for message in messages] == keys


def test_batches_and_intervals_of_the_configurations(load):
    lora, full, video, evaluated = (Run(load(text), replicas=1) for text in MEANINGS)
    assert (lora.global_batch(IMAGE), lora.accumulation_of(IMAGE)) == (8, 4)
    assert (full.save_every_steps, video.save_every_steps) == (500, 100)
    assert [video.micro_batch(size) for size in (CLIP, IMAGE, Size(1024, 1024, 33))] == [2, 16, 1]
    assert [evaluated.eval_micro_batch(size) for size in (IMAGE, CLIP, Size(1024, 1024, 33))] == [6, 4, 1]
    assert evaluated.eval_every_steps == 320 // 16


def test_evaluated_datasets_are_loaded(load, tmp_path):
    config = load(EVAL)
    held_out, trained = config.eval_datasets
    assert (held_out.name, trained.name) == ("held out", "dataset")
    assert (held_out.config, trained.config) == (str(tmp_path / "eval.toml"), str(tmp_path / "dataset.toml"))
    assert (held_out.data.size_wh, trained.data) == ((256, 256), config.data)
    assert held_out.data.sources == held_out.data.directory


def test_a_dataset_with_clips_and_masks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    (tmp_path / "dataset.toml").write_text(DATASET)
    config = load_config(tmp_path / "main.toml")
    assert config.messages == ()
    first, second = config.data.directory
    # The tall example of golden/buckets.json, and 448 × 576 as it is: the area's side is 507.98.
    assert [bucket.size for bucket in Bucketing.of(first).place(614, 2395, 1)] == [(368, 720, 1)]
    assert [bucket.size for bucket in Bucketing.of(second).place(614, 2395, 60)] == []
    assert [bucket.size for bucket in Bucketing.of(second).place(614, 2395, 1)] == [(448, 576, 1)]
    assert (first.mask_path, second.mask_path) == (str(tmp_path / "pictures"), None)
    assert (second.shuffled_copies, second.num_repeats) == (10, 5.0)


# Every key of diffusion-pipe's main TOML, with a value that is not its default where another is possible.
KEPT = {
    "epochs": 7,
    "max_steps": 3,
    "micro_batch_size_per_gpu": 2,
    "image_micro_batch_size_per_gpu": 3,
    "eval_micro_batch_size_per_gpu": 4,
    "eval_image_micro_batch_size_per_gpu": 5,
    "gradient_accumulation_steps": 6,
    "gradient_clipping": 0.5,
    "warmup_steps": 7,
    "lr_scheduler": "cosine",
    "force_constant_lr": 1e-3,
    "save_every_n_epochs": 1,
    "save_every_n_steps": 2,
    "save_every_n_examples": 3,
    "checkpoint_every_n_epochs": 4,
    "checkpoint_every_n_minutes": 5.0,
    "save_dtype": "float16",
    "activation_checkpointing": "unsloth",
    "caching_batch_size": 9,
    "map_num_proc": 3,
    "uncond_fraction": 0.25,
    "video_clip_mode": "single_middle",
    "eval_every_n_epochs": 1,
    "eval_every_n_steps": 2,
    "eval_every_n_examples": 3,
    "eval_before_first_step": False,
    "steps_per_print": 2,
    "logging_steps": 3,
    "x_axis_examples": True,
    "huber_delta": 0.1,
    "smooth_l1_beta": 0.2,
    "pseudo_huber_c": 0.3,
    "regenerate_cache": True,
    "resume_from_checkpoint": "run",
    "model.dtype": "float16",
    "model.transformer_dtype": "float8_e5m2",
    "model.text_encoder_fp8": True,
    "model.text_encoder_nf4": True,
    "model.cache_text_embeddings": False,
    "model.timestep_sample_method": "uniform",
    "model.sigmoid_scale": 1.3,
    "model.shift": 2.5,
    "model.flux_shift": True,
    "model.multiscale_loss_weight": 0.5,
    "model.self_attn_lr": 1e-4,
    "model.cross_attn_lr": 2e-4,
    "model.mlp_lr": 3e-4,
    "model.mod_lr": 4e-4,
    "model.llm_adapter_lr": 0.0,
    "optimizer.weight_decay": 0.5,
    "optimizer.eps": 1e-3,
    "optimizer.beta2_half_life": 100.0,
    "monitoring.enable_wandb": True,
    "monitoring.wandb_api_key": "a",
    "monitoring.wandb_tracker_name": "b",
    "monitoring.wandb_run_name": "c",
}
ANSWERED = {
    "pipeline_stages": 2,
    "partition_method": "manual",
    "partition_split": [10],
    "blocks_to_swap": 10,
    "disable_block_swap_for_eval": True,
    "reentrant_activation_checkpointing": True,
    "compile": True,
    "eval_gradient_accumulation_steps": 2,
    "huggingface_repo": "owner/repo",
    "upload_hf_from_epoch": 2,
    "optimizer.gradient_release": True,
    "optimizer.kahan_sum": True,
}


@pytest.mark.parametrize(("key", "value"), KEPT.items(), ids=KEPT)
def test_a_key_is_kept_unchanged(tmp_path, key, value):
    found = load_config(write(tmp_path, {key: value}))
    assert found.messages == ()
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


@pytest.mark.parametrize(("key", "value"), ANSWERED.items(), ids=ANSWERED)
def test_a_key_that_cannot_apply_is_answered_in_one_line(tmp_path, key, value):
    (message,) = load_config(write(tmp_path, {key: value})).messages
    assert message.startswith(f"{tmp_path}/main.toml: {key}: does nothing here: ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eval_datasets", []),
        ("eval_gradient_accumulation_steps", 1),
        ("huggingface_repo", ""),
        ("optimizer.gradient_release", False),
    ],
)
def test_a_key_that_asks_for_nothing_has_no_message(tmp_path, key, value):
    assert load_config(write(tmp_path, {key: value})).messages == ()


def test_a_message_says_that_data_is_never_evaluated_again(load):
    message = "eval_datasets: used only before the first step"
    assert message in load(toml(MAIN | {"eval_datasets": ["eval.toml"]})).messages[0]
    assert load(toml(MAIN | {"eval_datasets": ["eval.toml"], "eval_every_n_steps": 9})).messages == ()
