"""A process that keeps the server's process alive: it holds the socket, and starts another when one dies.

Connections that arrive in between wait in the socket's backlog. SIGTERM and Ctrl-C go on to the server, whose exit code
becomes the supervisor's. A server that ends by itself before it has lived SHORT_LIFE seconds QUICK_DEATHS times in a
row is not started again.
"""

import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

SHORT_LIFE = 10.0  # seconds
QUICK_DEATHS = 5

_STARTUP_ERRORS = (1, 2)  # the command line's exit codes: what is wrong then stays wrong

_log = logging.getLogger(__name__)


def supervise(command: Sequence[str], listener: socket.socket) -> int:
    """Run `command`, to which the listening socket is handed as `--listen-fd N`, until it ends well or is told to stop.

    Returns the exit code for this process.
    """
    child: subprocess.Popen[bytes] | None = None
    stopping = False

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = stopping or number != signal.SIGHUP
        if child is not None and child.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(child.pid, number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, forward)
    quick_deaths = 0
    while not stopping:
        started = time.monotonic()
        descriptor = listener.fileno()
        # In a group of its own, or a terminal's Ctrl-C would reach it twice: a second signal ends what drains.
        child = subprocess.Popen([*command, "--listen-fd", str(descriptor)], pass_fds=[descriptor], process_group=0)
        if stopping:
            child.terminate()  # the signal came before there was a child to forward it to
        code = _wait(child)
        if stopping and code in (-signal.SIGTERM, 128 + signal.SIGTERM, -signal.SIGINT):
            return 0  # it was told to stop before it could drain, which is no fault of its own
        if stopping or code in (0, *_STARTUP_ERRORS):
            return code if code >= 0 else 128 - code
        quick_deaths = quick_deaths + 1 if time.monotonic() - started < SHORT_LIFE else 0
        if quick_deaths >= QUICK_DEATHS:
            _log.error("the server died %d times in a row (%s), giving up", quick_deaths, _end_of(code))
            return 1
        _log.error("the server died (%s), starting another", _end_of(code))
        time.sleep(min(10.0, 0.1 * 2**quick_deaths))
    return 0


def _wait(child: "subprocess.Popen[bytes]") -> int:
    """Its exit code. Other children that end meanwhile are buried: a container's first process is given all orphans."""
    while child.returncode is None:
        number, status = os.wait()
        if number == child.pid:
            child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode


def _end_of(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}, {signal.strsignal(-code)}"
