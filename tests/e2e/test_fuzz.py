"""Thousands of requests generated from the API's OpenAPI description, valid and invalid: never a 5xx."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from service.adapters.launchers.local.launcher import LocalLauncher
from service.main import create_app
from service.settings import Settings
from tests.factories import make_manifest

EXAMPLES = 40  # of each kind and operation


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalLauncher, "list_environments", lambda _: {"llm": make_manifest()})
        patch.setattr(LocalLauncher, "count_free_slots", lambda _, active_jobs: 0)
        patch.setattr(LocalLauncher, "count_free_reserved_slots", lambda _, environment: 0)
        home: Path = tmp_path_factory.mktemp("home")
        yield schemathesis.openapi.from_asgi("/openapi.json", create_app(Settings(home=home)))


@pytest.mark.filterwarnings("ignore")  # schemathesis warns about the description; only responses are tested here
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_no_request_causes_a_server_error(api: Any, mode: GenerationMode) -> None:
    operations = [operation.ok() for operation in api.get_all_operations()]
    assert len(operations) >= 14
    for operation in operations:

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        def send(case: Any) -> None:
            case.validate_response(case.call(), checks=[not_a_server_error])

        with suppress(Unsatisfiable):  # an operation without parameters has no invalid request
            send()
