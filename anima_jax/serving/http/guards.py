"""What every request passes before its route: names and origins, the key, and clients that are slow.

A page of another site can make a browser send requests to this machine. So a server that only this machine can reach
answers only to names of this machine (a name of the attacker's could resolve to it: DNS rebinding), and a request that
changes something must not come from a page of another origin.
"""

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anima_jax.serving.http.routes import ApiRoute, matching, shape_of
from anima_jax.serving.http.server import ServerConfig

LOCAL_NAMES = {"localhost", "127.0.0.1", "::1"}

ANY = "*"
"""Stands for every name in `ServerConfig.hosts`."""

SAFE = ("GET", "HEAD", "OPTIONS")
"""Methods that change nothing."""

CORS_HEADERS = {
    "Access-Control-Allow-Methods": "GET, POST, PUT, DELETE",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, If-Match",
    "Access-Control-Max-Age": "600",
}

POLICY = "default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'self'; object-src 'none'"
"""What a browser lets the page do: it loads nothing from other machines."""


class Guards:
    """ASGI middleware that refuses requests from where they should not come, and those without the key.

    The page's files need no key, and routes that say so.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig, routes: Sequence[BaseRoute]):
        self._app, self._config, self._routes = app, config, routes
        ancestors = " ".join(["'self'", *config.cors])
        self._headers = {
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "same-origin",
            "Content-Security-Policy": f"{POLICY}; frame-ancestors {ancestors}",
        }
        self._key = None if config.api_key is None else _digest(config.api_key.encode("utf-8", "surrogateescape"))
        own = {_host_name(config.host), *map(str.lower, config.hosts)}
        self._names = own | LOCAL_NAMES if config.is_local and ANY not in own else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        allowed = origin in self._config.cors
        if refusal := self._refusal(scope, headers, allowed):
            status, message, more = refusal
            await _refuse(send, status, shape_of(scope["path"], self._routes)(status, message), more)
            return
        if allowed and scope["method"] == "OPTIONS":
            await _answer(send, 204, {"Access-Control-Allow-Origin": str(origin), "Vary": "Origin", **CORS_HEADERS})
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered = MutableHeaders(scope=message)
                answered.update(self._headers)
                if allowed:
                    answered["Access-Control-Allow-Origin"] = str(origin)
                    answered["Access-Control-Expose-Headers"] = "ETag, Retry-After"
                    answered.add_vary_header("Origin")
            await send(message)

        await self._app(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope, headers: Headers, allowed: bool) -> tuple[int, str, dict[str, str]] | None:
        """Return status, message and headers if the request is refused."""
        host = headers.get("host")  # which browsers always send
        if self._names is not None and host is not None and _host_name(host) not in self._names:
            return 403, "the server is called by another name than its own; --allow_host NAME allows it", {}
        if not allowed and _is_cross_site(scope, headers):
            return 403, "the request comes from a page of another site; --cors ORIGIN allows it", {}
        is_preflight = allowed and scope["method"] == "OPTIONS"
        if self._key is None or is_preflight or not self._needs_key(scope):
            return None
        if not any(hmac.compare_digest(_digest(given), self._key) for given in _given_keys(headers)):
            return 401, "the API key is missing or wrong", {"WWW-Authenticate": 'Bearer realm="anima_jax"'}
        return None

    def _needs_key(self, scope: Scope) -> bool:
        found = matching(self._routes, scope)
        return not all(isinstance(route, ApiRoute) and route.operation.is_open for route in found)


def _is_cross_site(scope: Scope, headers: Headers) -> bool:
    """Return whether a browser says that a page of another origin sends a request that may change something."""
    if scope["method"] in SAFE:
        return False
    if (site := headers.get("sec-fetch-site")) is not None:  # what a proxy between them does not change
        return site not in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is not None and _authority(origin) != headers.get("host", "").lower()


def _authority(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _host_name(host: str) -> str:
    """Return the name in a Host header, without its port and brackets."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _given_keys(headers: Headers) -> list[bytes]:
    """Return what a client may have given as the key: a bearer token, or the password of basic authentication."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    given = value.strip().encode("latin-1")
    if scheme.lower() == "bearer":
        return [given]
    if scheme.lower() != "basic":
        return []
    try:
        pair = base64.b64decode(given, validate=True)
    except (binascii.Error, ValueError):
        return []
    return [pair, pair.partition(b":")[2]]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


async def _refuse(send: Send, status: int, error: dict[str, Any], headers: dict[str, str]) -> None:
    await _answer(send, status, headers | {"Content-Type": "application/json"}, json.dumps(error).encode())


async def _answer(send: Send, status: int, headers: dict[str, str], body: bytes = b"") -> None:
    given = {"Content-Length": str(len(body)), **headers}
    encoded = [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in given.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
