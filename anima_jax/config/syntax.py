"""Reader of a TOML file. A syntax error says in one line what is wrong, where, and how TOML wants it."""

import datetime
import os
import re
import tomllib
from typing import Any

from anima_jax.errors import UserError, os_reason

UTF_16 = (b"\xff\xfe", b"\xfe\xff")
"""Byte order marks of UTF-16, in which PowerShell's `>` and Notepad's "Unicode" write."""

_KEY = r"^\s*(?P<key>[\w.\"'-]+)\s*"

HINTS: tuple[tuple[str, str], ...] = (
    (r"\0", "the file has zero bytes, as UTF-16 text has: save it as UTF-8"),
    (r"^\s*<", "this is a web page"),
    (r"^\s*\{\s*(\"|$)", "this is JSON: TOML has a line key = value for each setting"),
    (
        r"^[^#']*\"[^\"]*\\",
        "a backslash in double quotes begins an escape: write a path in single quotes, as 'C:\\Users\\me'",
    ),
    ("[“”„‘’«»]", "the quotation marks are typographic: write ' or \""),
    (rf"{_KEY}:(\s|$)", "TOML writes {key} = …, with an equals sign instead of a colon"),
    (r"^\s*(//|;|--)|^[^\"'#]*=[^\"'#]*(//|;)", "a comment begins with #, and a line ends without a semicolon"),
    (rf"{_KEY}=\s*(True|False|TRUE|FALSE)\b", "true and false are lower case in TOML"),
    (rf"{_KEY}=\s*(None|none|null|nil|~)\b", "TOML has no empty value: leave the key out, or put # before it"),
    (rf"{_KEY}=\s*(#.*)?$", "{key} has no value: leave the key out, or put # before it"),
    (rf"{_KEY}=\s*[(]", "a list is written in square brackets: [1, 2]"),
    (rf"{_KEY}=\s*[+-]?(\.\d|\d+\.(?!\d))", "a decimal point needs a digit on both sides: 0.5, 1.0"),
    (rf"{_KEY}=\s*[+-]?0\d", "a number does not begin with 0: 1, not 01"),
    (rf"{_KEY}=\s*[+-]?\d[\d.]*,\d", "a decimal point is a dot: 0.5"),
    (rf"{_KEY}=\s*(?![\"'\[{{\d.+-]|(inf|nan|true|false)\b)\S", "text is written in quotes: {key} = '…'"),
    (rf"{_KEY}=\s*(\"[^\"]+|'[^']+)$", "the closing quotation mark is missing"),
    (rf"{_KEY}=\s*'[^']*'\w", "text that contains ' is written in double quotes: \"it's\""),
    (r"\{[^}]*,\s*\}", "no comma stands after the last entry of a table in braces"),
    (r"\{[^}]*$", "a table in braces stands on one line: join its lines, or write it as a [table] of its own"),
    (r"^\s*\[[^\]]*$", "the closing bracket is missing"),
    (rf"(?=\s*[A-Za-z_]){_KEY}(#.*)?$", "expected {key} = a value"),
)
"""Pattern of a line → what is wrong with it. The first match counts; `key` is the line's key."""

OTHERWISE: tuple[tuple[str, str], ...] = (
    ("Unclosed array", "the entries of a list are separated by commas, and ] closes it"),
    ("Expected newline", "something follows the value: one key = value a line, text in quotes"),
    ("Expected '='", "expected key = a value"),
    ("'''", "a text that begins with three quotation marks has no end"),
    ('"""', "a text that begins with three quotation marks has no end"),
)
"""The parser's message → what is wrong, if no line of `HINTS` matches."""


def read_toml(path: str) -> dict[str, Any]:
    """Read a TOML file, UTF-8 with or without byte order mark.

    Raises UserError; a syntax error names the line and what to change.
    """
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder, expected a TOML file")
    try:
        with open(path, "rb") as file:
            data = file.read()
        if data.startswith(UTF_16):
            raise UserError(f"{path}: is UTF-16 text, expected UTF-8; save the file as UTF-8")
        text = data.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file (looked for {os.path.abspath(path)})") from error
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is {error.object[error.start]:#04x}"
        raise UserError(f"{path}: {found}, expected UTF-8 text; save the file as UTF-8") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {os_reason(error)}") from error
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid TOML: {_explained(text, error)}") from error


def toml_value(text: str) -> Any:
    """Return the TOML value of `text`, or `text` itself if it is not one, so that bare words need no quotes."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    value = parsed["value"]
    return text if len(parsed) > 1 or isinstance(value, datetime.date | datetime.time) else value


def _explained(text: str, error: Exception) -> str:
    """Return the parser's message and position, and a hint for the usual mistakes."""
    lines = text.replace("\r\n", "\n").split("\n")
    found = re.search(r"\(at (?:line (\d+), column \d+|end of document)\)", str(error))
    if found is None:
        return str(error)
    number = int(found[1]) if found[1] else len(lines)
    otherwise = (hint for message, hint in OTHERWISE if message in str(error))
    hint = _repeated(lines, number, str(error)) or _hint(lines, number) or next(otherwise, "")
    return f"{error}{f': {hint}' if hint else ''}"


def _hint(lines: list[str], number: int) -> str:
    """Return what is wrong with a line, counted from 1, or with the one at which its value begins."""
    for at in range(min(number, len(lines)), max(0, number - 20), -1):
        for pattern, hint in HINTS if at == number or "=" in lines[at - 1] else ():
            if match := re.search(pattern, lines[at - 1]):
                where = "" if at == number else f"in line {at}, "
                return where + hint.format(**match.groupdict())
        if re.match(rf"{_KEY}=", lines[at - 1]):
            break
    return ""


def _repeated(lines: list[str], number: int, message: str) -> str:
    """Return the hint for a key or table that is in the file twice, or ""."""
    if not re.search(r"overwrite|declare|twice|mutate", message):
        return ""
    line = lines[number - 1].strip()
    name = line.partition("=")[0].strip()
    table = re.match(r"\[+\s*(.*?)\s*\]+", line)
    same = re.compile(rf"\s*{re.escape(name)}\s*=" if table is None else rf"\s*\[+\s*{re.escape(table[1])}\s*\]")
    first = next((at for at, other in enumerate(lines[: number - 1], start=1) if same.match(other)), None)
    what = f"[{table[1]}]" if table else name
    return f"{what} is already set{f' in line {first}' if first else ''}: keep one of them"
