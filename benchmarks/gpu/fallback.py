"""What every further engine does without, once a stage has shown that it does not work here.

Nothing of this happens in silence: the terminal, the report and every result say which options an engine got.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from benchmarks.gpu.runner import Outcome, Runner
from benchmarks.gpu.stages import Stage

NO_FLASH_ATTENTION: dict[str, Any] = {"attention_backend": "TRITON_ATTN", "mm_encoder_attn_backend": "TORCH_SDPA"}
SAFE: dict[str, Any] = {**NO_FLASH_ATTENTION, "compilation_config": {"custom_ops": ["none"]}}

NO_ENGINE = "vLLM does not run here without METok either (smoke-llm)"

BROKEN_ATTENTION = re.compile(r"^FlashAttention .*(WRONG|FAILED)", re.MULTILINE)


def restrict(runner: Runner, option: dict[str, Any]) -> None:
    """Give every further engine these arguments, unless it gets others already."""
    if not runner.folder.engine_option.exists():
        runner.folder.engine_option.write_text(json.dumps(option) + "\n")
        print(f"    engines from here on: {json.dumps(option)}", flush=True)


def smoke_lib(runner: Runner, stage: Stage, outcome: Outcome) -> None:
    """FlashAttention that gives wrong results is not used."""
    if BROKEN_ATTENTION.search((runner.folder.logs / f"{stage.name}.log").read_text(errors="replace")):
        restrict(runner, NO_FLASH_ATTENTION)


def smoke_llm(runner: Runner, stage: Stage, outcome: Outcome) -> None:
    """A model that does not run is tried without FlashAttention and without vLLM's compiled operators."""
    if not outcome.ok:
        print(f"    {stage.name} again, with SMOKE=safe", flush=True)
        again = runner.run(stage, {"SMOKE": "safe"})
        if again is not None and again.ok:
            restrict(runner, SAFE)
        elif again is not None:  # eight starts were spent on the same error once
            runner.no_engine = NO_ENGINE


def engine_tiny(runner: Runner, stage: Stage, outcome: Outcome) -> None:
    """The same for the first engines with METok."""
    if outcome.ok or runner.folder.engine_option.exists():
        return
    result = runner.folder.tiny
    if result.exists():
        result.replace(result.with_name(f"{result.stem}-default-options.json"))
    restrict(runner, SAFE)
    print(f"    {stage.name} again", flush=True)
    again = runner.run(stage)
    if again is None or not again.ok:
        runner.folder.engine_option.unlink()  # it was not that


AFTER: dict[str, Callable[[Runner, Stage, Outcome], None]] = {
    "smoke-lib": smoke_lib,
    "smoke-llm": smoke_llm,
    "engine-tiny": engine_tiny,
}
"""What is looked at behind a stage, by its name. Not in the smallest form, which has no GPU to look at."""
