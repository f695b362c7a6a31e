"""Ports for the processes that tests start."""

import socket


def free_port() -> int:
    """Return a TCP port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
