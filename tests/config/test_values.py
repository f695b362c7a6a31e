"""A valid configuration and the values that follow from it."""

import dataclasses
import json
import math
import operator
import os
from pathlib import Path

import pytest

from anima_jax.config.load import load_config
from anima_jax.config.optimizer import Schedule
from anima_jax.config.sizes import Size
from anima_jax.data.buckets import Bucketing
from anima_jax.models.dit import DiTConfig
from anima_jax.models.llm_adapter import LLMAdapterConfig
from tests.config.files import REMOVE, write

FRESH = {"model.transformer_path": REMOVE, "model.config": {}}
AR_KEYS = {"min_ar": 0.5, "max_ar": 2.0, "num_ar_buckets": 7}

SOURCE_DEFAULTS = {
    "size_buckets": (),
    "min_ar": None,
    "max_ar": None,
    "num_ar_buckets": None,
    "ar_buckets": (),
    "enable_ar_bucket": False,
    "frame_buckets": (1,),
    "num_repeats": 1.0,
    "subsample_ratio": 1.0,
    "caption_prefix": "",
    "skip_empty_caption": True,
    "caption_choice": "each",
    "caption_mode": "tags",
    "mixed_weights": {"tags": 50.0, "nl": 10.0, "tags_nl": 20.0, "nl_tags": 20.0},
    "shuffle_tags": False,
    "cache_shuffle_num": 0,
    "cache_shuffle_delimiter": ", ",
    "keep_tokens": 0,
    "keep_tokens_separator": "",
    "nl_shuffle_sentences": False,
    "nl_keep_first_sentence": False,
    "tag_dropout": 0.0,
    "protected_tags": (),
    "protected_tags_file": None,
    "mask_path": None,
    "default_mask_file": None,
    "control_path": None,
    "inpaint_mask_path": None,
    "inpaint_masks": None,
    "caption_extension": None,
    "captions_file": None,
    "online_captions": False,
}
"""What a `[[directory]]` has besides its path and resolutions if nothing is set."""

FOLDER_KEYS = {
    *("mask_path", "default_mask_file", "online_captions", "caption_extension", "captions_file"),
    *("control_path", "inpaint_mask_path"),
}
"""The keys that a `[[tfds]]` does not have."""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load the small configuration with changes, from another folder than its own."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return lambda changes=None, dataset=None, overrides=(): load_config(write(tmp_path, changes, dataset), overrides)


DEFAULTS = json.loads((Path(__file__).parents[1] / "golden" / "diffusion_pipe_defaults.json").read_text())
"""Table → key → default, and the file of diffusion-pipe that it comes from."""


@pytest.mark.parametrize(
    ("table", "key", "default"),
    [(table, key, row["default"]) for table, rows in DEFAULTS.items() if table != "about" for key, row in rows.items()],
)
def test_a_default_is_that_of_diffusion_pipe(load, table, key, default):
    config = load({"adapter": {"type": "lora", "rank": 4}} if table == "adapter" else {})
    tables = {"main": config, "directory": config.data.directory[0]}
    found = getattr(tables[table] if table in tables else getattr(config, table), key)
    assert (list(found) if isinstance(found, tuple) else found) == default


OURS = {
    "seed": 0,
    "ema_decay": None,
    "global_batch_size": None,
    "param_dtype": "float32",
    "remat": "none",
    "remat_every": 1,
    "scan_unroll": 1,
    "max_checkpoints": None,
    "max_skipped_steps": 10,
    "map_num_proc": min(8, os.cpu_count() or 1),
    "compilation_cache_dir": None,
    "cache_dir": None,
    "cache_local_dir": None,
    "cached_dtype": "bfloat16",
    "trust_cache": False,
    "strict_data": False,
    "resume_from_checkpoint": None,
    "reset_dataloader": False,
    "reset_optimizer": False,
    "reset_optimizer_params": False,
    "loss": ("mse", 0.0),
    "messages": (),
    "model.transformer_dtype": None,
    "model.max_caption_tokens": 512,
    "monitoring.enable_tensorboard": True,
}


@pytest.mark.parametrize(("key", "default"), OURS.items(), ids=OURS)
def test_our_own_keys_change_nothing_unless_set(load, key, default):
    assert operator.attrgetter(key)(load()) == default


def test_a_directory_has_one_size_and_its_captions_unchanged_unless_set(load):
    config = load()
    (source,) = config.data.sources
    assert source is config.data.directory[0]
    assert Bucketing.of(source) == Bucketing((512,), (1,), (1,))
    assert source.model_dump(exclude={"path", "resolutions"}) == SOURCE_DEFAULTS
    assert source.shuffled_copies == 0


@pytest.mark.parametrize(
    ("keys", "remat"),
    [
        ({"activation_checkpointing": False}, "none"),
        ({"activation_checkpointing": True}, "full"),
        ({"activation_checkpointing": "unsloth"}, "offload"),
        ({"activation_checkpointing": True, "remat": "attention"}, "attention"),
        ({"remat": "dots"}, "dots"),
    ],
)
def test_remat_follows_from_activation_checkpointing_unless_set(load, keys, remat):
    assert load(keys).remat == remat


@pytest.mark.parametrize(
    ("changes", "overrides", "which"),
    [
        ({"resume_from_checkpoint": True}, [], ""),
        ({}, ["resume_from_checkpoint=true"], ""),
        ({}, ["resume_from_checkpoint="], ""),
        ({"resume_from_checkpoint": False}, [], None),
        ({"resume_from_checkpoint": True}, ["resume_from_checkpoint=20260101_12-00-00"], "20260101_12-00-00"),
    ],
)
def test_the_run_to_resume(load, changes, overrides, which):
    assert load(changes, overrides=overrides).resume_from_checkpoint == which


def test_samples_are_drawn_every_500_steps_or_by_epochs(load):
    sample = {"prompts": ["a"]}
    for keys, every in (({}, (None, 500)), ({"every_n_epochs": 2}, (2, None)), ({"every_n_steps": 9}, (None, 9))):
        found = load({"sample": sample | keys}).sample
        assert found is not None
        assert (found.every_n_epochs, found.every_n_steps) == every


def test_the_compilation_cache_is_in_a_folder_or_off(load, tmp_path):
    assert load({"compilation_cache_dir": ""}).compilation_cache_dir == ""
    assert load({"compilation_cache_dir": "xla"}).compilation_cache_dir == str(tmp_path / "elsewhere" / "xla")


def test_a_text_encoder_may_be_a_folder_written_by_transformers(load, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "qwen"
    transformers.Qwen3Config().save_pretrained(folder)
    (folder / "model.safetensors").touch()
    assert load({"model.llm_path": "qwen"}).model.llm_path == str(folder / "model.safetensors")


def test_unlisted_keys_are_options_of_the_optimizer(load):
    optimizer = load({"optimizer": {"type": "Lion", "lr": 1, "b1": 0.8, "mask": {"a": [1]}}}).optimizer
    assert (optimizer.type, optimizer.options) == ("lion", {"b1": 0.8, "mask": {"a": [1]}})
    assert (optimizer.betas, optimizer.weight_decay, optimizer.eps) == (None, None, None)


def test_an_integer_is_accepted_where_a_float_is_expected(load):
    config = load({"optimizer.lr": 1, "gradient_clipping": 0})
    assert (config.optimizer.lr, config.gradient_clipping) == (1.0, 0.0)
    assert isinstance(config.optimizer.lr, float)


def test_optimizer_types_are_case_insensitive(load):
    assert load({"optimizer.type": "AdamW"}).optimizer.type == "adamw"


def test_a_byte_order_mark_and_windows_line_endings_change_nothing(tmp_path):
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
    assert forced.schedule == Schedule("constant", 0)


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


def test_paths_are_relative_to_the_current_directory_first_then_to_the_file(load, tmp_path):
    beside = str(tmp_path / "dit.safetensors")
    assert load().model.transformer_path == beside
    (tmp_path / "elsewhere" / "dit.safetensors").touch()
    assert load().model.transformer_path == str(tmp_path / "elsewhere" / "dit.safetensors")
    assert load({"model.transformer_path": beside}).model.transformer_path == beside
    assert load().output_dir == str(tmp_path / "elsewhere" / "runs")


def test_paths_in_a_dataset_toml_are_relative_to_its_own_folder(load, tmp_path):
    load()
    (tmp_path / "data" / "mine").mkdir(parents=True)
    (tmp_path / "data" / "set.toml").write_text("resolutions = [512]\n[[directory]]\npath = 'mine'")
    assert load({"dataset": "data/set.toml"}).data.directory[0].path == str(tmp_path / "data" / "mine")


def test_addresses_stay_unchanged(load):
    addresses = {"model.transformer_path": "hf://owner/repo/dit.safetensors", "cache_dir": "gs://bucket/cache"}
    config = load({**addresses, "model.vae_path": "gs://bucket/vae.safetensors", "cache_local_dir": "copies"})
    assert config.model.transformer_path == "hf://owner/repo/dit.safetensors"
    assert config.model.vae_path == "gs://bucket/vae.safetensors"
    assert config.cache_dir == "gs://bucket/cache"


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
    expected = {
        "optimizer.lr": 1e-4,
        "optimizer.betas": (0.8, 0.9),
        "model.dtype": "float32",
        "seed": 7,
        "adapter.type": "lora",
        "adapter.rank": 4,
        "sample.prompts": ("a = b",),
    }
    assert {key: operator.attrgetter(key)(config) for key in expected} == expected
    assert config.output_dir.endswith("/2026-08-01")


def test_the_last_override_of_a_key_wins(load):
    assert load(overrides=["epochs=5", "epochs=6"]).epochs == 6


def test_a_directory_overrides_shared_keys(load, tmp_path):
    load()
    (tmp_path / "more").mkdir()
    directories = [{"path": "pictures"}, {"path": "more", "num_repeats": 0.5, "caption_prefix": ""}]
    shared = {"num_repeats": 3, "caption_prefix": "art, ", "skip_empty_caption": False}
    first, second = load(dataset={**shared, "directory": directories}).data.directory
    assert (first.num_repeats, first.caption_prefix, first.skip_empty_caption) == (3.0, "art, ", False)
    assert (second.num_repeats, second.caption_prefix, second.skip_empty_caption) == (0.5, "", False)


@pytest.mark.parametrize(
    ("resolution", "side"),
    [(512, 512), (500, 496), (500.5, 496), (16, 16), ([1280, 720], 960), ([448, 576], 512), ([1000, 900], 944)],
)
def test_a_resolution_is_an_area(load, resolution, side):
    config = load(dataset={"resolutions": [resolution]})
    # Of all multiples of 16, none is nearer to the square root of the area.
    area = math.prod(resolution) if isinstance(resolution, list) else resolution**2
    nearest = min(range(16, 2048, 16), key=lambda other: abs(other - math.sqrt(area)))
    ((size, resolution_of_it, _),) = Bucketing.of(config.data.directory[0]).place(700, 400, 1)
    assert size == (side, side, 1) == (nearest, nearest, 1)
    assert resolution_of_it == pytest.approx(math.sqrt(area), abs=5e-4)  # three decimals
    assert config.data.size_wh == (side, side)


def test_a_rounded_resolution_has_one_message(load):
    directories = [{"path": "pictures"}, {"path": "pictures"}]
    config = load(dataset={"resolutions": [500, 512, [1280, 720]], "directory": directories})
    (message,) = config.messages
    assert "resolutions: 500 is an area: images are 496 × 496; (1280, 720) is an area: images are 960 × 960" in message


@pytest.mark.parametrize(
    ("keys", "bucketing"),
    [
        (AR_KEYS, Bucketing((512,), tuple(2 ** ((step - 3) / 3) for step in range(7)), (1,))),
        ({"ar_buckets": [[512, 512], [448, 576], 1.5]}, Bucketing((512,), (1, 448 / 576, 1.5), (1,))),
        ({"ar_buckets": [2], **AR_KEYS}, Bucketing((512,), (2,), (1,))),
        (
            {"ar_buckets": [2], "frame_buckets": [33, 17], "resolutions": [1024, 512]},
            Bucketing((512, 1024), (2,), (1, 17, 33)),
        ),
        (
            {"size_buckets": [[640, 384, 33], [512, 512, 1]]},
            Bucketing((), (), (), (Size(640, 384, 33), Size(512, 512, 1))),
        ),
    ],
)
def test_keys_of_sizes_become_a_bucketing(load, keys, bucketing):
    (source,) = load(dataset={"enable_ar_bucket": True, **keys}).data.sources
    assert Bucketing.of(source) == bucketing


def test_more_than_three_resolutions_are_allowed_with_the_flag_or_size_buckets(tmp_path):
    path = write(tmp_path, dataset={"resolutions": [256, 512, 768, 1024]})
    config = load_config(path, i_know_what_i_am_doing=True)
    assert Bucketing.of(config.data.directory[0]).resolutions == (256, 512, 768, 1024)
    # Size buckets replace resolutions.
    assert load_config(write(tmp_path, dataset={"resolutions": [64, 65, 66, 67], "size_buckets": [[64, 64, 1]]}))


def test_samples_have_the_largest_size_of_any_source(load):
    directories = [
        {"path": "pictures"},
        {"path": "pictures", "resolutions": [256, 768]},
        {"path": "pictures", "size_buckets": [[640, 384, 33], [512, 496, 1]]},
    ]
    config = load(
        {"sample": {"prompts": ["a"]}}, {"directory": directories, "tfds": [{"name": "a", "resolutions": [64]}]}
    )
    assert [Bucketing.of(source).sizes[-1] for source in config.data.sources] == [
        (512, 512, 1),
        (768, 768, 1),
        (512, 496, 1),
        (64, 64, 1),
    ]
    assert config.data.size_wh == config.sample_size_wh == (768, 768)
    assert load(dataset={"directory": [directories[2]]}).data.size_wh == (512, 496)


def test_caption_and_mask_keys_reach_the_sources_that_have_them(load, tmp_path):
    load()
    (tmp_path / "masks").mkdir()
    shared = {
        "shuffle_tags": True,
        "cache_shuffle_delimiter": "; ",
        "subsample_ratio": 0.5,
        "caption_choice": "random",
        "mask_path": "masks",
        "default_mask_file": "dit.safetensors",
        "online_captions": True,
    }
    own = {"path": "pictures", "cache_shuffle_num": 3, "num_repeats": 2}
    sources = {"directory": [{"path": "pictures"}, own], "tfds": [{"name": "a", "caption_prefix": "b "}]}
    masks = {"mask_path": str(tmp_path / "masks"), "default_mask_file": str(tmp_path / "dit.safetensors")}
    for_all = {key: shared[key] for key in ("cache_shuffle_delimiter", "subsample_ratio", "caption_choice")}
    for_all = SOURCE_DEFAULTS | for_all | {"shuffle_tags": True}
    for_folders = for_all | masks | {"online_captions": True}
    one, other, tfds = load(dataset=shared | sources).data.sources
    assert one.model_dump(exclude={"path", "resolutions"}) == for_folders
    assert other.model_dump(exclude={"path", "resolutions"}) == for_folders | {
        "cache_shuffle_num": 3,
        "num_repeats": 2.0,
    }
    common = for_all | {"caption_prefix": "b "}
    assert {key: getattr(tfds, key) for key in common if key in type(tfds).model_fields} == {
        key: value for key, value in common.items() if key not in FOLDER_KEYS
    }
    assert [source.shuffled_copies for source in (one, other, tfds)] == [1, 3, 1]


@pytest.mark.parametrize(("keys", "copies"), [({}, 0), ({"shuffle_tags": True}, 1), ({"cache_shuffle_num": 2}, 2)])
def test_tag_keys_do_not_depend_on_cached_text(load, keys, copies):
    (source,) = load({"model.cache_text_embeddings": False}, {"tag_dropout": 0.25, **keys}).data.sources
    assert (source.shuffled_copies, source.tag_dropout) == (copies, 0.25)
    (cached,) = load({}, keys).data.sources
    assert cached.shuffled_copies == copies


def test_keys_of_the_cache_are_kept(load, tmp_path):
    keys = {
        "cache_dir": "gs://bucket/cache",
        "cache_local_dir": "scratch",
        "cache_dtype": "float16",
        "trust_cache": True,
        "regenerate_cache": True,
        "strict_data": True,
    }
    config = load(keys)
    assert config.cache_dir == "gs://bucket/cache"
    assert config.cache_local_dir == str(tmp_path / "elsewhere" / "scratch")
    assert (config.cached_dtype, config.compute_dtype) == ("float16", "bfloat16")
    assert (config.trust_cache, config.regenerate_cache, config.strict_data) == (True, True, True)
    assert load({"model.dtype": "float32"}).cached_dtype == "float32"


def test_a_tfds_source_has_defaults(load):
    config = load(dataset={"directory": REMOVE, "tfds": [{"name": "anima_shapes"}]})
    (source,) = config.data.sources
    assert source == config.data.tfds[0]
    assert (source.name, source.split, source.image, source.caption) == ("anima_shapes", "train", "image", "caption")


def test_unset_sizes_are_those_of_the_released_model(load):
    assert load(FRESH).model.config == DiTConfig()


def test_unset_sizes_keep_the_proportions(load):
    sizes = load(FRESH | {"model.config": {"width": 256, "context_width": 128, "adapter": {"blocks": 2}}}).model.config
    adapter = LLMAdapterConfig(width=128, blocks=2, heads=2, mlp_width=512, target_width=128)
    assert sizes == DiTConfig(width=256, heads=2, mlp_width=1024, context_width=128, adapter=adapter)


def test_sizes_are_dumped_as_their_keys(load):
    """Checkpoints store the configuration so, to compare it with that of a resumed run."""
    assert load(FRESH).model_dump(mode="json")["model"]["config"] == dataclasses.asdict(DiTConfig())


def test_samples_have_the_size_of_the_training_images_unless_set(load):
    prompts = {"prompts": ["a"]}
    assert load({"sample": prompts}).sample_size_wh == (512, 512)
    assert load({"sample": {**prompts, "width": 256, "height": 128}}).sample_size_wh == (256, 128)


def test_configurations_are_frozen(load):
    config = load()
    with pytest.raises(ValueError, match="frozen"):
        config.epochs = 5


OFF = "does nothing here: enable_ar_bucket is not true"
SIZED = {"path": "pictures", "size_buckets": [[512, 512, 1]]}


@pytest.mark.parametrize(
    ("dataset", "messages"),
    [
        ({"enable_ar_bucket": False, **AR_KEYS}, [f"{key}: {OFF}" for key in AR_KEYS]),
        ({**AR_KEYS, "enable_ar_bucket": True, "directory": [{"path": "pictures"}, SIZED]}, []),
        (
            {"frame_buckets": [1, 33], "directory": [SIZED]},
            [f"{key}: does nothing here: size_buckets is set" for key in ("resolutions", "frame_buckets")],
        ),
        (
            {"enable_ar_bucket": True, "ar_buckets": [1.0], "directory": [{"path": "pictures", "min_ar": 1}]},
            ["directory[0].min_ar: does nothing here: ar_buckets is set"],
        ),
    ],
)
def test_keys_without_effect_have_a_message_unless_another_source_needs_them(load, dataset, messages):
    assert [message.partition("dataset.toml: ")[2] for message in load(dataset=dataset).messages] == messages


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            {"frame_buckets": [1, 32, 33, 36]},
            "frame_buckets: the VAE takes 1 + 4n frames: of 32 the first 29, of 36 the ",
        ),
        (
            {"resolutions": REMOVE, "size_buckets": [[64, 64, 8]]},
            "size_buckets: the VAE takes 1 + 4n frames: of 8 the f",
        ),
    ],
)
def test_frames_that_the_vae_does_not_use_have_a_message(load, dataset, message):
    (found,) = load(dataset=dataset).messages
    assert message in found


def test_messages_name_the_file_the_key_and_what_does_its_job(load):
    (message,) = load({"blocks_to_swap": 20}).messages
    assert "main.toml: blocks_to_swap: " in message
    assert "activation_checkpointing" in message


def test_keys_of_forks_are_accepted_unless_they_ask_for_something_missing_here(load):
    fork = {"model.llm_path": REMOVE, "model.qwen_path": "llm.safetensors", "model.qwen_nf4": True}
    asks_for_nothing = {"train_mlp": True, "shuffle_tags": False, "tag_delimiter": ", ", "tag_dropout_percent": 0.0}
    config = load(fork | {f"model.{key}": value for key, value in asks_for_nothing.items()})
    assert [message.split(": ", 1)[1] for message in config.messages] == [
        "model.qwen_path: is taken as model.llm_path",
        "model.qwen_nf4: is taken as model.text_encoder_nf4",
    ]
    assert config.model.text_encoder_nf4
    assert config.model.llm_path.endswith("llm.safetensors")
