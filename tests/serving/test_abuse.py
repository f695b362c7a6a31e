"""What strangers send: broken, huge, slow and malicious requests are refused in one line, and the server goes on."""

import base64
import io
import json
import random
import socket
import struct
import time
import types
import zlib

import pytest
from PIL import Image, PngImagePlugin

pytest.importorskip("uvicorn")

from anima_jax.errors import UserError
from anima_jax.serving.app import create_app
from anima_jax.serving.http.http_server import protocol
from anima_jax.serving.http.limits import RequestLimits
from anima_jax.serving.http.own_api import settings_in
from anima_jax.serving.http.server import ServerConfig
from tests.serving.servers import SMALL, ManualEngine, running_app

LIMITS = RequestLimits(
    max_size=64,
    max_steps=8,
    max_batch=2,
    max_body=200_000,
    max_prompt=1000,
    max_tokens=500,
    max_picture=2**20,
    max_connections=20,
    read_timeout=0.5,
    write_timeout=0.5,
    job_timeout=300,
)


@pytest.fixture(scope="module")
def engine():
    return ManualEngine()


@pytest.fixture(scope="module")
def running(engine):
    with running_app(create_app(engine, ServerConfig(limits=LIMITS))) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left(engine):
    yield
    for ticket in engine.tickets:
        ticket.cancel()
        ticket.move("cancelled")


def refused(response, *statuses: int) -> str:
    """The error of a refused request, which is one line without a traceback or a path of this machine."""
    assert response.status_code in statuses, (response.status_code, response.text)
    message = response.json()["error"]
    assert not any(word in message for word in ("\n", "Traceback", ".py", "/root", "site-packages")), message
    return message


def post(running, body, **headers):
    return running.client.post("/api/jobs", content=body, headers={"content-type": "application/json"} | headers)


BROKEN = [
    *(b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b"\x00", b'{"prompt": "\xff"}', b"{}{}"),
    b"[" * 100_000,
    b'{"a":' * 20_000,
    b'{"sampler_options": ' + b'{"a":' * 500 + b"1" + b"}" * 501,
    b'{"shift": NaN}',
    b'{"shift": Infinity}',
    b'{"shift": -Infinity}',
    b'{"shift": 1e999}',
    b'{"seed": ' + b"9" * 5000 + b"}",
    b'{"seed": ' + b"9" * 400 + b"}",
    b'{"shift": ' + b"9" * 400 + b"}",
    b'{"steps": 1e400}',
    b'{"prompt": "\\ud800"}',
    b'{"sampler_options": {"eta": "\\udfff"}}',
    b'{"\\ud800": 1}',
    b'{"prompt": "a", "prompt": "b"}',
    b'{"sampler_options": {"eta": 1, "eta": 2}}',
    *(
        json.dumps(body).encode()
        for body in (
            {"prompts": "x"},
            {"prompt": None},
            {"prompt": ["x"]},
            {"prompt": "x" * 1001},
            {"steps": True},
            {"steps": "3"},
            {"steps": 2.5},
            {"steps": 0},
            {"steps": 9},
            {"width": 33},
            {"width": -8},
            {"width": 72},
            {"batch_size": 3},
            {"seed": -2},
            {"seed": 2**64},
            {"sigmas": [1.0, "x"]},
            {"sigmas": [2.0, 0.0]},
            {"sigmas": [1 - n / 20 for n in range(20)]},
            {"guidance_interval": [0.5]},
            {"sampler": "eulr"},
            {"sampler": "../../etc/passwd"},
            {"sampler_options": {"eta": {"a": 1}}},
            {"sampler_options": {"eta": 10**400}},
            {"noise": "torch-cuda:x"},
            {"cache": "easy:nan"},
            {"tile": 10**30},
            {"loras": [{"name": "../../secret"}]},
            {"loras": [{"name": "x", "weight": {"blocks.0-9": "a"}}]},
            {"controls": [{"name": "/etc/passwd", "image": "x"}]},
            {"image": "/etc/passwd"},
            {"image": "file:///etc/passwd"},
            {"image": "http://127.0.0.1:1/x.png"},
            {"image": "data:text/html;base64,PGI+"},
            {"image": "A" * 100_000},
            {"mask": "iVBORw0KGgo="},
            {"references": ["hf://owner/repo/x.png"]},
            {"regions": [{"prompt": "x", "area": "/etc/passwd"}]},
            {"regions": [{"prompt": "x", "area": [0, 0, -1, 1e308]}]},
            {"regions": [{"prompt": "x"}]},
            {"preview_every": -1},
        )
    ),
]


def test_a_thousand_broken_requests_leave_the_server_as_it_was(running, engine):
    rng, before = random.Random(0), len(engine.tickets)
    for index in range(1000):
        body = BROKEN[index % len(BROKEN)]
        if index >= 2 * len(BROKEN):  # the same, damaged somewhere
            place = rng.randrange(len(body) + 1)
            body = body[:place] + rng.choice([b"", b"\x00", b"\xff", b"{", b"]", b'"']) + body[place + 1 :] + b"}"
        response = post(running, body)
        if response.status_code != 202 or index < 2 * len(BROKEN):  # some damage leaves a good request
            refused(response, 400, 413, 422, 429)
    assert len(engine.tickets) - before <= 2
    assert running.client.get("/health").json()["status"] == "ok"


def test_texts_whose_reading_would_take_hours_are_refused(running):
    many = b'{"references": [' + b"," * 2**17  # each mistake would take 7 µs and a kilobyte
    assert "more than 131072 values" in refused(post(running, many), 400)
    twice = b"{" + b"".join(b'"%d":0,' % n for n in range(18_000)) + b'"x":0,"x":1}'
    assert "'x' is there twice" in refused(post(running, twice), 400)
    for text in ("Steps: 1," + " " * 150_000 + "x", "[" * 150_000 + "\nSteps: 1, Size: 8x8"):
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text("parameters", text)
        data = saved("PNG", pnginfo=chunks)
        assert running.client.post("/api/settings", files={"file": ("x.png", data, "image/png")}).status_code == 200


def test_the_place_of_a_mistake_is_named(running):
    cases = {
        b'{"loras": [{"name": "x"}, {"nme": "y"}]}': "there is no setting 'loras[1].nme'",
        b'{"promt": "x"}': "there is no setting 'promt' (did you mean 'prompt'?)",
        b'{"loras": [{}]}': "loras[0].name is missing",
        b'{"sampler": "eulr"}': "(did you mean 'euler'?)",
        json.dumps({"prompt": "😀" * 200}).encode(): "a prompt of 800 tokens, expected at most 500",
        b'{"steps": 9}': "steps 9, expected at most 8 on this server",
        b'{"prompt": "a", "prompt": "b"}': "'prompt' is there twice",
    }
    for body, expected in cases.items():
        assert expected in refused(post(running, body), 400, 422)


def png(size, *chunks: tuple[bytes, bytes], data: bytes = b"") -> bytes:
    parts = [(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)), *chunks, (b"IDAT", data), (b"IEND", b"")]
    written = [struct.pack(">I", len(x)) + name + x + struct.pack(">I", zlib.crc32(name + x)) for name, x in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def saved(kind: str, size=(8, 8), **options) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size).save(data, format=kind, **options)
    return data.getvalue()


def huge_pictures() -> dict[str, bytes]:
    """Small files that say that they are huge, or become so."""
    jpeg, gif, tiff, bmp = saved("JPEG"), saved("GIF"), saved("TIFF"), saved("BMP")
    frame = jpeg.index(b"\xff\xc0") + 5
    bomb = zlib.compress(b"\0" * 60_000_000)
    webp = b"VP8X" + struct.pack("<I", 10) + b"\0" * 4 + b"\xff\xff\xff" * 2
    tags = [(256, 60_000), (257, 60_000)]
    for tag, value in tags:
        at = (
            tiff.index(struct.pack("<HH", tag, 3))
            if struct.pack("<HH", tag, 3) in tiff
            else tiff.index(struct.pack("<HH", tag, 4))
        )
        tiff = tiff[: at + 2] + struct.pack("<HII", 4, 1, value) + tiff[at + 12 :]
    return {
        "png": png((60_000, 60_000)),
        "png of zeros": png((50_000, 20_000), data=zlib.compress(bytes(3 * 10**6))),
        "text": png((8, 8), (b"zTXt", b"parameters\0\0" + bomb)),
        "international text": png((8, 8), (b"iTXt", b"prompt\0\1\0\0\0" + bomb)),
        "profile": png((8, 8), (b"iCCP", b"x\0\0" + bomb)),
        "jpeg": jpeg[:frame] + struct.pack(">HH", 65_000, 65_000) + jpeg[frame + 4 :],
        "gif": gif[:6] + struct.pack("<HH", 65_535, 65_535) + gif[10:],
        "webp": b"RIFF" + struct.pack("<I", len(webp) + 4) + b"WEBP" + webp,
        "tiff": tiff,
        "bmp": bmp[:18] + struct.pack("<ii", 60_000, 60_000) + bmp[26:],
        "truncated": png((64, 64), data=zlib.compress(random.Random(0).randbytes(12_352)))[:9000],
        "empty": b"\x89PNG\r\n\x1a\n",
    }


def test_pictures_that_would_fill_the_memory_are_refused_before_they_do(running):
    for name, data in huge_pictures().items():
        response = running.client.post("/api/settings", content=data, headers={"content-type": "image/png"})
        assert refused(response, 413, 422).startswith("the picture"), name
        body = json.dumps({"image": base64.b64encode(data).decode(), "denoise": 0.5}).encode()
        if (
            "text" not in name and name != "profile"
        ):  # with too much text, or a broken profile, pixels may still be good
            assert refused(post(running, body), 413, 422).startswith("image"), name


def test_hostile_texts_in_pictures_are_settings_or_an_error(running):
    texts = ["{" * 50_000, '{"seed": NaN}', '{"prompt": "\\ud800"}', '{"sampler": 3}', "9" * 5000, "{}", "\x00"]
    texts += ['{"steps": 1e999, "shift": Infinity}', '{"loras": [["../../x", 1e999]]}', '{"width": "a"}']
    texts += ["x\nSteps: 99999999999999999999, Seed: -99999999999999999999, CFG scale: 1e999, Size: 999999x999999"]
    for name in ("anima_jax", "prompt", "parameters"):
        for text in texts:
            chunks = PngImagePlugin.PngInfo()
            chunks.add_text(name, text)
            data = saved("PNG", pnginfo=chunks)
            response = running.client.post("/api/settings", files={"file": ("../../x.png", data, "image/png")})
            if response.status_code != 200:
                refused(response, 422)


def test_texts_beyond_a_limit_are_left_out_with_a_note_and_the_shorter_ones_are_read():
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", "a cat\nSteps: 7, Seed: 5")
    chunks.add_text("prompt", " " * 2**20)
    data = saved("PNG", pnginfo=chunks)
    server = types.SimpleNamespace(limits=RequestLimits())
    answer = settings_in(data, server)
    assert (answer.settings["prompt"], answer.settings["steps"]) == ("a cat", 7)
    assert answer.notes[1:] == ["its 'prompt' is not read: its texts have more than 1048576 characters"]
    server.limits = RequestLimits(max_text=5)
    with pytest.raises(UserError, match="the picture: its 'parameters', 'prompt' is not read"):
        settings_in(data, server)


def test_bodies_that_are_too_large_are_refused_announced_or_not(running):
    large = b'{"prompt": "' + b"x" * 300_000 + b'"}'

    def parts():
        for start in range(0, len(large), 10_000):
            yield large[start : start + 10_000]

    assert "larger than 200 kB" in refused(post(running, large), 413)
    assert "larger than 200 kB" in refused(post(running, parts()), 413)
    form = {"file": ("x.png", large, "image/png")}
    assert "larger than 200 kB" in refused(running.client.post("/api/settings", files=form), 413)
    many = {f"file{n}": ("x.png", b"x", "image/png") for n in range(200)}
    refused(running.client.post("/api/settings", files=many), 400)


def test_forms_that_cannot_be_read_are_refused(running):
    kinds = [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=x",
        "text/html",
        "",
    ]
    for kind in kinds:
        for body in (
            b"",
            b"--x",
            b"--x\r\nContent-Disposition: form-data; name=\xff\r\n\r\n\r\n--x--\r\n",
            b"\0" * 100,
        ):
            response = running.client.post("/api/settings", content=body, headers={"content-type": kind})
            refused(response, 400, 415, 422)


def test_names_and_paths_never_leave_what_the_server_has(running):
    for path in ("/api/images/..%2f..%2fetc%2fpasswd.png", "/api/images/%2e%2e/thumbnail.jpg", "/api/jobs/%00"):
        assert running.client.get(path).status_code == 404
    for path in ("/..%2f..%2f..%2fetc/passwd", "/%2e%2e/app.py", "//etc/passwd", "/%00", "/" + "a" * 5000, "/%ff.js"):
        response = running.client.get(path)
        assert refused(response, 404) == "there is nothing at this address", path


# ---- clients that are slow, or many ---------------------------------------------------------------------------------


def connect(running) -> socket.socket:
    connection = socket.create_connection(running.address)
    connection.settimeout(300)
    return connection


def everything(connection: socket.socket) -> bytes:
    """What arrives until the server ends the connection."""
    found = []
    try:
        while data := connection.recv(65536):
            found.append(data)
    except ConnectionError:
        pass
    return b"".join(found)


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n"])
def test_headers_that_do_not_arrive_end_the_connection(running, sent):
    with connect(running) as connection:
        connection.sendall(sent)
        assert everything(connection) == b""


def test_a_body_that_does_not_arrive_is_refused(running):
    head = (
        b"POST /api/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    )
    with connect(running) as connection:
        connection.sendall(head + b'{"prompt"')
        found = everything(connection)
    assert found.startswith(b"HTTP/1.1 408 ")
    assert b"did not arrive in time" in found


def test_a_client_that_does_not_read_is_let_go(running):
    with connect(running) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(0.5)
        with pytest.raises((TimeoutError, ConnectionError)):  # noqa: PT012
            while True:
                connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
        running.client.close()
        while running.uvicorn.server_state.connections:
            time.sleep(0.02)


def test_a_client_that_reads_a_large_answer_slowly_is_not_let_go():
    timers, ended = [], []
    connection = object.__new__(protocol(LIMITS))
    connection.flow = types.SimpleNamespace(pause_writing=lambda: None)
    connection.loop = types.SimpleNamespace(call_later=lambda seconds, call: timers.append(call))
    sizes = [100, 90, 90, 89]  # MiB that wait for the client: when it begins, and at each look
    size = types.SimpleNamespace(get_write_buffer_size=lambda: sizes.pop(0) * 2**20, abort=lambda: ended.append(True))
    connection.transport = size
    connection.pause_writing()
    timers.pop()()
    assert timers
    assert not ended
    timers.pop()()
    assert not timers
    assert ended


def test_too_many_connections_are_refused_and_room_comes_back(running):
    import httpx

    connections = [connect(running) for _ in range(LIMITS.max_connections + 5)]
    assert everything(connections[-1]).startswith(b"HTTP/1.1 503 ")
    for connection in connections:
        connection.close()
    while running.uvicorn.server_state.connections:
        time.sleep(0.02)
    running.client = httpx.Client(base_url=running.url, timeout=300)
    assert running.client.get("/health").status_code == 200


# ---- pages of other sites, and keys ---------------------------------------------------------------------------------


def test_pages_of_other_sites_can_neither_draw_nor_find_the_server(running):
    small = json.dumps(SMALL).encode()
    address = "127.0.0.1:" + str(running.address[1])
    assert "another name" in refused(running.client.get("/api/models", headers={"host": "evil.example"}), 403)
    for origin in ("https://evil.example", "null", f"http://localhost:{running.address[1]}", f"https://x@{address}"):
        assert "another site" in refused(post(running, small, origin=origin), 403)
    assert "another site" in refused(post(running, small, **{"sec-fetch-site": "cross-site"}), 403)
    refused(post(running, small, **{"sec-fetch-site": "same-site", "origin": f"http://{address}"}), 403)
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        refused(post(running, small, **{"content-type": kind}), 415)
    response = running.client.get("/api/models", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in response.headers


def test_an_allowed_origin_may_use_the_server_and_others_may_not():
    config = ServerConfig(limits=LIMITS, cors=("https://studio.example",), api_key="secret")
    with running_app(create_app(ManualEngine(), config)) as running:
        client, own = running.client, {"origin": "https://studio.example"}
        preflight = client.options("/api/jobs", headers=own | {"access-control-request-method": "POST"})
        assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (204, own["origin"])
        assert {"Authorization", "Content-Type", "If-Match"} == set(
            preflight.headers["access-control-allow-headers"].split(", ")
        )
        headers = own | {"authorization": "Bearer secret"}
        response = client.post("/api/jobs", json=SMALL, headers=headers)
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (202, own["origin"])
        refused(client.post("/api/jobs", json=SMALL, headers=headers | {"origin": "https://other.example"}), 403)


def test_every_route_but_health_and_the_page_asks_for_the_key():
    with running_app(create_app(ManualEngine(), ServerConfig(limits=LIMITS, api_key="sécret"))) as running:
        client = running.client
        document = client.get("/openapi.json", auth=("x", "sécret")).json()
        for path, methods in document["paths"].items():
            for method in methods:
                response = client.request(method, path)
                if path != "/health":
                    assert response.headers.get("www-authenticate", "").startswith("Bearer"), path
        assert (client.get("/health").status_code, client.get("/").status_code) == (200, 200)
        key = "sécret".encode()
        for given in (b"Bearer " + key, b"bearer  " + key, b"Basic " + base64.b64encode(b"user:" + key)):
            assert client.get("/api/jobs", headers={b"authorization": given}).status_code == 200, given
        for given in (b"Bearer secret", b"Bearer", b"Basic x", b"Basic " + base64.b64encode(b"\xff"), b"Digest " + key):
            refused(client.get("/api/jobs", headers={b"authorization": given}), 401)
