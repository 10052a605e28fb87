"""Pages of other websites in a real browser: they can neither read from a service on this machine nor change anything there."""

import re
import sqlite3
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Playwright, sync_playwright

from tests.real_server import LOG_FILE, Server, run_server

CHROMIUM = "/usr/bin/chromium"
NO_HELP = "--disable-features=LocalNetworkAccessChecks"  # newer browsers ask before a page may reach this machine; others do not
FOREIGN_NAME = "evil.test"  # the browser finds it at 127.0.0.1, where the attacker's name server would point it at last
ROW = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}'
TIMEOUT_MS = 10_000

# Each attack is a function of the service's URL, and returns what it could read, or null.
ATTACKS = {
    "read with fetch": "async url => { const r = await fetch(url + '/jobs'); return await r.text() }",
    "read with credentials": "async url => { const r = await fetch(url + '/jobs', {credentials: 'include'}); return await r.text() }",
    "read with a custom header": "async url => { const r = await fetch(url + '/jobs', {headers: {'X-A': 'b'}}); return await r.text() }",
    "read without CORS": "async url => { const r = await fetch(url + '/jobs', {mode: 'no-cors'}); return (await r.text()) || null }",
    "post JSON": """async url => {
        const headers = {'Content-Type': 'application/json'}
        const r = await fetch(url + '/train', {method: 'POST', headers, body: '{}'}); return await r.text() }""",
    "post JSON as text": """async url => {
        await fetch(url + '/internal/reconcile', {method: 'POST', mode: 'no-cors', body: '{}'}); return null }""",
    "plant a dataset": """async url => {
        const body = new FormData(); body.append('file', new Blob([ROW]), 'rows.jsonl')
        await fetch(url + '/datasets', {method: 'POST', mode: 'no-cors', body}); return null }""",
    "send a beacon": "async url => { navigator.sendBeacon(url + '/jobs/job_1/cancel', '{}'); return null }",
    "delete": "async url => { const r = await fetch(url + '/jobs/job_1', {method: 'DELETE'}); return await r.text() }",
    "open an event stream": """url => new Promise(resolve => {
        const source = new EventSource(url + '/jobs/job_1/events')
        source.onmessage = message => resolve(message.data); source.onopen = () => resolve('open')
        source.onerror = () => { source.close(); resolve(null) } })""",
    "load as an image": """url => new Promise(resolve => {
        const image = new Image(); image.onload = () => resolve('loaded'); image.onerror = () => resolve(null)
        image.src = url + '/docs/assets/favicon.png' })""",
    "load as a script": """url => new Promise(resolve => {
        const script = document.createElement('script'); script.onload = () => resolve('loaded'); script.onerror = () => resolve(null)
        script.src = url + '/openapi.json'; document.head.append(script) })""",
    "show in a frame": """url => new Promise(resolve => {
        const frame = document.createElement('iframe')
        frame.onload = () => { try { resolve(frame.contentDocument.body.innerText || null) } catch { resolve(null) } }
        frame.src = url + '/docs'; document.body.append(frame) })""",
    "open a window": """url => new Promise(resolve => {
        const opened = window.open(url + '/docs')
        setTimeout(() => { try { resolve(opened && opened.document.body.innerText || null) } catch { resolve(null) } }, 500) })""",
    "submit a form": """url => new Promise(resolve => {
        const frame = document.createElement('iframe'); frame.name = 'target'; document.body.append(frame)
        const form = document.createElement('form'); form.action = url + '/datasets'; form.method = 'POST'; form.target = 'target'
        form.enctype = 'multipart/form-data'
        const name = document.createElement('input'); name.name = 'incoming'; name.value = 'incoming/x'; form.append(name)
        document.body.append(form); form.submit(); setTimeout(() => resolve(null), 500) })""",
}


class ForeignSite(BaseHTTPRequestHandler):
    """An empty page at every path."""

    def do_GET(self) -> None:
        page = b"<!doctype html><title>foreign</title><body></body>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def foreign_port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), ForeignSite) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        yield site.server_port
        site.shutdown()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Server]:
    with run_server(home, reconcile_interval_s=0) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright: Playwright
    with sync_playwright() as playwright:
        rules = f"--host-resolver-rules=MAP {FOREIGN_NAME} 127.0.0.1"
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[rules, "--no-sandbox", "--disable-popup-blocking", NO_HELP])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context()
    context.set_default_timeout(TIMEOUT_MS)
    yield context.new_page()
    context.close()


def count_records(home: Path) -> dict[str, int]:
    with sqlite3.connect(f"file:{home / 'tunesmith.db'}?mode=ro", uri=True) as database:
        return {table: database.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("jobs", "datasets")}


def read_access_log(home: Path) -> list[tuple[str, int]]:
    """The route and the status of each request that reached the service."""
    found = re.findall(r"request method=(\S+) route=(\S+) status=(\d+)", (home / LOG_FILE).read_text())
    return [(f"{method} {route}", int(status)) for method, route, status in found]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", FOREIGN_NAME])
def test_foreign_page_reads_nothing_and_changes_nothing(page: Page, server: Server, home: Path, foreign_port: int, host: str) -> None:
    before = len(read_access_log(home))
    read: dict[str, str | None] = {}
    for name, attack in ATTACKS.items():
        page.goto(f"http://{host}:{foreign_port}/")
        read[name] = page.evaluate(
            f"async url => {{ const ROW = {ROW!r}; try {{ return await ({attack})(url) }} catch {{ return null }} }}", server.url
        )
    assert read == dict.fromkeys(ATTACKS)
    answers = read_access_log(home)[before:]
    assert len([status for _, status in answers if status == 403]) >= len(ATTACKS) - 2  # all others did reach the service
    answered = {name for name, status in answers if status != 403}
    assert answered <= {"GET /docs", "GET /docs/assets", "GET unknown", "GET /openapi.json"}  # in a window of its own
    assert count_records(home) == {"jobs": 0, "datasets": 0}


@pytest.mark.parametrize("path", ["/jobs", "/", "/docs", "/openapi.json", "/health"])
def test_name_that_points_at_this_machine_reads_nothing(page: Page, server: Server, home: Path, path: str) -> None:
    """DNS rebinding: the page came from the attacker; then its name leads to the service, which is the same origin to the browser."""
    attacker = f"http://{FOREIGN_NAME}:{server.port}/start"
    page.route(attacker, lambda route: route.fulfill(content_type="text/html", body="<body>attacker</body>"))
    page.goto(attacker)
    assert page.evaluate("async path => (await fetch(path)).status", path) == 421
    assert page.evaluate("async path => (await fetch(path, {method: 'POST'})).status", path) in (403, 421)
    response = page.goto(f"http://{FOREIGN_NAME}:{server.port}{path}")
    assert response is not None
    assert response.status == 421


def test_own_pages_work_under_their_policy(page: Page, server: Server) -> None:
    """Swagger UI shows the operations, and its requests reach the service."""
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(f"{server.url}/docs")
    page.wait_for_selector(".opblock")
    assert problems == []
    fetch = partial(page.evaluate, "async path => (await fetch(path)).status")
    assert fetch("/health") == 200
    assert fetch("/jobs") in (200, 401)
    assert page.evaluate("async () => (await fetch('/train', {method: 'POST', body: '{}'})).status") in (401, 422)
