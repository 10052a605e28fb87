"""A fake service that returns prepared responses through an in-memory transport."""

import httpx2

from cli.http_client import Client

JOB_ID = "training_0123456789ab"  # a full id, which costs no request

FakeReply = httpx2.Response | httpx2.TransportError

CONNECTION_LOST = httpx2.ReadError("the response was lost")
JOB_CREATED = httpx2.Response(201, json={"job_id": "training_1"})
BUSY = httpx2.Response(429, text="Rate exceeded.")
UNAVAILABLE = httpx2.Response(503, json={"error": {"code": "unavailable", "message": "away", "hint": ""}}, headers={"Retry-After": "2"})


class FakeService:
    """Returns the given responses in order, repeats the last one, and records the requests."""

    def __init__(self, *replies: FakeReply) -> None:
        self.replies = list(replies)
        self.requests: list[httpx2.Request] = []
        self.sleeps_s: list[float] = []
        self.client = Client("http://service", transport=httpx2.MockTransport(self._reply), sleep=self.sleeps_s.append)

    @property
    def idempotency_keys(self) -> list[str]:
        return [request.headers["Idempotency-Key"] for request in self.requests]

    def _reply(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, httpx2.TransportError):
            raise reply
        return httpx2.Response(reply.status_code, content=reply.content, headers=reply.headers)  # a response can be read only once
