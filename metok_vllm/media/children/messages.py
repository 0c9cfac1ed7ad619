"""Short messages between the processes: JSON over a Unix socket, with open files beside them."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from typing import Any

LONGEST = 16384
"""Bytes of a message."""


def pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a socket that keeps messages apart; a program that is started inherits neither."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(end: socket.socket, message: dict[str, Any], files: Sequence[int] = ()) -> None:
    """Send a message and, with it, duplicates of open files.

    Raises:
        OSError: the other end is closed.
    """
    socket.send_fds(end, [json.dumps(message).encode()], list(files), socket.MSG_NOSIGNAL)


def receive(end: socket.socket) -> dict[str, Any] | None:
    """The next message, or None where the other end is closed.

    Raises:
        TimeoutError: nothing came within the socket's timeout.
    """
    return _read(_received(end))


def receive_with_files(end: socket.socket, most: int) -> tuple[dict[str, Any] | None, list[int]]:
    """As `receive`, and up to `most` open files that came with the message."""
    try:
        data, files, _, _ = socket.recv_fds(end, LONGEST, most)
    except ConnectionError:
        return None, []
    return _read(data), files


def _received(end: socket.socket) -> bytes:
    try:
        return end.recv(LONGEST)
    except ConnectionError:
        return b""


def _read(data: bytes) -> dict[str, Any] | None:
    if not data:
        return None
    message: dict[str, Any] = json.loads(data)
    return message
