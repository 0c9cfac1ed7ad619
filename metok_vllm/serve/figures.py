"""Asking the engines for figures, without ever making an HTTP request wait long for a busy one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any, Generic, TypeVar

from metok_vllm.contract.counters import SCHEDULER_UTILITY, summed
from metok_vllm.log import metok_logger

logger = metok_logger(__name__)

T = TypeVar("T")

KEPT_SECONDS = 1.0
"""Answers younger than this are not asked for again, however many scrape."""

PATIENCE_SECONDS = 2.0
"""An engine answers between two of its steps. Who has waited this long gets the answer before."""


class Latest(Generic[T]):
    """The latest answer to a question, asked at most once at a time."""

    def __init__(
        self, ask: Callable[[], Awaitable[T]], kept: float = KEPT_SECONDS, patience: float = PATIENCE_SECONDS
    ) -> None:
        self._ask = ask
        self._kept = kept
        self._patience = patience
        self._at: float | None = None
        self._asking: asyncio.Task[None] | None = None
        self._failing = False
        self.value: T | None = None  # None until there has been an answer

    @property
    def age(self) -> float:
        """Seconds since the answer came; NaN where there is none yet."""
        return float("nan") if self._at is None else monotonic() - self._at

    async def refresh(self) -> T | None:
        """Ask again, unless the answer is fresh; wait for at most `patience` seconds.

        Returns the latest answer.

        A question that is not answered in time stays asked, and its answer serves whoever comes next.
        """
        if self._at is None or self.age >= self._kept:
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._update())
            await asyncio.wait({self._asking}, timeout=self._patience)
        return self.value

    async def _update(self) -> None:
        try:
            self.value = await self._ask()
        except Exception as error:  # whatever it is, a scrape answers with the values before
            if not self._failing:
                logger.warning("METok: the engine's figures cannot be read: %s", error)
            self._failing = True
        else:
            self._at = monotonic()
            self._failing = False


async def ask_workers(engine_client: Any, method: str, *args: Any) -> list[list[Any]]:
    """The answers of every worker of every engine to one of `MetokWorkerExtension`'s methods.

    `AsyncLLM.collective_rpc` hands out the first engine's answers alone; with data parallelism there are
    more.
    """
    answers: list[list[Any]] = await engine_client.engine_core.call_utility_all_async(
        "collective_rpc", method, None, args, None
    )
    return answers


async def ask_first_ranks(engine_client: Any, method: str) -> list[Any]:
    """For each engine the answer of its first tensor-parallel rank: the others answer None."""
    answers = await ask_workers(engine_client, method)
    return [next(answer for answer in workers if answer is not None) for workers in answers]


async def engine_figures(engine_client: Any) -> dict[str, Any]:
    """``engines``, and the sum over them of ``worker`` (`metok_stats`) and
    ``scheduler`` (`SchedulerCounters.snapshot`).
    """
    workers, schedulers = await asyncio.gather(
        ask_first_ranks(engine_client, "metok_stats"),
        engine_client.engine_core.call_utility_all_async(SCHEDULER_UTILITY),
    )
    return {"engines": len(workers), "worker": summed(workers), "scheduler": summed(schedulers)}


async def recent_requests(engine_client: Any) -> list[dict[str, Any]]:
    """The latest pruned requests of all engines together, latest first."""
    engines = await ask_first_ranks(engine_client, "metok_recent")
    return sorted((request for latest in engines for request in latest), key=lambda one: one["time"], reverse=True)
