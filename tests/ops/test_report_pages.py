"""The pages of reports in `prism ui`: what is answered, and that a page can do nothing to the UI."""

import asyncio
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from prism_assets.ops.report_pages import ReportPages
from prism_assets.report.places import IN_THE_UI, link_in_the_ui

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


async def _dagster(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"dagster"})


def ask(path, method="GET"):
    """Status, headers and content of what is answered before Dagster's application."""
    sent = []

    async def send(message):
        sent.append(message)

    async def run():
        await ReportPages(_dagster)({"type": "http", "path": path, "method": method, "headers": []}, None, send)

    asyncio.run(run())
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


@pytest.fixture
def project(two_versions, monkeypatch):
    monkeypatch.setenv("PRISM_CONFIG", str(two_versions.config))
    return two_versions


def test_the_page_of_a_target_and_that_over_all_are_answered(project):
    lake = project.lake
    status, headers, content = ask(IN_THE_UI + "pairs")
    assert status == 200 and content == lake.local(lake.require("report", "pairs"), "report.html").read_bytes()
    assert headers[b"content-security-policy"].startswith(b"sandbox allow-scripts")
    assert b"allow-same-origin" not in headers[b"content-security-policy"]
    assert ask(IN_THE_UI)[2] == (project.settings.storage.report / "report.html").read_bytes()
    assert ask(IN_THE_UI + "pairs", "HEAD")[2] == b""


@pytest.mark.parametrize("name", ["nope", "../plain", "..", "plain/report.json", "/etc/passwd", "\x00"])
def test_what_is_no_report_is_not_there(project, name):
    status, headers, content = ask(IN_THE_UI + name)
    assert status == 404 and b"There is no such report" in content and b"content-security-policy" in headers


def test_everything_else_is_dagsters(project):
    for path, method in (("/", "GET"), ("/prism/reports", "GET"), (IN_THE_UI + "plain", "POST")):
        assert ask(path, method)[2] == b"dagster"
    assert link_in_the_ui("a/b <c>") == "/prism/report/a%2Fb%20%3Cc%3E"


def test_the_asset_links_to_it(project):
    import dagster as dg

    event = project.instance.get_latest_materialization_event(dg.AssetKey("report"))
    metadata = event.asset_materialization.metadata
    target = event.asset_materialization.partition
    assert metadata["page"] == dg.UrlMetadataValue(link_in_the_ui(target))
    assert "“prism trust" in metadata["use"].value


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: install it to test a page in its sandbox")
def test_in_its_sandbox_a_page_works_and_has_no_access_to_the_ui(project):
    from playwright.sync_api import sync_playwright

    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            status, headers, content = ask(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.decode(), value.decode())
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(
                executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--no-first-run"]
            )
            page = chromium.new_page()
            page.goto(f"http://127.0.0.1:{server.server_port}{link_in_the_ui('plain')}")
            page.locator(".found").first.filter(has_text="8 of 8 rows").wait_for()
            assert page.evaluate("self.origin") == "null"
            before = len(asked)
            assert page.evaluate("fetch('/graphql').then(() => 'sent', () => 'refused')") == "refused"
            assert len(asked) == before
            chromium.close()
    finally:
        server.shutdown()
