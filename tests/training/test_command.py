"""The command line of training: what it prints, and where."""

import logging
import sys

from anima_jax.training.command import LOGGER, log_to_console, overrides, parse_arguments


class FullDisk:
    """A stderr that is redirected to a file on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")

    def flush(self) -> None:
        pass


def test_a_message_that_cannot_be_printed_does_not_end_the_run(monkeypatch):
    before = LOGGER.handlers[:], LOGGER.propagate, LOGGER.level
    try:
        log_to_console()
        monkeypatch.setattr(sys, "stderr", FullDisk())
        logging.getLogger("anima_jax.training").warning("the run continues")
    finally:
        LOGGER.handlers[:], LOGGER.propagate = before[:2]
        LOGGER.setLevel(before[2])


def test_an_empty_name_of_a_run_is_a_text_and_a_bare_flag_means_the_newest():
    words = ["--config", "main.toml", "--run_name", "", "--resume_from_checkpoint"]
    assert overrides(parse_arguments(words))[-2:] == ['run_name=""', "resume_from_checkpoint=true"]
