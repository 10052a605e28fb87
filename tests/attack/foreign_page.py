"""Pages of strangers in a real Chromium on the machine of the service's owner: they read nothing and change nothing.

Three strangers: another port of this host, another host, and a host whose name was rebound to the service's address, so that the browser
takes the page and the service for one origin. The browser's own guard of local addresses is off: not every browser has one.
"""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Error, Page, sync_playwright

from tests.attack.campaign import Row, Size, make_row
from tests.attack.fixtures import World
from tests.attack.target import Json, Target, run_target
from tests.chaos.campaign import CampaignError

CHROMIUM = Path("/usr/bin/chromium")
RESOLVER_RULES = "MAP evil.test 127.0.0.1, MAP rebind.test 127.0.0.1"
STEP_TIMEOUT_MS = 3000
WAIT_MS: dict[Size, int] = {"full": 2000, "short": 700}  # for what never answers, such as a stream
# Runs in the page. Each attempt that could read something returns what it read.
SCRIPT = """async ({base, paths, posts, waitMs}) => {
  const read = [];
  const keep = (how, text) => { if (text) read.push(`${how}: ${String(text).slice(0, 20000)}`); };
  const wait = (promise) => Promise.race([promise, new Promise((done) => setTimeout(done, waitMs))]);
  const tries = [];
  const attempt = (how, run) => tries.push(wait(run().then((text) => keep(how, text)).catch(() => {})));
  for (const path of paths) {
    for (const credentials of ["omit", "include"]) {
      attempt(`fetch ${path}`, async () => (await fetch(base + path, {credentials})).text());
      attempt(`no-cors ${path}`, async () => (await fetch(base + path, {mode: "no-cors", credentials})).text());
    }
    attempt(`xhr ${path}`, () => new Promise((done, fail) => {
      const request = new XMLHttpRequest();
      request.open("GET", base + path); request.onload = () => done(request.responseText); request.onerror = fail; request.send();
    }));
    attempt(`event source ${path}`, () => new Promise((done) => {
      const source = new EventSource(base + path, {withCredentials: true});
      source.onmessage = (event) => done(event.data);
      for (const type of ["status", "phase", "metrics"]) source.addEventListener(type, (event) => done(event.data));
    }));
    attempt(`web socket ${path}`, () => new Promise((done) => {
      const socket = new WebSocket(base.replace("http", "ws") + path);
      socket.onopen = () => done("open"); socket.onmessage = (event) => done(event.data); socket.onerror = () => done("");
    }));
    attempt(`frame ${path}`, () => new Promise((done) => {
      const frame = document.createElement("iframe");
      frame.onload = () => { try { done(frame.contentDocument.body.innerText); } catch { done(""); } };
      frame.src = base + path; document.body.append(frame);
    }));
    for (const tag of ["script", "img", "link", "object", "video"]) {
      const element = document.createElement(tag);
      if (tag === "link") { element.rel = "stylesheet"; element.href = base + path; }
      else if (tag === "object") element.data = base + path;
      else element.src = base + path;
      document.body.append(element);
    }
  }
  for (const {method, path, body, type} of posts) {
    for (const options of [{mode: "no-cors"}, {mode: "cors"}, {mode: "no-cors", credentials: "include"}])
      attempt(`${method} ${path}`, async () =>
        (await fetch(base + path, {method, body, headers: {"Content-Type": type}, ...options})).text());
    navigator.sendBeacon(base + path, new Blob([body], {type: "text/plain"}));
    for (const enctype of ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]) {
      const frame = document.createElement("iframe");
      frame.name = `frame${Math.random()}`;
      const form = document.createElement("form");
      Object.assign(form, {action: base + path, method: "POST", enctype, target: frame.name});
      const input = document.createElement("input");
      input.name = enctype === "text/plain" ? body.slice(0, -1) + ',"a":"' : "file";
      input.value = enctype === "text/plain" ? '"}' : body;
      form.append(input);
      if (path === "/datasets" && enctype === "multipart/form-data") {
        const file = document.createElement("input");
        const files = new DataTransfer();
        files.items.add(new File(['{"text": "planted"}\\n'.repeat(9)], "planted.jsonl"));
        file.type = "file"; file.name = "file"; file.files = files.files;
        form.replaceChildren(file);
      }
      document.body.append(frame, form);
      form.submit();
    }
  }
  await Promise.all(tries);
  return read;
}"""


def run(size: Size) -> Row:
    """Let each stranger try everything."""
    if not CHROMIUM.exists():
        raise CampaignError(f"no {CHROMIUM}: install the package chromium")
    with run_target(slots=1) as target, _serve_page() as port, sync_playwright() as playwright:
        world = World(target.owner())
        job_id = world.submit()  # waits in the queue, so that a page could pause, cancel or delete it
        before = target.read_rows()
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=_arguments())
        try:
            reads = _attack_from_everywhere(browser, world, job_id, port, size)
        finally:
            browser.close()
        problems = [f"read by {read}" for read in _find_reads(reads, world)]
        problems += _name_effects(before, target.read_rows())
        problems += _check_headers(target, world, job_id)
    measured = f"{len(reads)} answers reached a script, {len(problems)} reads and effects"
    return make_row("foreign pages in Chromium: CSRF, rebinding, forms, EventSource", "0 effects, 0 reads", measured, problems)


def _arguments() -> list[str]:
    guards = "LocalNetworkAccessChecks,BlockInsecurePrivateNetworkRequests,PrivateNetworkAccessSendPreflights"
    arguments = [f"--host-resolver-rules={RESOLVER_RULES}", f"--disable-features={guards}", "--no-proxy-server"]
    return [*arguments, "--no-sandbox"] if os.geteuid() == 0 else arguments


def _attack_from_everywhere(browser: Browser, world: World, job_id: str, port: int, size: Size) -> list[str]:
    """Everything that a script could read."""
    target, wait_ms = world.target, WAIT_MS[size]
    hosts = ("evil.test", "127.0.0.1", "localhost") if size == "full" else ("evil.test", "127.0.0.1")
    reads: list[str] = []
    context = browser.new_context()
    context.set_default_timeout(STEP_TIMEOUT_MS * 4)
    page = context.new_page()
    _go(page, str(world.owner.expect(201, "POST", "/login-codes")["url"]))  # the owner uses the service in this browser
    if page.evaluate("async () => (await fetch('/jobs')).status") != 200:
        raise CampaignError("the owner's browser is not logged in")
    for origin in (f"http://{host}:{port}" for host in hosts):
        _go(page, origin + "/")
        reads += page.evaluate(SCRIPT, _arguments_of_script(target.url, world, job_id, wait_ms))
        _go(page, origin + "/sandboxed")
        frame = page.frames[-1]
        reads += frame.evaluate(SCRIPT, _arguments_of_script(target.url, world, job_id, wait_ms))
    rebound = f"http://rebind.test:{target.port}"
    for path in ("/jobs", f"/jobs/{world.completed_job_id}", f"/datasets/{world.dataset_id}"):
        reads.append(f"navigation to {path}: {_go(page, rebound + path)}")
    reads += page.evaluate(SCRIPT, _arguments_of_script(rebound, world, job_id, wait_ms))
    context.close()
    return reads


def _go(page: Page, url: str) -> str:
    """Open a page; return its text."""
    try:
        page.goto(url, wait_until="load", timeout=STEP_TIMEOUT_MS)
        return page.content()
    except Error:
        return ""


def _arguments_of_script(base: str, world: World, job_id: str, wait_ms: int) -> Json:
    train = json.dumps(world.train_body())
    key = json.dumps({"name": "stolen", "scopes": ["admin"]})
    posts = [
        ("POST", "/train", train, "application/json"),
        ("POST", "/train", train, "text/plain"),
        ("POST", "/keys", key, "text/plain"),
        ("POST", f"/jobs/{job_id}/pause", "{}", "text/plain"),
        ("POST", f"/jobs/{world.completed_job_id}/clone", "{}", "text/plain"),
        ("POST", "/internal/reconcile", "{}", "text/plain"),
        ("POST", "/internal/cleanup", '{"orphans": true}', "text/plain"),
        ("POST", "/datasets", "{}", "text/plain"),
        ("DELETE", f"/jobs/{world.failed_job_id}", "{}", "text/plain"),
        ("PUT", f"/jobs/{job_id}", "{}", "application/json"),
    ]
    paths = ["/jobs", f"/jobs/{world.completed_job_id}", f"/jobs/{world.completed_job_id}/events", "/datasets", "/keys", "/openapi.json"]
    rows = [dict(zip(("method", "path", "body", "type"), post, strict=True)) for post in posts]
    return {"base": base, "paths": paths, "posts": rows, "waitMs": wait_ms}


def _find_reads(reads: list[str], world: World) -> Iterator[str]:
    """What was read and belongs to the owner. The requests have ids of the owner in them; names and rows they do not."""
    for read in reads:
        if world.mark in read or '"openapi"' in read or (read.startswith("web socket") and "open" in read):
            yield read[:120]


def _name_effects(before: dict[str, str], after: dict[str, str]) -> list[str]:
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    return [f"changed {name}" for name in sorted(changed)]


def _check_headers(target: Target, world: World, job_id: str) -> list[str]:
    """With the owner's own token, as a browser that holds it would send it: a foreign origin or host is refused all the same."""
    problems: list[str] = []
    before = target.read_rows()
    foreign: list[dict[str, str]] = [
        {"Origin": "http://evil.test"},
        {"Origin": f"http://127.0.0.1:{target.port + 1}"},
        {"Origin": "null"},
        {"Origin": f"http://127.0.0.1:{target.port}.evil.test"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"},
        {"Host": f"rebind.test:{target.port}"},
        {"Host": "evil.test"},
        {"Host": f"127.0.0.1.evil.test:{target.port}"},
        {"Host": ""},
    ]
    for headers in foreign:
        for method, path in (("POST", f"/jobs/{job_id}/pause"), ("GET", "/jobs"), ("POST", "/internal/reconcile")):
            response = world.owner.request(method, path, headers=headers)
            if response.is_success:
                problems.append(f"{method} {path} with {headers} succeeded")
            elif "Access-Control-Allow-Origin" in response.headers:
                problems.append(f"{method} {path} with {headers} lets the foreign page read the answer")
    return problems + _name_effects(before, target.read_rows())


@contextmanager
def _serve_page() -> Iterator[int]:
    """The stranger's web server; yields its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the name that http.server calls
            page = '<iframe sandbox="allow-scripts allow-forms" srcdoc="<body></body>">' if self.path == "/sandboxed" else "<body></body>"
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(f"<!doctype html>{page}".encode())

        def log_message(self, *_: Any) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
