"""The keys with which a run learns to edit: what they are taken from, and what does not go together."""

import pytest

from anima_jax.config.load import load_config
from anima_jax.errors import UserError
from tests.small_run import write_config, write_transformer

LORA = "type = 'lora'\nrank = 4"


@pytest.fixture
def load(tmp_path):
    for name in ("pictures", "references", "more"):
        (tmp_path / name).mkdir()
    write_transformer(tmp_path / "base.safetensors")

    def load(main: str, dataset: str = "", sample: str = "", adapter: str = LORA):
        tables = ({"adapter": adapter} if adapter else {}) | (
            {"sample": f"prompts = ['a', 'b']\n{sample}"} if sample else {}
        )
        config = write_config(tmp_path, tmp_path / "pictures", f"epochs = 1\n{main}", **tables)
        file = tmp_path / "dataset.toml"
        file.write_text(f"{file.read_text()}{dataset}".replace("FOLDER", str(tmp_path)))
        config.write_text(config.read_text().replace("FOLDER", str(tmp_path)))
        return load_config(config)

    return load


def test_keys_of_forks_and_sources_without_references(load, tmp_path):
    config = load(
        "edit = true", "control_path = ['FOLDER/references', 'FOLDER/more']\n[[directory]]\npath = 'FOLDER/more'"
    )
    assert [source.control_path for source in config.data.sources] == [
        (str(tmp_path / "references"), str(tmp_path / "more")),
        None,
    ]
    config = load("conditioning = true", "control_paths = ['FOLDER/references']", "reference = 'FOLDER/main.toml'")
    assert config.edit
    assert config.sample.references == ((str(tmp_path / "main.toml"),),) * 2
    assert len(config.messages) == 3
    config = load("edit = true", "control_path = 'FOLDER/references'", "references = [[], 'FOLDER/main.toml']")
    assert config.sample.references == ((), (str(tmp_path / "main.toml"),))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("edit = true",), "dataset.toml: control_path: missing, expected a folder of reference pictures in at least"),
        (
            ("", "control_path = 'FOLDER/references'"),
            r"control_path: nothing uses the control pictures, expected .* edit",
        ),
        (
            ("edit = true", "control_path = 'FOLDER/references'", "", "type = 'lllite'"),
            "adapter.type: a control network works on single frames, expected edit = false",
        ),
        (
            ("edit = true", "control_path = 'FOLDER/references'", "references = ['FOLDER/main.toml']"),
            "sample.references: found 1 item for 2 prompts, expected one file, or an item for each",
        ),
        (
            ("edit = true", "control_path = 'FOLDER/references'", "references = 'FOLDER/nothing.png'"),
            "sample.references: expected a file, found nothing at",
        ),
        (
            ("", "control_path = 'FOLDER/references'", "control = 'FOLDER/nothing.png'", "type = 'lllite'"),
            "sample.control: expected a file, found nothing at",
        ),
        # Whether pairs are needed is unknown if one of these is wrong.
        *(
            ((main, "control_path = 'FOLDER/references'", "", adapter), message)
            for main, adapter, message in (
                ("edit = 1", LORA, "edit: found 1 "),
                ("edit = 'true'", LORA, "edit: found"),
                ("adapter = 'lllite'", "", r"adapter: found .* with type = 'lllite' in it"),
                ("", "type = 3", "adapter.type: found 3"),
                ("", "type = 'lllte'", "adapter.type: found 'lllte'.*did you mean 'lllite'"),
                ("", "type = 'lllte'\ncond_dim = 32\nmlp_dim = 8", "adapter.type: found 'lllte'.*mean 'lllite'"),
                ("", "type = 'lokrr'\nrank = 4\ndecompose_factor = 4", "adapter.type: found 'lokrr'.*mean 'lokr'"),
                ("", "type = 'lllite'\ncond_in_channels = 0", "adapter.cond_in_channels: found 0"),
            )
        ),
        (
            ("", "", "", "type = 'lllite'\ncond_in_channels = 5"),
            "adapter.cond_in_channels: found 5",
        ),
        (
            ("edit = true", "control_path = 'FOLDER/references'", "references = [[], 'FOLDER/nothing.png']"),
            r"sample.references\[1\]: expected a file, found nothing at",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line(load, keys, message):
    with pytest.raises(UserError, match=message) as raised:
        load(*keys)
    assert len(raised.value.messages) == 1
