"""The pages of reports in `prism ui`, so that the asset `report` can link to them: a browser follows no link from a
server's page to a file.

A page runs scripts of ours over data of others. It is therefore sent as a sandbox, which has an origin of its own: even
what its own policy should let through could ask the UI for nothing.
"""

from typing import Any

from prism_assets.errors import PrismError
from prism_assets.ops.guard import App, Receive, Scope, Send

_HEADERS = [
    (b"content-type", b"text/html; charset=utf-8"),
    (b"content-security-policy", b"sandbox allow-scripts allow-modals"),  # modals: the dialog that prints
    (b"cache-control", b"no-store"),
]
_NONE = b"<!doctype html><title>No report</title><p>There is no such report: <code>prism run</code> makes it."


class ReportPages:
    """An ASGI application that answers for the pages of reports, and leaves everything else to `app`."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from prism_assets.report.places import IN_THE_UI

        asked = scope["type"] == "http" and scope["path"].startswith(IN_THE_UI) and scope["method"] in ("GET", "HEAD")
        if not asked:
            await self._app(scope, receive, send)
            return
        page = _page(scope["path"].removeprefix(IN_THE_UI))
        content = _NONE if page is None else page
        length: Any = (b"content-length", str(len(content)).encode())
        status = 404 if page is None else 200
        await send({"type": "http.response.start", "status": status, "headers": [*_HEADERS, length]})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else content})


def _page(target: str) -> bytes | None:
    """The page of a target by its name, or that over all targets (no name), of the project that PRISM_CONFIG names."""
    from prism_assets.report.places import report_pages
    from prism_assets.settings import load_settings

    try:
        page = report_pages(load_settings()).get(target)
        return None if page is None else page.read_bytes()
    except (PrismError, OSError):
        return None
