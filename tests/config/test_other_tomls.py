"""TOMLs as forks, guides and GUIs of diffusion-pipe have them load and mean what they mean there.

Written anew after files that exist: of four forks, of guides and single runs, of GUIs that write TOMLs, and of
sd-scripts, whose keys are answered with ours.
"""

import operator
import re

import pytest

from anima_jax.config import other_trainers, unsupported_keys
from anima_jax.config.dataset import DatasetConfig
from anima_jax.config.load import load_config
from anima_jax.config.main import MainConfig
from anima_jax.config.schema import key_table
from anima_jax.config.unsupported_keys import IN_DATASET, set_aside
from anima_jax.errors import UserError
from anima_jax.training import optimizers
from tests.config.files import MODEL, write

HEAD = "output_dir = 'runs'\ndataset = 'dataset.toml'\nepochs = 3\n"
OLD_MODEL = MODEL.replace("llm_path", "qwen_path")
LORA = "[adapter]\ntype = 'lora'\nrank = 16\ndtype = 'bfloat16'\n"
OPTIMIZER = "[optimizer]\ntype = 'adamw_optimi'\nlr = 2e-5\nbetas = [0.9, 0.99]\n"
DATASET = "resolutions = [512]\n[[directory]]\npath = 'pictures'\n"

MIXED = f"""{HEAD}
train_llm_adapter = false
{OLD_MODEL}
shift = 3.0
cache_text_embeddings = false
shuffle_tags = true
tag_delimiter = '; '
tag_dropout_percent = 0.1
shuffle_keep_first_n = 2
protected_tags_file = 'protected.txt'
caption_dropout_percent = 0.05
caption_mode = 'mixed'
mixed_weights = {{ tags = 60, nl = 40 }}
nl_shuffle_sentences = true
nl_keep_first_sentence = true
debug_caption_processing = false
debug_caption_interval = 100
caching_batch_size = 5
qwen_nf4 = true
{LORA}
[optimizer]
type = 'AdamW8bitKahan'
lr = 3e-5
"""

CACHED = f"""{HEAD}
activation_checkpointing = 'unsloth'
caching_batch_size = 1
{OLD_MODEL}
cache_text_embeddings = true
shuffle_tags = true
tag_dropout_percent = 0.1
caption_dropout_percent = 0.05
caption_mode = 'tags'
train_self_attn = true
train_cross_attn = true
train_mlp = false
train_adaln = false
train_llm_adapter = false
qwen_nf4 = false
{LORA}
{OPTIMIZER}
[monitoring]
enable_wandb = false
"""

TAGS = f"""{HEAD}
eval_every_n_epochs = 100000
checkpoint_every_n_minutes = 999999
{OLD_MODEL}
llm_adapter_lr = 0
cache_text_embeddings = false
shuffle_tags = false
tag_delimiter = ', '
shuffle_keep_first_n = 1
tag_dropout_percent = 0
caption_dropout_percent = 0.1
caption_mode = 'tags'
{OPTIMIZER}
"""

FULL_MATRIX = f"""{HEAD}
sample = 'prompts.toml'
sample_every_n_epochs = 2
sample_at_first = true
output_name = 'anima-test'
compile = true
map_num_proc = 8
{MODEL}
llm_adapter_lr = 0
sigmoid_scale = 1.0
[adapter]
type = 'lokr'
rank = 8
factor = 8
preset = 'full'
full_matrix = true
{OPTIMIZER}
"""

COSMOS = f"""{HEAD}
bench = true
{MODEL.replace("anima", "cosmos_predict2")}
[adapter]
type = 'lokr'
rank = 6
factor = -1
[optimizer]
type = 'adamw'
lr = 3e-5
"""

FLOATS = f"""{HEAD}
warmup_steps = 1e2
micro_batch_size_per_gpu = [[512.0, 4.0], [1024, 1]]
{MODEL}
[adapter]
type = 'lokr'
rank = 1e6
decompose_factor = 4.0
{OPTIMIZER}
"""

GUI = f"""{HEAD}
batch_fill_strategy = 'fill'
freeze_llm_adapter = true
{MODEL}
diffusion_model_dtype = 'float8'
flow_use_ot = false
contrastive_flow_lambda = 0
[adapter]
type = 'LoCon'
dim = 32
weight_decompose = false
conv_dim = 0
module_dropout = 0.0
loraplus_lr_ratio = 1
{OPTIMIZER}
[debug]
log_grad_norm = false
"""

RANDOM_CAPTIONS = """
resolutions = [1024]
enable_random_caption = true
keep_tokens = 1
keep_tokens_separator = '|||'
cache_shuffle_num = 4
keep_latent_cache = false
multiline_captions = false
[[directory]]
path = 'pictures'
caption_extension = 'txt'
"""

PREVIEWS = f"""{HEAD}
max_checkpoints_to_keep = 3
lr_scheduler = 'cosine'
[lr_scheduler_args]
lr_min = 0.0
{MODEL.replace("'anima'", "'cosmos_predict2'")}
[adapter]
type = 'lycoris_dora'
rank = 8
{OPTIMIZER}
[preview]
enabled = true
prompts = ["a red circle", {{ name = "blue", prompt = "a blue square", seed = 3 }}]
negative_prompt = "grey"
preview_every_n_epochs = 2
preview_save_png = true
num_inference_steps = 20
guidance_scale = 5
seed = 42
"""

PER_EPOCH = """
resolutions = [1024]
caption_sampling = 'random_per_epoch'
shuffle_caption = true
[[directory]]
path = 'pictures'
[[directory]]
path = 'pictures'
caption_sampling = 'all'
"""

PROMPTS = """
width = 1024
height = 768
num_inference_steps = 32
guidance_scale = 4
seed = 24
[[prompts]]
prompt = 'a red circle'
negative_prompt = 'blurred'
[[prompts]]
prompt = 'a blue square'
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load a main TOML of this text, with a dataset TOML and the files that they name."""
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path)
    (tmp_path / "protected.txt").write_text("solo\n")
    (tmp_path / "prompts.toml").write_text(PROMPTS)

    def loaded(main, dataset=DATASET):
        path.write_text(main)
        (tmp_path / "dataset.toml").write_text(dataset)
        return load_config("main.toml", check_optimizer=optimizers.check)

    return loaded


@pytest.fixture
def errors(load):
    def found(*texts):
        with pytest.raises(UserError) as caught:
            load(*texts)
        return caught.value.messages

    return found


def frozen(config):
    return {group for group, rate in config.learning_rates.items() if not rate}


MEANINGS = {
    "mixed captions": (
        (MIXED,),
        {
            "uncond_fraction": 0.05,
            "caching_batch_size": 5,
            "model.text_encoder_nf4": True,
            "model.llm_adapter_lr": 0,
            "adapter.rank": 16,
            "data.directory": {
                "shuffle_tags": True,
                "cache_shuffle_delimiter": "; ",
                "tag_dropout": 0.1,
                "keep_tokens": 2,
                "all_protected_tags": {"solo"},
                "caption_mode": "mixed",
                # The fork's code reads a weight that is not named as 50, 10, 20 and 20.
                "mixed_weights": {"tags": 60, "nl": 40, "tags_nl": 20, "nl_tags": 20},
                "nl_shuffle_sentences": True,
                "nl_keep_first_sentence": True,
            },
        },
    ),
    "cached captions": (
        (CACHED,),
        {
            "uncond_fraction": 0.05,
            "remat": "offload",
            "model.mlp_lr": 0,
            "model.mod_lr": 0,
            "model.llm_adapter_lr": 0,
            "model.self_attn_lr": None,
            "model.text_encoder_nf4": False,
            "data.directory": {"shuffle_tags": False, "tag_dropout": 0},
        },
    ),
    "a full fine-tune on tags": (
        (TAGS,),
        {"uncond_fraction": 0.1, "adapter": None, "data.directory": {"keep_tokens": 1, "caption_mode": "tags"}},
    ),
    "a LoKr of full matrices, with a file of prompts": (
        (FULL_MATRIX, RANDOM_CAPTIONS),
        {
            "adapter.rank": 10**6,
            "adapter.decompose_factor": 8,
            "output_name": "anima-test",
            "sample.prompts": ("a red circle", "a blue square"),
            "sample.negative_prompts": ("blurred", ""),
            "sample.every_n_epochs": 2,
            "sample.every_n_steps": None,
            "sample.steps": 32,
            "sample.guidance_scale": 4,
            "sample.seeds": (24,),
            "sample.width": 1024,
            "sample.height": 768,
            "data.directory": {"caption_choice": "random", "keep_tokens": 1, "keep_tokens_separator": "|||"},
        },
    ),
    "Anima as Cosmos-Predict2": ((COSMOS,), {"model.type": "anima", "adapter.decompose_factor": -1}),
    "floats for whole numbers": (
        (FLOATS,),
        {"adapter.rank": 10**6, "adapter.decompose_factor": 4, "micro_batch_size_per_gpu": ((512, 4), (1024, 1))},
    ),
    "previews": (
        (PREVIEWS,),
        {
            "adapter.type": "dora",
            "max_checkpoints": 3,
            "lr_scheduler_min_lr": 0,
            "sample.prompts": ("a red circle", "a blue square"),
            "sample.negative_prompts": ("grey", "grey"),
            "sample.every_n_epochs": 2,
            "sample.steps": 20,
            "sample.guidance_scale": 5,
            "sample.seeds": (42,),
        },
    ),
    "a GUI's file": (
        (GUI, PER_EPOCH),
        {
            "adapter.type": "lora",
            "adapter.rank": 32,
            "model.transformer_dtype": "float8",
            "model.llm_adapter_lr": 0,
            "data.directory": {"caption_choice": "random", "shuffle_tags": True},
        },
    ),
}


@pytest.mark.parametrize(("texts", "meaning"), MEANINGS.values(), ids=MEANINGS)
def test_a_toml_of_a_fork_loads_and_means_the_same(load, texts, meaning):
    config = load(*texts)
    source = config.data.directory[0]
    found = {key: operator.attrgetter(key)(config) for key in meaning if key != "data.directory"}
    expected = {key: value for key, value in meaning.items() if key != "data.directory"}
    captions = meaning.get("data.directory", {})
    assert found == expected
    assert {key: getattr(source, key) for key in captions} == captions


def test_a_key_that_is_taken_has_a_note_with_our_key(load):
    notes = [message.split(": ", 1)[1] for message in load(CACHED).messages]
    assert notes == [
        "model.qwen_path: is taken as model.llm_path",
        "model.shuffle_tags: does nothing here: captions are cached and never change; it needs "
        "cache_text_embeddings = false",
        "model.tag_dropout_percent: does nothing here: captions are cached and never change; it needs "
        "cache_text_embeddings = false",
        "model.caption_dropout_percent: is taken as uncond_fraction",
        "model.train_mlp: is taken as model.mlp_lr = 0",
        "model.train_adaln: is taken as model.mod_lr = 0",
        "model.train_llm_adapter: is taken as model.llm_adapter_lr = 0",
    ]


@pytest.mark.parametrize("table", ["", "model.", "adapter."])
@pytest.mark.parametrize(
    ("key", "group"),
    [("self_attn", "self_attn"), ("cross_attn", "cross_attn"), ("mlp", "mlp"), ("adaln", "mod"), ("llm_adapter",) * 2],
)
def test_a_part_that_is_not_trained_has_the_rate_0(load, table, key, group):
    name = table.removesuffix(".")
    line = f"train_{key} = false\n"
    text = HEAD + (line if not name else "") + MODEL + (line if name == "model" else "") + LORA
    config = load(text + (line if name == "adapter" else "") + OPTIMIZER)
    assert frozen(config) == {group}
    assert [message.split(": ")[1] for message in config.messages] == [f"{table}train_{key}"]


REFUSED = [
    ("flow_use_ot = true", "model.flow_use_ot: noise is drawn for each example alone"),
    ("cfm_enabled = true", "model.cfm_enabled: the loss is that of diffusion-pipe"),
    ("train_text_encoder = true", "model.train_text_encoder: expected a rate: text_encoder_lr in [adapter]"),
    ("train_mlp = 'no'", "model.train_mlp: found 'no', expected false"),
    ("epochs = 3", "model.epochs: unknown key; it belongs at the top of the file, above every [table]"),
    ("shuffle_caption = true", "model.shuffle_caption: unknown key; here it is shuffle_tags in the dataset TOML"),
    ("num_repeats = 2", "model.num_repeats: unknown key; it belongs in the dataset TOML"),
    (
        "caption_dropout_percent = 7",
        "model.caption_dropout_percent: as uncond_fraction: found 7 (a whole number), expe",
    ),
    ("qwen_path = 'other'", "model.qwen_path: is taken as model.llm_path, which is set too; expected one of the two"),
]


@pytest.mark.parametrize(("line", "message"), REFUSED, ids=[line for line, _ in REFUSED])
def test_a_key_that_asks_for_something_else_is_named_with_ours(errors, line, message):
    (found,) = errors(HEAD + MODEL + line + "\n" + OPTIMIZER)
    assert message in found


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("full_matrix = true", "adapter.full_matrix: belongs to type = 'lokr'"),
        ("weight_decompose = true", "adapter.weight_decompose: expected type = 'dora'"),
        ("preset = 'attn-only'", "adapter.preset: expected target_modules"),
        ("network_alpha = 8", "adapter.network_alpha: unknown key; here it is alpha in [adapter]"),
        ("rs_lora = true", "adapter.rs_lora: expected alpha"),
    ],
)
def test_a_variant_of_an_adapter_is_named_with_our_key(errors, line, message):
    (found,) = errors(HEAD + MODEL + LORA + line + "\n" + OPTIMIZER)
    assert message in found


def test_an_unknown_optimizer_is_judged_before_its_arguments(load, errors):
    (found,) = errors(HEAD + MODEL + "[optimizer]\ntype = 'unheard_of'\nlr = 'fast'\nfoo = 1\n")
    assert "type = 'unheard_of' is not known" in found
    (found,) = errors(HEAD + MODEL + OPTIMIZER + "warmup_steps = 100\n")
    assert "[optimizer] warmup_steps: unknown key; it belongs at the top of the file, above every [table]" in found
    # diffusion-pipe's own example sets no rate for this one.
    assert load(HEAD + MODEL + "[optimizer]\ntype = 'automagic'\nweight_decay = 0.01\n").optimizer.lr == 1e-6


def test_a_file_of_prompts_is_needed_only_if_it_is_named(load, errors):
    (found,) = errors(FULL_MATRIX.replace("prompts.toml", "no.toml"))
    assert "sample: expected a [sample] table, or the file of one; found nothing at no.toml" in found
    assert load(HEAD + "sample = ''\n" + MODEL + OPTIMIZER).sample is None
    assert load(PREVIEWS.replace("enabled = true", "enabled = false")).sample is None
    (message,) = load(HEAD + "sample_every_n_epochs = 1\n" + MODEL + OPTIMIZER).messages
    assert (
        "sample_every_n_epochs: does nothing here: it means sample.every_n_epochs, but there is no [sample]" in message
    )


# ---- sd-scripts and other trainers ---------------------------------------------------------------------------------

SD_SCRIPTS = """
pretrained_model_name_or_path = 'dit.safetensors'
qwen3 = 'llm.safetensors'
output_dir = 'runs'
max_train_epochs = 10
train_batch_size = 2
learning_rate = 1e-4
optimizer_type = 'AdamW8bit'
network_dim = 16
mixed_precision = 'bf16'
gradient_checkpointing = true
loss_type = 'huber'
noise_offset = 0.1
flip_aug = false
min_snr_gamma = 0
[sample_arguments]
sample_prompts = 'prompts.txt'
nonsense = 3
"""

SD_DATASET = """
[general]
shuffle_caption = true
keep_tokens = 1
[[datasets]]
resolution = 1024
  [[datasets.subsets]]
  image_dir = 'pictures'
  num_repeats = 10
  flip_aug = false
"""


def test_keys_of_sd_scripts_are_answered_with_ours(errors):
    found = dict(line.removeprefix("main.toml: ").split(": ", 1) for line in errors(SD_SCRIPTS))
    expected = {
        "pretrained_model_name_or_path": "transformer_path in [model]",
        "qwen3": "llm_path in [model]",
        "max_train_epochs": "here it is epochs",
        "train_batch_size": "micro_batch_size_per_gpu",
        "learning_rate": "lr in [optimizer]",
        "optimizer_type": "type in [optimizer]",
        "network_dim": "rank in [adapter]",
        "mixed_precision": "dtype in [model]",
        "gradient_checkpointing": "activation_checkpointing",
        "loss_type": "huber_delta, smooth_l1_beta or pseudo_huber_c",
        "noise_offset": "rectified flow",
        "sample_arguments.sample_prompts": "prompts in [sample]",
        "sample_arguments.nonsense": "unknown key",
    }
    missing = {"dataset", "epochs", "model", "optimizer"}
    assert found.keys() == expected.keys() | missing
    assert [key for key, answer in expected.items() if answer not in found[key]] == []


def test_a_dataset_toml_of_sd_scripts_is_answered_with_ours(errors):
    found = dict(
        line.split("dataset.toml: ")[1].split(": ", 1) for line in errors(HEAD + MODEL + OPTIMIZER, SD_DATASET)
    )
    expected = {
        "general": "keys for all folders are at the top of the file",
        "general.shuffle_caption": "here it is shuffle_tags",
        "general.keep_tokens": "here it is keep_tokens",
        "datasets": "each folder is a [[directory]]",
        "datasets[0].resolution": "here it is resolutions, as [1024]",
        "datasets[0].subsets": "each folder is a [[directory]]",
        "datasets[0].subsets[0].image_dir": "path in a [[directory]]",
        "datasets[0].subsets[0].num_repeats": "it belongs at the top of the file",
        "tfds": "expected at least one [[directory]]",
    }
    assert found.keys() == expected.keys()
    assert [key for key, answer in expected.items() if answer not in found[key]] == []


OURS = {key.split(".")[-1] for schema in (MainConfig, DatasetConfig) for key in key_table(schema)}


def test_every_answer_names_keys_that_exist():
    named = {
        word for ours in other_trainers.NAMED for word in re.findall(r"(?<!')\b[a-z]+(?:_[a-z0-9]+)+\b(?!')", ours)
    }
    assert named - {"weight_decay"} <= OURS
    first = {re.match(r"\[?(\w+)", ours)[1] for ours in other_trainers.NAMED}
    assert first <= OURS


def test_no_key_of_ours_is_taken_for_another_trainers():
    top = {key for schema in (MainConfig, DatasetConfig) for key in key_table(schema) if "." not in key}
    assert not top & other_trainers.HERE.keys()
    every = [key for keys in (*other_trainers.NAMED.values(), *other_trainers.ABSENT.values()) for key in keys.split()]
    assert len(every) == len(set(every))


ROWS = {
    **unsupported_keys.MAIN,
    **unsupported_keys.CAPTIONS,
    **unsupported_keys.DATASET,
    **unsupported_keys.SAMPLE_FILE,
}
TARGETS = sorted({row.target for row in ROWS.values() if row.target})


def test_every_target_is_a_key_of_ours():
    known = {*key_table(MainConfig), *(f"sample.{key}" for key in ("steps", "guidance_scale")), *OURS}
    assert [target for target in TARGETS if target.removeprefix(IN_DATASET) not in known] == []


def test_a_harmless_value_is_silent_and_another_is_not():
    for key, row in ROWS.items():
        for value, silent in [*((value, True) for value in row.harmless), (object(), False)]:
            table: dict = {"model": {}, "adapter": {"type": "lokr"}, "optimizer": {}, "sample": {}}
            inner = table
            *above, last = key.replace("*", "x").split(".")
            for part in above:
                inner = inner.setdefault(part, {})
            inner[last] = value
            assert bool(list(set_aside(table, ROWS))) != silent, key


def test_short_names_of_dtypes_and_of_a_sigmoid_are_taken(load):
    model = MODEL.replace("'bfloat16'", "'BF16'") + "timestep_sample_method = 'sigmoid'\ntransformer_dtype = 'fp8'\n"
    config = load(HEAD + "save_dtype = 'fp32'\n" + model + LORA.replace("'bfloat16'", "'fp16'") + OPTIMIZER)
    assert (config.model.dtype, config.save_dtype, config.adapter.dtype) == ("bfloat16", "float32", "float16")
    assert config.model.timestep_sample_method == "logit_normal"
    assert config.model.transformer_dtype in {"float8", "float8_e4m3fn"}
    assert any("model.dtype: 'BF16' is taken as 'bfloat16'" in message for message in config.messages)


def test_a_samples_cfg_and_a_table_of_a_lora_are_known(load, errors):
    sample = "[sample]\nprompts = ['a']\ncfg = 3.5\nnum_inference_steps = 20\n"
    config = load(HEAD + MODEL + OPTIMIZER + sample)
    assert (config.sample.guidance_scale, config.sample.steps) == (3.5, 20)
    found = errors(HEAD + MODEL + OPTIMIZER + "[network]\nnetwork_dim = 8\n")
    assert [line.removeprefix("main.toml: ") for line in found] == [
        "network: unknown key; here it is [adapter]",
        "network.network_dim: unknown key; here it is rank in [adapter]",
    ]
