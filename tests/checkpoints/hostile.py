"""Hostile files: what opening one must do."""

import re
import tracemalloc

import pytest

from anima_jax.errors import UserError


def peak_of_refusal(open_file, path, content, expected):
    """Open a file that must be refused, in one short line that begins with its path; return the peak of memory."""
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=re.escape(expected)) as caught:
            open_file(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.isprintable()
    assert len(message) < 1200
    return peak
