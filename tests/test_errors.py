"""What leaves a command line when the user made a mistake."""

import pytest

from anima_jax.errors import UserError, command_line, did_you_mean


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


def test_the_nearest_name_is_suggested_and_a_far_one_is_not():
    assert did_you_mean("optimiser", ["adapter", "optimizer"]) == " (did you mean 'optimizer'?)"
    assert did_you_mean("zzz", ["adapter", "optimizer"]) == ""
