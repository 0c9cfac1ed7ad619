"""The server runner: the same questions to an OpenAI-compatible server, each with its real video file."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai

from benchmarks.accuracy.data import Item
from benchmarks.accuracy.local import MAX_TOKENS, Outcome
from metok_vllm.compression.accounting import VisualTokens
from metok_vllm.contract.profile import IGNORED
from metok_vllm.demo.model_choice import DemoModel
from metok_vllm.demo.server import HOST, free_port, running_server, serve_command, serve_environment

Settings = dict[str, Any] | Literal["off"] | None
TIMEOUT = 600.0  # seconds for one answer
MIME = {
    ".mp4": "video/mp4",
    ".m4v": "video/mp4",
    ".webm": "video/webm",
    ".mkv": "video/x-matroska",
    ".mov": "video/quicktime",
}


class ServerError(RuntimeError):
    """The server did not answer as it should; the message is one sentence."""


@contextlib.contextmanager
def started(model: Path, frames: int, log: Path, profile: bool) -> Iterator[str]:
    """The base URL of a `vllm serve` with METok, up as long as the body runs.

    Args:
        model: its folder.
        frames: the most of a video.
        log: file that its output goes to.
        profile: whether the profile in the model's folder rules, where there is one.

    Raises:
        metok_vllm.demo.errors.DemoError: it does not start.
    """
    flags = ["--dtype", "float32", "--max-model-len", "4096"]
    if not profile:
        flags += ["--additional-config", json.dumps({"metok": {"profile": IGNORED}})]
    served = DemoModel(str(model), flags=tuple(flags), kv_gib=1)
    port = free_port()
    log.parent.mkdir(parents=True, exist_ok=True)
    with running_server(serve_command(served, port, frames), serve_environment(served), port, log):
        yield f"http://{HOST}:{port}/v1"


class ServerRunner:
    """Asks one server, one question at a time."""

    def __init__(self, url: str, frames: int, layers: int | None = None, model: str | None = None) -> None:
        """`url` ends in /v1; `frames` is the most that a METok server samples;
        `model` None: the first one served.

        `layers` of the language model, where known, give the mean of visual tokens over layers.
        """
        # A proxy of the environment cannot reach a server on this very machine.
        local = "127.0.0.1" in url or "localhost" in url
        http = openai.DefaultHttpxClient(trust_env=not local)
        key = os.environ.get("OPENAI_API_KEY", "none")
        self.url, self.frames, self.layers = url, frames, layers
        self._client = openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=TIMEOUT, http_client=http)
        self._stock: dict[int, dict[str, Any]] = {}  # METok's report of each question, which also counts for stock
        if model is None:
            with self._explained():
                model = self._client.models.list().data[0].id
        self.model = model

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def answer(self, item: Item, metok: Settings) -> Outcome:
        """Ask one question. `metok` None: nothing that only a METok server understands is sent.

        Tokens and KV bytes come from METok's report; for "off", from the report of an earlier METok answer to
        the same question and the server's own count of the prompt. Without either they stay unknown.

        Raises:
            ServerError: no server, a refusal, no report.
        """
        extra: dict[str, Any] = {}
        if metok is not None:
            stated = metok if metok == "off" else {**metok, "report": True}
            extra = {
                "mm_processor_kwargs": {"metok": stated},
                "media_io_kwargs": {"video": {"num_frames": self.frames}},
            }
        content = [
            {"type": "video_url", "video_url": {"url": data_url(item.video)}},
            {"type": "text", "text": item.prompt},
        ]
        messages: Any = [{"role": "user", "content": content}]
        began = time.perf_counter()
        with self._explained():
            response = self._client.chat.completions.create(
                model=self.model, messages=messages, max_tokens=MAX_TOKENS, temperature=0, extra_body=extra
            )
            text = response.choices[0].message.content or ""
        seconds = time.perf_counter() - began
        if isinstance(metok, dict):
            return self._with_report(item, text, response.id, seconds)
        prompt = response.usage.prompt_tokens if response.usage else None
        return self._stock_outcome(item, text, prompt, seconds)

    def _with_report(self, item: Item, text: str, request: str, seconds: float) -> Outcome:
        with self._explained():
            found: Any = self._client.get(f"/metok/reports/{request}", cast_to=object)
        self._stock[item.number] = found
        tokens = VisualTokens(**found["visual_tokens"])
        first, second, third = found["prune_layers"]
        computed = first * tokens.encoded + (second - first) * tokens.after_l1 + (third - second) * tokens.after_l2
        return Outcome(
            text=text.strip(),
            entering=tokens.encoded,
            after_l1=tokens.after_l1,
            after_l2=tokens.after_l2,
            retained=tokens.retained,
            per_layer=None if self.layers is None else computed / self.layers,
            kv_bytes=found["kv_bytes"]["metok"],
            seconds=seconds,
        )

    def _stock_outcome(self, item: Item, text: str, prompt: int | None, seconds: float) -> Outcome:
        found = self._stock.get(item.number)
        if found is None or prompt is None:
            return Outcome(text=text.strip(), seconds=seconds)
        visual = prompt - found["text_tokens"]
        if visual != found["visual_tokens"]["stock"]:
            expected = found["visual_tokens"]["stock"]
            raise ServerError(
                f"METok counts {expected} visual tokens for the stock model and the server took {visual}."
            )
        kv = found["kv_bytes"]["stock"]
        return Outcome(text.strip(), visual, visual, visual, visual, float(visual), kv, seconds)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except openai.APIStatusError as error:
            message = " ".join(str(error.message).split())[:400]
            raise ServerError(
                f"The server at {self.url} refused the request (HTTP {error.status_code}): {message}"
            ) from None
        except openai.APITimeoutError:
            raise ServerError(f"The server at {self.url} took more than {TIMEOUT:g} s for an answer.") from None
        except openai.APIConnectionError:
            raise ServerError(f"No server answers at {self.url}.") from None
        except (openai.OpenAIError, LookupError, TypeError, AttributeError) as error:
            raise ServerError(f"The server at {self.url} does not speak the OpenAI API: {error!r}.") from None


def data_url(video: Path) -> str:
    """The file as a data URL."""
    kind = MIME.get(video.suffix.lower(), "video/mp4")
    return f"data:{kind};base64,{base64.b64encode(video.read_bytes()).decode()}"
