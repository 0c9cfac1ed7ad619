"""METok's HTTP routes, attached through vLLM's `--middleware`.

vLLM's own group for plugin routes (`vllm.endpoint_plugins`) warns in every server where such a plugin is merely installed, and
METok must be silent there. A middleware is only there when asked for; this one does nothing but add the routes when the server
starts, so that requests to them pass vLLM's API key check like all others.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

PREFIX = "/v1/metok"  # under /v1, which is what vLLM's --api-key guards


class MetokRoutes:
    """ASGI middleware that adds METok's routes to the app when its lifespan begins."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            attach_routes(scope["app"])
        await self.app(scope, receive, send)


def attach_routes(app: FastAPI) -> None:
    """Add the routes under `PREFIX`."""
    app.add_api_route(f"{PREFIX}/reports/{{request_id}}", report, methods=["GET"])
    app.add_api_route(f"{PREFIX}/state", state, methods=["GET"])


async def state(request: Request) -> JSONResponse:
    """What METok holds in each worker right now: deferred prompts, and KV blocks by request and kind of group."""
    answers = await request.app.state.engine_client.collective_rpc("metok_state")
    return JSONResponse({"workers": answers})


async def report(request_id: str, request: Request) -> JSONResponse:
    """What METok did to a request that was sent with ``"report": true``; 404 where there is no such report."""
    engine = request.app.state.engine_client
    answers = await engine.collective_rpc("metok_report", args=(request_id,))
    found = next((answer for answer in answers if answer is not None), None)
    if found is None:
        message = (
            f"There is no METok report for request {request_id}; only requests with "
            'mm_processor_kwargs={"metok": {"report": true}} have one, and only the latest are kept.'
        )
        error = {"message": message, "type": "NotFoundError", "param": None, "code": 404}
        return JSONResponse({"error": error}, status_code=404)
    return JSONResponse({**found, "request_id": request_id})
