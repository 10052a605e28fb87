"""The HTTP transport of judges and embeddings: it resolves the host, checks the addresses and connects to one that it checked.

A name that leads to another address a moment later (DNS rebinding) is of no use, since nothing resolves it a second time. The TLS
certificate is still checked against the name. Responses have a maximum size.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import httpx2

from jobs.runtime.egress import Resolve, checked_addresses, operator_proxy, resolve
from schema.egress import EgressPolicy, EgressRefused, Target, parse_url

MAX_RESPONSE_BYTES = 32 << 20  # 64 embeddings of 8192 numbers are some 12 MB of JSON


class CheckedTransport(httpx2.AsyncBaseTransport):
    """Sends requests only to addresses that the policy allows; raises ConnectError from EgressRefused for any other.

    Behind a proxy of the operator, the proxy resolves the name and connects; a name that this machine can resolve is still checked.
    """

    def __init__(
        self, base_url: str, policy: EgressPolicy, *, resolve: Resolve = resolve, inner: httpx2.AsyncBaseTransport | None = None
    ) -> None:
        self._policy = policy
        self._resolve = resolve
        self._proxy = operator_proxy(parse_url(base_url))
        self._inner = inner or httpx2.AsyncHTTPTransport(proxy=self._proxy)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        # Identity: a small compressed body could expand to any size.
        request.headers["Accept-Encoding"] = "identity"
        response = await self._send(request)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            await response.aclose()
            raise httpx2.RemoteProtocolError("the response is compressed, which was not asked for", request=request)
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = LimitedStream(response.stream)
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def _send(self, request: httpx2.Request) -> httpx2.Response:
        try:
            target = parse_url(str(request.url))
            addresses = await self._find_addresses(request, target)
        except EgressRefused as error:
            raise httpx2.ConnectError(str(error), request=request) from error
        if self._proxy is not None:
            return await self._inner.handle_async_request(request)
        for address in addresses[:-1]:
            with contextlib.suppress(httpx2.ConnectError, httpx2.ConnectTimeout):
                return await self._inner.handle_async_request(_pin(request, target, address))
        return await self._inner.handle_async_request(_pin(request, target, addresses[-1]))

    async def _find_addresses(self, request: httpx2.Request, target: Target) -> tuple[str, ...]:
        """The addresses, all allowed; none for a name that only the operator's proxy can resolve. Raises EgressRefused."""
        timeout_s = request.extensions.get("timeout", {}).get("connect")
        try:
            return await asyncio.wait_for(asyncio.to_thread(checked_addresses, target, self._policy, self._resolve), timeout_s)
        except TimeoutError as error:
            raise httpx2.ConnectTimeout(f"{target.host} was not found in time", request=request) from error
        except OSError as error:
            if self._proxy is not None:
                return ()
            raise httpx2.ConnectError(f"{target.host} is not found", request=request) from error


class LimitedStream(httpx2.AsyncByteStream):
    """A response body of at most MAX_RESPONSE_BYTES."""

    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        received = 0
        async for chunk in self._stream:
            received += len(chunk)
            if received > MAX_RESPONSE_BYTES:
                raise httpx2.RemoteProtocolError(f"the response is larger than {MAX_RESPONSE_BYTES >> 20} MB")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


def _pin(request: httpx2.Request, target: Target, address: str) -> httpx2.Request:
    """The same request to an address; its Host header and the name that TLS verifies stay."""
    return httpx2.Request(
        request.method,
        request.url.copy_with(host=address),
        headers=request.headers,
        stream=request.stream,
        extensions={**request.extensions, "sni_hostname": target.host},
    )
