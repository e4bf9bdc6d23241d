"""An OpenAI-compatible server that answers at once: the ceiling of a generator that speaks HTTP.

`python -m tramontane.client.loadtest.generator.null_http_server` prints `ready http://127.0.0.1:PORT/v1` and ends when
its stdin does.
"""

from __future__ import annotations

import asyncio
import sys

import msgspec
from aiohttp import web

_EVENT = b"data: " + msgspec.json.encode({"choices": [{"text": "a"}]}) + b"\n\n"


async def _models(request: web.Request) -> web.Response:
    return web.json_response({"data": [{"id": "null"}]})


async def _completions(request: web.Request) -> web.StreamResponse:
    count = int((await request.json()).get("max_tokens", 16))
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for _ in range(count):
        await response.write(_EVENT)
    end = {
        "choices": [{"text": "", "finish_reason": "length"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": count},
    }
    await response.write(b"data: " + msgspec.json.encode(end) + b"\n\ndata: [DONE]\n\n")
    return response


async def _serve() -> None:
    app = web.Application()
    app.add_routes([web.get("/v1/models", _models), web.post("/v1/completions", _completions)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    _host, port = runner.addresses[0][:2]
    print(f"ready http://127.0.0.1:{port}/v1", flush=True)  # noqa: T201  (its parent reads this)
    await asyncio.to_thread(sys.stdin.buffer.read)
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(_serve())
