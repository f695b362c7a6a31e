"""docs/names.md: its tables of parameters are those by which files are read and written."""

import itertools
import re
from pathlib import Path

import pytest

from anima_jax.checkpoints.names import control, diffusers, dit, file_tensors, networks, qwen3
from anima_jax.models import parameters
from anima_jax.models.control import LAYERS, ControlConfig, ControlNetwork
from anima_jax.models.dit import AnimaDiT
from anima_jax.models.qwen3 import Qwen3, Qwen3Config
from tests.golden_files import golden
from tests.models.dit_peer import original_names
from tests.small_run import CONFIG

PAGE = (Path(__file__).parents[2] / "docs" / "names.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[tuple[str, ...]]:
    """The rows of a section's table, every `{a,b}` spelled out, as one row for each choice."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = []
    for line in section.splitlines():
        if line.startswith("| `"):
            cells = [spelled_out(cell.strip(" `")) for cell in line.strip("|").split(" | ")]
            found += zip(*cells, strict=True)
    return found


def spelled_out(text: str) -> list[str]:
    parts = [part.split(",") if index % 2 else [part] for index, part in enumerate(re.split(r"[{}]", text))]
    return ["".join(choice) for choice in itertools.product(*parts)]


def in_files(rules, module) -> set[tuple[str, str]]:
    """(our path, the file's name with N for the layer) of every parameter of a model."""
    tensors = file_tensors(rules, parameters.abstract(module)[1])
    return {
        (tensor.path, tensor.name if tensor.layer is None else re.sub(r"(blocks|layers)\.\d+\.", r"\1.N.", tensor.name))
        for tensor in tensors
    }


def test_the_transformers_and_the_adapters_parameters():
    page = {(ours, file) for ours, file, _ in rows("Parameters of the transformer")}
    page |= set(rows("Parameters of the LLM adapter"))
    only_where_widths_differ = {(f"llm_adapter.in_proj.{a}", f"llm_adapter.in_proj.{b}") for a, b in KINDS}
    assert page >= only_where_widths_differ
    model = in_files(dit.RULES, lambda rngs: AnimaDiT(CONFIG, rngs=rngs))
    assert page | only_where_widths_differ == model | only_where_widths_differ


KINDS = (("kernel", "weight"), ("bias", "bias"))


def test_diffusers_names_of_the_transformers_parameters():
    table = rows("Parameters of the transformer")
    assert original_names(peer for _, _, peer in table) == {peer: file for _, file, peer in table}


def test_a_control_networks_parameters():
    config = ControlConfig(resblocks=2, dilations=(1, 2), layers=LAYERS, blocks=2, width=8)
    _, shapes = parameters.abstract(lambda rngs: ControlNetwork(config, rngs=rngs))

    def general(name: str) -> str:
        named = re.sub("|".join(LAYERS), "LAYER", name)
        return re.sub(r"(resblocks?[._]|conv_|norm_|branches\.|_blocks_)\d", r"\1N", named)

    found = {(general(tensor.path), general(tensor.name)) for tensor in file_tensors(control.rules(config), shapes)}
    assert set(rows("Parameters of a control network")) == found


def test_the_text_encoders_parameters():
    config = Qwen3Config(width=16, layers=2, heads=2, key_heads=1, head_size=8, mlp_width=32, vocabulary=11)
    assert set(rows("Parameters of the text encoder")) == in_files(qwen3.RULES, lambda rngs: Qwen3(config, rngs=rngs))


@pytest.mark.parametrize(
    ("network", "row", "file"),
    [
        (networks.DIT, "transformer", "dit_image"),
        (networks.DIT, "transformer, with diffusers' names", "dit_image"),
        (networks.QWEN3, "text encoder", "qwen3"),
        (networks.WAN_VAE, "VAE", "vae"),
    ],
)
def test_every_prefix_that_is_listed_is_read(network, row, file):
    section = PAGE.split("\n## Prefixes of files\n")[1].split("\n## ")[0]
    names = {name.removeprefix(network.saved_prefix) for name in golden(f"{file}.model")}
    names = {name for name in names if not name.startswith(dit.ADAPTER)}
    spell = diffusers.transformer if "diffusers" in row else str
    prefixes = [
        p for line in section.splitlines() if line.startswith(f"| {row} |") for p in re.findall(r"`([\w.]+\.)`", line)
    ]
    assert len(prefixes) > 1
    for prefix in (*prefixes, ""):
        located = networks.locate(network, [prefix + spell(name) for name in names])
        assert located is not None
        assert (located.prefix, located.keys.keys(), located.unknown) == (prefix, names, ())
