"""Requests generated from the OpenAPI document, valid and not, alone and in chains, mixed with fixtures so that successes are reached too.

Every answer must be documented: its status, its content type, its headers and its body. None may be a 5xx, except a 503 that says when to
try again and that a declared limit of the service gives.
"""

import time
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky, Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.attack.campaign import Row, Size, make_row
from tests.attack.fixtures import FIXTURES, ValidRequest, World
from tests.attack.target import HEALTH_LIMITS_S, HealthProber, Json, Target, run_target

REQUESTS: dict[Size, int] = {"full": 5000, "short": 500}
STATEFUL_SHARE = 0.2
SLOW_S = 5.0
TIMEOUT_S = 20.0
STEPS_PER_CHAIN = 8
CHAINS_TOGETHER = 20
FIXTURE_EVERY = 4  # examples that share one fixture, which may take several requests to make
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance, response_headers_conformance]
SETTINGS = settings(
    deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck), print_blob=False, derandomize=False
)


@dataclass
class Counts:
    """What was sent, how it was answered, and what went wrong."""

    statuses: Counter[int] = field(default_factory=Counter[int])
    succeeded: set[str] = field(default_factory=set[str])
    limited: int = 0
    slowest_s: float = 0.0
    server_errors: list[str] = field(default_factory=list[str])
    violations: dict[str, str] = field(default_factory=dict[str, str])  # one of each kind
    slow: list[str] = field(default_factory=list[str])

    @property
    def sent(self) -> int:
        """All requests."""
        return sum(self.statuses.values())

    @property
    def problems(self) -> list[str]:
        """All of them."""
        return self.server_errors + self.slow + list(self.violations.values())


class Fuzzer:
    """Sends cases to one service and checks the answers."""

    def __init__(self, target: Target, world: World) -> None:
        self._world = world
        self._target = target
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.headers.update(world.owner.headers())
        self.counts = Counts()

    def fuzz_operation(self, operation: Any, examples: int) -> None:
        """Send generated cases of one operation, some of them with the path or the body of its fixture."""
        name = operation.definition.raw["operationId"]
        fixtures = [FIXTURES[name](self._world) for _ in range(1 + examples // FIXTURE_EVERY)]
        for fixture in fixtures[:2]:
            self._send_fixture(operation, fixture)
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @seed(0)
            @given(
                case=operation.as_strategy(generation_mode=mode),
                fixture=st.sampled_from(fixtures),
                mix=st.sampled_from(["nothing", "path", "path and body", "path and body"]),
            )
            @settings(SETTINGS, max_examples=max(1, examples // 2))
            def send(case: Any, fixture: ValidRequest, mix: str) -> None:
                _mix(case, fixture, mix)
                self.send(case)

            with suppress(Unsatisfiable):  # an operation without parameters has no invalid request
                send()

    def fuzz_chains(self, schema: Any, requests_left: int) -> None:
        """Send chains of requests in which later ones use what earlier ones returned."""
        fuzzer = self

        class Chain(schema.as_state_machine()):  # type: ignore[misc]  # a class that schemathesis makes from the document
            def call(self, case: Any, **_: Any) -> Any:
                return fuzzer.send(case)

            def validate_response(self, *_: Any, **__: Any) -> None:
                """Done by `send`."""

        chains = max(1, requests_left // STEPS_PER_CHAIN)
        for _ in range(0, chains, CHAINS_TOGETHER):
            with suppress(Flaky):  # what a chain can do next depends on answers, which hypothesis expects to repeat
                Chain.run(settings=settings(SETTINGS, max_examples=CHAINS_TOGETHER, stateful_step_count=STEPS_PER_CHAIN))

    def send(self, case: Any) -> Any:
        """Send one case and check the answer."""
        name = case.operation.definition.raw["operationId"]
        if name == "read_job_logs" and isinstance(case.query, dict):
            case.query.pop("follow", None)  # follows until the job ends
        began = time.monotonic()
        try:
            response = case.call(base_url=self._target.url, session=self._session, timeout=TIMEOUT_S, allow_redirects=False)
        except requests.exceptions.Timeout:
            self.counts.slow.append(f"{name} did not answer within {TIMEOUT_S:.0f} s")
            raise
        took_s = time.monotonic() - began
        self._check(name, case, response, took_s)
        return response

    def _check(self, name: str, case: Any, response: Any, took_s: float) -> None:
        counts = self.counts
        status = response.status_code
        counts.statuses[status] += 1
        counts.slowest_s = max(counts.slowest_s, took_s)
        if took_s > SLOW_S:
            counts.slow.append(f"{name} took {took_s:.1f} s")
        self._session.cookies.clear()  # of a login: the session is the owner's by its token
        if 200 <= status < 400:
            counts.succeeded.add(name)
        if status == 503 and "retry-after" in response.headers:
            counts.limited += 1
        elif status >= 500:
            counts.server_errors.append(f"{name} answered {status}: {case.as_curl_command()[:300]}")
        try:
            case.validate_response(response, checks=CHECKS)
        except FailureGroup as group:
            for failure in group.exceptions:
                self._add_violation(name, status, failure)
        except Failure as failure:
            self._add_violation(name, status, failure)

    def _add_violation(self, name: str, status: int, failure: BaseException) -> None:
        message = " ".join(str(failure).split())
        self.counts.violations.setdefault(f"{name} {status} {type(failure).__name__}", f"{name} answered {status}: {message[:200]}")

    def _send_fixture(self, operation: Any, fixture: ValidRequest) -> None:
        case = operation.Case(path_parameters=fixture.path or None)
        options: Json = fixture.options()
        case.query = options["params"] or None
        if "content" in options:
            options["data"] = options.pop("content")
        began = time.monotonic()
        url = self._target.url + fixture.url_path
        response = self._session.request(fixture.method, url, timeout=TIMEOUT_S, allow_redirects=False, **options)
        self._check(operation.definition.raw["operationId"], case, schemathesis.Response.from_any(response), time.monotonic() - began)
        if response.status_code != fixture.status:
            self.counts.violations[f"fixture {fixture.template}"] = (
                f"the fixture of {fixture.method} {fixture.template} got {response.status_code}"
            )


def run(size: Size) -> Row:
    """Fuzz every operation, then chains of them."""
    warnings.simplefilter("ignore")  # schemathesis warns about the document; only answers matter here
    with run_target(slots=1) as target, HealthProber(target) as prober:
        document = target.owner().expect(200, "GET", "/openapi.json")
        fuzzer = Fuzzer(target, World(target.owner()))
        schema = schemathesis.openapi.from_dict(document)
        operations = [result.ok() for result in schema.get_all_operations()]
        alone = int(REQUESTS[size] * (1 - STATEFUL_SHARE))
        for operation in operations:
            fuzzer.fuzz_operation(operation, 1 + alone // len(operations))
        fuzzer.fuzz_chains(schema, REQUESTS[size] - fuzzer.counts.sent)
        while fuzzer.counts.sent < REQUESTS[size]:
            fuzzer.fuzz_operation(operations[fuzzer.counts.sent % len(operations)], 40)
        counts = fuzzer.counts
        problems = counts.problems + prober.problems(HEALTH_LIMITS_S[size])
    missing = sorted({operation.definition.raw["operationId"] for operation in operations} - counts.succeeded)
    problems += [f"no success of {', '.join(missing)}"] if missing else []
    measured = (
        f"{counts.sent} requests to {len(operations)} operations, {counts.statuses[201]} × 201, {len(counts.server_errors)} × 5xx, "
        f"{counts.limited} × 503 with Retry-After, {len(counts.violations)} schema violations, slowest {counts.slowest_s * 1000:.0f} ms"
    )
    figure = f"≥ {REQUESTS[size]} requests, 0 of 5xx, 0 schema violations, none slower than {SLOW_S:.0f} s"
    return make_row("schemathesis over the whole OpenAPI", figure, measured, problems)


def _mix(case: Any, fixture: ValidRequest, mix: str) -> None:
    """Put the fixture's path, and in objects the fixture's fields that the case lacks or half of those it has, into the case."""
    if mix == "nothing":
        return
    if fixture.path:
        case.path_parameters = {**case.path_parameters, **fixture.path} if mix == "path" else dict(fixture.path)
    valid = fixture.body if fixture.body is not None else fixture.form
    if mix == "path and body" and isinstance(case.body, dict) and valid:
        kept = {name: value for index, (name, value) in enumerate(sorted(case.body.items())) if index % 2}
        case.body = {**kept, **valid}
