"""The connections below the requests: uvicorn's HTTP/1.1, and an end for those whose client does its part no more.

uvicorn waits without end for a client that takes none of its answer, never sends a whole head, or goes on with a body
that was answered before its end, and each of them keeps memory and a file descriptor. `watch` looks at all connections
about once a second, so that none of this costs a request, or a piece of a body, anything.
"""

import asyncio
import fcntl
import logging
import os
import resource
import socket
import struct
import sys
import termios
from collections.abc import Collection
from contextlib import suppress

import h11
from prometheus_client import Counter
from uvicorn.protocols.http.h11_impl import H11Protocol

from service import logs
from service.settings import Settings

_LINGER_SECONDS = 10.0  # for a client to end a body that has been answered: closed at once, it might miss the answer
_LOOK_SECONDS = 1.0
_RESET = struct.pack("ii", 1, 0)  # for SO_LINGER: what the system still holds for the client is dropped, too

_log = logging.getLogger(__name__)


class Connection(H11Protocol):
    """uvicorn's connection, which can tell how long it has waited for its client and for what."""

    _awaited: tuple[str, object] | None = None
    _waited = 0.0

    def _should_upgrade(self) -> bool:
        """Offers of another protocol (Java's client makes one with every request) are passed over without a warning."""
        return False

    def overdue(self, passed: float, limits: dict[str, float]) -> str | None:
        """What the client had to do and did not in its time, one of `limits`; `passed`: seconds since the last call."""
        awaited = self._await()
        self._waited = self._waited + passed if awaited == self._awaited else 0.0
        self._awaited = awaited
        return awaited[0] if awaited and self._waited >= limits[awaited[0]] else None

    @property
    def request_id(self) -> str:
        """Of the request that came last; empty where there was none."""
        return str(self.scope["state"].get("request_id", "")) if self.scope else ""

    def _await(self) -> tuple[str, object] | None:
        """What only the client can do now, with something that changes as it goes on."""
        if self.transport.get_write_buffer_size():
            return "take_answer", self.unsent()
        if self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None:
            return "send_head", self.cycle
        if self.conn.their_state is h11.SEND_BODY and self.cycle.response_complete:
            return "end_body", self.cycle
        return None

    def unsent(self) -> int:
        """Bytes of answers that the client has not confirmed; with those that the system holds, where it tells them."""
        held = bytes(4)
        with suppress(OSError, ValueError):  # the latter of a socket that is closed
            held = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, held)
        return self.transport.get_write_buffer_size() + int.from_bytes(held, sys.byteorder)

    def cut(self) -> None:
        """End it now, whatever is still to be sent."""
        if self.transport.get_write_buffer_size():
            with suppress(OSError):
                self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.transport.abort()


async def watch(connections: Collection[Connection], settings: Settings, ended: Counter) -> None:
    """Until cancelled, end what is overdue, count it by what was awaited, and tell when file descriptors run out."""
    limits = {
        "take_answer": settings.send_timeout_ms / 1000,
        "send_head": settings.header_timeout_ms / 1000,
        "end_body": min(_LINGER_SECONDS, settings.upload_timeout_ms / 1000),
    }
    pause = min(_LOOK_SECONDS, min(limits.values()) / 4)
    exhausted = False
    while True:
        await asyncio.sleep(pause)
        for connection in list(connections):
            if awaited := connection.overdue(pause, limits):
                _tell(connection, awaited, limits[awaited])
                connection.cut()
                ended.labels(awaited).inc()
        before, exhausted = exhausted, _no_descriptor_left()
        if exhausted and not before:
            _log.error("no file descriptor is left for new connections; there are %d now", len(connections))


def _tell(connection: Connection, awaited: str, seconds: float) -> None:
    client = ":".join(map(str, connection.client or ()))
    if awaited != "take_answer":
        _log.debug("the connection of %s is closed: it did not %s in %g s", client, awaited, seconds)
        return
    token = logs.request_id.set(connection.request_id)
    text = "the connection of %s is cut: nothing of an answer was taken for %g s, %d bytes are left"
    _log.warning(text, client, seconds, connection.unsent())
    logs.request_id.reset(token)


def raise_descriptor_limit() -> None:
    """Let the process have as many connections as the system allows; the usual 1024 are soon taken."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS names a limit that it does not grant
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _no_descriptor_left() -> bool:
    """Asked by taking one: uvloop closes the connections for which there is none, and says nothing."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return True
    return False
