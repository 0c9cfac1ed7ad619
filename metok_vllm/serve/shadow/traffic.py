"""When the comparisons run: only while this server has nothing else to do, one at a time.

A request that comes while one runs ends it at once, and it is tried again later. So a client waits at most
for the step that the engine is in, or for one video that is being prepared.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any, Protocol

from vllm.v1.engine.exceptions import EngineDeadError

from metok_vllm.log import metok_logger
from metok_vllm.serve.shadow.engines import EnginesGone
from metok_vllm.serve.shadow.exchange import CURRENT, Exchange
from metok_vllm.serve.shadow.record import Outcome, Record
from metok_vllm.serve.shadow.replay import Comparison, Disturbed, Unrepeatable

logger = metok_logger(__name__)

WAITING = 8
"""Requests that wait for a quiet moment. One more that is drawn meanwhile is let go."""

PATIENCE_S = 300.0
"""How long one waits."""

TRIES = 3
"""How often a comparison is begun: each one fetches the video anew."""

LONGEST_S = 120.0
"""How long one may take."""

LOOK_S = 0.25
"""Seconds between two looks at the engines: other servers' requests are seen there alone."""


class Engines(Protocol):
    """What the comparisons need to know of the engines: `engines.py: LiveEngines`."""

    async def answer(self, name: str) -> tuple[str, list[int]] | None: ...

    async def are_idle(self) -> bool: ...


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
        self._drawn: asyncio.Queue[_Drawn] = asyncio.Queue(WAITING)
        self._open = 0  # clients' requests in this process
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._running: asyncio.Task[Comparison] | None = None

    async def watch(self, app: Any, scope: Any, receive: Any, send: Any) -> None:
        """Run an ASGI app for a request; while a client's is being served, nothing is compared.

        It begins where the app reads the request's body: what is refused before that, such as for a wrong
        key, disturbs nobody.
        """
        with ExitStack() as until_its_end:

            async def opening() -> Any:
                message = await receive()
                if message["type"] == "http.request" and not is_open:
                    is_open.append(until_its_end.enter_context(self.client()))
                return message

            is_open: list[None] = []
            await app(scope, opening, send)

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
        if not (exchange.is_compressed and exchange.is_answered):
            return
        if self._drawn.full():
            self.record.count("busy")
            return
        # At once: the scheduler keeps the latest answers alone.
        answer = asyncio.ensure_future(self._engines.answer(exchange.name))
        # Where the engines are gone nobody waits for it any more, and asyncio would log a trace of that.
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._drawn.put_nowait(_Drawn(exchange, answer, monotonic() + PATIENCE_S))

    async def run(self) -> None:
        """Compare what was drawn, until cancelled or the engines are gone."""
        with suppress(EnginesGone, EngineDeadError):  # vLLM says so, and ends the server
            while True:
                self.record.count(await self._one(await self._drawn.get()))

    async def _one(self, drawn: _Drawn) -> Outcome:
        """Compare one request; what came of it."""
        try:
            found = await drawn.answer
            if found is None:
                return "failed"
            request_id, tokens = found
            for _ in range(TRIES):
                if not await self._is_quiet(drawn.deadline):
                    break
                comparison = await self._undisturbed(drawn.exchange, tokens)
                if comparison is not None:
                    self.record.add(request_id, comparison, self._shown(drawn.exchange))
                    return "compared"
            return "busy"
        except Unrepeatable as error:
            logger.debug("METok: a request cannot be compared: %s", error)
            return "unrepeatable"
        except (EnginesGone, EngineDeadError):
            raise
        except Exception as error:  # of a request that nobody waits for: the server goes on
            logger.warning("METok: comparing a request with the model without METok failed: %s", error)
            return "failed"

    def _shown(self, exchange: Exchange) -> str | None:
        if self._question is None or (body := exchange.body) is None:
            return None
        return self._question(body)

    async def _is_quiet(self, deadline: float) -> bool:
        """Wait until nobody else is served; whether that came before the deadline."""
        while (left := deadline - monotonic()) > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._quiet.wait(), left)
                if await self._engines.are_idle() and not self._open:
                    return True
                await asyncio.sleep(LOOK_S)
        return False

    async def _undisturbed(self, exchange: Exchange, tokens: list[int]) -> Comparison | None:
        """Compare one request; None where somebody else came, or it took too long."""
        running: asyncio.Task[Comparison] = asyncio.ensure_future(self._compare(exchange.body, tokens))
        self._running, end = running, monotonic() + LONGEST_S
        try:
            while not (await asyncio.wait({running}, timeout=LOOK_S))[0]:
                if monotonic() > end or not await self._engines.are_idle():
                    running.cancel()
            return None if running.cancelled() else running.result()
        except Disturbed:
            return None
        finally:
            self._running = None
            running.cancel()


@dataclass(frozen=True)
class _Drawn:
    """A request that waits to be compared."""

    exchange: Exchange
    answer: asyncio.Future[tuple[str, list[int]] | None]
    deadline: float
