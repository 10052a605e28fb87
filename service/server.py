"""The HTTP server of `python -m service`: it says what happens when it is stopped, and can stop by itself when nobody needs it.

The first Ctrl-C or SIGTERM ends the streams, lets requests finish and makes the running attempts save their state. A second Ctrl-C does
not wait for that: attempts end or go on without a service, and the next one finds out.
"""

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.api.stream import Feeds, run_in_thread
from service.bootstrap import Services
from service.core.errors import Unavailable
from service.core.ports import AttemptOwner
from service.http_protocol import GuardedConfig

MAX_IDLE_CHECK_S = 1.0
INTERRUPTED_EXIT_CODE = 130

log = logging.getLogger(__name__)


def describe_stop(attempts: int) -> str:
    """What the user reads after the first Ctrl-C."""
    if not attempts:
        return "stopping: no attempt is running here"
    saved = "1 running attempt is saved and continues" if attempts == 1 else f"{attempts} running attempts are saved and continue"
    return f"stopping: {saved} at the next start; press Ctrl-C again to leave without waiting"


class Server(uvicorn.Server):
    """uvicorn's server, for one app."""

    def __init__(self, config: GuardedConfig, app: FastAPI, *, exit_when_idle_s: float | None, service_file: Path) -> None:
        """`service_file` is deleted when a second Ctrl-C ends the process at once."""
        super().__init__(config)
        self._app = app
        self._exit_when_idle_s = exit_when_idle_s
        self._service_file = service_file
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []  # or the loop would forget them while they run

    async def main_loop(self) -> None:
        """Serve until a signal stops it, or nobody has needed it for long enough."""
        self._loop = asyncio.get_running_loop()
        if self._exit_when_idle_s is not None:
            self._tasks.append(asyncio.create_task(self._exit_when_idle(self._exit_when_idle_s)))
        await super().main_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called for a signal, between any two steps of the program: the loop does what is to be done."""
        is_first = not self.should_exit
        super().handle_exit(sig, frame)
        if self._loop is not None and is_first:
            self._loop.call_soon_threadsafe(self._begin_stop)
        elif self._loop is not None and sig == signal.SIGINT:
            self._loop.call_soon_threadsafe(self._leave)

    def _begin_stop(self) -> None:
        feeds: Feeds = self._app.state.feeds
        feeds.stop()
        self._tasks.append(asyncio.create_task(self._announce_stop()))

    async def _announce_stop(self) -> None:
        services: Services = self._app.state.services
        owners = [launcher for launcher in services.launchers if isinstance(launcher, AttemptOwner)]
        attempts = sum([await run_in_thread(owner.count_attempts) for owner in owners])
        print(describe_stop(attempts), file=sys.stderr, flush=True)

    def _leave(self) -> None:
        """End the process at once, as a kill would, which every part survives."""
        print("stopped without waiting: the next start continues what was not saved from its last checkpoint", file=sys.stderr, flush=True)
        self._service_file.unlink(missing_ok=True)
        os._exit(INTERRUPTED_EXIT_CODE)

    async def _exit_when_idle(self, idle_s: float) -> None:
        """Stop the server once no request has come for `idle_s` seconds and no job is queued or active."""
        requests, idle_since = -1, 0.0
        while not self.should_exit:
            now = asyncio.get_running_loop().time()
            if self.server_state.total_requests != requests or self.server_state.tasks:
                requests, idle_since = self.server_state.total_requests, now
            elif now - idle_since >= idle_s:
                if not await run_in_thread(self._has_work):
                    log.info("nobody needs the service; it stops", extra={"idle_s": idle_s})
                    self.should_exit = True
                    return
                idle_since = now  # the time begins anew, so that the store is asked rarely
            await asyncio.sleep(min(MAX_IDLE_CHECK_S, idle_s / 4))

    def _has_work(self) -> bool:
        """Whether a job is queued or active, as far as the store tells."""
        services: Services = self._app.state.services
        try:
            return bool(services.store.list_queued_jobs(None, 1) or services.store.list_active_jobs(None, 1))
        except Unavailable:
            return True
