"""The command: its flags, what it says when it cannot start, and how it ends."""

import io
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

pytest.importorskip("uvicorn")

import httpx
from PIL import Image

from anima_jax import serve
from anima_jax.serving import extra
from anima_jax.serving.app import create_app
from anima_jax.serving.http.gallery import Gallery
from anima_jax.serving.http.http_server import HttpServer, listen
from anima_jax.serving.http.limits import RequestLimits
from anima_jax.serving.http.server import ServerConfig
from tests.serving.servers import SMALL, ManualEngine, small_files


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    files = small_files(str(tmp_path_factory.mktemp("serve")))
    return [word for name, file in files.items() for word in (f"--{name}", file)] + ["--dtype", "float32"]


def error_of(capsys, *arguments: object) -> str:
    """The one-line error of these arguments, which end the command with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        serve.main([str(argument) for argument in arguments])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    return line.removeprefix("error: ")


def test_what_keeps_a_server_from_starting_is_said_in_one_line(flags, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("x")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        cases = {
            ("--port", port): f"--host 127.0.0.1 --port {port}: Address already in use",
            ("--port", 70_000): "--port 70000, expected 0 to 65535",
            ("--host", "no.such.host.invalid"): "--host no.such.host.invalid --port 8000: ",
            ("--gallery", tmp_path / "file" / "x"): f"--gallery {tmp_path}/file/x: ",
            ("--lora_dir", tmp_path / "none"): f"--lora_dir {tmp_path}/none: is not a folder",
            ("--api_key_file", tmp_path / "none"): f"--api_key_file {tmp_path}/none: cannot be read: No such file",
            ("--api_key", " "): "the API key is empty",
            ("--slots", 0): "--slots 0, expected at least 1",
            ("--job_timeout", "nan"): "--job_timeout nan, expected at least 1",
            ("--cors", "studio.example"): "--cors studio.example: expected an origin, such as https://example.org",
            ("--vae", tmp_path / "none.safetensors"): f"{tmp_path}/none.safetensors: no such file",
            ("--prot", 1): "unrecognized arguments: --prot",
        }
        for given, expected in cases.items():
            assert error_of(capsys, *flags, *given).startswith(expected), given
    monkeypatch.setattr(extra, "MODULES", ("no_such_module",))
    assert error_of(capsys, *flags).startswith("no_such_module: not installed, expected the extra: pip install")


def test_the_key_comes_from_the_flag_a_file_or_the_environment(tmp_path, monkeypatch):
    (tmp_path / "key").write_text("from file\n")
    monkeypatch.setenv(serve.KEY, "from environment")
    given = {(): "from environment", ("--api_key_file", str(tmp_path / "key")): "from file", ("--api_key", "x"): "x"}
    assert {words: serve.api_key(serve.parse_arguments(words)) for words in given} == given


def test_a_server_is_bound_to_this_machine_unless_told(flags):
    arguments = serve.parse_arguments([*flags, "--port", "0"])
    with listen(ServerConfig(host=arguments.host, port=arguments.port)) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"


class Process:
    """The command in a process of its own, and its address."""

    def __init__(self, *arguments: str, port: int = 0):
        command = [sys.executable, "-m", "anima_jax.serve", "--port", str(port), "--no_warm_up", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=os.environ | {"ANIMA_API_KEY": "secret"}, **pipes)
        line = self.process.stdout.readline()
        assert line.startswith("serving at http://127.0.0.1:"), (line, self.process.stderr.read())
        self.client = httpx.Client(base_url=line.split()[-1], timeout=300, headers={"authorization": "Bearer secret"})

    def draw(self, **options) -> dict:
        return self.client.post("/api/jobs?wait=1", json=SMALL | options).json()


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_stopped_server_finishes_its_jobs_and_another_finds_its_images(flags, tmp_path):
    serving = Process(*flags, "--gallery", str(tmp_path), "--slots", "2")
    assert serving.client.get("/health", headers={"authorization": ""}).json()["status"] == "ok"
    answers: list[dict] = []
    waiting = threading.Thread(target=lambda: answers.append(serving.draw(seed=1, batch_size=3)))
    waiting.start()
    while not serving.client.get("/api/jobs").json()["jobs"]:
        pass
    serving.process.send_signal(signal.SIGTERM)
    waiting.join(300)
    assert (serving.process.wait(300), answers[0]["state"]) == (0, "done")
    found = Gallery(RequestLimits(), tmp_path).page(9)
    assert [image.id for image in found][::-1] == sorted(image["id"] for image in answers[0]["images"])
    with socket.create_server(("127.0.0.1", serving.client.base_url.port)):
        pass  # the port is free at once


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_killed_server_starts_again_at_its_port_with_the_images_that_were_finished(flags, tmp_path):
    flags = [*flags, "--gallery", str(tmp_path), "--slots", "2"]
    killed = Process(*flags)
    finished = killed.draw(seed=1, batch_size=2)["images"]
    killed.client.post("/api/jobs", json=SMALL | {"batch_size": 16, "steps": 20})
    while len(killed.client.get("/api/images").json()["images"]) < 4:  # it is writing one after the other
        pass
    killed.process.kill()
    killed.process.wait(300)
    again = Process(*flags, port=killed.client.base_url.port)
    images = again.client.get("/api/images").json()["images"]
    assert {image["id"] for image in finished} < {image["id"] for image in images}
    for image in images:
        with Image.open(io.BytesIO(again.client.get(image["url"]).content)) as opened:
            opened.load()
    assert again.draw(seed=1)["state"] == "done"
    again.process.kill()
    again.process.wait(300)


def test_requests_are_taken_while_images_of_the_default_size_are_compiled():
    engine, ready = ManualEngine(), threading.Event()
    config = ServerConfig(port=0, defaults={"width": 32, "height": 48, "sampler": "heun"})
    with listen(config) as listening:
        server = HttpServer(create_app(None, config), lambda: engine, 0, ready.set, warm_up=True)
        thread = threading.Thread(target=server.serve_on, args=(listening,))
        thread.start()
        assert engine.submitted.acquire(timeout=300)
        assert ready.wait(300)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        assert httpx.get(f"{url}/health").json()["status"] == "ok"
        (ticket,) = engine.tickets
        engine.finish(ticket)
        server._loader.join(300)
        server.should_exit = True
        thread.join(300)
    order = ticket.order
    assert (order.request.width, order.params.sampler, order.is_counted) == (32, "heun", False)
