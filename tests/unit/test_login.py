"""A browser that logs in: its link, its session, and what ends it."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from starlette.testclient import TestClient

from service.api.authentication import SESSION_COOKIE
from tests.unit.api_harness import get_error, run_test_service


@pytest.fixture
def browser(client: TestClient) -> Iterator[TestClient]:
    """The same service, for a browser that has no token."""
    browser = TestClient(client.app, follow_redirects=False)
    yield browser
    browser.close()


def make_link(client: TestClient, headers: dict[str, str] | None = None) -> str:
    answer = client.post("/login-codes", headers=headers)
    assert answer.status_code == 201
    parts = urlsplit(answer.json()["url"])
    return f"{parts.path}?{parts.query}"


def test_link_logs_a_browser_in(client: TestClient, browser: TestClient) -> None:
    answer = browser.get(make_link(client))
    assert (answer.status_code, answer.headers["location"]) == (303, "/docs")
    cookie = answer.headers["set-cookie"].lower()
    assert all(part in cookie for part in ("httponly", "samesite=strict", "max-age=28800", "path=/"))
    assert browser.get("/whoami").json() == client.get("/whoami").json()
    assert browser.post("/logout").status_code == 204
    assert get_error(browser.get("/whoami"), 401)["code"] == "unauthorized"


def test_link_works_once(client: TestClient, browser: TestClient) -> None:
    link = make_link(client)
    assert browser.get(link).status_code == 303
    browser.cookies.clear()
    assert get_error(browser.get(link), 401)["message"] == "the login link was used"


def test_links_of_the_same_second_all_work(client: TestClient, browser: TestClient) -> None:
    for link in [make_link(client) for _ in range(3)]:
        assert browser.get(link).status_code == 303
        browser.cookies.clear()


def test_session_is_no_code_and_a_code_is_no_session(client: TestClient, browser: TestClient) -> None:
    link = make_link(client)
    code = link.partition("code=")[2]
    assert browser.get("/whoami", headers={"Cookie": f"{SESSION_COOKIE}={code}"}).status_code == 401
    browser.get(link)
    session = browser.cookies[SESSION_COOKIE]
    assert browser.get(f"/login?code={session}").status_code == 401
    assert browser.get("/login?code=x").status_code == 401


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_link_on_a_foreign_page_is_refused(client: TestClient, browser: TestClient, site: str) -> None:
    assert browser.get(make_link(client), headers={"Sec-Fetch-Site": site}).status_code == 403
    assert SESSION_COOKIE not in browser.cookies


def test_session_of_a_key_ends_with_the_key(client: TestClient, browser: TestClient) -> None:
    key = client.post("/keys", json={"name": "dashboard", "scopes": ["read"]}).json()
    browser.get(make_link(client, {"Authorization": f"Bearer {key['key']}"}))
    assert browser.get("/whoami").json()["scopes"] == ["datasets:read", "jobs:read"]
    client.delete(f"/keys/{key['key_id']}")
    assert browser.get("/whoami").status_code == 401


def test_session_ends_when_the_token_of_the_home_folder_is_replaced(tmp_path: Path) -> None:
    with run_test_service(tmp_path) as client:
        browser = TestClient(client.app, follow_redirects=False)
        browser.get(make_link(client))
        session = browser.cookies[SESSION_COOKIE]
    for replaced, status in ((False, 200), (True, 401)):
        if replaced:
            (tmp_path / "token").unlink()
        with run_test_service(tmp_path) as client:
            del client.headers["Authorization"]
            assert client.get("/whoami", headers={"Cookie": f"{SESSION_COOKIE}={session}"}).status_code == status
