"""Answers that the HTTP server will ask for once more: how far are they from the model's without METok?

What a client gets is text; the tokens that the engine made are known here. An answer is kept from its end
until it is fetched, and only the latest are.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from vllm.v1.request import RequestStatus

from metok_vllm.contract.beside import Beside
from metok_vllm.contract.request_ids import client_id, is_first_sample, shown

if TYPE_CHECKING:
    from vllm.v1.request import Request

KEPT = 64
"""Answers of clients that went away are never fetched."""

_ENDED = (
    RequestStatus.FINISHED_STOPPED,
    RequestStatus.FINISHED_LENGTH_CAPPED,
    RequestStatus.FINISHED_REPETITION,
    RequestStatus.FINISHED_ABORTED,  # by the front end too, which alone knows strings that end an answer
)


class KeptAnswers:
    """The latest answers, by the name that `Beside.keep_answer` gives them."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def ended(self, request: Request) -> None:
        """Keep a request's answer if somebody will ask for it; of several samples, the first one's."""
        beside = Beside.of(request.sampling_params)
        if beside is None or not beside.keep_answer or request.status not in _ENDED:
            return
        if not is_first_sample(request.request_id):
            return
        self._kept[beside.keep_answer] = {
            "request_id": shown(client_id(request.request_id)),
            "tokens": [int(token) for token in request.output_token_ids if token >= 0],
        }
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def take(self, name: str) -> dict[str, Any] | None:
        """``request_id``, as the client saw it, and ``tokens``; None where nothing is kept under the name."""
        return self._kept.pop(name, None)
