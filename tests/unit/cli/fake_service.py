"""A service that gives prepared answers over a transport in memory."""

import httpx2

from cli.http_client import Client

FakeReply = httpx2.Response | httpx2.TransportError

CONNECTION_LOST = httpx2.ReadError("the answer was lost")
JOB_CREATED = httpx2.Response(201, json={"job_id": "training_1"})
BUSY = httpx2.Response(429, text="Rate exceeded.")
UNAVAILABLE = httpx2.Response(503, json={"error": {"code": "unavailable", "message": "away", "hint": ""}}, headers={"Retry-After": "2"})


class FakeService:
    """Answers in the given order, the last one for ever, and remembers what it was asked."""

    def __init__(self, *answers: FakeReply) -> None:
        self.answers = list(answers)
        self.requests: list[httpx2.Request] = []
        self.sleeps_s: list[float] = []
        self.client = Client("http://service", transport=httpx2.MockTransport(self._answer), sleep=self.sleeps_s.append)

    @property
    def idempotency_keys(self) -> list[str]:
        return [request.headers["Idempotency-Key"] for request in self.requests]

    def _answer(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, httpx2.TransportError):
            raise answer
        return httpx2.Response(answer.status_code, content=answer.content, headers=answer.headers)  # one can be read only once
