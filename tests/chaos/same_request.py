"""The same request many times at once, as from a client that loses every response; then the same key with another body."""

import asyncio
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from bench.http import Connection, Request, Response
from tests.chaos.campaign import Row, Size
from tests.chaos.service import Service, make_light_trainer, make_train_request, service

KEYS: dict[Size, int] = {"full": 200, "short": 20}
CONCURRENCY = 50


def run(size: Size) -> Row:
    """Send the requests to one service with SQLite, in which all of them compete."""
    keys = [f"key-{number}" for number in range(KEYS[size])]
    with tempfile.TemporaryDirectory(prefix="chaos-same-") as folder:
        trainer = make_light_trainer(Path(folder, "trainer"), real_one_in=10**9)
        with service(Path(folder, "home"), **trainer) as running:
            outcome = asyncio.run(_send_all(running, running.upload(), keys))
            jobs = sum(1 for _ in running.jobs())
    return Row(
        fault="the same request at once",
        injected=f"{len(keys)} keys, each {CONCURRENCY} times at once, then each with another body",
        expected=f"exactly {len(keys)} jobs; every changed body a 409",
        observed=f"{jobs} jobs; {outcome.consistent_keys} of {len(keys)} keys gave one job; {outcome.conflicts} changed bodies a 409",
        passed=(jobs, outcome.consistent_keys, outcome.conflicts) == (len(keys),) * 3,
    )


@dataclass(frozen=True)
class Outcome:
    """What the clients received."""

    consistent_keys: int  # keys whose requests all got 201 with the same job
    conflicts: int  # changed bodies that got 409


async def _send_all(running: Service, dataset_id: str, keys: Sequence[str]) -> Outcome:
    url = running.url.replace("://", f"://{running.token}@")
    connections = [Connection(url) for _ in range(CONCURRENCY)]
    consistent_keys = conflicts = 0
    for key in keys:
        same = _request(key, make_train_request(dataset_id, job_name=key))
        responses = await asyncio.gather(*(connection.send(same) for connection in connections))
        consistent_keys += {response.status for response in responses} == {HTTPStatus.CREATED} and len(
            {response.body for response in responses}
        ) == 1
        changed = _request(key, make_train_request(dataset_id, job_name="another job"))
        conflicts += _is_conflict(await connections[0].send(changed))
    for connection in connections:
        connection.close()
    return Outcome(consistent_keys, conflicts)


def _request(key: str, body: dict[str, object]) -> Request:
    return Request("POST", "/train", body, {"Idempotency-Key": key})


def _is_conflict(response: Response) -> bool:
    return response.status == HTTPStatus.CONFLICT and b'"idempotency_conflict"' in response.body
