"""What `prism ui` starts; tests/ops/test_webserver.py has what that answers."""

import os
import sys

import pytest
from typer.testing import CliRunner


@pytest.fixture
def ui(make_project, tmp_path, monkeypatch):
    """`ui(*arguments)`: what the command prints, and what it would start."""
    from prism_assets import compat
    from prism_assets.cli import app

    project = make_project(tmp_path / "project", ui={"allowed_hosts": ["prism.example.org"]})
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    started = []
    monkeypatch.setattr(compat, "dagster_dev", lambda *given: started.append((*given, os.umask(0o022))))

    def run(*arguments):
        before = os.umask(0)
        try:
            done = CliRunner().invoke(app, ["ui", "--config", str(project.config), *arguments])
        finally:
            os.umask(before)
        assert done.exit_code == 0, done.output
        return done.output, started.pop()

    return run


def test_the_webserver_is_the_guarded_one_under_the_names_of_the_settings(ui):
    output, (options, webserver, umask) = ui("--port", "4000")
    assert "http://127.0.0.1:4000" in output and "log-in" not in output
    assert options[2:] == ["-p", "4000", "-h", "127.0.0.1"]
    module = "prism_assets.ops.webserver"
    assert webserver == [sys.executable, "-m", module, "127.0.0.1", "prism.example.org", "--"]
    assert umask & 0o002  # others cannot write to the sockets, however open the files of this user are


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.7", "::"])
def test_listening_on_the_network_is_warned_of_and_addresses_count_as_hosts(ui, host):
    output, (_, webserver, _) = ui("--host", host)
    assert "has no log-in" in output and "docs/security.md" in output
    assert webserver[3:] == [host, "prism.example.org", "*", "--"]
    assert ("http://[::]:3000" if host == "::" else f"http://{host}:3000") in output
