"""The Hugging Face Hub on loopback, for models: what `huggingface_hub` says to it over HTTP, and what the real one answers.

with LoopbackHub() as hub:
    hub.tokens["hf_mine"] = Token(user="ada", role="write")
    hub.add("ada/base", {"config.json": b"{}"}, gated=True, readers={"grace"})
    …                     # HF_ENDPOINT=hub.url, or HfApi(endpoint=hub.url)
    hub.repos["ada/tuned"].files["README.md"].content

Large files come by Git LFS, so clients need HF_HUB_DISABLE_XET=1: Xet is a protocol of its own. Standard library alone. Faults of the
line are `http_faults(hub.url)`; every address that the Hub hands out is one of the host that it was asked by.

`python -m infra.loopback.hub --port 9025 --token hf_mine=ada` runs in the foreground.
"""

import argparse
import base64
import json
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Literal, Self
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".gguf", ".bin", ".model", ".onnx", ".pt", "tokenizer.json")
LFS_THRESHOLD_BYTES = 10_000_000  # smaller texts are git's own
POINTER_BYTES = 134
DATE = "2026-01-01T00:00:00.000Z"  # nothing here depends on a clock


@dataclass(frozen=True)
class Token:
    """What a token may do, in the Hub's words. `permissions` are a fine-grained one's, by user, organisation or repository."""

    user: str
    role: Literal["read", "write", "fineGrained"] = "write"
    orgs: Mapping[str, Literal["read", "contributor", "write", "admin"]] = field(default_factory=dict)
    permissions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # "repo.content.read", "repo.write"
    can_read_gated: bool = False  # of a fine-grained one; the others may

    def can_write(self, repo_id: str) -> bool:
        """Whether it may create or change a repository of that name."""
        owner = repo_id.partition("/")[0]
        if owner != self.user and self.orgs.get(owner) not in ("contributor", "write", "admin"):
            return False
        return self.role == "write" or (self.role == "fineGrained" and self._has_permission("repo.write", repo_id))

    def can_read(self, repo_id: str) -> bool:
        """Whether it may see a private repository of that name."""
        owner = repo_id.partition("/")[0]
        if owner != self.user and owner not in self.orgs:
            return False
        return (
            self.role != "fineGrained" or self._has_permission("repo.content.read", repo_id) or self._has_permission("repo.write", repo_id)
        )

    def whoami(self) -> dict[str, Any]:
        """As `/api/whoami-v2` says it."""
        access: dict[str, Any] = {"displayName": "a token", "role": self.role, "createdAt": DATE}
        if self.role == "fineGrained":
            scoped = [
                {"entity": {"_id": name, "type": self._entity_type(name), "name": name}, "permissions": list(permissions)}
                for name, permissions in self.permissions.items()
            ]
            access["fineGrained"] = {"canReadGatedRepos": self.can_read_gated, "global": [], "scoped": scoped}
        orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in self.orgs.items()]
        return {"type": "user", "id": self.user, "name": self.user, "fullname": self.user, "isPro": False, "orgs": orgs} | {
            "auth": {"type": "access_token", "accessToken": access}
        }

    def _has_permission(self, permission: str, repo_id: str) -> bool:
        return any(permission in self.permissions.get(name, ()) for name in (repo_id, repo_id.partition("/")[0]))

    def _entity_type(self, name: str) -> str:
        return "model" if "/" in name else "user" if name == self.user else "org"


@dataclass(frozen=True)
class Blob:
    """A file as one commit has it."""

    content: bytes = field(repr=False)
    lfs: bool

    @property
    def oid(self) -> str:
        """The name that clients compare: git's of a small file, the sha256 of a large one."""
        return sha256(self.content).hexdigest() if self.lfs else self.git_oid

    @property
    def git_oid(self) -> str:
        content = self.content
        if self.lfs:
            content = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.oid}\nsize {len(self.content)}\n".encode()
        return sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Commit:
    """The whole repository at one time."""

    oid: str
    title: str
    files: Mapping[str, Blob]


@dataclass
class Repo:
    """A model repository; `readers` are the users whom a gated one lets in."""

    repo_id: str
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)
    commits: list[Commit] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.commit("initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", lfs=False)})

    @property
    def head(self) -> Commit:
        """The newest commit."""
        return self.commits[-1]

    @property
    def files(self) -> Mapping[str, Blob]:
        """As the newest commit has them."""
        return self.head.files

    def commit_at(self, revision: str) -> Commit:
        """The commit of `main` or of a hash. Raises Refused."""
        found = self.head if revision == "main" else next((commit for commit in self.commits if commit.oid == revision), None)
        if found is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def commit(self, title: str, files: Mapping[str, Blob]) -> Commit:
        """A new state of the repository."""
        told = json.dumps([len(self.commits), self.repo_id, title, sorted((path, blob.oid) for path, blob in files.items())])
        made = Commit(sha1(told.encode()).hexdigest(), title, dict(files))
        self.commits.append(made)
        return made


class HubError(Exception):
    """The Hub says no: status, its words, and the code that clients look at."""

    def __init__(self, status: int, message: str, code: str = "", **more: object) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.more = status, message, code, more


@dataclass(frozen=True)
class HubRequest:
    """A request as the Hub hears it."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = field(repr=False)

    @property
    def json(self) -> Any:  # noqa: ANN401  # JSON
        return json.loads(self.body)

    @property
    def token(self) -> str | None:
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None

    @property
    def host(self) -> str:
        return f"http://{self.headers['host']}"


@dataclass(frozen=True)
class HubResponse:
    """What the Hub says; `json` unless there is content."""

    json: Any = None
    content: bytes | None = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


class LoopbackHub:
    """The Hub in a thread of this process; a context manager. `quota_bytes` is what private large files may take."""

    def __init__(self, *, port: int = 0, quota_bytes: int | None = None) -> None:
        self.tokens: dict[str, Token] = {}
        self.repos: dict[str, Repo] = {}
        self.requests: list[HubRequest] = []
        self.quota_bytes = quota_bytes
        self._lfs_objects: dict[str, bytes] = {}  # LFS, by sha256: what was uploaded, committed or not
        self._lock = threading.RLock()
        self._server = _Server(("127.0.0.1", port), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add_repository(
        self, repo_id: str, files: Mapping[str, bytes], *, private: bool = False, gated: bool = False, readers: Iterable[str] = ()
    ) -> Repo:
        """A repository that is there already."""
        repo = Repo(repo_id, private, gated, set(readers))
        blobs = {path: Blob(content, _is_large(path, len(content))) for path, content in files.items()}
        self._lfs_objects |= {blob.oid: blob.content for blob in blobs.values() if blob.lfs}
        repo.commit("files", {**repo.files, **blobs})
        self.repos[repo_id] = repo
        return repo

    def uploaded_digests(self) -> list[str]:
        """The sha256 of every large file that was sent, as often as it was."""
        return [asked.path.rpartition("/")[2] for asked in self.requests if asked.method == "PUT" and asked.path.startswith("/lfs/")]

    def handle(self, request: HubRequest) -> HubResponse:
        """Raises Refused."""
        with self._lock:
            self.requests.append(request)
            if request.token is not None and request.token not in self.tokens:
                raise HubError(401, "Invalid credentials in Authorization header")
            for method, pattern, act in ROUTES:
                found = re.fullmatch(pattern, request.path)
                if found and request.method in (method, "HEAD" if method == "GET" else ""):
                    return act(self, request, *(unquote(part) for part in found.groups()))
        raise HubError(404, f"no route for {request.method} {request.path}")

    # --- who ---------------------------------------------------------------------------------------------------------

    def whoami(self, request: HubRequest) -> HubResponse:
        if request.token is None:
            raise HubError(401, "Invalid username or password.")
        return HubResponse(self.tokens[request.token].whoami())

    def check_read(self, request: HubRequest, repo_id: str) -> HubResponse:
        self._check_gated_access(request, self._readable_repo(request, repo_id))
        return HubResponse({})

    def check_write(self, request: HubRequest, repo_id: str) -> HubResponse:
        self._writable_repo(request, repo_id)
        return HubResponse({})

    # --- repositories ------------------------------------------------------------------------------------------------

    def create(self, request: HubRequest) -> HubResponse:
        name, organization = request.json["name"], request.json.get("organization")
        if request.token is None:
            raise HubError(401, "Invalid username or password.")
        repo_id = f"{organization or self.tokens[request.token].user}/{name}"
        if not self.tokens[request.token].can_write(repo_id):
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{repo_id.partition("/")[0]}"')
        url = f"{request.host}/{repo_id}"
        if repo_id in self.repos:
            raise HubError(409, "You already created this model repo", url=url)
        private = request.json.get("visibility") == "private" or request.json.get("private") is True
        self.repos[repo_id] = Repo(repo_id, private)
        return HubResponse({"url": url, "name": repo_id, "id": repo_id})

    def delete(self, request: HubRequest) -> HubResponse:
        user = self.tokens[request.token].user if request.token else ""
        repo = self._writable_repo(request, f"{request.json.get('organization') or user}/{request.json['name']}")
        del self.repos[repo.repo_id]
        return HubResponse({})

    def settings(self, request: HubRequest, repo_id: str) -> HubResponse:
        repo = self._writable_repo(request, repo_id)
        if "visibility" in request.json or "private" in request.json:
            repo.private = request.json.get("visibility") == "private" or request.json.get("private") is True
        repo.gated = bool(request.json.get("gated", repo.gated))
        return HubResponse({})

    def info(self, request: HubRequest, repo_id: str, revision: str = "main") -> HubResponse:
        repo = self._readable_repo(request, repo_id)
        commit = repo.commit_at(revision)
        about: dict[str, Any] = {"_id": "0", "id": repo_id, "modelId": repo_id, "author": repo_id.partition("/")[0], "sha": commit.oid}
        about |= {"private": repo.private, "gated": "manual" if repo.gated else False, "disabled": False, "tags": [], "downloads": 0}
        about |= {"lastModified": DATE, "createdAt": DATE, "siblings": [_sibling_json(*file) for file in sorted(commit.files.items())]}
        return HubResponse(about)

    def refs(self, request: HubRequest, repo_id: str) -> HubResponse:
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": self._readable_repo(request, repo_id).head.oid}
        return HubResponse({"branches": [main], "converts": [], "tags": []})

    def history(self, request: HubRequest, repo_id: str, revision: str) -> HubResponse:
        repo = self._readable_repo(request, repo_id)
        until = repo.commits.index(repo.commit_at(revision)) + 1
        commits = [{"id": each.oid, "title": each.title, "message": "", "authors": [], "date": DATE} for each in repo.commits[:until]]
        return HubResponse(commits[::-1])

    # --- reading files -----------------------------------------------------------------------------------------------

    def tree(self, request: HubRequest, repo_id: str, revision: str, folder: str = "") -> HubResponse:
        commit = self._readable_repo(request, repo_id).commit_at(revision)
        below = f"{folder}/" if folder else ""
        inside = {path: blob for path, blob in sorted(commit.files.items()) if path.startswith(below)}
        if folder and not inside:
            raise HubError(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        if request.query.get("recursive", "false").lower() in ("true", "1"):
            return HubResponse([*_list_folders(inside, below, deep=True), *(_tree_entry_json(*file) for file in inside.items())])
        here = {path: blob for path, blob in inside.items() if "/" not in path.removeprefix(below)}
        return HubResponse([*_list_folders(inside, below, deep=False), *(_tree_entry_json(*file) for file in here.items())])

    def paths_info(self, request: HubRequest, repo_id: str, revision: str) -> HubResponse:
        files = self._readable_repo(request, repo_id).commit_at(revision).files
        form = "json" not in request.headers.get("content-type", "")
        wanted = parse_qs(request.body.decode()).get("paths", []) if form else request.json["paths"]
        return HubResponse([_tree_entry_json(path, files[path]) for path in wanted if path in files])

    def resolve(self, request: HubRequest, repo_id: str, revision: str, path: str) -> HubResponse:
        repo = self._readable_repo(request, repo_id)
        self._check_gated_access(request, repo)
        commit = repo.commit_at(revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", headers=headers)
        blob = commit.files[path]
        if not blob.lfs:
            return _content_response(blob.content, request, headers | {"ETag": f'"{blob.oid}"'})
        linked = {"X-Linked-Size": str(len(blob.content)), "X-Linked-ETag": f'"{blob.oid}"'}
        # To the same server under another name, as the real one does: clients then keep their token to themselves.
        store = request.host.replace("127.0.0.1", "localhost")
        return HubResponse(content=b"", status=302, headers=headers | linked | {"Location": f"{store}/lfs/{blob.oid}"})

    def get_lfs_object(self, request: HubRequest, oid: str) -> HubResponse:
        if oid not in self._lfs_objects:
            raise HubError(404, "NoSuchKey")
        return _content_response(self._lfs_objects[oid], request, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    # --- writing files -----------------------------------------------------------------------------------------------

    def validate(self, request: HubRequest) -> HubResponse:
        if re.match(r"---\r?\n.*?\n---\r?\n", request.json["content"], re.DOTALL):
            return HubResponse({"errors": [], "warnings": []})
        return HubResponse({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})

    def preupload(self, request: HubRequest, repo_id: str, revision: str) -> HubResponse:
        files = self._writable_repo(request, repo_id).commit_at(revision).files
        told = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if _is_large(file["path"], file["size"]) else "regular",
                "shouldIgnore": False,
                "oid": files[file["path"]].oid if file["path"] in files else None,
            }
            for file in request.json["files"]
        ]
        return HubResponse({"files": told})

    def lfs_batch(self, request: HubRequest, repo_id: str) -> HubResponse:
        repo, wanted = self._writable_repo(request, repo_id), request.json["objects"]
        new = sum(item["size"] for item in wanted if item["oid"] not in self._lfs_objects)
        if repo.private and self.quota_bytes is not None and self._private_lfs_bytes() + new > self.quota_bytes:
            raise HubError(
                403, "Private repository storage limit reached, please upgrade your plan to increase your private storage limit."
            )

        def actions(item: dict[str, Any]) -> dict[str, Any]:
            upload = {"href": f"{request.host}/lfs/{item['oid']}", "header": {}}
            verify = {"href": f"{request.host}/{repo_id}.git/info/lfs/objects/verify", "header": {}}
            return {} if item["oid"] in self._lfs_objects else {"actions": {"upload": upload, "verify": verify}}

        return HubResponse(
            {"transfer": "basic", "objects": [{"oid": item["oid"], "size": item["size"], **actions(item)} for item in wanted]}
        )

    def lfs_upload(self, request: HubRequest, oid: str) -> HubResponse:
        if sha256(request.body).hexdigest() != oid:
            raise HubError(400, "XAmzContentSHA256Mismatch")
        self._lfs_objects[oid] = request.body
        return HubResponse(content=b"", headers={"ETag": f'"{oid}"'})

    def lfs_verify(self, request: HubRequest, repo_id: str) -> HubResponse:
        self._writable_repo(request, repo_id)
        if len(self._lfs_objects.get(request.json["oid"], b"")) != request.json["size"]:
            raise HubError(404, "the object was not uploaded")
        return HubResponse({})

    def commit(self, request: HubRequest, repo_id: str, revision: str) -> HubResponse:
        repo = self._writable_repo(request, repo_id)
        header, *steps = [json.loads(line) for line in request.body.splitlines() if line]
        repo.commit_at(revision)
        if header["value"].get("parentCommit", repo.head.oid) != repo.head.oid:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.files)
        for step in steps:
            self._apply(files, step["key"], step["value"])
        made = repo.commit(header["value"]["summary"], files)
        return HubResponse(
            {"success": True, "commitOid": made.oid, "commitUrl": f"{request.host}/{repo_id}/commit/{made.oid}", "hookOutput": ""}
        )

    def _apply(self, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        match key:
            case "file":
                files[path] = Blob(base64.b64decode(value["content"]), lfs=False)
            case "lfsFile" if value["oid"] in self._lfs_objects:
                files[path] = Blob(self._lfs_objects[value["oid"]], lfs=True)
            case "lfsFile":
                raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
            case "deletedFile" if path in files:
                del files[path]
            case "deletedFile":
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            case "deletedFolder":
                for inside in [each for each in files if each.startswith(path.rstrip("/") + "/")]:
                    del files[inside]
            case _:
                raise HubError(400, f"unknown operation {key}")

    # --- rights ------------------------------------------------------------------------------------------------------

    def _readable_repo(self, request: HubRequest, repo_id: str) -> Repo:
        """The repository, if the caller may see it."""
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and not (request.token and self.tokens[request.token].can_read(repo_id))):
            raise HubError(404 if request.token else 401, "Repository not found", "RepoNotFound")
        return repo

    def _check_gated_access(self, request: HubRequest, repo: Repo) -> None:
        """Past the gate, to the files."""
        if not repo.gated:
            return
        if request.token is None:
            message = f"Access to model {repo.repo_id} is restricted. You must have access to it and be authenticated to access it."
            raise HubError(401, message, "GatedRepo")
        token = self.tokens[request.token]
        if token.role == "fineGrained" and not token.can_read_gated:
            raise HubError(403, "Please enable access to public gated repositories in your fine-grained token settings.", "GatedRepo")
        if token.user not in repo.readers and token.user != repo.repo_id.partition("/")[0]:
            raise HubError(403, f"Access to model {repo.repo_id} is restricted and you are not in the authorized list.", "GatedRepo")

    def _writable_repo(self, request: HubRequest, repo_id: str) -> Repo:
        """The repository, if the caller may change it."""
        repo = self._readable_repo(request, repo_id)
        if request.token is None:
            raise HubError(401, "Invalid username or password.")
        if not self.tokens[request.token].can_write(repo_id):
            raise HubError(403, "Forbidden: you must use a token with write access to this repository")
        return repo

    def _private_lfs_bytes(self) -> int:
        large = {blob.oid: len(blob.content) for repo in self.repos.values() if repo.private for blob in repo.files.values() if blob.lfs}
        return sum(large.values())


REPO = r"([\w.-]+(?:/[\w.-]+)?)"
REV = r"([^/]+)"
MODEL = rf"/api/models/{REPO}"

# The first that fits, so the longer ones come before `info`, whose name may contain anything.
ROUTES: list[tuple[str, str, Callable[..., HubResponse]]] = [
    ("GET", r"/api/whoami-v2", LoopbackHub.whoami),
    ("POST", r"/api/repos/create", LoopbackHub.create),
    ("DELETE", r"/api/repos/delete", LoopbackHub.delete),
    ("POST", r"/api/validate-yaml", LoopbackHub.validate),
    ("PUT", rf"{MODEL}/settings", LoopbackHub.settings),
    ("GET", rf"{MODEL}/auth-check", LoopbackHub.check_read),
    ("GET", rf"{MODEL}/auth-check/write", LoopbackHub.check_write),
    ("GET", rf"{MODEL}/refs", LoopbackHub.refs),
    ("GET", rf"{MODEL}/commits/{REV}", LoopbackHub.history),
    ("GET", rf"{MODEL}/tree/{REV}", LoopbackHub.tree),
    ("GET", rf"{MODEL}/tree/{REV}/(.+)", LoopbackHub.tree),
    ("POST", rf"{MODEL}/paths-info/{REV}", LoopbackHub.paths_info),
    ("POST", rf"{MODEL}/preupload/{REV}", LoopbackHub.preupload),
    ("POST", rf"{MODEL}/commit/{REV}", LoopbackHub.commit),
    ("GET", rf"{MODEL}/revision/{REV}", LoopbackHub.info),
    ("GET", MODEL, LoopbackHub.info),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", LoopbackHub.lfs_batch),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/verify", LoopbackHub.lfs_verify),
    ("PUT", r"/lfs/([0-9a-f]{64})", LoopbackHub.lfs_upload),
    ("GET", r"/lfs/([0-9a-f]{64})", LoopbackHub.get_lfs_object),
    ("GET", rf"/{REPO}/resolve/{REV}/(.+)", LoopbackHub.resolve),
]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that close the connection."""


class _Handler(BaseHTTPRequestHandler):
    """One connection; `hub` is set on the class of each server."""

    hub: ClassVar[LoopbackHub]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        body = self._body()
        asked = HubRequest(self.command, url.path, query, {name.lower(): value for name, value in self.headers.items()}, body)
        try:
            answer = self.hub.handle(asked)
        except HubError as refused:
            self._send(_error_response(refused))
        else:
            self._send(answer)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815  # the names that the server looks for

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            return b"".join(self._chunks())
        length = int(self.headers.get("Content-Length", 0))
        content = self.rfile.read(length)
        if len(content) < length:
            self.close_connection = True
            raise ConnectionError("the client hung up")
        return content

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().partition(b";")[0] or b"0", 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _send(self, answer: HubResponse) -> None:
        content = json.dumps(answer.json).encode() if answer.content is None else answer.content
        self.send_response(answer.status)
        kind = "application/json" if answer.content is None else "application/octet-stream"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """No log."""


def _error_response(error: HubError) -> HubResponse:
    """An error as the Hub writes it: in the body for people, in two headers for clients."""
    more = dict(error.more)
    headers = {"X-Error-Message": error.message, **({"X-Error-Code": error.code} if error.code else {})}
    headers |= more.pop("headers", {})  # type: ignore[arg-type]  # given by this file alone
    return HubResponse({"error": error.message, **more}, status=error.status, headers=headers)


def _content_response(content: bytes, request: HubRequest, headers: Mapping[str, str]) -> HubResponse:
    """The content, or the range of it that was asked for."""
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if not found:
        return HubResponse(content=content, headers=headers)
    first, last = int(found[1]), min(int(found[2] or len(content)), len(content) - 1)
    if first > last:
        return HubResponse(content=b"", status=416, headers={**headers, "Content-Range": f"bytes */{len(content)}"})
    told = {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
    return HubResponse(content=content[first : last + 1], status=206, headers=told)


def _is_large(path: str, size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) or size > LFS_THRESHOLD_BYTES


def _sibling_json(path: str, blob: Blob) -> dict[str, Any]:
    lfs = {"lfs": {"sha256": blob.oid, "size": len(blob.content), "pointerSize": POINTER_BYTES}} if blob.lfs else {}
    return {"rfilename": path, "size": len(blob.content), "blobId": blob.git_oid, **lfs}


def _tree_entry_json(path: str, blob: Blob) -> dict[str, Any]:
    lfs = {"lfs": {"oid": blob.oid, "size": len(blob.content), "pointerSize": POINTER_BYTES}} if blob.lfs else {}
    return {"type": "file", "oid": blob.git_oid, "size": len(blob.content), "path": path, **lfs}


def _list_folders(files: Iterable[str], below: str, *, deep: bool) -> list[dict[str, Any]]:
    found: set[str] = set()
    for path in files:
        parts = path.removeprefix(below).split("/")[:-1]
        found |= {below + "/".join(parts[:depth]) for depth in range(1, len(parts) + 1) if deep or depth == 1}
    return [{"type": "directory", "oid": sha1(name.encode()).hexdigest(), "size": 0, "path": name} for name in sorted(found)]


def main() -> None:
    """Run until told to stop."""
    parser = argparse.ArgumentParser(prog="python -m infra.loopback.hub", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--token", action="append", default=[], metavar="TOKEN=USER", help="a token that may write; may be repeated")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C does it
    with suppress(KeyboardInterrupt), LoopbackHub(port=chosen.port) as hub:
        hub.tokens.update({token: Token(user) for token, _, user in (each.partition("=") for each in chosen.token)})
        print(hub.url, flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
