"""METok's part of the HTTP server, brought in through vLLM's `--middleware`.

vLLM's own group for plugin routes (`vllm.endpoint_plugins`) warns in every server where such a plugin is merely installed, and
METok must be silent there. A middleware is only there when asked for. This one adds the routes when the server starts, so that
requests to them pass vLLM's API key check like all others, and refuses what only shows in a request as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from metok_vllm.engine.scheduler import NO_PROMPT_LOGPROBS

PREFIX = "/v1/metok"  # under /v1, which is what vLLM's --api-key guards


class MetokRoutes:
    """ASGI middleware: METok's routes from the start of the app's lifespan on, and a check of chat requests."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            attach_routes(scope["app"])
        elif scope["type"] == "http" and scope["method"] == "POST" and scope["path"].endswith("/chat/completions"):
            body, receive = await buffered(receive)
            if asks_for_impossible_logprobs(body):
                await error(400, f"METok: {NO_PROMPT_LOGPROBS}", "BadRequestError")(scope, receive, send)
                return
        await self.app(scope, receive, send)


async def buffered(receive: Callable[[], Awaitable[Any]]) -> tuple[bytes, Callable[[], Awaitable[Any]]]:
    """The request's whole body, and a `receive` that gives it once more; vLLM reads it whole as well."""
    messages: list[Any] = []
    while True:
        message = await receive()
        messages.append(message)
        if message["type"] != "http.request" or not message.get("more_body", False):
            break
    pending = iter(messages)

    async def replay() -> Any:
        return next(pending, None) or await receive()

    return b"".join(message.get("body", b"") for message in messages), replay


def asks_for_impossible_logprobs(body: bytes) -> bool:
    """Whether a chat request asks for prompt logprobs of a prompt with a pruned video."""
    # Bodies with a video are large: they are parsed here only where all the words are there.
    if b'"prompt_logprobs"' not in body or b'"video' not in body:
        return False
    try:
        request = json.loads(body)
    except ValueError:
        return False  # vLLM has the right answer to this
    if not isinstance(request, dict) or request.get("prompt_logprobs") is None:
        return False
    kwargs = request.get("mm_processor_kwargs")
    return not (isinstance(kwargs, dict) and kwargs.get("metok") == "off")


def error(status: int, message: str, kind: str) -> JSONResponse:
    """An error in the form of vLLM's own."""
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


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
        return error(404, message, "NotFoundError")
    return JSONResponse({**found, "request_id": request_id})
