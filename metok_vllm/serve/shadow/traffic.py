"""When the comparisons run: only while this server has nothing else to do, one at a time.

A request that comes while one runs ends it at once, and it is tried again later. So a client waits at most
for the step that the engine is in, or for one video that is being prepared.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any, Protocol

from vllm.v1.engine.exceptions import EngineDeadError

from metok_vllm.log import metok_logger
from metok_vllm.serve.shadow.exchange import CURRENT, Exchange
from metok_vllm.serve.shadow.record import Outcome, Record
from metok_vllm.serve.shadow.replay import Comparison, Unrepeatable

logger = metok_logger(__name__)

WAITING = 8
"""Requests that wait for a quiet moment. One more that is drawn meanwhile is let go."""

PATIENCE_S = 300.0
"""How long one waits."""

LOOK_S = 0.25
"""Seconds between two looks at the engines: other servers' requests are seen there alone."""


class Engines(Protocol):
    """What the comparisons need to know of the engines."""

    async def answer(self, name: str) -> tuple[str, list[int]] | None:
        """A request's id as the client saw it, and its answer's tokens; None where there is none."""

    async def is_idle(self) -> bool:
        """Whether no client's request is queued or running in any of them."""


Compare = Callable[[bytes | None, list[int]], Awaitable[Comparison]]


class Shadow:
    """Draws requests, and compares them in the background.

    Args:
        rate: share of requests that are drawn.
        engines: where answers are and who is busy.
        compare: `Replay.compare`.
        question: what may be shown of a body; None for nothing.
    """

    def __init__(
        self,
        rate: float,
        engines: Engines,
        compare: Compare,
        question: Callable[[bytes], str] | None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.rate = rate
        self.record = Record()
        self._engines = engines
        self._compare = compare
        self._question = question
        self._draw = draw
        self._drawn: asyncio.Queue[tuple[float, Exchange]] = asyncio.Queue(WAITING)
        self._open = 0  # clients' requests in this process
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._running: asyncio.Task[Comparison] | None = None

    @contextmanager
    def client(self) -> Iterator[None]:
        """While a client's request is open, nothing is compared."""
        self._open += 1
        self._quiet.clear()
        if self._running is not None:
            self._running.cancel()
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self._quiet.set()

    async def serve(self, app: Any, scope: Any, receive: Any, send: Any) -> None:
        """Run an ASGI app for one chat request, and note it where it is drawn and had a compressed video."""
        if self._draw() >= self.rate:
            await app(scope, receive, send)
            return
        exchange = Exchange()
        token = CURRENT.set(exchange)
        try:
            await app(scope, exchange.receiving(receive), exchange.sending(send))
        finally:
            CURRENT.reset(token)
        if exchange.is_compressed and exchange.is_answered:
            try:
                self._drawn.put_nowait((monotonic(), exchange))
            except asyncio.QueueFull:
                self.record.count("busy")

    async def run(self) -> None:
        """Compare what was drawn, until cancelled."""
        while True:
            since, exchange = await self._drawn.get()
            outcome = await self._one(exchange, since + PATIENCE_S)
            if outcome is not None:
                self.record.count(outcome)

    async def _one(self, exchange: Exchange, deadline: float) -> Outcome | None:
        """What came of a request; None where it was compared, which `Record.add` counts."""
        try:
            found = await self._engines.answer(exchange.name)
            if found is None:
                return "failed"
            request_id, tokens = found
            while await self._is_quiet(deadline):
                comparison = await self._undisturbed(exchange, tokens)
                if comparison is not None:
                    self.record.add(request_id, comparison, self._shown(exchange))
                    return None
            return "busy"
        except Unrepeatable as error:
            logger.debug("METok: a request cannot be compared: %s", error)
            return "unrepeatable"
        except EngineDeadError:
            return "failed"  # vLLM has said so, and ends the server
        except Exception as error:  # of a request that nobody waits for: the server goes on
            logger.warning("METok: comparing a request with the model without METok failed: %s", error)
            return "failed"

    def _shown(self, exchange: Exchange) -> str | None:
        body = exchange.body
        return None if self._question is None or body is None else self._question(body)

    async def _is_quiet(self, deadline: float) -> bool:
        """Wait until nobody else is served; whether that came before the deadline."""
        while (left := deadline - monotonic()) > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._quiet.wait(), left)
                if await self._engines.is_idle() and not self._open:
                    return True
                await asyncio.sleep(LOOK_S)
        return False

    async def _undisturbed(self, exchange: Exchange, tokens: list[int]) -> Comparison | None:
        """Compare one request; None where somebody else came."""
        running: asyncio.Task[Comparison] = asyncio.ensure_future(self._compare(exchange.body, tokens))
        self._running = running
        try:
            while True:
                done, _ = await asyncio.wait({running}, timeout=LOOK_S)
                if done:
                    return running.result()
                if not await self._engines.is_idle():
                    running.cancel()
        except asyncio.CancelledError:
            if running.cancelled() and not _is_ending():
                return None
            raise
        finally:
            self._running = None
            running.cancel()


def _is_ending() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
