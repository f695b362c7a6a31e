"""What TOML does not allow is said in one line, with the position and what to change."""

import pytest

from anima_jax.config.load import load_config
from anima_jax.config.syntax import read_toml
from anima_jax.errors import UserError
from tests.config.files import write

MISTAKES = [
    ('epochs = 3\nx = "C:\\Users\\me"', "(at line 2, column 10): a backslash in double quotes begins an escape"),
    ("x = [{name = 'a',\n config = 'b'}]", "(at line 1, column 18): a table in braces stands on one line"),
    ("x = {name = 'a',}", "no comma stands after the last entry"),
    ("x = True", "true and false are lower case"),
    ("x = None", "TOML has no empty value: leave the key out"),
    ("x =\ny = 1", "x has no value"),
    ("x = anima", "text is written in quotes: x = '…'"),
    ("x = C:/models/dit.safetensors", "text is written in quotes: x = '…'"),
    ("x = “anima”", "the quotation marks are typographic"),
    ("x = 'anima", "the closing quotation mark is missing"),
    ("x = 'it's'", "text that contains ' is written in double quotes"),
    ("x = '''a\ny = 1", "a text that begins with three quotation marks has no end"),
    ("x = 1\ny = 2\nx = 3\n", "(at line 3, column 6): x is already set in line 1: keep one of them"),
    ("[model]\nx = 1\n[optimizer]\n[model]", "[model] is already set in line 1: keep one of them"),
    ("x: 3", "TOML writes x = …, with an equals sign instead of a colon"),
    ("x 3", "expected key = a value"),
    ("// x", "a comment begins with #"),
    ("x = 1;", "a line ends without a semicolon"),
    ("x = .5", "a decimal point needs a digit on both sides"),
    ("x = 0,5", "a decimal point is a dot"),
    ("x = 01", "a number does not begin with 0"),
    ("x = (1, 2)", "a list is written in square brackets"),
    ("x = [1 2]", "the entries of a list are separated by commas"),
    ("x = [1,\n 2\ny = 3", "the entries of a list are separated by commas, and ] closes it"),
    ("[model\nx = 1", "the closing bracket is missing"),
    ("x = 1 y = 2", "something follows the value"),
    ('{"x": 1}', "this is JSON"),
    ("<!DOCTYPE html>", "this is a web page"),
    ("x\0 = 1", "the file has zero bytes, as UTF-16 text has"),
]


@pytest.mark.parametrize(("text", "hint"), MISTAKES, ids=[hint[-40:] for _, hint in MISTAKES])
def test_a_usual_mistake_says_what_to_change(tmp_path, text, hint):
    path = tmp_path / "main.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_toml(str(path))
    (found,) = caught.value.messages
    assert hint in found


def test_utf_16_is_named_and_a_byte_order_mark_of_utf_8_is_skipped(tmp_path):
    path = tmp_path / "main.toml"
    path.write_text("x = 1", encoding="utf-16")
    with pytest.raises(UserError, match="is UTF-16 text, expected UTF-8"):
        read_toml(str(path))
    path.write_text("x = 1", encoding="utf-8-sig")
    assert read_toml(str(path)) == {"x": 1}


def test_a_path_with_an_escape_says_that_it_wants_single_quotes(tmp_path):
    path = write(tmp_path, {"output_dir": "C:\new", "model.vae_path": "D:\train\\vae.safetensors"})
    with pytest.raises(UserError) as caught:
        load_config(path)
    found = [error.removeprefix(f"{path}: ").split(": ", 1) for error in caught.value.messages]
    assert [key for key, _ in found] == ["output_dir", "model.vae_path"]
    assert all("a backslash in double quotes begins an escape" in text for _, text in found)


def test_one_table_where_there_may_be_several_wants_two_brackets(tmp_path):
    path = write(tmp_path, dataset={"directory": {"path": "pictures"}})
    with pytest.raises(UserError, match=r"directory: found .* expected a list: write \[\[directory\]\]"):
        load_config(path)
