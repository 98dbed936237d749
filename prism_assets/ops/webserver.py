"""Dagster's webserver and reports behind `Guard`: `python -m prism_assets.ops.webserver [HOST…] -- OPTIONS`.

`prism ui` starts it in place of `python -m dagster_webserver`; the options are that program's. Of a HOST `*` any IP
address is one.
"""

import sys
from collections.abc import Sequence

from prism_assets.compat import serve_dagster_webserver
from prism_assets.ops.guard import Guard, is_loopback
from prism_assets.ops.report_pages import ReportPages

_ANY_ADDRESS = "*"


def webserver_command(host: str, allowed_hosts: Sequence[str] = ()) -> list[str]:
    """The command that serves what listens on `host`, to be followed by the webserver's own options."""
    hosts = [host, *allowed_hosts]
    if not is_loopback(host):
        hosts.append(_ANY_ADDRESS)
    return [sys.executable, "-m", __name__, *hosts, "--"]


def main(arguments: Sequence[str]) -> None:
    """Serve until the process is stopped."""
    end = arguments.index("--")
    hosts = [host for host in arguments[:end] if host != _ANY_ADDRESS]
    any_address = len(hosts) < end
    serve_dagster_webserver(arguments[end + 1 :], lambda app: Guard(ReportPages(app), hosts, any_address))


if __name__ == "__main__":
    main(sys.argv[1:])
