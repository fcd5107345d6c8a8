"""How a long run is told to stop: by Ctrl-C, as people do, or by SIGTERM, as schedulers of clusters do."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTE = b"\nstopping after this step; a second time stops at once, without saving\n"


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that receives the first of `SIGNALS` instead of its usual effect, which a second one has again.

    Signals that are ignored stay so; outside the main thread, where none can be received, the list stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    heard = [number for number, handler in before.items() if handler is not signal.SIG_IGN]

    def restore() -> None:
        for number in heard:
            signal.signal(number, before[number])

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        restore()
        os.write(2, NOTE)

    for number in heard:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()
