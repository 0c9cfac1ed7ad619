"""Short messages between the processes: JSON over a Unix socket, with open files beside them.

A child may be in a stranger's hands. So what comes need not be a message at all (`Garbled`), and an end
counts as closed only where the kernel says so: an empty message looks the same to `recv`.
"""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Sequence
from typing import Any

LONGEST = 16384
"""Bytes of a message."""


class Garbled(Exception):
    """Something that none of METok's own processes says."""


def pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a socket that keeps messages apart; a program that is started inherits neither."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(end: socket.socket, message: dict[str, Any], files: Sequence[int] = (), *, wait: bool = True) -> None:
    """Send a message and, with it, duplicates of open files.

    Raises:
        OSError: the other end is closed; or nobody reads there, and this was not to wait.
    """
    data, flags = json.dumps(message).encode(), socket.MSG_NOSIGNAL | (0 if wait else socket.MSG_DONTWAIT)
    if files:
        socket.send_fds(end, [data], list(files), flags)
    else:
        end.send(data, flags)  # a confined child has no sendmsg


def receive(end: socket.socket) -> dict[str, Any] | None:
    """The next message, or None where the other end is closed.

    Raises:
        TimeoutError: nothing came within the socket's timeout.
        Garbled: what came is no message.
    """
    try:
        data = end.recv(LONGEST)
    except ConnectionError:  # it closed without having read all, and may have said something before
        data = end.recv(LONGEST)
    return None if not data and ended(end) else _read(data)


def receive_with_files(end: socket.socket, most: int) -> tuple[dict[str, Any] | None, list[int]]:
    """As `receive`, and up to `most` open files that came with the message."""
    try:
        data, files, _, _ = socket.recv_fds(end, LONGEST, most)
    except ConnectionError:
        return None, []
    return _read(data) if data else None, files


def there(end: socket.socket) -> bool:
    """Whether a message waits to be received."""
    poll = select.poll()
    poll.register(end, select.POLLIN)
    return bool(poll.poll(0))


def ended(end: socket.socket, seconds: float = 0) -> bool:
    """Whether every process that held the other end has closed it, `seconds` from now at the latest."""
    poll = select.poll()
    poll.register(end, 0)
    return bool(poll.poll(seconds * 1000))


def _read(data: bytes) -> dict[str, Any]:
    try:
        message = json.loads(data)
    except (ValueError, RecursionError):
        raise Garbled("no JSON") from None
    if not isinstance(message, dict):
        raise Garbled("no object")
    return message
