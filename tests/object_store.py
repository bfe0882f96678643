"""An object store over HTTP for tests: GET, HEAD and PUT of files in a folder, each whole or not there.

python object_store.py FOLDER HOST PORT
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from aiohttp import web


def make_store(folder: Path) -> web.Application:
    async def put(request: web.Request) -> web.Response:
        path = folder / request.match_info["name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=folder, prefix=".half-")
        with os.fdopen(handle, "wb") as out:
            async for chunk in request.content.iter_chunked(2**20):
                out.write(chunk)
        Path(name).replace(path)
        return web.Response(status=201)

    async def get(request: web.Request) -> web.StreamResponse:
        path = folder / request.match_info["name"]
        return web.FileResponse(path) if path.is_file() else web.Response(status=404)

    store = web.Application(client_max_size=2**30)
    store.router.add_put("/{name:.+}", put)
    store.router.add_get("/{name:.+}", get)  # and HEAD
    return store


if __name__ == "__main__":
    web.run_app(make_store(Path(sys.argv[1])), host=sys.argv[2], port=int(sys.argv[3]), print=None)
