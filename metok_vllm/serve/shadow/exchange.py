"""One request to the HTTP server that may be asked again: what it said, and whether it was answered.

It listens to what the server reads and sends by itself, and changes nothing of it.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any
from uuid import uuid4

from metok_vllm.contract.request_ids import printable

LONGEST_BODY = 32 * 2**20
"""Bytes of a request that is remembered. A longer one brings its video with it."""

LONGEST_QUESTION = 500
"""Characters of a question that are shown."""

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class Exchange:
    """A request and how it ended.

    Attributes:
        name: under which the scheduler keeps its answer (`Beside.keep_answer`).
        is_compressed: METok compresses a video of it.
        is_answered: the client has got the whole of an answer of status 200.
    """

    def __init__(self) -> None:
        self.name = uuid4().hex
        self.is_compressed = False
        self.is_answered = False
        self._body = bytearray()
        self._is_short = True
        self._is_gone = False
        self._status = 0

    @property
    def body(self) -> bytes | None:
        """What the client has sent; None where that is longer than `LONGEST_BODY`."""
        return bytes(self._body) if self._is_short else None

    def receiving(self, receive: Receive) -> Receive:
        """As `receive`; remembers the body, and whether the client went away."""

        async def listening() -> Any:
            message = await receive()
            self._is_gone |= message["type"] == "http.disconnect"
            if message["type"] == "http.request" and self._is_short:
                self._body += message.get("body", b"")
                if len(self._body) > LONGEST_BODY:
                    self._is_short = False
                    self._body.clear()
            return message

        return listening

    def sending(self, send: Send) -> Send:
        """As `send`; notices the end of the answer."""

        async def listening(message: Any) -> None:
            await send(message)
            if message["type"] == "http.response.start":
                self._status = message["status"]
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                # To a client that has gone, vLLM's answer is 200 and null.
                self.is_answered = self._status == 200 and not self._is_gone

        return listening


CURRENT: ContextVar[Exchange | None] = ContextVar("metok_exchange", default=None)
"""The request that is being served, where it was drawn."""


def keep_answer() -> str:
    """Of a request with a compressed video: the name to keep its answer under, empty where it was not drawn.

    `contract/admission.py` asks it. A beam search passes there with each step; only one is kept.
    """
    exchange = CURRENT.get()
    if exchange is None:
        return ""
    exchange.is_compressed = True
    return exchange.name


def question_of(body: bytes) -> str:
    """The text of the user's last turn in a chat request's body, as it may be shown on one line."""
    turns = [turn for turn in json.loads(body)["messages"] if turn.get("role") == "user"]
    content = turns[-1].get("content") if turns else None
    parts = [content] if isinstance(content, str) else content or []
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return printable(" ".join(text for text in texts if isinstance(text, str))[:LONGEST_QUESTION])
