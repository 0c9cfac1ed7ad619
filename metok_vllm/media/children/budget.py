"""A budget that is handed out in the order in which it was asked for."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Lock


class BudgetFull(Exception):
    """As many wait as may wait."""


@dataclass(eq=False)
class Grant:
    """A share of a budget, which is to be given back once: `Budget.give_back`."""

    amount: int
    ready: Future[None] = field(default_factory=Future)
    """Done once the share is there to be used, or cancelled by who waited for it."""
    held: bool = False


class Budget:
    """`total` units of something. Whoever cannot have its share at once waits; nobody overtakes.

    May be used from several threads. A waiting share is waited for by its `ready`, from a thread or from an
    event loop (`asyncio.wrap_future`).
    """

    def __init__(self, total: int, most_waiting: int | None = None) -> None:
        """
        Args:
            total: units; none may ask for more.
            most_waiting: how many may wait; None for any number.
        """
        self.total = total
        self.most_waiting = most_waiting
        self._free = total
        self._waiting: deque[Grant] = deque()
        self._returned: deque[Grant] = deque()
        self._lock = Lock()

    @property
    def used(self) -> int:
        """Units that are handed out."""
        return self.total - self._free

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def ask(self, amount: int) -> Grant:
        """Ask for a share.

        Raises:
            BudgetFull: as many wait as may wait.
            ValueError: more than `total`, which there will never be.
        """
        if not 0 <= amount <= self.total:
            raise ValueError(f"{amount} of {self.total}")
        grant = Grant(amount)
        with self._lock:
            waits = bool(self._waiting) or amount > self._free
            full = waits and self.most_waiting is not None and len(self._waiting) >= self.most_waiting
            if not full:
                self._waiting.append(grant)
                self._hand_out()
        self._take_back()
        if full:
            raise BudgetFull
        return grant

    def enlarge(self, grant: Grant, by: int) -> bool:
        """Add to a share what is free right now; whether there was as much. It overtakes those who wait."""
        with self._lock:
            enough = 0 <= by <= self._free
            if enough:
                self._free -= by
                grant.amount += by
        self._take_back()
        return enough

    def reduce(self, grant: Grant, to: int) -> None:
        """Give back a part of a share that is held: all but `to` units."""
        with self._lock:
            self._free += grant.amount - to
            grant.amount = to
            self._hand_out()
        self._take_back()

    def give_back(self, grant: Grant) -> None:
        """Return a share, or stop waiting for it. A second call changes nothing.

        May be called by a finalizer, which runs at any moment, in a thread that holds the lock as well.
        """
        self._returned.append(grant)
        self._take_back()

    def _take_back(self) -> None:
        """Serve `give_back`. Whoever holds the lock does so after it has let go."""
        while self._returned and self._lock.acquire(blocking=False):
            try:
                while self._returned:
                    grant = self._returned.popleft()
                    if grant.held:
                        self._free += grant.amount
                        grant.held = False
                    elif grant in self._waiting:
                        self._waiting.remove(grant)
                        grant.ready.cancel()
                self._hand_out()
            finally:
                self._lock.release()

    def _hand_out(self) -> None:
        """Serve the head of the queue as far as it goes."""
        while self._waiting and self._waiting[0].amount <= self._free:
            grant = self._waiting.popleft()
            self._free -= grant.amount
            grant.held = True
            if grant.ready.set_running_or_notify_cancel():  # else its owner has left, and gives it back
                grant.ready.set_result(None)
