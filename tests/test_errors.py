"""How command lines end after a user's mistake or an interrupt."""

import os
import subprocess
import sys

import pytest

from anima_jax.errors import ArgumentParser, UserError, command_line, did_you_mean


@pytest.mark.parametrize(
    ("error", "lines"),
    [
        (UserError("x.toml: no such file"), "error: x.toml: no such file\n"),
        (UserError("first", "second"), "error: first\nerror: second\n"),
        (UserError("a message\n  of another library's"), "error: a message of another library's\n"),
    ],
)
def test_each_mistake_is_one_line_and_the_exit_code_is_2(capsys, error, lines):
    @command_line
    def main():
        raise error

    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert capsys.readouterr() == ("", lines)


def test_what_hostile_files_can_make_a_program_say_is_bounded():
    error = UserError(*[f"{number} " + "\x00" * 10_000 + "the end" for number in range(1000)])
    assert len(error.messages) == 101
    assert error.messages[-1] == "and 900 more errors"
    assert all(len(message) <= 4000 and message.endswith("the end") for message in error.messages[:-1])


INTERRUPTED = """
import signal, time
from anima_jax.errors import command_line

class Collected:
    "Destroyed by C code: Python drops an exception raised here."
    def __del__(self):
        raise KeyboardInterrupt

class Kept:
    "Destroyed when the interpreter is taken down."
    def __del__(self):
        print("taken down")

kept = Kept()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores interrupts

@command_line
def main():
    print("begins")
    Collected()
    end = time.monotonic() + 20
    while time.monotonic() < end:
        pass
    print("continues")

main()
"""


def test_an_interrupt_in_a_callback_of_c_code_ends_the_process_at_once():
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "begins\n", "interrupted\n")


def test_the_nearest_name_is_suggested_and_a_far_one_is_not():
    assert did_you_mean("optimiser", ["adapter", "optimizer"]) == " (did you mean 'optimizer'?)"
    assert did_you_mean("zzz", ["adapter", "optimizer"]) == ""


def test_an_unknown_flag_is_answered_with_the_nearest():
    parser = ArgumentParser(prog="train")
    parser.add_argument("--trust_cache", action="store_true")
    assert parser.parse_args(["--trust_cache"]).trust_cache
    with pytest.raises(UserError, match=r"--trust_cash=1 \(did you mean '--trust_cache'\?\) \(see train --help\)"):
        parser.parse_args(["--trust_cash=1"])


FAILING = """
import os, sys
import anima_jax.errors

@anima_jax.errors.command_line
def main():
    print("before")
    {body}

main()
"""


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("open('/nowhere/x')", 2, "error: /nowhere/x: No such file or directory\n"),
        ("raise OSError(5, 'Input/output error', 'x.png')", 1, "error: x.png: Input/output error\n"),
        ("raise OSError(28, 'No space left on device', 'a\\x1b[2J')", 1, "error: a\\x1b[2J: the disk is full\n"),
        ("raise MemoryError('Unable to allocate 37 GiB')", 1, "error: out of memory: Unable to allocate 37 GiB\n"),
        (
            "os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone'); os.getcwd()",
            2,
            "error: the current folder",
        ),
    ],
)
def test_errors_of_the_system_are_one_line(tmp_path, body, code, said):
    ended = run_main(tmp_path, body)
    assert (ended.returncode, ended.stdout) == (code, "before\n")
    assert ended.stderr.startswith(said)
    assert ended.stderr.count("\n") == 1


def run_main(folder, body: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", FAILING.format(body=body)]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": root}, text=True, check=False, **options)


def test_what_stdout_cannot_encode_is_escaped_unless_it_already_knows_how(tmp_path, monkeypatch):
    cases = {"ascii:strict": ("print(chr(215))", "\\xd7"), "utf-8:surrogateescape": ("print(chr(0xDCFF))", "\xff")}
    for encoding, (body, written) in cases.items():
        monkeypatch.setenv("PYTHONIOENCODING", encoding)
        assert run_main(tmp_path, body, encoding="latin-1").stdout == f"before\n{written}\n"


def test_output_that_cannot_be_written_is_one_line_and_a_reader_that_has_gone_is_none(tmp_path):
    with open("/dev/full", "w") as full:
        ended = run_main(tmp_path, "pass", stdout=full)
        assert (ended.returncode, ended.stderr) == (1, "error: stdout: the disk is full\n")
        assert run_main(tmp_path, "raise anima_jax.errors.UserError('x')", stderr=full).returncode == 2
    reader, writer = os.pipe()
    os.close(reader)
    ended = run_main(tmp_path, "pass", stdout=writer)
    assert (ended.returncode, ended.stderr) == (141, "")
