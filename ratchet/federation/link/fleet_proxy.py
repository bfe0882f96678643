"""Show nodes the one part of a SuperLink that is for them, over TLS, and nobody anything else.

A SuperLink serves three interfaces on one port: for nodes (`/v1/fleet`), for commands that start runs
(`/v1/control`) and for its apps (`/v1/runtime`). Whoever reaches the second one can run code of their choice
on the coordinator. So the SuperLink listens on loopback, and other machines reach this proxy.

It runs in Flower's own environment: `python fleet_proxy.py SETTINGS`, a JSON file with `host`, `port`,
`certificate`, `key`, `authority` (paths) and `superlink` (its https address).
"""

from __future__ import annotations

import json
import ssl
import sys
from pathlib import Path

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

MOST = 64 * 2**20  # bytes of one request; Flower sends in pieces of 5 MiB
HOP_BY_HOP = {"connection", "content-length", "host", "keep-alive", "te", "transfer-encoding", "upgrade"}


def make_app(superlink: str, authority: str) -> Starlette:
    client = httpx.AsyncClient(
        base_url=superlink, verify=ssl.create_default_context(cafile=authority), timeout=60, trust_env=False
    )

    async def forward(request: Request) -> Response:
        length = request.headers.get("content-length", "")
        if not length.isdigit() or int(length) > MOST:
            return PlainTextResponse(f"wanted a Content-Length of at most {MOST}", status_code=413)
        headers = [(name, value) for name, value in request.headers.items() if name not in HOP_BY_HOP]
        path = f"/v1/fleet/{request.path_params['call']}"
        try:
            found = await client.post(path, content=await request.body(), headers=headers)
        except httpx.HTTPError:
            return PlainTextResponse("the SuperLink does not answer", status_code=503)
        kept = {name: value for name, value in found.headers.items() if name not in HOP_BY_HOP}
        return Response(found.content, found.status_code, kept)

    return Starlette(routes=[Route("/v1/fleet/{call:str}", forward, methods=["POST"])])


if __name__ == "__main__":
    settings = json.loads(Path(sys.argv[1]).read_text())
    uvicorn.run(
        make_app(settings["superlink"], settings["authority"]),
        host=settings["host"],
        port=settings["port"],
        ssl_certfile=settings["certificate"],
        ssl_keyfile=settings["key"],
        access_log=False,
        log_level="warning",
        server_header=False,
    )
