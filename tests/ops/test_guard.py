"""The guard around an application that answers everything; tests/ops/test_webserver.py has Dagster's."""

import asyncio

import pytest

from prism_assets.ops.guard import Guard, is_loopback

OWN = {"host": "localhost:3000"}


async def answers_everything(scope, receive, send):
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        return
    headers = [(b"X-Frame-Options", b"ALLOWALL"), (b"Content-Security-Policy", b"object-src 'none'"), (b"a", b"b")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"data"})


def messages(headers, method="GET", path="/", query=b"", kind="http", **options):
    """What is sent back to a request; `headers` is a mapping, or a list where a name comes twice."""
    pairs = headers.items() if isinstance(headers, dict) else headers
    scope = {
        "type": kind,
        "method": method,
        "path": path,
        "query_string": query,
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in pairs],
    }
    sent = []

    async def receive():
        return {"type": f"{kind}.connect"}

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(answers_everything, **options)(scope, receive, send))
    return sent


def status(headers, **request):
    first = messages(headers, **request)[0]
    return {"websocket.accept": 101, "websocket.close": 403}.get(first["type"]) or first["status"]


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:3000", "localhost:8080", "127.0.0.1:3000", "[::1]:3000"],
)
def test_every_name_and_port_of_this_machine_is_its_own(host):
    assert status({"host": host}) == 200
    assert status({"host": host}, kind="websocket", path="/graphql") == 101


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example:3000", "localhost.evil.example", "evil-localhost", "127.0.0.1.nip.io:3000", "localhost."),
        *("", "localhost@evil.example", "evil.example@localhost", "localhost/evil", "localhost:evil", "[::1"),
        *("0.0.0.0:3000", "192.168.0.7:3000", "[::ffff:192.168.0.7]", "2130706433", "locälhost"),
    ],
)
def test_another_host_is_refused(host):
    assert status({"host": host}) == 403
    assert status({"host": host}, kind="websocket", path="/graphql") == 403


def test_a_request_has_exactly_one_host():
    assert status({}) == 403
    assert status([("host", "localhost"), ("host", "evil.example")]) == 403


def test_named_hosts_are_let_through_and_addresses_where_the_server_listens_on_one():
    assert status({"host": "Prism.Example.org"}, hosts=["prism.example.org"]) == 200
    assert status({"host": "www.prism.example.org"}, hosts=["prism.example.org"]) == 403
    assert status({"host": "192.168.0.7:3000"}, any_address=True) == 200
    assert status({"host": "[fe80::1]:3000"}, any_address=True) == 200
    assert status({"host": "evil.example"}, any_address=True) == 403
    assert status({"host": "[fe80::1]:3000"}, hosts=["FE80::0:1"]) == 200


@pytest.mark.parametrize(
    "origin",
    [
        *("http://evil.example", "null", "", "http://localhost", "http://localhost:8000", "http://127.0.0.1:3000"),
        *("file://", "http://localhost:3000.evil.example", "chrome-extension://localhost:3000", "localhost:3000"),
    ],
)
def test_another_origin_is_refused_another_port_of_this_machine_too(origin):
    for request in ({"method": "POST"}, {"method": "OPTIONS"}, {}, {"kind": "websocket"}):
        assert status(OWN | {"origin": origin}, **request) == 403
    assert status([*OWN.items(), ("origin", "http://localhost:3000"), ("origin", origin)]) == 403


def test_the_origin_of_its_own_pages_is_let_through_also_behind_a_proxy_with_tls():
    assert status(OWN | {"origin": "http://localhost:3000"}, kind="websocket") == 101
    proxied = {"host": "prism.example.org", "origin": "https://prism.example.org"}
    assert status(proxied, method="POST", hosts=["prism.example.org"]) == 200


@pytest.mark.parametrize(
    ("site", "expected"),
    [("same-origin", 200), ("none", 200), ("same-site", 403), ("cross-site", 403), ("new-word", 403), ("", 403)],
)
def test_what_a_page_of_another_site_asks_for_is_refused(site, expected):
    assert status(OWN | {"sec-fetch-site": site}) == expected


def test_a_link_on_a_page_of_another_site_leads_to_a_page_from_which_the_user_goes_on():
    headers = OWN | {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    start, body = messages(headers, path="/<script>")
    assert start["status"] == 403 and b'<a href="/">' in body["body"] and b"<script" not in body["body"]
    start, body = messages({"host": "<script>", "sec-fetch-mode": "navigate"})
    assert start["status"] == 403 and b"<script" not in body["body"] and b"&lt;script&gt;" in body["body"]


@pytest.mark.parametrize("path", ["/graphql", "/graphql/"])
def test_graphql_is_taken_by_post_with_a_type_that_no_form_can_send(path):
    def graphql(method="GET", query=b"", **headers):
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return status(OWN | named, method=method, path=path, query=query)

    assert graphql("POST", content_type="application/json; charset=utf-8") == 200
    assert graphql("POST", content_type="application/graphql") == 200
    for kind in ("", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "a/b; application/json"):
        assert graphql("POST", content_type=kind) == 403
    assert graphql("POST", b"query={version}") == 403
    assert graphql(query=b"query={version}") == 403
    assert graphql(query=b"query={version}", accept="text/html") == 403
    assert graphql("HEAD", b"query={version}") == 403
    assert graphql("PUT", content_type="application/json") == 403
    assert graphql(accept="text/html,*/*") == 200  # the editor


def test_no_answer_can_be_framed_or_embedded_and_each_protection_is_given_once():
    for headers in (OWN, {"host": "evil.example"}):
        given = messages(headers)[0]["headers"]
        names = [name.lower() for name, _ in given]
        assert (b"x-frame-options", b"DENY") in given and names.count(b"x-frame-options") == 1
        assert (b"cross-origin-resource-policy", b"same-origin") in given
        assert any(name == b"content-security-policy" and b"frame-ancestors 'none'" in value for name, value in given)
    kept = messages(OWN)[0]["headers"]
    assert (b"Content-Security-Policy", b"object-src 'none'") in kept and (b"a", b"b") in kept


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False)]
    + [("192.168.0.7", False), ("my-laptop", False)],
)
def test_which_addresses_are_reached_from_this_machine_alone(host, expected):
    assert is_loopback(host) is expected
