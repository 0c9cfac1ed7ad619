"""vLLM 0.33's rule of the waiting queue, inside whatever vLLM is at hand, and 0.32's."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

import vllm.v1.core.sched.scheduler as module

ENDS_THE_QUEUE = """\
                    if num_new_tokens == 0:
                        # The request cannot be scheduled.
                        break
"""
STEPS_OVER = """\
                    if num_new_tokens == 0:
                        # The request cannot be scheduled. Requeue it so it does
                        # not stall the requests behind it.
                        skip_request(request_queue)
                        continue
"""
RULES = {"vLLM 0.32": ENDS_THE_QUEUE, "vLLM 0.33": STEPS_OVER}


def rule_at_hand() -> str:
    """Which of the two the installed vLLM follows.

    Raises:
        AssertionError: neither; its `schedule` is written otherwise.
    """
    source = inspect.getsource(module.Scheduler.schedule)
    (found,) = [name for name, lines in RULES.items() if source.count(lines) == 1]
    return found


def follow(rule: str, monkeypatch: Any) -> None:
    """For the rest of the test vLLM's scheduler follows `rule`, a key of `RULES`.

    Only these lines of `Scheduler.schedule` change: what stands there for a waiting request without tokens.
    """
    source = inspect.getsource(module.Scheduler.schedule)
    changed = source.replace(RULES[rule_at_hand()], RULES[rule])
    found: dict[str, Any] = {}
    exec(compile(textwrap.dedent(changed), f"<schedule by the rule of {rule}>", "exec"), vars(module), found)
    monkeypatch.setattr(module.Scheduler, "schedule", found["schedule"])
