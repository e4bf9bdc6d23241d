"""An OpenAI-compatible HTTP server whose answers are written down, and which keeps what it was asked."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

Script = list[dict | float | str] | int | tuple[int, str]


def content(text: str) -> dict:
    return {"choices": [{"text": text, "finish_reason": None}]}


def end(reason: str = "length", **usage: object) -> dict:
    return {"choices": [{"text": "", "finish_reason": reason}], "usage": usage}


class FakeOpenAI:
    """Sends each completion the next of `scripts`: events (or seconds to wait) as server-sent events, a status with an
    error, or a status with a body. Of `quirks` each is a model, which always answers by its own script. `listing`
    answers for the models, where it is set.
    """

    def __init__(self, owner: str | None = None, quirks: dict[str, Script] | None = None) -> None:
        self.owner = owner
        self.quirks = quirks or {}
        self.listing: tuple[int, str] | None = None
        self.scripts: deque[Script] = deque()
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.peers: list[object] = []
        self.left = 0

    async def models(self, request: web.Request) -> web.Response:
        self.headers.append(dict(request.headers))
        if self.listing is not None:
            return web.Response(status=self.listing[0], text=self.listing[1])
        owned = {} if self.owner is None else {"owned_by": self.owner}
        return web.json_response({"data": [{"id": name, **owned} for name in self.quirks or ("tiny", "other")]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        self.headers.append(dict(request.headers))
        self.peers.append(request.transport.get_extra_info("peername"))
        script = self.scripts.popleft() if self.scripts else [content("a"), content("b"), end(completion_tokens=2)]
        script = self.quirks.get(self.bodies[-1]["model"], script)
        if isinstance(script, int):
            return web.json_response({"error": {"message": "no"}}, status=script)
        if isinstance(script, tuple):
            return web.Response(status=script[0], text=script[1], content_type="application/json")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            for step in script:
                if isinstance(step, float):
                    await asyncio.sleep(step)
                elif isinstance(step, str):
                    await response.write(step.encode())
                else:
                    await response.write(b"data: " + json.dumps(step).encode() + b"\n\n")
        except (ConnectionError, asyncio.CancelledError):
            self.left += 1
            raise
        return response

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        app = web.Application()
        app.add_routes([web.get("/v1/models", self.models)])
        app.add_routes([web.post(f"/v1/{path}", self.completions) for path in ("completions", "chat/completions")])
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        finally:
            await runner.cleanup()
