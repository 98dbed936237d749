"""What stands between a browser and the webserver of `prism ui`: other sites' pages can neither act on it nor read it.

Dagster's webserver has no log-in, answers any Host and any Origin, and takes GraphQL mutations by GET. So an open page
of any site could start runs, by an image tag alone. `Guard` is an ASGI application around it that refuses

- a Host that is not this machine's (DNS rebinding: a name of the attacker's that leads to 127.0.0.1),
- what a page of another origin asks for, by `Origin` and `Sec-Fetch-Site`, websockets included,
- GraphQL by GET, and by POST in a form that a page may send anywhere without being asked for permission,

and that adds to every answer that no page may frame it, embed it or hold a handle on its window, and that pictures come
from it alone. It is no log-in: see docs/security.md.
"""

import html
import ipaddress
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::[0-9]{1,5})?")
_OWN_SITES = ("same-origin", "none")  # none: the user typed the address, or opened it from outside of a browser
_GRAPHQL_TYPES = ("application/json", "application/graphql")
_PROTECTION = {
    # Another policy beside Dagster's own: a browser keeps to both.
    "Content-Security-Policy": "frame-ancestors 'none'; form-action 'self'; img-src 'self' data: blob:",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
}
# Dagster answers with some of them, and a name that is given twice counts as none in some browsers.
_ONCE = {name.lower().encode() for name in _PROTECTION} - {b"content-security-policy"}


def is_loopback(host: str) -> bool:
    """Whether what listens on this address is reached from this machine alone."""
    address = _address(host)
    return address.is_loopback if address else host.lower() == "localhost"


class Guard:
    """An ASGI application that lets through to `app` what the user's own pages ask for.

    `hosts` are the names under which the webserver may be called, beside those of this machine. `any_address` lets IP
    addresses count as such: no page can have one of ours as its origin but our own.
    """

    def __init__(self, app: App, hosts: Iterable[str] = (), any_address: bool = False) -> None:
        self._app = app
        self._hosts = {"localhost", "127.0.0.1", "[::1]", *(_in_a_header(host) for host in hosts)}
        self._any_address = any_address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, _protected(send))
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: an answer of 403
        else:
            await _answer(scope, _protected(send), refusal)

    def _refusal(self, scope: Scope) -> str | None:
        """Why a request is refused; None where it is let through."""
        hosts = _values(scope, b"host")
        host = hosts[0].lower() if len(hosts) == 1 else ""
        if not self._is_ours(host):
            return (
                f"it is for the host {host!r}. If that is a name of this machine, or of a proxy before it, add it to "
                "ui.allowed_hosts in prism.yaml"
            )
        for origin in _values(scope, b"origin"):
            if origin.lower() not in (f"http://{host}", f"https://{host}"):
                return (
                    f"a page of {origin!r} sent it to {host!r}. If a proxy stands in between, it must pass on the Host "
                    "that the browser asked for"
                )
        for site in _values(scope, b"sec-fetch-site"):
            if site.lower() not in _OWN_SITES:
                return "a page of another site asked for it"
        if scope["type"] == "http" and scope["path"].rstrip("/") == "/graphql":
            return _graphql_refusal(scope)
        return None

    def _is_ours(self, host: str) -> bool:
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        return match[1] in self._hosts or (self._any_address and _address(match[1].strip("[]")) is not None)


def _graphql_refusal(scope: Scope) -> str | None:
    if scope["method"] == "POST":
        kind = "".join(_values(scope, b"content-type")).partition(";")[0].strip().lower()
        return None if kind in _GRAPHQL_TYPES else f"GraphQL is sent as {' or '.join(_GRAPHQL_TYPES)}, not as {kind!r}"
    if any("text/html" in one for one in _values(scope, b"accept")) and not scope.get("query_string"):
        return None  # the editor, which sends its queries by POST
    return "GraphQL is taken by POST alone"


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for key, value in scope["headers"] if key.lower() == name]


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _in_a_header(host: str) -> str:
    """A host as the header Host has it, without a port."""
    address = _address(host)
    return f"[{address}]" if address and address.version == 6 else host.lower()


def _protected(send: Send) -> Send:
    """`send` with `_PROTECTION` in the headers of every answer."""

    async def protected(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            kept = [(name, value) for name, value in message.get("headers", ()) if name.lower() not in _ONCE]
            added = [(name.lower().encode(), value.encode()) for name, value in _PROTECTION.items()]
            message = {**message, "headers": [*kept, *added]}
        await send(message)

    return protected


async def _answer(scope: Scope, send: Send, refusal: str) -> None:
    """403 with the reason; for a link on a page of another site, a page from which the user can go on."""
    said = f"prism ui refuses this request: {refusal}."
    kind, body = "text/plain", said
    if "navigate" in _values(scope, b"sec-fetch-mode"):
        kind = "text/html"
        body = f'<!doctype html><title>Refused</title><p>{html.escape(said)}<p><a href="/">Open the Dagster UI</a>'
    content = body.encode()
    headers = [(b"content-type", f"{kind}; charset=utf-8".encode()), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else content})
