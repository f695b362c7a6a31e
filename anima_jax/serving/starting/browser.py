"""The page at the end of `anima-start`: a free port, the address for this and for another computer, the browser."""

import argparse
import contextlib
import getpass
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Mapping

from anima_jax.errors import UserError
from anima_jax.exit_codes import INTERRUPTED
from anima_jax.serving import extra
from anima_jax.serving.starting import commands, quick_start, run_toml, training_run
from anima_jax.serving.starting.choices import StartModel

PORTS = 50
"""Ports that are tried after one that is taken."""


def free_port(port: int, host: str = "127.0.0.1") -> int:
    """Return `port`, or the next one on which nothing listens. Raises UserError if there is none near."""
    for number in range(port, min(port + PORTS, 65536)):
        with contextlib.closing(socket.socket()) as tried:
            if sys.platform != "win32":  # a port that was just left is free; on Windows the option means something else
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                tried.bind((host, number))
                return number
    raise UserError(f"--port {port}: it and the next {PORTS - 1} are taken")


def has_browser(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether a browser of this computer's own screen can be opened: not over SSH, nor without a screen."""
    if any(environment.get(name) for name in ("SSH_CONNECTION", "SSH_TTY", "SSH_CLIENT")):
        return False
    if sys.platform.startswith("linux") and not (environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY")):
        return False
    with contextlib.suppress(webbrowser.Error):
        webbrowser.get()
        return True
    return False


def address_lines(port: int) -> list[str]:
    """Return where the page is: its address, and for another computer the SSH command that leads to it."""
    user, host = "USER", socket.gethostname()
    with contextlib.suppress(Exception):  # a user without a name
        user = getpass.getuser()
    return [
        f"the page: http://127.0.0.1:{port}",
        f"from another computer: ssh -L {port}:127.0.0.1:{port} {user}@{host}   and then the same address there",
    ]


def check_installed() -> None:
    """Raise UserError if the page's packages are not installed."""
    if extra.missing():
        raise UserError("the page needs pip install 'anima-jax[serve]'; --no_page does without it")


def open_when_ready(port: int, process: "subprocess.Popen[bytes]") -> None:
    """Open the page in the browser as soon as the server answers, from a thread of its own."""

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy is asked for this machine

    def wait() -> None:
        while process.poll() is None:
            try:
                with opener.open(f"http://127.0.0.1:{port}/health", timeout=5):
                    webbrowser.open(f"http://127.0.0.1:{port}")
                    return
            except (OSError, urllib.error.URLError):
                time.sleep(0.5)

    threading.Thread(target=wait, daemon=True).start()


def serve(arguments: argparse.Namespace, model: StartModel, toml: pathlib.Path | None) -> int:
    """Serve the page with the model, and the LoRA of the TOML's newest run if there is one, until it is stopped.

    Return the exit code of the server; one that was stopped by Ctrl-C has ended well. Raises UserError for a port
    without a free one near.
    """
    port = free_port(arguments.port)
    if port != arguments.port:
        print(f"port {arguments.port} is taken: {port} is used")
    words = serve_flags(arguments, model, toml, port)
    print()
    for line in address_lines(port):
        print(line)
    commands.show("anima_jax.serve", *words)
    with commands.started("anima_jax.serve", *words) as process:
        if not arguments.no_browser and has_browser():
            open_when_ready(port, process)
        code = commands.code_of(commands.wait(process))
    return 0 if code == INTERRUPTED else code


def serve_flags(arguments: argparse.Namespace, model: StartModel, toml: pathlib.Path | None, port: int) -> list[str]:
    """Return the flags of `anima_jax.serve` for the model, and for the newest run of the TOML."""
    run = training_run.run_of(toml) if toml else quick_start.run_of(arguments) if model.base == "shapes" else None
    words: list[str] = []
    if toml:
        words += ["--config", commands.short_path(toml), "--dataset", commands.short_path(run_toml.dataset_of(toml))]
    elif model.base == "shapes":
        words += ["--config", quick_start.CONFIG, "--checkpoint", commands.short_path(model.paths["transformer"])]
    else:
        for flag, path in model.paths.items():
            words += [f"--{flag}", path]
    if run:
        words += ["--run", commands.short_path(run)]
        if toml and (lora := training_run.lora_of(run)):
            name = lora.relative_to(run).with_suffix("").as_posix()
            words += ["--lora_dir", commands.short_path(run), "--page_lora", name]
            words += [f"--page_prompt={run_toml.prompt_of(toml)}"]
    return [*words, "--port", str(port)]
