"""What an operator sees of the comparisons: metrics, the worst ones, a line in the log for each of these.

The metrics are the process's own, as those of refused requests are (`contract/refusals.py`).
"""

from __future__ import annotations

from collections import Counter as Totals
from dataclasses import asdict
from functools import cache
from typing import Any, Literal, get_args

from prometheus_client import Counter, Histogram

from metok_vllm.contract.forced import KL_LIMIT
from metok_vllm.contract.refusals import FRONT_END
from metok_vllm.log import metok_logger
from metok_vllm.serve.shadow.replay import Comparison

logger = metok_logger(__name__)

Outcome = Literal["compared", "busy", "unrepeatable", "failed"]
"""It was compared; the server was never idle, or too many waited; it cannot be asked again; it went wrong."""

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
SHARES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)
NATS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 1.0, 3.0)
WORST = 10
"""Requests that are named."""


@cache
def _metrics() -> tuple[Counter, Histogram, Histogram]:
    """Made on first use: a server without `shadow_rate` has none."""
    requests = Counter(
        "metok_shadow_requests", "Requests drawn by shadow_rate, by what came of them.", ["outcome"], registry=FRONT_END
    )
    for outcome in OUTCOMES:
        requests.labels(outcome)
    agreement = Histogram(
        "metok_shadow_agreement",
        "Share of an answer's tokens that the model would have chosen without METok too.",
        buckets=SHARES,
        registry=FRONT_END,
    )
    kl = Histogram(
        "metok_shadow_kl",
        "KL divergence of METok's distribution from the model's own in nats, mean over an answer's tokens.",
        buckets=NATS,
        registry=FRONT_END,
    )
    return requests, agreement, kl


class Record:
    """All comparisons of one HTTP server process since its start."""

    def __init__(self) -> None:
        self._totals: Totals[Outcome] = Totals()
        self._tokens = self._agreeing = 0
        self._worst: list[tuple[str, Comparison, str | None]] = []
        _metrics()

    def count(self, outcome: Outcome) -> None:
        """One request is done with."""
        self._totals[outcome] += 1
        _metrics()[0].labels(outcome).inc()

    def add(self, request_id: str, comparison: Comparison, question: str | None) -> None:
        """What came out of one that was compared.

        Args:
            request_id: as the client saw it, fit to be shown.
            comparison: what came out.
            question: its text, where the operator lets it be shown.
        """
        _, agreement, kl = _metrics()
        agreement.observe(comparison.agreement)
        kl.observe(comparison.kl)
        self._tokens += comparison.tokens
        self._agreeing += comparison.agreeing
        if comparison.agreeing == comparison.tokens and comparison.largest_kl <= KL_LIMIT:
            return  # only what differs is worth a name
        new = (request_id, comparison, question)
        self._worst = sorted([*self._worst, new], key=lambda one: (one[1].agreement, -one[1].kl))[:WORST]
        if new in self._worst:
            logger.warning(
                "METok: %s is among the answers farthest from the model's own: %d of %d tokens would be the same "
                "without METok, KL %.3g on the mean and %.3g at most",
                request_id,
                comparison.agreeing,
                comparison.tokens,
                comparison.kl,
                comparison.largest_kl,
            )

    def shown(self) -> dict[str, Any]:
        """For the status page: totals, the share of agreeing tokens over all, and the worst, worst first."""
        return {
            "requests": {outcome: self._totals[outcome] for outcome in OUTCOMES},
            "tokens": self._tokens,
            "agreement": self._agreeing / self._tokens if self._tokens else None,
            "worst": [
                {
                    "request_id": request_id,
                    **asdict(comparison),
                    "agreement": comparison.agreement,
                    **({} if question is None else {"question": question}),
                }
                for request_id, comparison, question in self._worst
            ],
        }
