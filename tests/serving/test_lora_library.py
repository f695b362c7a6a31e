"""The library of a server: what it finds under which name, and what it never opens."""

import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from anima_jax.errors import UserError
from anima_jax.sampling.regions import Area, Region
from anima_jax.sampling.request import ImageRequest, SamplingParams
from anima_jax.serving.lora_library import LoraLibrary
from anima_jax.serving.orders import Order
from tests.models.networks import normal

MODULE = "lora_unet_blocks_0_mlp_layer1"


def write_lora(path, metadata=None, rank=2, seed=0):
    factors = {"lora_down": normal(rank, 64, seed=seed), "lora_up": normal(128, rank, seed=seed + 1)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"{MODULE}.{name}.weight": values for name, values in factors.items()}, path, metadata)


@pytest.fixture
def folder(tmp_path):
    write_lora(tmp_path / "loras" / "style.safetensors", {"ss_tag_frequency": '{"10_x": {"cat": 3, "dog ": 5}}'})
    write_lora(tmp_path / "loras" / "people" / "anna.safetensors", {"modelspec.trigger_phrase": "anna, smiling"}, 3)
    write_lora(tmp_path / "loras" / "people" / "style.safetensors")
    write_lora(tmp_path / "secret" / "key.safetensors")
    return tmp_path / "loras"


def test_files_are_named_by_their_path_within_the_folder_and_new_ones_are_found_at_once(folder):
    library = LoraLibrary(folder)
    assert [entry.name for entry in library.loras()] == ["people/anna", "people/style", "style"]
    anna = library.loras()[0]
    assert (anna.kind, anna.rank, anna.trigger) == ("LoRA", 3, ("anna, smiling",))
    assert library.loras()[2].trigger == ("dog", "cat")
    names = ("anna", "people\\anna", "people/anna.safetensors")
    assert {library.lora(name) for name in names} == {str(folder / "people" / "anna.safetensors")}
    write_lora(folder / "new.safetensors")
    assert library.lora("new") == str(folder / "new.safetensors")
    assert len(library.loras()) == 4


def test_files_that_change_leave_no_old_entries(folder):
    library = LoraLibrary(folder, controls=[folder])
    for rank in (1, 2, 3):
        write_lora(folder / "style.safetensors", rank=rank)
        assert (len(library.loras()), len(library.controls())) == (3, 0)
    assert len(library._entries) == 6


def test_folders_that_did_not_change_are_not_read_again(folder, monkeypatch):
    library, walks, walk = LoraLibrary(folder), [], os.walk
    monkeypatch.setattr(os, "walk", lambda path: walks.append(path) or walk(path))
    for path in (folder, folder / "people"):
        os.utime(path, (0, 0))
    for _ in range(3):
        assert (
            library.lora("anna") == library.lora_paths()["people/anna"] == str(folder / "people" / "anna.safetensors")
        )
    assert len(walks) == 1
    (folder / "people" / "anna.safetensors").rename(folder / "people" / "other.safetensors")
    assert "people/other" in library.lora_paths()
    os.symlink(folder.parent / "secret" / "key.safetensors", folder / "people" / "linked.safetensors")
    with pytest.raises(UserError, match="there is none of this name"):
        library.lora("linked")


@pytest.mark.parametrize(
    "name", ["../secret/key", "{root}/secret/key", "key", "linked", "elsewhere/key", "style\0", "", ".", "people"]
)
def test_files_outside_of_the_folders_are_never_found(folder, name):
    os.symlink(folder.parent / "secret" / "key.safetensors", folder / "linked.safetensors")
    os.symlink(folder.parent / "secret", folder / "elsewhere")
    library = LoraLibrary(folder)
    assert len(library.loras()) == 3
    with pytest.raises(UserError, match="there is none of this name"):
        library.adapter(name.format(root=folder.parent))


def test_a_name_that_two_files_share_is_an_error_that_names_both(folder):
    write_lora(folder / "animals" / "anna.safetensors")
    with pytest.raises(UserError, match="lora 'anna': names 2 files: animals/anna, people/anna"):
        LoraLibrary(folder).lora("anna")


def test_adapters_stay_in_memory_up_to_a_limit_and_a_changed_file_is_read_again(folder):
    library = LoraLibrary(folder, kept_bytes=2000)
    first = library.adapter("style")
    assert library.adapter("style")[1] is first[1]
    library.adapter("anna")
    assert library.adapter("style")[1] is not first[1]
    write_lora(folder / "style.safetensors", rank=4, seed=7)
    key, adapter = library.adapter("style")
    assert key != first[0]
    np.testing.assert_array_equal(adapter.patches["blocks.0.mlp.layer1"].parts["lora_A"].read(), normal(4, 64, seed=7))


def test_files_that_are_no_adapters_are_not_listed_and_errors_do_not_tell_the_server_s_paths(folder):
    (folder / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    save_file({"x": np.zeros(3, np.float32)}, folder / "other.safetensors")
    library = LoraLibrary(folder, controls=[folder])
    assert len(library.loras()) == 3
    assert library.controls() == []
    for name in ("broken", "other"):
        with pytest.raises(UserError) as caught:
            library.adapter(name)
        assert str(folder) not in str(caught.value)
    save_file({f"{MODULE}.diff": np.full((128, 64), np.inf, np.float32)}, folder / "huge.safetensors")
    with pytest.raises(UserError, match=r"lora 'huge': has NaN or infinite values in blocks\.0\.mlp\.layer1"):
        library.adapter("huge")
    with pytest.raises(UserError, match="control 'style': is not a control network"):
        library.control("style")
    with pytest.raises(UserError, match=r"--lora_dir .*nowhere: is not a folder"):
        LoraLibrary(folder / "nowhere")


def test_prompts_name_adapters_as_generate_reads_them(folder):
    region = Region(Area(0, 0, 32, 32), "a cat <lora:anna:0.5>")
    order = Order(
        ImageRequest("a dog, <lora:style:0.8:0.2>, sitting", 64, 64, regions=(region,)),
        SamplingParams(negative_prompt="ugly<lyco:people/style>"),
        loras=(("new", 1.0),),
    )
    found = LoraLibrary(folder).tagged(order)
    both = {"": 0.8, "text_encoder": 0.2}
    assert found.loras == (("new", 1.0), ("style", both), ("anna", 0.5), ("people/style", 1.0))
    assert (found.request.prompt, found.request.regions[0].prompt) == ("a dog, sitting", "a cat")
    assert found.params.negative_prompt == "ugly"
    library = LoraLibrary(controls=[folder])
    assert library.tagged(order) is order
    library.add("lora", "style", folder / "style.safetensors")
    assert library.tagged(order).loras == found.loras
