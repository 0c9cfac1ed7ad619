"""How long the HTTP server waits for its clients when it shuts down.

What differs: uvicorn waits for every open request without end (uvicorn/server.py: `Server.shutdown`), and
vLLM 0.32 sets no bound (vllm/entrypoints/launchers/launcher.py: `serve_http`). The engine has been drained or
stopped before, so no answer comes any more: a client that sends its request slowly, or reads its answer
slowly, would alone keep the process and its children alive.

It can go when vLLM sets `timeout_graceful_shutdown` itself.
"""

from __future__ import annotations

import asyncio
from typing import Any

GRACE_S = 3
"""Seconds for what has been answered already to reach its client. Then open requests are cancelled."""


def bound_shutdown(config: Any) -> None:
    """Give an HTTP server that would wait for ever a bound.

    Args:
        config: a `uvicorn.Config`, whose server need not have started.
    """
    if config.timeout_graceful_shutdown is None:
        config.timeout_graceful_shutdown = GRACE_S


async def run_until_shutdown(app: Any, scope: Any, receive: Any, send: Any, last: Any) -> None:
    """Run an ASGI app for one request; where shutdown cancels it, end without a trace in the log.

    uvicorn cancels requests at shutdown alone. It would log a trace for each and answer 500.

    Args:
        app: the ASGI app, with its `scope`, `receive` and `send`.
        last: what to answer then, itself an ASGI app. Left out where an answer has begun.
    """
    begun = False

    async def sending(message: Any) -> None:
        nonlocal begun
        begun = True
        await send(message)

    try:
        await app(scope, receive, sending)
    except asyncio.CancelledError:
        if not begun:
            await last(scope, receive, send)
