"""The gateway's HTTP app: routes, their access control, and errors in OpenAI's form.

Plain Starlette, whose routing takes about 30 µs a request. Pages of other sites cannot use the gateway from a
browser: on loopback, the host's name is checked (against DNS rebinding), bodies must be declared as JSON (so
that the browser sends a preflight request first), and no CORS header is ever sent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ratchet.config.params import Config
from ratchet.errors import RatchetError
from ratchet.gateway import review_page as review
from ratchet.gateway.completions import FORMS, Completions
from ratchet.gateway.limits import Gone, read_body
from ratchet.gateway.routing import Fleet
from ratchet.gateway.state import PROBES, Parts, gather_parts, is_loopback
from ratchet.monitoring.request_log import RequestLog
from ratchet.monitoring.request_records import Feedback
from ratchet.serving.engine import Engine
from ratchet.serving.faults import Fault, to_fault
from ratchet.serving.protocol import Model, encode_models, parse_feedback

EVALUATIONS, DRIFT_REPORTS = LINKED = ("/evaluations/", "/monitor/reports/")  # what the page links
LAST_WORDS_SECONDS = 3.0  # at the shutdown, for cut-off answers to be ended and logged
Endpoint = Callable[[Request], Awaitable[Response]]


def create_app(root: Path, config: Config, engine: Engine, fleet: Fleet, log: RequestLog) -> ASGIApp:
    """Make the app, which starts and closes `fleet`, `engine` and `log` with the server.

    Raises CheckoutError when `.ratchet/gateway.key` is not ours.
    """
    parts = gather_parts(root, config, engine, fleet, log)
    routes = [
        *(Route(path, Completions(parts, path), methods=["POST"]) for path in FORMS),
        *(Route(path + "/{id:path}", _not_kept(parts), methods=["GET", "POST", "DELETE"]) for path in FORMS),
        Route("/v1/feedback", _feedback(parts), methods=["POST"]),
        Route("/v1/models", models := _models(parts)),
        Route("/v1/models/{name:path}", models),
        Route("/healthz", _health),
        Route("/readyz", _readiness(parts)),
        Route("/metrics", _metrics(parts)),
        Route("/", _page(parts)),
        Route(f"{EVALUATIONS}{{name}}", _linked(parts)),
        Route(f"{DRIFT_REPORTS}{{folder}}/{{name}}", _linked(parts)),
        Route(review.PATH, review.review_page(parts), methods=["GET"]),
        Route(review.PATH, review.review_word(parts), methods=["POST"]),
    ]
    app = Starlette(routes=routes, lifespan=_lifespan(parts), exception_handlers=_handlers(parts))
    return Guard(app, config.gateway.host)


class Guard:
    """A wrapper that refuses what a page of another site could send from a browser on this machine.

    It also gives every page of our own the headers of PAGE.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app = app
        self._hosts = {"127.0.0.1", "localhost", "[::1]", host, f"[{host}]"} if is_loopback(host) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] == "http"
            and scope["path"] not in PROBES
            and (fault := self._find_fault(dict(scope["headers"]), scope["method"]))
        ):
            await _show(fault)(scope, receive, send)
        else:
            await self._app(scope, receive, _as_page(send) if scope.get("method") == "GET" else send)

    def _find_fault(self, headers: dict[bytes, bytes], method: str) -> Fault | None:
        host = headers.get(b"host", b"").decode("latin-1")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self._hosts is not None and name.lower() not in self._hosts:
            return Fault(
                403,
                f"the host {host!r} is not this gateway",
                remedy=f"known: {', '.join(sorted(self._hosts))} (gateway.host)",
                code="unknown_host",
            )
        kind = headers.get(b"content-type", b"").decode("latin-1")
        if method == "POST" and kind.partition(";")[0].strip().lower() != "application/json":
            return Fault(
                415,
                f"the content type is {kind!r}, wanted application/json",
                remedy="send the header `content-type: application/json`",
            )
        return None


# A page runs no script, fetches nothing, and stands in no frame, unless its route says otherwise.
PAGE = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "media-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def _as_page(send: Send) -> Send:
    """Add PAGE to an answer in HTML; headers that its route has set are kept."""

    async def send_on(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            if headers.get("content-type", "").startswith("text/html"):
                for name, value in PAGE.items():
                    headers.setdefault(name, value)
        await send(message)

    return send_on


def _lifespan(parts: Parts) -> Callable[[Starlette], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def run(_: Starlette) -> AsyncIterator[None]:
        parts.log.start()
        await parts.fleet.start()
        yield
        until = time.monotonic() + LAST_WORDS_SECONDS
        while parts.slots.held and time.monotonic() < until:
            await asyncio.sleep(0.02)
        await parts.fleet.close()
        parts.doorkeeper.close()
        await parts.engine.close()
        await run_in_threadpool(parts.log.close)

    return run


# --- endpoints ----------------------------------------------------------------------------------------------


async def _health(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


def _readiness(parts: Parts) -> Endpoint:
    async def readiness(request: Request) -> Response:
        """Answer whether a version is in charge.

        Like /healthz, this needs no key, since load balancers have none.
        """
        champion = parts.require_champion()
        return JSONResponse({"status": "ready", "version": champion})

    return readiness


def _models(parts: Parts) -> Endpoint:
    started = int(time.time())

    async def models(request: Request) -> Response:
        """Answer with the one model that the path names, or with all."""
        parts.admit(request.headers, "infer")
        if name := request.path_params.get("name"):
            parts.require_model(name)
            return Response(msgspec.json.encode(Model(name, started)), media_type="application/json")
        known = [Model(name, started) for name in parts.models()]
        return Response(encode_models(known), media_type="application/json")

    return models


def _not_kept(parts: Parts) -> Endpoint:
    async def refuse(request: Request) -> Response:
        parts.admit(request.headers, "infer")
        raise Fault(
            404,
            f"{request.path_params['id'][:80]!r} cannot be looked up: answers are not kept for clients",
            remedy="keep the answer that came, and send earlier turns with the next request",
            code="not_kept",
        )

    return refuse


def _feedback(parts: Parts) -> Endpoint:
    async def feedback(request: Request) -> Response:
        """Record feedback on an answer whose id carries our signature.

        The signature alone proves that the id is ours, so no look-up is needed, and feedback may come before
        the answer is in the log.
        """
        key = parts.admit(request.headers, "feedback")
        raw = await read_body(
            request.receive, request.headers.get("content-length", ""), parts.config.gateway.max_body_bytes
        )
        body = parse_feedback(raw)
        if not parts.ids.is_ours(body.request_id):
            raise Fault(
                404,
                f"request_id {body.request_id[:80]!r} was not given out here",
                remedy="send the `id` of an answer, or its header x-request-id",
                param="request_id",
            )
        user, sender = parts.ids.pseudonym(body.user or ""), parts.ids.sender(key.name)
        said = Feedback(
            body.request_id, user, time.time(), body.score, body.label, body.answer, body.comment, sender
        )
        await parts.remember(said)
        return JSONResponse({"object": "feedback", "request_id": body.request_id})

    return feedback


def _metrics(parts: Parts) -> Endpoint:
    async def metrics(request: Request) -> Response:
        parts.admit(request.headers, "admin")
        return Response(parts.meters.text(), media_type="text/plain; version=1.0.0; charset=utf-8")

    return metrics


def _page(parts: Parts) -> Endpoint:
    async def page(request: Request) -> Response:
        parts.admit(request.headers, "admin")
        from ratchet.reporting.dashboard import render_page

        return HTMLResponse(await run_in_threadpool(render_page, parts.root, parts.config))

    return page


def _linked(parts: Parts) -> Endpoint:
    async def linked(request: Request) -> Response:
        """Answer with a file that the page links: an evaluation's page, or Evidently's report.

        Evidently's has scripts of its own. The sandbox gives them no origin, so that they can reach no other
        page of the gateway.
        """
        parts.admit(request.headers, "admin")
        from ratchet.reporting.dashboard import read_linked

        text = await run_in_threadpool(read_linked, parts.root, request.url.path)
        if text is None:
            raise HTTPException(404)
        return HTMLResponse(text, headers={"content-security-policy": "sandbox allow-scripts"})

    return linked


# --- errors -------------------------------------------------------------------------------------------------


def _handlers(parts: Parts) -> dict[Any, Any]:
    """Return the handlers of errors that are raised before an answer has begun."""

    async def refuse(request: Request, error: Exception) -> Response:
        fault = to_fault(error)
        if request.url.path in FORMS:
            parts.meters.refused(fault.status)
        path = request.url.path
        return _show(fault, asks_browser=path in ("/", review.PATH) or path.startswith(LINKED))

    async def refuse_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        known = (
            "POST /v1/chat/completions, /v1/responses, /v1/feedback, GET /v1/models, /healthz, /readyz, "
            "/metrics, /, /review"
        )
        return _show(
            Fault(
                error.status_code,
                f"{request.method} {request.url.path} is not served",
                remedy=f"known: {known}",
                code="unknown_url",
            )
        )

    async def let_go(request: Request, error: Exception) -> None:
        """Send nothing: the client hung up."""

    return {RatchetError: refuse, HTTPException: refuse_route, Gone: let_go, Exception: refuse}


def _show(fault: Fault, *, asks_browser: bool = False) -> Response:
    headers = {name.decode(): value.decode() for name, value in fault.headers()}
    if fault.status == 401:
        # For `Basic`, a browser asks its user for a password, which is the key; other clients send bearer
        # tokens, and must not be asked for a password.
        headers["www-authenticate"] = 'Basic realm="ratchet"' if asks_browser else "Bearer"
    return Response(fault.body(), fault.status, headers, media_type="application/json")
