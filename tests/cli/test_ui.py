"""The real webserver, daemon and browser: a file is dropped, a new selection follows, and the pages tell of it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PRISM = Path(sys.executable).with_name("prism")
START_SECONDS = 120
REFRESH_SECONDS = 240

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine: install it (Debian: apt-get install chromium) to test the UI"
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, make_project) -> Iterator[tuple[Any, str]]:
    """A finished project with `prism ui` on it: the project and the address."""
    folder = tmp_path_factory.mktemp("ui")
    project = make_project(
        folder / "project", candidates={"at_rest_seconds": 1}, strategies=["prism", "random"], seeds=[0]
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("DAGSTER_HOME", "PRISM_CONFIG")}
    environment["OMP_NUM_THREADS"] = "1"
    subprocess.run([PRISM, "run", "--config", project.config], env=environment, check=True, capture_output=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with open(folder / "ui.log", "w") as log:
        process = subprocess.Popen(
            [PRISM, "ui", "--config", project.config, "--port", str(port)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A shell that started the tests in the background made SIGINT ignored, and dagster stops on SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        until(lambda: answers(address + "/server_info"), START_SECONDS, "the webserver")
        yield project, address
    finally:
        stop(process)


def stop(process: subprocess.Popen) -> None:
    """End the server with everything that it started."""
    import psutil

    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGINT)
    _, alive = psutil.wait_procs(family, timeout=15)
    for one in alive:
        one.kill()
    process.wait()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except OSError:
        return False


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait for `condition` to be true and give back what it returned."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(1)
    raise AssertionError(f"{what} did not come within {seconds:.0f} s")


def ask(address: str, query: str) -> dict[str, Any]:
    request = urllib.request.Request(
        address + "/graphql", data=json.dumps({"query": query}).encode(), headers={"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["data"]


def test_another_sites_page_gets_nothing_from_prism_ui(served) -> None:
    """tests/ops/test_webserver.py has the attacks; here it is `prism ui` itself that refuses one."""
    request = urllib.request.Request(f"{served[1]}/server_info", headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request, timeout=30)


@pytest.fixture(scope="module")
def browser(served: tuple[Any, str]) -> Iterator[Any]:
    """A page of headless Chromium, past Dagster's first-use dialog."""
    from playwright.sync_api import sync_playwright

    ask(served[1], "mutation { setNuxSeen }")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = chromium.new_context(locale="en-US", viewport={"width": 1500, "height": 1600}).new_page()
        page.set_default_timeout(60_000)
        yield page
        chromium.close()


def test_a_dropped_file_becomes_a_new_selection_and_every_page_tells_of_it(served, browser) -> None:
    project, address = served
    before = project.selection("random").fingerprint
    rows = [
        {"prompt": f"reverse: {word}=", "completion": word[::-1], "source": "dropped"} for word in ("abx", "cdy", "efz")
    ]
    part = project.inbox / "dropped.jsonl.part"
    part.write_text("".join(json.dumps(row) + "\n" for row in rows) + "not json\n")
    os.replace(part, project.inbox / "dropped.jsonl")

    def refreshed() -> bool:
        new = project.selection("prism")
        pool = project.lake.get("live_pool", new.header["inputs"]["pool"]["fingerprint"])
        shards = project.lake.read_table(pool, ["shard"])["shard"].to_pylist()
        return any(key.startswith("dropped-") for key in shards)

    until(refreshed, REFRESH_SECONDS, "a selection from a pool with the dropped file")
    until(lambda: project.selection("random").fingerprint != before, REFRESH_SECONDS, "a new random selection")

    browser.goto(f"{address}/asset-groups")
    for group in ("corpus", "reference", "features", "selection", "training", "evaluation"):
        browser.get_by_text(group, exact=True).first.wait_for()

    browser.goto(f"{address}/assets/selection?view=overview")
    browser.get_by_text("as Parquet and as JSON Lines ready for training").first.wait_for()
    browser.get_by_text("Row count").first.wait_for()
    browser.get_by_text("completion_tokens").first.wait_for()
    browser.get_by_text("[Show Markdown]").first.click()
    browser.locator("img[src^='data:image/png']").first.wait_for()

    browser.goto(f"{address}/assets/report?view=partitions&partition=plain")
    with browser.context.expect_page() as opened:
        browser.locator("a[href='/prism/report/plain']").first.click()
    opened.value.get_by_role("heading", name="Verdict").wait_for()
    opened.value.close()

    dropped = next(key for key in project.lake.heads("candidates") if key["partition"].startswith("dropped-"))
    browser.goto(f"{address}/assets/candidates?view=partitions&partition={dropped['partition']}")
    browser.get_by_text("not valid JSON").or_(browser.get_by_text("rejects")).first.wait_for()

    browser.goto(f"{address}/assets/candidates?view=checks")
    browser.get_by_text("rows_accepted").first.wait_for()

    browser.goto(f"{address}/automation")
    for name in ("inbox", "target_files", "dead_runs", "automation", "nightly_reconcile", "weekly_refresh"):
        browser.get_by_text(name, exact=True).first.wait_for()

    states = ask(address, "{ sensorsOrError(repositorySelector: "
                 "{repositoryName: \"__repository__\", repositoryLocationName: \"prism\"}) { ... on Sensors { results "
                 "{ name sensorState { status } } } } }")  # fmt: skip
    running = {
        sensor["name"] for sensor in states["sensorsOrError"]["results"] if sensor["sensorState"]["status"] == "RUNNING"
    }
    assert running == {"inbox", "target_files", "dead_runs", "automation"}
