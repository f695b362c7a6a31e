"""Files on the hub, from a hub on this machine: where they go, what is said, and what goes wrong on the way."""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import os
import pathlib
import re
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from huggingface_hub import hf_hub_download
from safetensors.numpy import save

from anima_jax.checkpoints import hub, locations
from anima_jax.checkpoints.safetensors import SafetensorsFile
from anima_jax.errors import UserError
from tests.disks import fill, small_disk

DATA = save({"x": np.arange(100_000, dtype=np.float32)})
COMMIT = "c" * 40
NAME = "split_files/vae/vae.safetensors"


@dataclasses.dataclass
class FakeHub:
    """What the server has, and how it behaves."""

    url: str = ""
    files: dict[str, bytes] = dataclasses.field(default_factory=lambda: {NAME: DATA, "a.safetensors": DATA[:1000]})
    breaks_after: list[int] = dataclasses.field(default_factory=list)
    """Bytes after which each of the next downloads breaks off."""
    knows_ranges: bool = True
    refuses: tuple[int, str] | None = None
    sends: bytes | None = None
    ranges: list[str | None] = dataclasses.field(default_factory=list)
    """The ranges that were asked for."""

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        if path.startswith("/api/models/o/r"):
            if "/tree/" in path:
                body = json.dumps([{"type": "file", "path": name, "size": 1, "oid": "0"} for name in self.files])
            else:
                body = json.dumps({"id": "o/r", "sha": COMMIT, "siblings": [{"rfilename": n} for n in self.files]})
            self.send(request, 200, {"Content-Type": "application/json"}, body.encode())
            return
        match = re.fullmatch(r"/o/r/resolve/(main|v1|c{40})/(.*)", path)
        if self.refuses:
            status, code = self.refuses
            self.send(request, status, {"X-Error-Code": code}, b"")
        elif path.startswith("/o/r/") and not match:
            self.send(request, 404, {"X-Error-Code": "RevisionNotFound"}, b"")
        elif not match:
            self.send(request, 401, {"X-Error-Code": "RepoNotFound"}, b"")
        elif match[2] not in self.files:
            self.send(request, 404, {"X-Error-Code": "EntryNotFound"}, b"")
        else:
            data = self.files[match[2]]
            etag = hashlib.sha256(data).hexdigest()
            self.file(request, self.sends or data, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'})

    def file(self, request: http.server.BaseHTTPRequestHandler, data: bytes, headers: dict[str, str]) -> None:
        wanted = request.headers.get("Range")
        status, start = 200, 0
        if request.command == "GET":
            self.ranges.append(wanted)
            if wanted and self.knows_ranges:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                status, headers = 206, headers | {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        self.send(request, status, headers, data[start:])

    def send(self, request, status: int, headers: dict[str, str], body: bytes) -> None:
        request.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body[: self.breaks_after.pop(0)] if self.breaks_after else body)
        request.close_connection = True


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[FakeHub]:
    fake = FakeHub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            with contextlib.suppress(ConnectionError):
                fake.answer(self)

        do_HEAD = do_GET  # noqa: N815 - the name that the library calls

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        fake.url = f"http://127.0.0.1:{listening.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", fake.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub.time, "sleep", lambda _: None)
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield fake
        listening.shutdown()
        thread.join()


def error_of(address: str) -> str:
    with pytest.raises(UserError) as error:
        locations.resolve(address)
    (line,) = error.value.messages
    return line


def partials(folder: pathlib.Path) -> list[int]:
    return [path.stat().st_size for path in folder.rglob("*.incomplete")]


def test_a_file_is_downloaded_once_into_the_hubs_own_cache(server, tmp_path, capsys):
    path = locations.resolve(f"hf://o/r/{NAME}")
    digest = hashlib.sha256(DATA).hexdigest()
    blob = tmp_path / "cache" / "models--o--r" / "blobs" / digest
    assert pathlib.Path(path).read_bytes() == DATA
    said = [
        f"downloading hf://o/r/{NAME} (400 kB) to {blob}",
        f"downloaded {NAME}: 400 kB, sha256 {digest} as on the hub",
    ]
    assert capsys.readouterr().err.splitlines() == said
    with SafetensorsFile(f"hf://o/r/{NAME}") as file:
        assert list(file.tensors) == ["x"]
    assert hf_hub_download("o/r", NAME, endpoint=server.url) == path
    assert server.ranges == [None]


def test_a_dry_run_takes_only_the_header(server, tmp_path, capsys):
    with hub.headers_only():
        with SafetensorsFile(f"hf://o/r/{NAME}") as file:
            assert {name: entry.shape for name, entry in file.tensors.items()} == {"x": (100_000,)}
        path = pathlib.Path(locations.resolve(f"hf://o/r/{NAME}"))
        assert path.stat().st_size == len(DATA)
    assert not path.exists()
    assert not (tmp_path / "cache").exists()
    said = f"reading the header of hf://o/r/{NAME} (400 kB), which a run downloads"
    assert capsys.readouterr().err.splitlines() == [said]


def test_a_revision_is_a_branch_a_tag_or_a_commit(server, tmp_path):
    paths = [locations.resolve(f"hf://o/r@{revision}/a.safetensors") for revision in ("v1", COMMIT, "main")]
    assert {pathlib.Path(path).read_bytes() for path in paths} == {DATA[:1000]}
    refs = tmp_path / "cache" / "models--o--r" / "refs"
    assert {path.name: path.read_text() for path in refs.iterdir()} == {"v1": COMMIT, "main": COMMIT}
    assert "o/r@v2/a.safetensors: the repository has no revision 'v2'" in error_of("hf://o/r@v2/a.safetensors")


def test_a_broken_download_continues_also_in_another_process(server, tmp_path, capsys):
    server.breaks_after = [100_000] + [0] * hub.ATTEMPTS
    line = error_of(f"hf://o/r/{NAME}")
    assert re.search("the download broke off after 100 kB .*; the same command continues it$", line)
    assert partials(tmp_path) == [100_000]
    capsys.readouterr()
    server.breaks_after = [50_000, 7]
    assert pathlib.Path(locations.resolve(f"hf://o/r/{NAME}")).read_bytes() == DATA
    assert "(400 kB, 100 kB of them from an earlier attempt)" in capsys.readouterr().err
    assert server.ranges[-3:] == ["bytes=100000-", "bytes=150000-", "bytes=150007-"]
    assert partials(tmp_path) == []


def test_a_download_begins_again_where_the_server_knows_no_ranges(server):
    server.knows_ranges = False
    server.breaks_after = [100_000, 50_000]
    assert pathlib.Path(locations.resolve(f"hf://o/r/{NAME}")).read_bytes() == DATA
    assert server.ranges == [None, "bytes=100000-", "bytes=50000-"]


def test_a_file_with_another_hash_is_not_kept(server, tmp_path):
    server.sends = DATA[:-1] + b"!"
    line = error_of(f"hf://o/r/{NAME}")
    found, expected = (hashlib.sha256(data).hexdigest() for data in (server.sends, DATA))
    assert f"arrived with another hash ({found}) than the hub's ({expected})" in line
    server.sends = None
    assert pathlib.Path(locations.resolve(f"hf://o/r/{NAME}")).read_bytes() == DATA


@pytest.mark.parametrize(
    ("refuses", "expected"),
    [
        (
            (403, "GatedRepo"),
            "its owner asks for your consent: accept the conditions on {url}/o/r, then `hf auth login`",
        ),
        ((401, "RepoNotFound"), "there is no repository o/r, or it is private and needs `hf auth login` or HF_TOKEN"),
        ((403, ""), "access refused (403): log in with `hf auth login`"),
        ((500, ""), "could not be downloaded and is not in the local cache ("),
    ],
)
def test_a_refusal_says_what_helps_and_the_cache_counts(server, refuses, expected):
    server.refuses = refuses
    assert expected.format(url=server.url) in error_of(f"hf://o/r/{NAME}")
    server.refuses = None
    path = locations.resolve(f"hf://o/r/{NAME}")
    server.refuses = refuses
    assert locations.resolve(f"hf://o/r/{NAME}") == path


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("vae.safetensors", f" (did you mean '{NAME}'?)"),
        ("split_files/vae/vea.safetensors", f" (did you mean '{NAME}'?)"),
        ("zzz.txt", ""),
    ],
)
def test_a_file_that_is_not_in_the_repository_is_told_with_the_nearest_one(server, name, near):
    assert error_of(f"hf://o/r/{name}").startswith(
        f"hf://o/r/{name}: the repository has no file {name}{near}; its files are listed on {server.url}/o/r/tree/main"
    )


def test_without_a_network_the_cached_file_counts(server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "could not be downloaded and is not in the local cache" in error_of(f"hf://o/r/{NAME}")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    path = locations.resolve(f"hf://o/r/{NAME}")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert locations.resolve(f"hf://o/r/{NAME}") == path


def test_a_disk_without_room_is_told_before_the_download(server, tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", 512) as disk:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(disk))
        fill(disk, leave=200_000)
        line = error_of(f"hf://o/r/{NAME}")
        assert f"needs 400 kB in {disk}" in line
        assert line.endswith("are free; HF_HOME=FOLDER uses another folder")
        assert server.ranges == []


def test_a_cache_that_cannot_be_written_is_one_line(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file"))
    assert "cannot be written to" in error_of(f"hf://o/r/{NAME}")


def test_lines_in_a_log_say_how_far_a_download_is(server, monkeypatch, capsys):
    monkeypatch.setattr(hub, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(hub.time, "monotonic", iter(np.arange(0.0, 100.0, 2.0)).__next__)
    locations.resolve(f"hf://o/r/{NAME}")
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"vae\.safetensors: [\d.]+ kB of 400 kB \(\d+%\), [\d.]+ kB/s, \d+ s left", lines[1])
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize(
    "address", ["hf://o/r", "hf://o/r@/x", "hf://o//x", "hf://o/r/../x", "hf://o/@main/x", "hf://"]
)
def test_an_address_names_a_file_in_a_repository(address):
    assert error_of(address).startswith(f"{address}: expected hf://owner/repo")


def test_the_bar_is_for_terminals(server, monkeypatch, capsys):
    monkeypatch.setattr(os, "isatty", lambda _: True)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    locations.resolve(f"hf://o/r/{NAME}")
    assert "100%|" in capsys.readouterr().err
