"""METok's part of the HTTP server, brought in through vLLM's `--middleware`.

vLLM's own group for plugin routes (`vllm.endpoint_plugins`) warns in every server where such a plugin is
merely installed, and METok must be silent there. A middleware is only there when asked for. This one adds the
routes when the server starts, so that requests to them pass vLLM's API key check like all others, and asks
the engines before `/metrics` is answered.

A middleware is outermost: it runs before vLLM has looked at the API key. So it reads no body and refuses
nothing; with `shadow_rate` it hears what vLLM itself reads. What METok refuses, it refuses where vLLM has
authenticated and parsed the request (`frontend/processing.py`, `contract/admission.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from metok_vllm.contract import request_ids
from metok_vllm.contract.admission import check_requests
from metok_vllm.contract.advice import with_report
from metok_vllm.contract.server_choices import server_choices
from metok_vllm.contract.settings import MetokSettings
from metok_vllm.log import metok_logger
from metok_vllm.media.in_force import decode_pool, set_in_force
from metok_vllm.serve import metrics
from metok_vllm.serve.closing import bound_shutdown, run_until_shutdown
from metok_vllm.serve.figures import Latest, ask_workers, engine_figures, recent_requests
from metok_vllm.serve.shadow.engines import LiveEngines
from metok_vllm.serve.shadow.exchange import keep_answer, question_of
from metok_vllm.serve.shadow.replay import Replay
from metok_vllm.serve.shadow.traffic import Shadow
from metok_vllm.serve.status import status, status_page

logger = metok_logger(__name__)

PUBLISH_S = 1.0
"""Seconds between two statements of the pool's gauges.

With several API servers another one may answer `/metrics`.
"""

PREFIX = "/v1/metok"  # under /v1, which is what vLLM's --api-key guards
RETRY_AFTER_S = b"2"
CHAT = "/v1/chat/completions"
PAGE = "/metok"  # without any data, so outside


class MetokRoutes:
    """ASGI middleware: METok's routes and metrics from the start of the app's lifespan on."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self._figures: Latest[dict[str, Any]] | None = None
        self._shadow: Shadow | None = None
        self._metrics: Any | None = None  # answers /metrics, where vLLM's own route cannot

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif scope["type"] == "http" and self._figures is not None and path_of(scope) == metrics.PATH:
            decode_pool().publish()
            await self._figures.refresh()
            await (self._metrics or self.app)(scope, receive, send)
        elif scope["type"] == "http":
            last = error(503, "The server is shutting down.", "ServiceUnavailableError")
            await run_until_shutdown(self._watched(scope), scope, receive, retry_after(send), last)
        else:
            await self.app(scope, receive, send)

    def _watched(self, scope: Any) -> Any:
        """The app that answers a request; where `shadow_rate` is set, one that sees who is there."""
        if self._shadow is None or scope["method"] != "POST":
            return self.app
        app = partial(self._shadow.serve, self.app) if path_of(scope) == CHAT else self.app
        return partial(self._shadow.watch, app)

    async def _live(self, scope: Any, receive: Any, send: Any) -> None:
        """The server's life: from its start, through all requests, to its shutdown."""
        try:
            self._started(scope["app"])
        except Exception as error:
            # Raised, it would let the server start without METok's part.
            self._shut_down()
            if not isinstance(error, RuntimeError | ValueError):
                logger.exception("METok's part of the server does not start.")
            await receive()
            await send({"type": "lifespan.startup.failed", "message": f"vllm: error: {error}"})
            return
        background = [asyncio.create_task(keep_publishing())]
        if self._shadow is not None:
            background.append(asyncio.create_task(self._shadow.run()))
        try:
            await self.app(scope, receive, send)
        finally:
            for task in background:
                task.cancel()
            self._shut_down()

    def _started(self, app: FastAPI) -> None:
        """The engine client is there; no request has been taken yet."""
        check_requests().serves_metok_alone = True
        model_config = app.state.vllm_config.model_config
        settings = server_choices(model_config.hf_config).settings
        set_in_force(model_config.get_multimodal_config().media_io_kwargs, settings)
        decode_pool().start()
        bound_shutdown(app.state.server.config)
        if settings.shadow_rate:
            self._shadow = shadow_of(app.state, settings)
            check_requests().keep_answer = keep_answer
        self._figures = attach_routes(app, self._shadow)
        self._metrics = metrics.serve_metrics(self._figures)

    def _shut_down(self) -> None:
        """No request is running any more, or the start has failed."""
        check_requests().serves_metok_alone = False
        check_requests().keep_answer = str
        decode_pool().stop()


async def keep_publishing() -> None:
    """State the pool's gauges, until cancelled."""
    while True:
        decode_pool().publish()
        await asyncio.sleep(PUBLISH_S)


def error(status: int, message: str, kind: str) -> JSONResponse:
    """An error in the form of vLLM's own."""
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


def retry_after(send: Callable[[Any], Awaitable[None]]) -> Callable[[Any], Awaitable[None]]:
    """Say with every 503 when to try again, where it does not: vLLM gives its errors no headers."""

    async def with_header(message: Any) -> None:
        if message["type"] == "http.response.start" and message["status"] == 503:
            headers = list(message.get("headers", ()))
            if not any(name.lower() == b"retry-after" for name, _ in headers):
                headers.append((b"retry-after", RETRY_AFTER_S))
            message = {**message, "headers": headers}
        await send(message)

    return with_header


def path_of(scope: Any) -> str:
    """A request's path inside the app, without a slash at its end."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    if path.startswith(f"{root}/"):
        path = path[len(root) :]
    return path.rstrip("/")


def shadow_of(state: Any, settings: MetokSettings) -> Shadow:
    """What compares the answers of a server with the model's own; `state` is the app's."""
    shown = question_of if settings.status_shows_questions else None
    return Shadow(settings.shadow_rate, LiveEngines(state.engine_client), Replay(state).compare, shown)


def attach_routes(app: FastAPI, shadow: Shadow | None = None) -> Latest[dict[str, Any]]:
    """Add METok's routes. Returns what the engines' figures are read through."""
    # The engine client is there only once the server has started.
    figures = Latest(lambda: engine_figures(app.state.engine_client))
    recent = Latest(lambda: recent_requests(app.state.engine_client))

    async def current_status(request: Request) -> JSONResponse:
        return await status(request, figures, recent, shadow)

    app.add_api_route(f"{PREFIX}/reports/{{request_id:path}}", report, methods=["GET"])
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
    engines = await ask_workers(request.app.state.engine_client, "metok_report", request_ids.key(request_id))
    found = next((answer for workers in engines for answer in workers if answer is not None), None)
    if found is None:
        message = (
            f"There is no METok report for request {request_ids.shown(request_id)}; only {with_report()} have one, "
            "and only the latest are kept."
        )
        return error(404, message, "NotFoundError")
    return JSONResponse(found)
