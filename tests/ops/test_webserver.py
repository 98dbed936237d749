"""A hostile web page against the real webserver, as `prism ui` starts it: what it sends, and a browser that shows it.

Each attack is written as the page would make it. That none has an effect is asked for afterwards, the way the UI asks.
"""

import http.client
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
START_SECONDS = 120
JSON = {"content-type": "application/json"}
MUTATION = "mutation{setNuxSeen}"  # the smallest that leaves a trace
BY_GET = "/graphql?query=" + quote(MUTATION)
UPGRADE = {
    "connection": "Upgrade",
    "upgrade": "websocket",
    "sec-websocket-version": "13",
    "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
    "sec-websocket-protocol": "graphql-ws",
}


class Server:
    """The webserver on a port of this machine."""

    def __init__(self, port: int) -> None:
        self.port, self.own = port, f"http://127.0.0.1:{port}"

    def ask(self, method: str, path: str, headers: dict[str, str] | None = None, body: str | None = None):
        """Status, headers and text of an answer; headers of None are left out."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        given = {"host": f"127.0.0.1:{self.port}", **(headers or {})}
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in given.items():
            connection.putheader(name, value)
        if body is not None:
            connection.putheader("content-length", str(len(body.encode())))
        connection.endheaders(body.encode() if body is not None else None)
        answer = connection.getresponse()
        text = "" if answer.status == 101 else answer.read().decode("utf-8", "replace")
        connection.close()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, text

    def graphql(self, query: str, variables: dict | None = None, headers: dict[str, str] | None = None):
        """The data that a query of the UI itself gets."""
        body = json.dumps({"query": query, "variables": variables or {}})
        status, _, text = self.ask("POST", "/graphql", {**JSON, "origin": self.own, **(headers or {})}, body)
        assert status == 200, text
        return json.loads(text)["data"]

    def untouched(self) -> bool:
        """Whether no attack had an effect: no dialog dismissed, no run launched."""
        found = self.graphql("{ shouldShowNux runsOrError { ... on Runs { results { runId } } } }")
        return found == {"shouldShowNux": True, "runsOrError": {"results": []}}


@pytest.fixture(scope="module")
def server(tmp_path_factory, make_project) -> Iterator[Server]:
    """The webserver of a project that was never run, without a daemon."""
    from prism_assets.ops.home import dagster_home, package_file
    from prism_assets.ops.webserver import webserver_command

    folder = tmp_path_factory.mktemp("webserver") / "project"
    project = make_project(folder, ui={"allowed_hosts": ["prism.example.org"]})
    settings = project.settings
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DAGSTER_HOME", raising=False)
        home = dagster_home(settings)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PRISM_CONFIG": str(project.config), "DAGSTER_HOME": str(home), "OMP_NUM_THREADS": "1"}
    options = ["-w", str(package_file("workspace.yaml")), "-p", str(port), "-h", "127.0.0.1"]
    command = [*webserver_command("127.0.0.1", settings.ui.allowed_hosts), *options]
    with open(folder / "webserver.log", "w") as log:
        environment["PYTHONPATH"] = str(ROOT)
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        found = Server(port)
        deadline = time.monotonic() + START_SECONDS
        while not _answers(found):
            assert process.poll() is None and time.monotonic() < deadline, (
                project.folder / "webserver.log"
            ).read_text()
            time.sleep(0.5)
        yield found
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def _answers(server: Server) -> bool:
    try:
        return server.ask("GET", "/server_info")[0] == 200
    except OSError:
        return False


# -- requests -----------------------------------------------------------------------------------------------------


def test_the_ui_itself_is_answered(server):
    status, headers, page = server.ask("GET", "/", {"sec-fetch-site": "none"})
    assert status == 200 and "<html" in page
    assert "frame-ancestors 'none'" in headers["content-security-policy"] and headers["x-frame-options"] == "DENY"
    assert server.graphql("{ version }")["version"]
    status, _, page = server.ask("GET", "/graphql", {"accept": "text/html"})
    assert status == 200 and "graphiql" in page.lower()
    assert server.ask("GET", "/graphql", {**UPGRADE, "origin": server.own})[0] == 101


def test_a_proxy_that_prism_yaml_names_is_answered(server):
    proxied = {"host": "prism.example.org", "origin": "https://prism.example.org"}
    assert server.graphql("{ version }", headers=proxied)["version"]


EVIL = {"origin": "http://evil.example"}
BODY = json.dumps({"query": MUTATION})
ATTACKS = {
    "an image: <img src='http://127.0.0.1:3000/graphql?query=mutation…'>": ("GET", BY_GET, {"accept": "image/*"}, None),
    "the same from a browser that says where it comes from": ("GET", BY_GET, {"sec-fetch-site": "cross-site"}, None),
    "a link to a mutation": ("GET", BY_GET, {"accept": "text/html", "sec-fetch-mode": "navigate"}, None),
    "a query by GET, which another site's page may time": ("GET", "/graphql?query={version}", {}, None),
    "fetch() with JSON": ("POST", "/graphql", {**JSON, **EVIL}, BODY),
    "its preflight": ("OPTIONS", "/graphql", {**EVIL, "access-control-request-method": "POST"}, None),
    "a form with the mutation in its address": ("POST", BY_GET, {**EVIL, "content-type": "text/plain"}, "a=b"),
    "a form of a browser that sends no Origin": ("POST", BY_GET, {"content-type": "text/plain"}, "a=b"),
    "JSON sent as text, which needs no preflight": ("POST", "/graphql", {**EVIL, "content-type": "text/plain"}, BODY),
    "a sandboxed frame": ("POST", "/graphql", {**JSON, "origin": "null"}, BODY),
    "a page on another port of this machine": ("POST", "/graphql", {**JSON, "origin": "http://127.0.0.1:1"}, BODY),
    "DNS rebinding: the attacker's name leads to 127.0.0.1": (
        *("POST", "/graphql"),
        {**JSON, "host": "evil.example:3000", "origin": "http://evil.example:3000", "sec-fetch-site": "same-origin"},
        BODY,
    ),
    "DNS rebinding that reads a page": ("GET", "/", {"host": "evil.example"}, None),
    "a forged report of an asset": ("POST", "/report_asset_materialization/report", EVIL, "{}"),
    "a WebSocket": ("GET", "/graphql", {**UPGRADE, **EVIL}, None),
    "a WebSocket after DNS rebinding": (
        *("GET", "/graphql"),
        {**UPGRADE, "host": "evil.example", "origin": "http://evil.example"},
        None,
    ),
    "a script that includes a log": ("GET", "/logs/x/y/out", {"sec-fetch-site": "cross-site"}, None),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_an_attack_is_refused_and_has_no_effect(server, attack):
    status, headers, text = server.ask(*attack)
    assert status == 403
    if "upgrade" not in attack[2]:
        assert "prism ui refuses" in text and "access-control-allow-origin" not in headers
    assert server.untouched()


# -- run config ---------------------------------------------------------------------------------------------------

LAUNCH = """mutation($params: ExecutionParams!) { launchRun(executionParams: $params) { __typename
  ... on RunConfigValidationInvalid { errors { message } } ... on PythonError { message } } }"""
CHECK = """query($job: PipelineSelector!, $config: RunConfigData!) {
  isPipelineConfigValid(pipeline: $job, runConfigData: $config, mode: "default") { __typename } }"""
JOB = {"repositoryLocationName": "prism", "repositoryName": "__repository__", "pipelineName": "__ASSET_JOB"}


@pytest.mark.parametrize(
    ("config", "where"),
    [
        ({"resources": {"language_model": {"config": {"trust_remote_code": True}}}}, "resources:language_model:config"),
        ({"resources": {"language_model": {"config": {"name": "/tmp/evil"}}}}, "resources:language_model:config"),
        ({"resources": {"lake": {"config": {"root": "/tmp/evil"}}}}, "resources:lake:config"),
        ({"resources": {"lake": {"config": "/tmp/evil"}}}, "resources:lake:config"),
        ({"resources": {"vector_store": {"config": {"device": "cuda"}}}}, "resources:vector_store:config"),
        ({"ops": {"base_model": {"config": {"name": "/tmp/evil"}}}}, "ops:base_model:config"),
        ({"execution": {"config": {"max_workers": 64}}}, "execution:config"),
    ],
    ids=str,
)
def test_a_launch_that_would_change_a_setting_is_refused_with_the_place(server, config, where):
    selector = {**JOB, "assetSelection": [{"path": ["base_model"]}]}
    params = {"selector": selector, "mode": "default", "runConfigData": json.dumps(config)}
    answer = server.graphql(LAUNCH, {"params": params})["launchRun"]
    assert answer["__typename"] == "RunConfigValidationInvalid"
    assert where in answer["errors"][0]["message"]
    assert server.untouched()


def test_run_config_that_changes_no_setting_is_taken(server):
    for config in ({}, {"loggers": {"console": {"config": {"log_level": "ERROR"}}}}):
        answer = server.graphql(CHECK, {"job": JOB, "config": json.dumps(config)})["isPipelineConfigValid"]
        assert answer["__typename"] == "PipelineConfigValidationValid"


# -- a browser ----------------------------------------------------------------------------------------------------

# Tries what a page can; says in its title what came of it. Nothing may say more than "failed".
HOSTILE_PAGE = """<!doctype html><title>waiting</title><body><script>
const ui = "UI", mutation = "mutation{setNuxSeen}", found = {};
const load = (kind, attributes) => new Promise(done => {
  const element = Object.assign(document.createElement(kind), attributes);
  element.onload = () => done("loaded"); element.onerror = () => done("failed");
  document.body.append(element);
});
const form = (address) => new Promise(done => {
  const frame = Object.assign(document.createElement("iframe"), {name: "f", srcdoc: "."});
  document.body.append(frame);
  const form = Object.assign(document.createElement("form"),
    {method: "POST", action: address, target: "f", enctype: "text/plain"});
  document.body.append(form); form.submit(); setTimeout(() => done("failed"), 500);
});
const socket = (address) => new Promise(done => {
  const one = new WebSocket(address, "graphql-ws");
  one.onopen = () => done("opened"); one.onerror = () => done("failed");
});
const read = (options) => fetch(ui + "/graphql", options).then(one => one.text()).catch(() => "failed");
const blind = (options) => fetch(ui + "/graphql?query=" + mutation, {mode: "no-cors", ...options}).then(
  () => "sent", () => "failed");
(async () => {
  found.image = await load("img", {src: ui + "/graphql?query=" + mutation});
  found.favicon = await load("img", {src: ui + "/favicon.png"});
  found.script = await load("script", {src: ui + "/graphql?query={version}"});
  found.form = await form(ui + "/graphql?query=" + mutation);
  found.read = await read({method: "POST", headers: {"content-type": "application/json"},
    body: JSON.stringify({query: "{version}"})});
  found.text = await read({method: "POST", body: JSON.stringify({query: mutation})});
  found.blind = await blind({method: "POST", body: "a"});
  found.socket = await socket(ui.replace("http", "ws") + "/graphql");
  const frame = document.createElement("iframe"); frame.src = ui + "/"; document.body.append(frame);
  await new Promise(done => setTimeout(done, 500));
  document.title = JSON.stringify(found);
})();
</script>"""


@pytest.fixture(scope="module")
def hostile(server) -> Iterator[int]:
    """A web server of the attacker's, on another port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            ui = server.own if "/ip" in self.path else f"http://localhost:{server.port}"
            page = HOSTILE_PAGE.replace('"UI"', json.dumps(ui)).encode()
            if self.path == "/link":
                page = f'<a href="{server.own}/runs">look</a>'.encode()
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *arguments) -> None:
            pass

    attacker = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=attacker.serve_forever, daemon=True).start()
    yield attacker.server_port
    attacker.shutdown()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: install it (Debian: apt-get install chromium) to test a hostile page")
    from playwright.sync_api import sync_playwright

    names = "--host-resolver-rules=MAP evil.example 127.0.0.1"  # what the attacker's name server answers
    arguments = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", names]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = chromium.new_context(locale="en-US").new_page()
        page.set_default_timeout(30_000)
        yield page
        chromium.close()


@pytest.mark.parametrize("site", ["evil.example", "localhost"])
@pytest.mark.parametrize("path", ["/ip", "/name"])
def test_a_hostile_page_in_a_browser_gets_nothing(server, hostile, browser, site, path):
    browser.goto(f"http://{site}:{hostile}{path}")
    browser.wait_for_function("document.title !== 'waiting'")
    found = json.loads(browser.title())
    sent = found.pop("blind")
    assert set(found.values()) == {"failed"}, found
    assert sent in ("sent", "failed")  # the browser does not say what became of it; the server does
    frames = [frame for frame in browser.frames if frame.url.startswith(("http://127.0.0.1", "http://localhost"))]
    assert not any("appRoot" in frame.content() or "Dagster" in frame.content() for frame in frames[1:])
    assert server.untouched()


def test_a_name_that_is_made_to_lead_here_opens_no_page(server, browser):
    answer = browser.goto(f"http://evil.example:{server.port}/")
    assert answer.status == 403 and "ui.allowed_hosts" in browser.content()
    assert browser.evaluate("fetch('/graphql', {method: 'POST', body: '{}'}).then(one => one.status)") == 403


def test_a_link_from_another_site_leads_to_the_ui_by_one_more_click(server, hostile, browser):
    browser.goto(f"http://evil.example:{hostile}/link")
    browser.get_by_text("look").click()
    browser.get_by_text("Open the Dagster UI").click()
    browser.wait_for_url(f"{server.own}/**")
    browser.locator("#root *").first.wait_for(state="attached")
