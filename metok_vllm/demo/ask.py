"""Ask a server about a video through the `openai` client, and fetch METok's report of the request."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal
from urllib.parse import quote, urlsplit

import openai

from metok_vllm.demo.errors import DemoError

MAX_TOKENS = 48
"""Longest answer, in tokens."""

_UNMANAGED = "is it vLLM, started with --plugin metok --trust-request-mm-kwargs?"


@dataclass(frozen=True)
class Answer:
    """One answer of the server, and what the server counted."""

    text: str
    request_id: str
    prompt_tokens: int


class Client:
    """Talks to one OpenAI-compatible server.

    Every method raises `DemoError` where the server does not play along.
    """

    def __init__(self, url: str) -> None:
        """`url` is the server's, with or without the `/v1` at its end."""
        self.url = _base_url(url)
        host = urlsplit(self.url).hostname or ""
        # A proxy of the environment cannot reach a server on this very machine.
        http = openai.DefaultHttpxClient(trust_env=not _is_loopback(host))
        key = os.environ.get("OPENAI_API_KEY", "none")
        self._client = openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, http_client=http)
        self._model: str | None = None

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def model(self) -> str:
        """The name under which the server serves its (first) model."""
        if self._model is None:
            with _explained(self.url):
                served = self._client.models.list().data
            if not served:
                raise DemoError(f"The server at {self.url} serves no model.")
            self._model = served[0].id
        return self._model

    def ask(self, video_url: str, question: str, frames: int, metok: dict[str, Any] | Literal["off"]) -> Answer:
        """Ask `question` about a video of which the server is to sample `frames` frames;
        `metok` are the settings.
        """
        content = [
            {"type": "video_url", "video_url": {"url": video_url}},
            {"type": "text", "text": question},
        ]
        messages: Any = [{"role": "user", "content": content}]
        with _explained(self.url):
            response = self._client.chat.completions.create(
                model=self.model(),
                messages=messages,
                max_tokens=MAX_TOKENS,
                temperature=0,
                extra_body={
                    "mm_processor_kwargs": {"metok": metok},
                    # As the demo has sampled them itself, whatever the model's own way is.
                    "media_io_kwargs": {"video": {"num_frames": frames, "sampling": "uniform"}},
                },
            )
            usage = response.usage
            answer = response.choices[0].message.content or ""
            request_id = response.id
        if usage is None:
            raise DemoError(f"The server at {self.url} did not count the prompt's tokens; {_UNMANAGED}")
        return Answer(answer, request_id, usage.prompt_tokens)

    def report(self, request_id: str) -> dict[str, Any]:
        """METok's report of a request that was sent with ``"report": true``."""
        try:
            with _explained(self.url):
                found = self._client.get(f"/metok/reports/{quote(request_id, safe='')}", cast_to=object)
        except _NotFound:
            raise DemoError(f"The server at {self.url} has no METok report of the request; {_UNMANAGED}") from None
        if not isinstance(found, dict):
            raise DemoError(f"The server at {self.url} sent no METok report; {_UNMANAGED}")
        return found


class _NotFound(DemoError):
    """The server answered 404."""


class _explained:
    """Context manager: turns the client's errors into `DemoError`, one sentence."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, openai.APITimeoutError):
            raise DemoError(f"The server at {self.url} took too long to answer.") from None
        if isinstance(error, openai.APIConnectionError):
            raise DemoError(f"No server answers at {self.url}.") from None
        if isinstance(error, openai.APIStatusError):
            kind = _NotFound if error.status_code == HTTPStatus.NOT_FOUND else DemoError
            raise kind(
                f"The server at {self.url} refused the request (HTTP {error.status_code}): {_message(error)}"
            ) from None
        # What another kind of server sends: the client hands on a page as text, and missing fields as None.
        if isinstance(error, openai.OpenAIError | ValueError | AttributeError | TypeError | LookupError):
            raise DemoError(f"The server at {self.url} does not speak the OpenAI API; {_UNMANAGED}") from None


def _message(error: openai.APIStatusError) -> str:
    """The server's own words, in one line."""
    body: Any = error.body
    if isinstance(body, dict) and isinstance(body.get("error"), dict):
        body = body["error"]
    text = body.get("message") if isinstance(body, dict) else None
    line = " ".join(str(text or error.message).split())
    return line if len(line) <= 500 else line[:497] + "..."


def _base_url(url: str) -> str:
    wrong = DemoError(f"The server's address must look like http://localhost:8000, not {url!r}.")
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  # looked at for its check
    except ValueError:
        raise wrong from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise wrong
    trimmed = url.rstrip("/")
    return trimmed if trimmed.endswith("/v1") else f"{trimmed}/v1"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
