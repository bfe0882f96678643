"""Make the app of the Prefect server that `ratchet up` starts: Prefect's own, behind a guard.

    python -m uvicorn --factory ratchet.services.prefect_server:create_app --port 4200

Prefect checks no Host, so a page whose name is rebound to 127.0.0.1 (DNS rebinding) gets a CSRF token and can
start runs; and no Origin of websockets, so any page can send it events. The guard lets in only what is asked
by this server's own address, by no page or by a page of its own.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose


def create_app() -> ASGIApp:
    from prefect.server.api.server import create_app
    from prefect.settings import get_current_settings

    origins = get_current_settings().server.api.cors_allowed_origins.split(",")
    return OwnPagesOnly(create_app(final=True), origins)


class OwnPagesOnly:
    """A wrapper that refuses requests and websockets by another host's name or of another origin's page.

    `origins` are this server's, such as `http://127.0.0.1:4200`. A host is known by its name alone, since a
    tunnel may lead from another port; then the page has the origin of the host that it asks.
    """

    def __init__(self, app: ASGIApp, origins: list[str]) -> None:
        self._app, self._origins = app, set(origins)
        self._names = {urlsplit(origin).hostname for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or not (
            fault := self._find_fault(Headers(scope=scope))
        ):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await WebSocketClose(reason=fault)(scope, receive, send)
        else:
            await PlainTextResponse(fault, 403)(scope, receive, send)

    def _find_fault(self, headers: Headers) -> str:
        """Say what is foreign about a request; "" if nothing is."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if _name_of(host) not in self._names:
            return f"the host {host!r} is not this server; known: {', '.join(sorted(self._origins))}"
        if origin is not None and origin not in {*self._origins, f"http://{host}"}:
            return f"pages of {origin!r} may not ask this server"
        return ""


def _name_of(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
