"""A TCP proxy that a test can cut, stall, slow down, or make lose responses. Works for HTTP and gRPC.

with Proxy("127.0.0.1", port) as proxy:
    …                     # connect to proxy.address
    proxy.hang()          # connections stay open, nothing passes
    proxy.restore()

A method returns after it has taken effect. One thread with one event loop runs all connections, so each of its steps is atomic.
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
ZERO_LINGER = struct.pack("ii", 1, 0)  # SO_LINGER with no time: closing resets the connection
COMMAND_TIMEOUT_S = 10.0  # more than a busy machine needs


class Proxy:
    """Listens on a free port and forwards everything to `host:port`; a context manager."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._fault: Fault = "none"
        self._delay_s = 0.0
        self._connections: set[_Connection] = set()
        self._listener: asyncio.Server | None = None
        self._reserved_socket = _bind_socket(0)  # never listens: it reserves the port while the proxy is cut
        self._port = int(self._reserved_socket.getsockname()[1])

    @property
    def address(self) -> str:
        """The proxy's own `host:port`."""
        return f"127.0.0.1:{self._port}"

    def cut(self) -> None:
        """Stop listening and close every connection."""
        self._run_in_loop(self._set_fault("cut"))

    def reset(self) -> None:
        """Reset every connection, and each new one."""
        self._run_in_loop(self._set_fault("reset"))

    def hang(self) -> None:
        """Accept and keep connections; forward nothing in either direction until `restore`."""
        self._run_in_loop(self._set_fault("hang"))

    def drop_responses(self) -> None:
        """Forward requests and discard responses; connections stay open.

        A gRPC channel must have been used before: on a new connection the server's settings frame would be lost as well, and the client
        would send nothing.
        """
        self._run_in_loop(self._set_fault("drop_responses"))

    def delay(self, seconds: float) -> None:
        """Delay every chunk of at most 64 KiB, in each direction."""
        self._delay_s = seconds

    def restore(self) -> None:
        """Forward normally again. Connections that lost data are reset: their streams are incomplete."""
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

    # --- the event loop, in its own thread ---------------------------------------------------------------------------------

    async def _set_fault(self, fault: Fault) -> None:
        self._fault = fault
        self._changed.set()
        self._changed = asyncio.Event()
        for connection in list(self._connections):
            if fault in ("cut", "reset") or (fault == "none" and connection.lost_data):
                connection.abort(reset=fault != "cut")
        if fault == "cut" and self._listener is not None:
            self._listener.close()
            self._listener = None
        elif fault != "cut" and self._listener is None:
            self._listener = await asyncio.start_server(self._handle_connection, sock=_bind_socket(self._port))
        await asyncio.sleep(0)  # aborted transports are closed in the next iteration

    async def _shut_down(self) -> None:
        await self._set_fault("cut")
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _handle_connection(self, from_client: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        """Handle a connection from beginning to end."""
        connection = _Connection([client])
        self._connections.add(connection)
        try:
            await self._relay(connection, from_client, client)
        except (OSError, asyncio.CancelledError):  # the target refuses, one side is gone, or the proxy stops
            connection.abort(reset=False)
        with suppress(OSError):
            await connection.wait_closed()
        self._connections.discard(connection)

    async def _relay(self, connection: "_Connection", from_client: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        if self._fault == "reset":
            connection.abort(reset=True)
            return
        from_server, server = await asyncio.open_connection(*self._target)
        connection.ends.append(server)
        if connection.aborted:  # while connecting to the target
            server.transport.abort()
            return
        await asyncio.gather(
            self._relay_direction(connection, from_client, server, is_response=False),
            self._relay_direction(connection, from_server, client, is_response=True),
        )
        while connection.lost_data and not connection.aborted:  # do not forward the end of a stream that lost data
            await self._changed.wait()
        connection.close()

    async def _relay_direction(
        self, connection: "_Connection", source: asyncio.StreamReader, target: asyncio.StreamWriter, *, is_response: bool
    ) -> None:
        """Forward one direction until its end, including the end of the stream."""
        with suppress(OSError):
            while True:
                chunk = await source.read(CHUNK_BYTES)
                await asyncio.sleep(self._delay_s)
                while self._fault == "hang":
                    await self._changed.wait()
                if is_response and self._fault == "drop_responses":
                    connection.lost_data = True
                elif chunk:
                    target.write(chunk)
                    await target.drain()
                elif not target.is_closing():
                    target.write_eof()
                if not chunk:
                    return
        connection.abort(reset=False)  # one side is gone: close the other

    def _run_in_loop(self, change: Coroutine[None, None, None]) -> None:
        asyncio.run_coroutine_threadsafe(change, self._loop).result(COMMAND_TIMEOUT_S)


@dataclass(eq=False)
class _Connection:
    """A connection through the proxy: its two sides, as far as they exist."""

    ends: list[asyncio.StreamWriter] = field(default_factory=list)
    lost_data: bool = False
    aborted: bool = False

    def abort(self, *, reset: bool) -> None:
        """Close both sides at once and discard unsent data."""
        self.aborted = True
        for end in self.ends:
            if reset and not end.is_closing():
                end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ZERO_LINGER)
            end.transport.abort()

    def close(self) -> None:
        """Close both sides after all data is sent."""
        for end in self.ends:
            end.close()

    async def wait_closed(self) -> None:
        """Wait until both sides are closed."""
        for end in self.ends:
            await end.wait_closed()


def _bind_socket(port: int) -> socket.socket:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", port))
    return bound
