"""METok's part of the HTTP server, brought in through vLLM's `--middleware`.

vLLM's own group for plugin routes (`vllm.endpoint_plugins`) warns in every server where such a plugin is
merely installed, and METok must be silent there. A middleware is only there when asked for. This one adds the
routes when the server starts, so that requests to them pass vLLM's API key check like all others, asks the
engines before `/metrics` is answered, and refuses what only shows in a request as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from metok_vllm.contract.advice import with_report
from metok_vllm.contract.refusals import count_refused, no_prompt_logprobs
from metok_vllm.serve import metrics
from metok_vllm.serve.figures import Latest, ask_workers, engine_figures, recent_requests
from metok_vllm.serve.status import status, status_page

PREFIX = "/v1/metok"  # under /v1, which is what vLLM's --api-key guards
PAGE = "/metok"  # without any data, so outside


class MetokRoutes:
    """ASGI middleware: METok's routes and metrics from the start of the app's lifespan on,
    and a check of chat requests.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self._figures: Latest[dict[str, Any]] | None = None
        self._metrics: Any | None = None  # answers /metrics, where vLLM's own route cannot

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            self._figures = attach_routes(scope["app"])
            self._metrics = metrics.serve_metrics(self._figures)
        elif scope["type"] == "http" and path_of(scope) == metrics.PATH and self._figures is not None:
            await self._figures.refresh()
            if self._metrics is not None:
                await self._metrics(scope, receive, send)
                return
        elif scope["type"] == "http" and scope["method"] == "POST" and scope["path"].endswith("/chat/completions"):
            body, receive = await buffered(receive)
            if asks_for_impossible_logprobs(body):
                count_refused("prompt_logprobs")
                await error(400, f"METok: {no_prompt_logprobs()}", "BadRequestError")(scope, receive, send)
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


def path_of(scope: Any) -> str:
    """A request's path inside the app, without a slash at its end."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")).rstrip("/")


def attach_routes(app: FastAPI) -> Latest[dict[str, Any]]:
    """Add METok's routes. Returns what the engines' figures are read through."""
    # The engine client is there only once the server has started.
    figures = Latest(lambda: engine_figures(app.state.engine_client))
    recent = Latest(lambda: recent_requests(app.state.engine_client))

    async def current_status(request: Request) -> JSONResponse:
        return await status(request, figures, recent)

    app.add_api_route(f"{PREFIX}/reports/{{request_id}}", report, methods=["GET"])
    app.add_api_route(f"{PREFIX}/state", state, methods=["GET"])
    app.add_api_route(f"{PREFIX}/status", current_status, methods=["GET"])
    app.add_api_route(PAGE, status_page, methods=["GET"])
    return figures


async def state(request: Request) -> JSONResponse:
    """What METok holds in each worker right now: deferred prompts,
    and KV blocks by request and kind of group.
    """
    engines = await ask_workers(request.app.state.engine_client, "metok_state")
    return JSONResponse({"workers": [worker for workers in engines for worker in workers]})


async def report(request_id: str, request: Request) -> JSONResponse:
    """What METok did to a request that was sent with ``"report": true``;
    404 where there is no such report.
    """
    engines = await ask_workers(request.app.state.engine_client, "metok_report", request_id)
    found = next((answer for workers in engines for answer in workers if answer is not None), None)
    if found is None:
        message = (
            f"There is no METok report for request {request_id}; only {with_report()} have one, "
            "and only the latest are kept."
        )
        return error(404, message, "NotFoundError")
    return JSONResponse({**found, "request_id": request_id})
