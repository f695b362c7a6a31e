"""GGML's block formats: decoded as ggml decodes them, encoded as gguf does or with less error than ggml."""

import sys

import numpy as np
import pytest

from anima_jax.checkpoints.quantised import ggml, ggml_encode
from tests.golden_files import golden

IN_PACKAGE = [name for name in ggml.BLOCK_FORMATS if name.startswith(("iq1", "iq2", "iq3"))]
OURS = [name for name in ggml.BLOCK_FORMATS if name not in IN_PACKAGE]
BLOCKS = golden("ggml_blocks")


def same_bits(actual, expected) -> bool:
    return np.array_equal(actual.view(np.uint32), expected.view(np.uint32))


def random_blocks(form: ggml.BlockFormat, count: int) -> np.ndarray:
    """Blocks of random bytes, so of all codes, with finite scales."""
    blocks = np.random.default_rng(form.number).integers(0, 256, (count, form.nbytes), dtype=np.uint8)
    fields = blocks.view(form.layout)[:, 0]
    for name in form.layout.names:
        if form.layout[name].kind == "f":
            fields[name] = np.where(np.isfinite(fields[name]), fields[name], np.float16(-0.5))
    return blocks


@pytest.mark.parametrize("name", OURS)
def test_blocks_that_ggml_wrote_are_decoded_as_ggml_decodes_them(name):
    decoded = ggml.dequantise(BLOCKS[f"{name}.blocks"], ggml.BLOCK_FORMATS[name])
    assert same_bits(decoded, BLOCKS[f"{name}.values"])


@pytest.mark.parametrize("name", IN_PACKAGE)
def test_formats_with_codebooks_are_decoded_with_the_package_gguf(name):
    pytest.importorskip("gguf")
    decoded = ggml.dequantise(BLOCKS[f"{name}.blocks"], ggml.BLOCK_FORMATS[name])
    assert same_bits(decoded, BLOCKS[f"{name}.values"])


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"iq3_s needs the package gguf: pip install 'anima-jax\[gguf\]'"):
        ggml.dequantise(BLOCKS["iq3_s.blocks"], ggml.BLOCK_FORMATS["iq3_s"])


@pytest.mark.parametrize("name", ggml.BLOCK_FORMATS)
def test_random_blocks_are_decoded_as_gguf_decodes_them(name):
    gguf = pytest.importorskip("gguf")
    form = ggml.BLOCK_FORMATS[name]
    blocks = random_blocks(form, 700)
    assert gguf.GGML_QUANT_SIZES[form.number] == (form.values, form.nbytes)
    with np.errstate(all="ignore"):  # random scales of iq1_m overflow
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(form.number)).reshape(-1)
    finite = np.isfinite(expected).reshape(700, -1).all(axis=1)
    assert same_bits(ggml.dequantise(blocks[finite], form).reshape(-1), expected.reshape(700, -1)[finite].reshape(-1))


WEIGHTS = {
    "normal": lambda rng: rng.standard_normal((64, 512)) * 0.02,
    "heavy tails": lambda rng: rng.standard_t(3, (64, 512)),
    "positive": lambda rng: np.abs(rng.standard_normal((64, 512))) + 1,
    "mostly zero": lambda rng: rng.standard_normal((64, 512)) * (rng.random((64, 512)) < 0.02),
    "zero": lambda rng: np.zeros((64, 512)),
    "tiny": lambda rng: rng.standard_normal((64, 512)) * 1e-7,
    "whole": lambda rng: rng.integers(-127, 128, (64, 512)),  # ties, which round away from zero
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1"])
def test_encoded_blocks_are_those_of_gguf(name, weights):
    gguf = pytest.importorskip("gguf")
    form = ggml.BLOCK_FORMATS[name]
    values = WEIGHTS[weights](np.random.default_rng(0)).astype(np.float32)
    expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType(form.number))
    assert np.array_equal(ggml_encode.quantise(values, form), expected.reshape(-1, form.nbytes))


@pytest.mark.parametrize("name", ["q4_k", "q5_k", "q6_k"])
def test_k_quants_are_encoded_with_no_more_error_than_ggml_does(name):
    form, values = ggml.BLOCK_FORMATS[name], BLOCKS["values"]
    ours = ggml.dequantise(ggml_encode.quantise(values, form), form).reshape(values.shape)
    theirs = BLOCKS[f"{name}.values"].reshape(values.shape)
    # Two blocks are few: ggml's own weighting may win one of them by a percent.
    assert np.linalg.norm(ours - values) <= 1.01 * np.linalg.norm(theirs - values)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(("name", "error"), [("q4_k", 0.1), ("q5_k", 0.05), ("q6_k", 0.03)])
def test_k_quants_of_any_weights_have_a_small_error(name, error, weights):
    form, values = ggml.BLOCK_FORMATS[name], WEIGHTS[weights](np.random.default_rng(1)).astype(np.float32)
    decoded = ggml.dequantise(ggml_encode.quantise(values, form), form).reshape(values.shape)
    limit = 1.0 if weights == "tiny" else error  # a float16 scale cannot be that small
    assert np.linalg.norm(decoded - values) <= limit * np.linalg.norm(values)


@pytest.mark.parametrize("name", ggml_encode.ENCODERS)
@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "NaN"), (np.inf, "NaN or infinite"), (1e38, "beyond the range")]
)
def test_values_that_a_format_does_not_have_are_refused(name, value, message):
    values = np.zeros((2, 256), np.float32)
    values[1, 3] = value
    with pytest.raises(ValueError, match=message):
        ggml_encode.quantise(values, ggml.BLOCK_FORMATS[name])


@pytest.mark.parametrize("name", ["q8_0", "q4_1", "q4_k", "q6_k", "tq2_0", "iq4_xs"])
@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_a_scale_that_is_not_finite_is_refused(name, scale):
    form = ggml.BLOCK_FORMATS[name]
    blocks = random_blocks(form, 3)
    blocks.view(form.layout)[1, 0]["d"] = scale
    with pytest.raises(ValueError, match=f"1 of 3 blocks of {name} have a scale that is NaN or infinite"):
        ggml.dequantise(blocks, form)
