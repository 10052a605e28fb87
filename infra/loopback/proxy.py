"""A line between two programs that a test can cut, stall, slow down, or make lose what comes back. TCP, so HTTP and gRPC alike.

with Proxy("127.0.0.1", port) as line:
    …                     # speak to line.address
    line.hang()           # connections stay, nothing passes
    line.restore()

When a verb returns, it has taken effect. One thread and one event loop carry all connections, so nothing happens between two of its
steps.
"""

import asyncio
import socket
import struct
import threading
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, Self

Fault = Literal["none", "cut", "reset", "hang", "drop_responses"]
CHUNK_BYTES = 1 << 16
ZERO_LINGER = struct.pack("ii", 1, 0)  # SO_LINGER of no time: what is closed is reset
COMMAND_TIMEOUT_S = 10.0  # more than a busy machine takes to change the line


class Proxy:
    """Listens on a free port of its own and passes everything on to `host:port`; a context manager."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._fault: Fault = "none"
        self._delay_s = 0.0
        self._connections: set[_Connection] = set()
        self._listener: asyncio.Server | None = None
        self._reserved_socket = _bind_socket(0)  # never listens: it keeps the port ours while the line is cut
        self._port = int(self._reserved_socket.getsockname()[1])

    @property
    def address(self) -> str:
        """`host:port` to speak to."""
        return f"127.0.0.1:{self._port}"

    def cut(self) -> None:
        """Refuse new connections and close the open ones."""
        self._run_in_loop(self._set_fault("cut"))

    def reset(self) -> None:
        """Every connection is reset, and so is each new one."""
        self._run_in_loop(self._set_fault("reset"))

    def hang(self) -> None:
        """Connections are taken and stay; nothing passes, in either direction, until `restore`."""
        self._run_in_loop(self._set_fault("hang"))

    def drop_responses(self) -> None:
        """What is sent arrives and is carried out; what comes back is lost, and connections stay.

        A gRPC channel must have been used before: on a new connection the server's greeting would be lost as well, and the client
        would send nothing.
        """
        self._run_in_loop(self._set_fault("drop_responses"))

    def delay(self, seconds: float) -> None:
        """Every piece, of 64 KiB at most, takes that much longer, in each direction."""
        self._delay_s = seconds

    def restore(self) -> None:
        """As it was at first. Connections that lost something are reset: what would follow makes no sense to them."""
        self._delay_s = 0.0
        self._run_in_loop(self._set_fault("none"))

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._run_in_loop(self._set_fault("none"))
        return self

    def __exit__(self, *_: object) -> None:
        self._run_in_loop(self._shut_down())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._reserved_socket.close()

    # --- the line, in its own thread ---------------------------------------------------------------------------------

    async def _set_fault(self, fault: Fault) -> None:
        self._fault = fault
        self._changed.set()
        self._changed = asyncio.Event()
        for link in list(self._connections):
            if fault in ("cut", "reset") or (fault == "none" and link.lost_data):
                link.abort(reset=fault != "cut")
        if fault == "cut" and self._listener is not None:
            self._listener.close()
            self._listener = None
        elif fault != "cut" and self._listener is None:
            self._listener = await asyncio.start_server(self._handle_connection, sock=_bind_socket(self._port))
        await asyncio.sleep(0)  # what was broken off is closed at the next turn

    async def _shut_down(self) -> None:
        await self._set_fault("cut")
        links = asyncio.all_tasks() - {asyncio.current_task()}
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)

    async def _handle_connection(self, from_client: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        """A connection, from beginning to end."""
        link = _Connection([client])
        self._connections.add(link)
        try:
            await self._relay(link, from_client, client)
        except (OSError, asyncio.CancelledError):  # the target refuses, one end has closed, or the proxy stops
            link.abort(reset=False)
        with suppress(OSError):
            await link.wait_closed()
        self._connections.discard(link)

    async def _relay(self, connection: "_Connection", from_client: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        if self._fault == "reset":
            connection.abort(reset=True)
            return
        from_server, server = await asyncio.open_connection(*self._target)
        connection.ends.append(server)
        if connection.aborted:  # while the other half was made
            server.transport.abort()
            return
        await asyncio.gather(
            self._relay_direction(connection, from_client, server, is_response=False),
            self._relay_direction(connection, from_server, client, is_response=True),
        )
        while connection.lost_data and not connection.aborted:  # an end that was lost is not told, either
            await self._changed.wait()
        connection.close()

    async def _relay_direction(
        self, connection: "_Connection", source: asyncio.StreamReader, target: asyncio.StreamWriter, *, is_response: bool
    ) -> None:
        """One direction, to its end; the end of a stream is passed on like all else."""
        with suppress(OSError):
            while True:
                piece = await source.read(CHUNK_BYTES)
                await asyncio.sleep(self._delay_s)
                while self._fault == "hang":
                    await self._changed.wait()
                if is_response and self._fault == "drop_responses":
                    connection.lost_data = True
                elif piece:
                    target.write(piece)
                    await target.drain()
                elif not target.is_closing():
                    target.write_eof()
                if not piece:
                    return
        connection.abort(reset=False)  # an end that is gone is of no use to the other

    def _run_in_loop(self, change: Coroutine[None, None, None]) -> None:
        asyncio.run_coroutine_threadsafe(change, self._loop).result(COMMAND_TIMEOUT_S)


@dataclass(eq=False)
class _Connection:
    """A connection through the line: the halves that there are."""

    ends: list[asyncio.StreamWriter] = field(default_factory=list)
    lost_data: bool = False
    aborted: bool = False

    def abort(self, *, reset: bool) -> None:
        """Close both halves at once, whatever is still to be sent."""
        self.aborted = True
        for end in self.ends:
            if reset and not end.is_closing():
                end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ZERO_LINGER)
            end.transport.abort()

    def close(self) -> None:
        """Close both halves when all is sent."""
        for end in self.ends:
            end.close()

    async def wait_closed(self) -> None:
        """Wait until both halves are."""
        for end in self.ends:
            await end.wait_closed()


def _bind_socket(port: int) -> socket.socket:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", port))
    return bound
