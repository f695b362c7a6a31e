"""The command line of training: what it prints, and where."""

import logging
import sys

from anima_jax.training.command import LOGGER, log_to_console


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
