"""Errors that do not depend on one endpoint: unknown resources, wrong methods and wrong queries."""

import pytest
from starlette.testclient import TestClient

from tests.unit.api_harness import get_error


@pytest.mark.parametrize("query", ["limit=0", "limit=1000", "limit=x", "status=odd", "cursor=odd", "project_id=a%20b"])
def test_invalid_query_is_rejected(readonly_client: TestClient, query: str) -> None:
    assert readonly_client.get(f"/jobs?{query}").status_code in (400, 422)


@pytest.mark.parametrize(
    "path", ["/jobs/none", "/jobs/download/none", "/jobs/none/events", "/jobs/none/logs", "/datasets/none", "/nowhere"]
)
def test_missing_resource_is_404(readonly_client: TestClient, path: str) -> None:
    get_error(readonly_client.get(path), 404)


def test_a_wrong_method_is_405(readonly_client: TestClient) -> None:
    get_error(readonly_client.put("/train"), 405)
