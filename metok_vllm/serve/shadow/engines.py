"""What the comparisons ask the engines, through METok's scheduler (`scheduler/counters.py` says how)."""

from __future__ import annotations

import asyncio
from typing import Any

from metok_vllm.contract.counters import SCHEDULER_UTILITY

TRIES, APART_S = 8, 0.25
"""Where the front end has ended an answer itself, by a string, the scheduler hears of that a little later."""


class LiveEngines:
    """All engines of a server."""

    def __init__(self, engine_client: Any) -> None:
        self._core = engine_client.engine_core

    async def answer(self, name: str) -> tuple[str, list[int]] | None:
        """See `traffic.Engines`."""
        for _ in range(TRIES):
            answers = await self._core.call_utility_all_async(SCHEDULER_UTILITY, name)
            found = next((one for one in answers if one is not None), None)
            if found is not None:
                return found["request_id"], found["tokens"]
            await asyncio.sleep(APART_S)
        return None

    async def is_idle(self) -> bool:
        """See `traffic.Engines`."""
        return not any(one["requests"] for one in await self._core.call_utility_all_async(SCHEDULER_UTILITY))
