"""PEFT's settings in files. Oracle: the function with which peft itself finds a module's alpha."""

import contextlib
import json
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from anima_jax.adapters.file import open_adapter
from anima_jax.errors import UserError
from convert.__main__ import main

MODULES = [f"blocks.{block}.{layer}" for block in (0, 1, 11) for layer in ("self_attn.q_proj", "mlp.layer1")]
MODULES += ["llm_adapter.blocks.0.self_attn.q_proj"]
RANK = 4


def write(folder, text: str | None = None, metadata: str | None = None):
    """Write a LoRA in PEFT's names, with settings beside it or in its header."""
    tensors = {}
    for module in MODULES:
        name = f"base_model.model.{module}"
        tensors |= {f"{name}.lora_A.weight": np.ones((RANK, 8), np.float32)}
        tensors |= {f"{name}.lora_B.weight": np.ones((8, RANK), np.float32)}
    path = folder / "adapter_model.safetensors"
    save_file(tensors, path, {} if metadata is None else {"lora_adapter_metadata": metadata})
    if text is not None:
        (folder / "adapter_config.json").write_text(text)
    return path


def alphas(path) -> dict[str, float]:
    with open_adapter(path) as adapter:
        return {module: patch.scale * RANK for module, patch in adapter.patches.items()}


@pytest.mark.parametrize(
    "patterns",
    [
        {"q_proj": 8},
        {"self_attn.q_proj": 8, r"blocks\.0\.mlp\.layer1": 2},
        {"^blocks.0.self_attn.q_proj": 8},
        {r"^blocks\.1\.mlp\.layer1$": 2, "layer1": 3},
        {"layer1": 3, r"blocks\.1\.mlp\.layer1": 2},
        {r"blocks\.(0|11)\..*": 8, "q_proj": 2},
        {r"blocks\.\d\.mlp.*": 0.5},
        {".*": 16},
        {"layer": 8, "blocks": 8, "": 8, "locks.0.mlp.layer1": 8},
        {"llm_adapter.*": 1, ".*q_proj|.*layer1": 2},
    ],
    ids=str,
)
def test_a_modules_alpha_is_the_one_that_peft_finds(tmp_path, patterns):
    find = pytest.importorskip("peft.utils.other").get_pattern_key
    found = alphas(write(tmp_path, json.dumps({"r": RANK, "lora_alpha": 6, "alpha_pattern": patterns})))
    assert found == {module: patterns.get(find(patterns, module), 6) for module in MODULES}


def test_pefts_names_without_settings_are_said_with_the_scale_that_is_taken(tmp_path, capsys):
    path = write(tmp_path)
    assert set(alphas(path).values()) == {float(RANK)}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {path}: found no {tmp_path / 'adapter_config.json'}; without PEFT's settings")
    assert line.endswith("the scale (alpha / rank) is taken as 1")


def test_settings_without_an_alpha_have_pefts_default(tmp_path):
    config = pytest.importorskip("peft").LoraConfig(r=RANK)
    assert set(alphas(write(tmp_path, json.dumps({"peft_type": "LORA", "r": RANK}))).values()) == {config.lora_alpha}


def test_patterns_are_for_the_names_in_the_file(tmp_path):
    """PEFT knows no other: a pattern of the original names is not for a file with diffusers'."""
    names = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.ff.net.0.proj")
    factors = {"lora_A": np.ones((RANK, 8), np.float32), "lora_B": np.ones((8, RANK), np.float32)}
    tensors = {f"{name}.{part}.weight": values for name in names for part, values in factors.items()}
    patterns = {"blocks.0.self_attn.*": 1, "attn1.to_q": 2, "^transformer_blocks.0.ff.net.[0-9]{1,2}.proj": 3}
    settings = {"r": RANK, "lora_alpha": 6, "alpha_pattern": patterns}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    assert list(alphas(tmp_path / "a.safetensors").values()) == [2, 3]


def test_an_alpha_of_0_turns_an_adapter_off(tmp_path):
    assert set(alphas(write(tmp_path, '{"lora_alpha": 0}')).values()) == {0.0}


def test_the_settings_of_a_file_on_the_hub_are_beside_it(tmp_path, monkeypatch, capsys):
    """What the hub's cache holds is enough; where it has no settings, that is said."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cached = tmp_path / "models--me--lora" / "snapshots" / "abc"
    (tmp_path / "models--me--lora" / "refs").mkdir(parents=True)
    (tmp_path / "models--me--lora" / "refs" / "main").write_text("abc")
    cached.mkdir(parents=True)
    write(cached, '{"lora_alpha": 8}')
    assert set(alphas("hf://me/lora/adapter_model.safetensors").values()) == {8.0}
    assert capsys.readouterr().err == ""
    (cached / "adapter_config.json").unlink()
    assert set(alphas("hf://me/lora/adapter_model.safetensors").values()) == {float(RANK)}
    assert "without PEFT's settings the scale" in capsys.readouterr().err


WRONG = {
    "[1, 2]": "expected an object",
    "3": "expected an object",
    '"x"': "expected an object",
    "null": "expected an object",
    "true": "expected an object",
    "{": "cannot be read",
    "[" * 100_000: "cannot be read",
    '{"lora_alpha": "16"}': "lora_alpha is .*expected a number",
    '{"lora_alpha": [16]}': "lora_alpha is .*expected a number",
    '{"lora_alpha": {}}': "lora_alpha is .*expected a number",
    '{"lora_alpha": true}': "lora_alpha is True, expected a number",
    '{"lora_alpha": NaN}': "lora_alpha is nan, expected a number",
    '{"lora_alpha": 1e999}': "lora_alpha is inf, expected a number",
    '{"r": -Infinity}': "r is -inf, expected a number",
    '{"r": "8"}': "r is '8', expected a number",
    '{"rank_pattern": {"x": []}}': r"rank_pattern of x is list, expected a number",
    '{"lora_alpha": 1' + "0" * 400 + "}": "lora_alpha is .*expected a number",
    '{"alpha_pattern": [1]}': r"alpha_pattern is list, expected an object",
    '{"alpha_pattern": "x"}': "alpha_pattern is .*expected an object",
    '{"alpha_pattern": {"q_proj": null}}': "alpha_pattern of q_proj is None, expected a number",
    '{"alpha_pattern": {"q_proj(": 1}}': r"of q_proj\(: this regular expression cannot be matched in linear time",
    '{"alpha_pattern": {"(?=a)b": 1}}': "cannot be matched in linear time",
    '{"alpha_pattern": {"((((a{99}){99}){99}){99})": 1}}': "is too complex",
    '{"alpha_pattern": {"' + "(a*)*" * 50 + '": 1}}': "is too complex",
    json.dumps({"alpha_pattern": {f"(a{index})": 1 for index in range(101)}}): "over 100 regular expressions",
    '{"init_lora_weights": "pissa_niter_4"}': "init_lora_weights is pissa_niter_4, for which PEFT changes the base's",
    '{"use_qalora": true}': "use_qalora is True, a variant of LoRA that cannot be read",
    '{"use_rslora": "yes"}': "use_rslora is .*expected true or false",
}


@pytest.mark.parametrize("where", ["beside", "in the header"])
@pytest.mark.parametrize(("text", "message"), WRONG.items(), ids=[text[:40] for text in WRONG])
def test_settings_of_a_wrong_kind_end_in_one_line(tmp_path, text, message, where):
    path = write(tmp_path, text) if where == "beside" else write(tmp_path, metadata=text)
    with pytest.raises(UserError, match=message) as caught:
        alphas(path)
    (line,) = caught.value.messages
    assert len(line) < 400
    assert ("adapter_config.json: " if where == "beside" else ": lora_adapter_metadata: ") in line


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(.*)*x", r"(.*a){9}", r"(\w|\w\w|.)*!", r"((.*)*)*\.((.*)*)*x"])
def test_no_pattern_takes_long(tmp_path, pattern):
    path = write(tmp_path, json.dumps({"lora_alpha": 8, "alpha_pattern": {pattern: 1}}))
    begin = time.monotonic()
    with contextlib.suppress(UserError):  # too complex
        assert set(alphas(path).values()) == {8.0}
    assert time.monotonic() - begin < 5


def test_an_alpha_beyond_float32_ends_resize(tmp_path, capsys):
    """LAPACK may never return from the singular values of infinity."""
    path = write(tmp_path, json.dumps({"lora_alpha": 3e38}))
    with pytest.raises(SystemExit) as ended:
        main(["resize", str(path), str(tmp_path / "out.safetensors"), "--rank", "1"])
    assert ended.value.code == 2
    assert "NaN or infinite values" in capsys.readouterr().err
