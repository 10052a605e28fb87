"""Host names through the machine's resolver. It has no timeout of its own, so each lookup runs in a thread that may outlive the call."""

import socket
import threading
from queue import Empty, SimpleQueue

from storage.deadline import remaining_s

LOOKUP_TIMEOUT_S = 1.0
MAX_LOOKUPS = 16  # at a time; a name server that never answers must not use up threads


class SystemResolver:
    """The machine's resolver."""

    def __init__(self) -> None:
        self._slots = threading.BoundedSemaphore(MAX_LOOKUPS)

    def resolve(self, host: str, port: int) -> tuple[str, ...]:
        timeout_s = remaining_s(LOOKUP_TIMEOUT_S)
        if timeout_s <= 0 or not self._slots.acquire(blocking=False):
            return ()
        answers: SimpleQueue[tuple[str, ...]] = SimpleQueue()
        threading.Thread(target=self._look_up, args=(host, port, answers), name="resolver", daemon=True).start()
        try:
            return answers.get(timeout=timeout_s)
        except Empty:
            return ()

    def _look_up(self, host: str, port: int, answers: "SimpleQueue[tuple[str, ...]]") -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answers.put(tuple(dict.fromkeys(str(entry[4][0]) for entry in found)))
        except (OSError, UnicodeError):  # UnicodeError: the name is not valid in DNS
            answers.put(())
        finally:
            self._slots.release()
