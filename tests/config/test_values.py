"""What a correct configuration means."""

import dataclasses
import math

import pytest

from anima_jax.config import load_config
from anima_jax.config.dataset import side_of
from anima_jax.config.network import NetworkSizes
from tests.config.files import REMOVE, write

# The shape of diffusion-pipe's own example, with Anima in [model].
DIFFUSION_PIPE_MAIN = """
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
activation_checkpointing = true
partition_method = 'parameters'
save_dtype = 'bfloat16'
caching_batch_size = 1
steps_per_print = 1
video_clip_mode = 'single_beginning'

[model]
type = 'anima'
transformer_path = 'dit.safetensors'
vae_path = 'vae.safetensors'
llm_path = 'llm.safetensors'
dtype = 'bfloat16'
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
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load the small configuration with changes, from another folder than its own."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return lambda changes=None, dataset=None, overrides=(): load_config(write(tmp_path, changes, dataset), overrides)


def test_the_shape_of_diffusion_pipes_own_example_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path)
    path.write_text(DIFFUSION_PIPE_MAIN)
    config = load_config(path)
    assert config.output_dir == "/data/diffusion_pipe_training_runs/anima_test"
    assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.eps) == (2e-5, (0.9, 0.99), 1e-8)
    assert (config.global_batch, config.accumulation) == (8, 4)
    assert config.schedule == ("linear", 100)
    assert config.remat == "full"
    assert config.adapter is not None
    assert config.adapter.scale == 1.0
    assert config.data.size_wh == (512, 512)
    assert [note.split(": ")[1] for note in config.notes] == ["pipeline_stages", "blocks_to_swap", "partition_method"]


def test_defaults_are_those_of_diffusion_pipe(load):
    config = load()
    assert (config.micro_batch_size_per_gpu, config.gradient_accumulation_steps) == (1, 1)
    assert (config.gradient_clipping, config.warmup_steps, config.lr_scheduler) == (1.0, 0, "constant")
    assert (config.uncond_fraction, config.loss, config.remat) == (0.0, ("mse", 0.0), "none")
    assert (config.model.timestep_sample_method, config.model.sigmoid_scale) == ("logit_normal", 1.0)
    assert (config.model.shift, config.model.flux_shift, config.ema_decay) == (None, False, None)
    assert config.data.directory[0].skip_empty_caption
    assert config.notes == ()


def test_adamw_has_the_defaults_of_torch(load):
    torch = pytest.importorskip("torch")
    ours = load({"optimizer.type": "adamw"}).optimizer
    theirs = torch.optim.AdamW([torch.zeros(1)]).defaults
    assert (ours.betas, ours.eps, ours.weight_decay) == (theirs["betas"], theirs["eps"], theirs["weight_decay"])


def test_an_integer_is_a_number_where_a_float_is_wanted(load):
    config = load({"optimizer.lr": 1, "gradient_clipping": 0})
    assert (config.optimizer.lr, config.gradient_clipping) == (1.0, 0.0)
    assert isinstance(config.optimizer.lr, float)


def test_optimizer_types_are_read_in_any_case(load):
    assert load({"optimizer.type": "AdamW"}).optimizer.type == "adamw"


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path):
    path = write(tmp_path)
    plain = load_config(path)
    for name in ("main.toml", "dataset.toml"):
        text = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    assert load_config(path) == plain


def test_learning_rates_of_groups(load):
    changes = {"model.self_attn_lr": 1e-4, "model.llm_adapter_lr": 0}
    config = load(changes)
    assert config.learning_rates == {
        "llm_adapter": 0.0,
        "self_attn": 1e-4,
        "cross_attn": 2e-5,
        "mlp": 2e-5,
        "mod": 2e-5,
        "base": 2e-5,
    }
    forced = load(changes | {"force_constant_lr": 3e-5, "warmup_steps": 10, "lr_scheduler": "cosine"})
    assert set(forced.learning_rates.values()) == {0.0, 3e-5}
    assert forced.learning_rates["llm_adapter"] == 0.0
    assert forced.schedule == ("constant", 0)


def test_accumulation_follows_from_the_global_batch(load):
    config = load({"micro_batch_size_per_gpu": 4, "global_batch_size": 32})
    assert (config.global_batch, config.accumulation) == (32, 8)


@pytest.mark.parametrize(("examples", "steps"), [(800, 100), (3, 1), (15, 1), (16, 2)])
def test_saving_by_examples_counts_whole_steps(load, examples, steps):
    changes = {"save_every_n_examples": examples, "micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}
    assert load(changes).save_every_steps == steps


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, "float16"),
        ({"adapter": {"type": "lora", "rank": 4}}, "float16"),
        ({"adapter": {"type": "lora", "rank": 4, "dtype": "float32"}}, "float32"),
        ({"adapter": {"type": "lora", "rank": 4, "dtype": "float32"}, "save_dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_saved_dtype(load, changes, dtype):
    config = load({"model.dtype": "float16", **changes})
    assert (config.export_dtype, config.compute_dtype) == (dtype, "float16")


def test_alpha_scales_the_adapter(load):
    adapter = load({"adapter": {"type": "lora", "rank": 8, "alpha": 2}}).adapter
    assert adapter is not None
    assert adapter.scale == 0.25


@pytest.mark.parametrize("key", ["huber_delta", "smooth_l1_beta", "pseudo_huber_c"])
def test_a_loss_is_chosen_by_its_key(load, key):
    assert load({key: 0.5}).loss == (key, 0.5)


def test_paths_are_looked_up_from_here_first_then_from_the_file(load, tmp_path):
    beside = str(tmp_path / "dit.safetensors")
    assert load().model.transformer_path == beside
    (tmp_path / "elsewhere" / "dit.safetensors").touch()
    assert load().model.transformer_path == str(tmp_path / "elsewhere" / "dit.safetensors")
    assert load({"model.transformer_path": beside}).model.transformer_path == beside
    assert load().output_dir == str(tmp_path / "elsewhere" / "runs")


def test_a_dataset_in_another_folder_names_its_own_neighbours(load, tmp_path):
    load()
    (tmp_path / "data" / "mine").mkdir(parents=True)
    (tmp_path / "data" / "set.toml").write_text("resolutions = [512]\n[[directory]]\npath = 'mine'")
    assert load({"dataset": "data/set.toml"}).data.directory[0].path == str(tmp_path / "data" / "mine")


def test_addresses_pass_through(load):
    addresses = {"model.transformer_path": "hf://owner/repo/dit.safetensors", "output_dir": "gs://bucket/runs"}
    config = load({**addresses, "model.vae_path": "gs://bucket/vae.safetensors"})
    assert config.model.transformer_path == "hf://owner/repo/dit.safetensors"
    assert config.model.vae_path == "gs://bucket/vae.safetensors"
    assert config.output_dir == "gs://bucket/runs"


def test_overrides_are_toml_or_bare_words(load):
    overrides = [
        "optimizer.lr=1e-4",
        "optimizer.betas=[0.8, 0.9]",
        "model.dtype=float32",
        "seed = 7",
        "adapter.type=lora",
        "adapter.rank=4",
        "output_dir=2026-08-01",
        "sample.prompts=['a = b']",
    ]
    config = load(overrides=overrides)
    assert (config.optimizer.lr, config.optimizer.betas, config.model.dtype) == (1e-4, (0.8, 0.9), "float32")
    assert config.adapter is not None
    assert config.adapter.rank == 4
    assert config.sample is not None
    assert config.sample.prompts == ("a = b",)
    assert config.seed == 7
    assert config.output_dir.endswith("/2026-08-01")


def test_the_last_override_of_a_key_wins(load):
    assert load(overrides=["epochs=5", "epochs=6"]).epochs == 6


def test_a_directory_wins_over_the_shared_keys(load, tmp_path):
    load()
    (tmp_path / "more").mkdir()
    directories = [{"path": "pictures"}, {"path": "more", "num_repeats": 0.5, "caption_prefix": ""}]
    shared = {"num_repeats": 3, "caption_prefix": "art, ", "skip_empty_caption": False}
    first, second = load(dataset={**shared, "directory": directories}).data.directory
    assert (first.num_repeats, first.caption_prefix, first.skip_empty_caption) == (3.0, "art, ", False)
    assert (second.num_repeats, second.caption_prefix, second.skip_empty_caption) == (0.5, "", False)


@pytest.mark.parametrize(
    ("resolution", "side"),
    [(512, 512), (500, 496), (1, 16), ((1280, 720), 960), ((448, 576), 512), ((1024, 1024), 1024)],
)
def test_a_resolution_is_an_area(resolution, side):
    # Of all multiples of 16, none is nearer to the square root of the area.
    area = resolution**2 if isinstance(resolution, int) else math.prod(resolution)
    assert side_of(resolution) == side == min(range(16, 2048, 16), key=lambda other: abs(other - math.sqrt(area)))


def test_a_rounded_resolution_is_noted_once(load, tmp_path):
    load()
    directories = [{"path": "pictures"}, {"path": "pictures"}]
    config = load(dataset={"resolutions": [500], "directory": directories})
    assert config.data.size_wh == (496, 496)
    assert len(config.notes) == 1
    assert "496 × 496" in config.notes[0]


def test_tfds_sources(load):
    config = load(dataset={"directory": REMOVE, "tfds": [{"name": "anima_shapes"}]})
    (source,) = config.data.sources
    assert source == config.data.tfds[0]
    assert (source.name, source.split, source.image, source.caption) == ("anima_shapes", "train", "image", "caption")


def test_left_out_sizes_are_those_of_the_released_model():
    from anima_jax.models.dit import DiTConfig

    ours, released = NetworkSizes.model_validate({}).model_dump(), dataclasses.asdict(DiTConfig())
    assert ours == released


def test_left_out_sizes_keep_the_proportions():
    sizes = NetworkSizes.model_validate({"width": 256, "context_width": 128, "adapter": {"blocks": 2}})
    assert (sizes.heads, sizes.mlp_width) == (2, 1024)
    adapter = sizes.adapter
    assert (adapter.target_width, adapter.width, adapter.heads, adapter.mlp_width) == (128, 128, 2, 512)


def test_sample_pictures_have_the_training_pictures_size_unless_set(load):
    prompts = {"prompts": ["a"]}
    assert load({"sample": prompts}).sample_size_wh == (512, 512)
    assert load({"sample": {**prompts, "width": 256, "height": 128}}).sample_size_wh == (256, 128)


def test_configurations_are_frozen(load):
    config = load()
    with pytest.raises(ValueError, match="frozen"):
        config.epochs = 5


HARMLESS = [
    {"eval_datasets": []},
    {"eval_every_n_steps": 10, "eval_image_micro_batch_size_per_gpu": 2},
    {"model.cache_text_embeddings": True},
    {"optimizer.gradient_release": False},
]


@pytest.mark.parametrize("changes", HARMLESS, ids=[next(iter(changes)) for changes in HARMLESS])
def test_keys_to_come_are_accepted_where_they_ask_for_nothing(load, changes):
    assert load(changes).notes == ()


def test_dataset_keys_to_come_are_accepted_where_they_ask_for_nothing(load):
    keys = {"enable_ar_bucket": False, "min_ar": 0.5, "num_ar_buckets": 7, "frame_buckets": [1], "shuffle_tags": False}
    assert load(dataset=keys).notes == ()


def test_notes_name_the_file_the_key_and_what_does_its_job(load):
    (note,) = load({"blocks_to_swap": 20}).notes
    assert "main.toml: blocks_to_swap: " in note
    assert "activation_checkpointing" in note
