"""The last round: the pages that the stopped guest wrote last and its device state, as one stream of payloads.

Law: no event loop, no waiting; what is to be sent comes in from one side, worker threads take it from the other. It is
begun before the pages are known: the threads that send are awake then, while the guest stands still.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from migrate.devicestate import pack_into, parts_of
from migrate.pagewire import PageProducer
from transport.producer import NOT_YET

__all__ = ["LastRound"]


class LastRound:
    """A `migrate.ports.PayloadProducer`. It ends after `finish`, when everything was taken.

    Args:
        clock: seconds, for the figure of when the last page was given.
        on_more: called, in the thread of whoever adds, when there is something new or nothing more to come.
    """

    def __init__(
        self, clock: Callable[[], float], on_more: Callable[[], None], *, is_link_slow: bool
    ) -> None:
        self._clock = clock
        self._on_more = on_more
        self._is_link_slow = is_link_slow
        self._pages: PageProducer | None = None
        self._parts: deque[tuple[int, bytes]] = deque()
        self._state_bytes = 0
        self._is_finished = False
        self._pages_given_s: float | None = None
        # As they travel.
        self._page_payload_bytes = 0
        self._state_payload_bytes = 0
        self._lock = threading.Lock()

    @property
    def state_bytes(self) -> int:
        """All of the device state that was added."""
        return self._state_bytes

    def pages_ended_s(self, ended_s: float) -> float:
        """Give when the pages were there, of a round that was acknowledged whole at `ended_s`.

        Pages and state travel together and are not acknowledged one by one: what was on its way when the last page had
        been given to a connection is taken to be of either kind as the whole round was.
        """
        if self._pages_given_s is None:
            return ended_s
        all_bytes = self._page_payload_bytes + self._state_payload_bytes
        share = self._page_payload_bytes / all_bytes if all_bytes else 0.0
        return self._pages_given_s + share * (ended_s - self._pages_given_s)

    def add_state(self, part: bytes) -> None:
        """The next bytes of the device state. A `migrate.ports.DeviceStateSink`."""
        with self._lock:
            for piece in parts_of(part):
                self._parts.append((self._state_bytes, piece))
                self._state_bytes += len(piece)
        self._on_more()

    def add_pages(self, pages: PageProducer) -> None:
        """All pages that are left. Once."""
        with self._lock:
            self._pages = pages
        self._on_more()

    def finish(self) -> None:
        """Nothing more will be added."""
        with self._lock:
            self._is_finished = True
        self._on_more()

    def __call__(self, out: memoryview) -> int:
        """Write the next payload to `out`; NOT_YET while there may be more, 0 when there is no more."""
        while True:
            with self._lock:
                # Pages first: the state is complete only later anyway.
                pages = self._pages
                part = self._parts.popleft() if pages is None and self._parts else None
                if pages is None and part is None:
                    return 0 if self._is_finished else NOT_YET
            if part is not None:
                offset, content = part
                size = pack_into(out, content, offset, is_link_slow=self._is_link_slow)
                with self._lock:
                    self._state_payload_bytes += size
                return size
            if pages is not None and (size := pages(out)):
                with self._lock:
                    self._page_payload_bytes += size
                return size
            with self._lock:
                # Another thread may have come here first.
                if self._pages is pages:
                    self._pages = None
                    self._pages_given_s = self._clock()
