"""The status page: what METok did to the latest requests, and its totals. Read-only.

`GET /metok` is a page without any data; the page reads `GET /v1/metok/status`, which vLLM's `--api-key`
guards like everything under ``/v1``. No prompt text and no frame is shown; the setting
``status_shows_questions`` adds the users' questions.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import math
import re
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import PurePath
from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse, JSONResponse

from metok_vllm.contract.profile import told
from metok_vllm.contract.refusals import FRONT_END
from metok_vllm.contract.server_choices import server_choices
from metok_vllm.serve.figures import Latest
from metok_vllm.serve.metrics import refused_in
from metok_vllm.serve.shadow.traffic import Shadow

PAGE = "status.html"


@cache
def page() -> tuple[str, dict[str, str]]:
    """The page and its headers.

    Its only script and its only style are allowed by their hashes, and nothing else is.
    """
    text = (files(__package__) / PAGE).read_text("utf-8")
    policy = [
        "default-src 'none'",
        f"script-src {_hash(text, 'script')}",
        f"style-src {_hash(text, 'style')}",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    headers = {
        "Content-Security-Policy": "; ".join(policy),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
    return text, headers


def _hash(text: str, element: str) -> str:
    (content,) = re.findall(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


async def status_page() -> HTMLResponse:
    """The page itself."""
    text, headers = page()
    return HTMLResponse(text, headers=headers)


async def status(
    request: Request,
    figures: Latest[dict[str, Any]],
    recent: Latest[list[dict[str, Any]]],
    shadow: Shadow | None = None,
) -> JSONResponse:
    """All that the page shows, as JSON."""
    totals, requests = await asyncio.gather(figures.refresh(), recent.refresh())
    state = request.app.state
    body = {
        "server": _server(state),
        "engine_figures": totals,
        "engine_figures_age_seconds": _number(figures.age),
        "refused_by_this_process": refused_in(FRONT_END.collect()),
        "shadow_of_this_process": None if shadow is None else {"rate": shadow.rate, **shadow.record.shown()},
        "requests": [_with_question(one, state) for one in requests or ()],
        "requests_age_seconds": _number(recent.age),
    }
    return JSONResponse(body, headers={"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"})


def _server(state: Any) -> dict[str, Any]:
    model_config = state.vllm_config.model_config
    choices = server_choices(model_config.hf_config)
    return {
        "models": [model.name for model in state.openai_serving_models.base_model_paths],
        "architecture": model_config.architecture,
        "version": version("metok-vllm"),
        "layers": model_config.hf_text_config.num_hidden_layers,
        "pruned_before_layers": list(choices.prune_layers or ()),
        "settings": choices.settings.model_dump(mode="json"),
        "profile": None if choices.profile is None else _profile(choices.profile),
    }


def _profile(summary: dict[str, Any]) -> dict[str, Any]:
    """With the file's name alone: where it lies is the operator's business."""
    named = {**summary, "path": PurePath(summary["path"]).name}
    return {**named, "told": told(named)}


def _with_question(request: dict[str, Any], state: Any) -> dict[str, Any]:
    """With the question's text in the place of its token ids, where the worker sent any."""
    shown = {key: value for key, value in request.items() if key != "question_ids"}
    if "question_ids" in request:
        shown["question"] = state.engine_client.renderer.get_tokenizer().decode(request["question_ids"])
    return shown


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
