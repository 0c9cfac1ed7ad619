"""What the comparisons ask the engines, through METok's scheduler (`scheduler/counters.py` says how)."""

from __future__ import annotations

import asyncio
from typing import Any

from metok_vllm.contract.counters import SCHEDULER_UTILITY

TRIES, APART_S = 8, 0.25
"""Where the front end has ended an answer itself, by a string, the scheduler hears of that a little later."""


class EnginesGone(Exception):
    """The engines answer no more questions: they are shutting down, or dead."""


class LiveEngines:
    """All engines of a server."""

    def __init__(self, engine_client: Any) -> None:
        self._core = engine_client.engine_core

    async def answer(self, name: str) -> tuple[str, list[int]] | None:
        """A request's id as the client saw it, and its answer's tokens; None where there is none.

        Raises:
            EnginesGone: nobody answers any more.
        """
        for _ in range(TRIES):
            found = next((one for one in await self._ask(name) if one is not None), None)
            if found is not None:
                return found["request_id"], found["tokens"]
            await asyncio.sleep(APART_S)
        return None

    async def are_idle(self) -> bool:
        """Whether all of them work, and no client's request is queued or running in any.

        Raises:
            EnginesGone: nobody answers any more.
        """
        return not any(one["requests"] or one["paused"] for one in await self._ask())

    async def _ask(self, *name: str) -> list[Any]:
        try:
            answers: list[Any] = await self._core.call_utility_all_async(SCHEDULER_UTILITY, *name)
        except Exception as error:  # vLLM's is a plain one, at a shutdown
            raise EnginesGone(str(error)) from error
        return answers
