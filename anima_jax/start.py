"""python -m anima_jax.start: from a folder of pictures to a LoRA and the page."""

if __name__ == "__main__":
    from anima_jax.launch import start

    start()  # which imports this module under its own name

import sys
from collections.abc import Sequence

import jax

from anima_jax.errors import command_line
from anima_jax.exit_codes import STOPPED
from anima_jax.serving.starting import browser, choices, commands, flags, quick_start, training_run
from anima_jax.serving.starting.questions import Questions
from anima_jax.training.command import log_to_console


@command_line
def main(argv: Sequence[str] | None = None) -> None:
    """Ask what is not given as a flag, train a LoRA, open the page. Each step is printed as the command that does it.

    Interrupted at any point, the same command goes on: with the rest of a download, with the TOML that is there, from
    the run's last checkpoint.
    """
    log_to_console()
    arguments = flags.parse_arguments(argv)
    jax.config.update("jax_platforms", "cpu")  # this process only reads headers: the devices are for those it starts
    questions = Questions(yes=arguments.yes)
    if arguments.fetch:
        for path in choices.fetch_anima(arguments).values():
            print(path)
        return
    if not arguments.no_page:
        browser.check_installed()
    pictures = choices.pictures_path(arguments, questions)
    model = choices.choose_model(arguments, questions)
    answers = training_run.ask(arguments, questions, pictures, model)
    questions.report()
    print("\nthe same again, without questions:", end="")
    commands.show("anima_jax.start", *training_run.flags_of(arguments, model, answers))
    if not model.paths and not (arguments.no_train and arguments.no_page and answers is None):
        model, code = quick_start.trained(arguments)
        _end_if(code)
    toml = training_run.prepare(answers, model) if answers else None
    if toml and not arguments.no_train:
        if not questions.confirm("Train now", "--yes"):
            print("later, the same command goes on from here")
            return
        _end_if(training_run.train(toml))
    if not arguments.no_page:
        _end_if(browser.serve(arguments, model, toml))


def _end_if(code: int) -> None:
    """End with the exit code of another program, unless it is 0."""
    if code == STOPPED:
        print("stopped; the same command goes on from here")
    if code:
        sys.exit(code)
