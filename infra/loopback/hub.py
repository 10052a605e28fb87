"""The Hugging Face Hub on loopback, for models: answers the requests of `huggingface_hub` as the real Hub does.

    with LoopbackHub() as hub:
        hub.tokens["hf_mine"] = Token(user="ada", role="write")
        hub.add_repository("ada/base", {"config.json": b"{}"}, gated=True, readers={"grace"})
        ...  # use HF_ENDPOINT=hub.url, or HfApi(endpoint=hub.url)
        hub.repos["ada/tuned"].files["README.md"].content

Large files use Git LFS, so clients need HF_HUB_DISABLE_XET=1: Xet is a protocol of its own. Standard library only. For network faults,
put `run_http_fault_proxy(hub.url)` in front; every URL in a response names the host of the request.

`python -m infra.loopback.hub --port 9025 --token hf_mine=ada` runs it in the foreground.
"""

import argparse
import base64
import json
import re
import signal
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from hashlib import sha1, sha256
from typing import Any, Self
from urllib.parse import parse_qs, unquote

from infra.loopback.hub_repository import DATE, Blob, HubError, Repo, Token, is_large
from infra.loopback.hub_server import HubRequest, HubResponse, content_response, create_server

POINTER_BYTES = 134  # of a Git LFS pointer file


class LoopbackHub:
    """The Hub in a thread of this process; a context manager. `quota_bytes` limits the large files of private repositories."""

    def __init__(self, *, port: int = 0, quota_bytes: int | None = None) -> None:
        self.tokens: dict[str, Token] = {}
        self.repos: dict[str, Repo] = {}
        self.requests: list[HubRequest] = []
        self.quota_bytes = quota_bytes
        self._lfs_objects: dict[str, bytes] = {}  # by sha256; what was uploaded, committed or not
        self._lock = threading.RLock()
        self._server = create_server(self, port)
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
        """Create a repository with these files."""
        repo = Repo(repo_id, private, gated, set(readers))
        blobs = {path: Blob(content, is_large(path, len(content))) for path, content in files.items()}
        self._lfs_objects |= {blob.oid: blob.content for blob in blobs.values() if blob.lfs}
        repo.commit("files", {**repo.files, **blobs})
        self.repos[repo_id] = repo
        return repo

    def uploaded_digests(self) -> list[str]:
        """The sha256 of every large file that was uploaded, once per upload."""
        return [
            request.path.rpartition("/")[2] for request in self.requests if request.method == "PUT" and request.path.startswith("/lfs/")
        ]

    def handle(self, request: HubRequest) -> HubResponse:
        """Answer a request. Raises HubError."""
        with self._lock:
            self.requests.append(request)
            if request.token is not None and request.token not in self.tokens:
                raise HubError(401, "Invalid credentials in Authorization header")
            for method, pattern, handler in ROUTES:
                match = re.fullmatch(pattern, request.path)
                if match and request.method in (method, "HEAD" if method == "GET" else ""):
                    return handler(self, request, *(unquote(part) for part in match.groups()))
        raise HubError(404, f"no route for {request.method} {request.path}")

    # --- accounts -----------------------------------------------------------------------------------------------------

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
        paths = parse_qs(request.body.decode()).get("paths", []) if form else request.json["paths"]
        return HubResponse([_tree_entry_json(path, files[path]) for path in paths if path in files])

    def resolve(self, request: HubRequest, repo_id: str, revision: str, path: str) -> HubResponse:
        repo = self._readable_repo(request, repo_id)
        self._check_gated_access(request, repo)
        commit = repo.commit_at(revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", headers=headers)
        blob = commit.files[path]
        if not blob.lfs:
            return content_response(blob.content, request, headers | {"ETag": f'"{blob.oid}"'})
        linked = {"X-Linked-Size": str(len(blob.content)), "X-Linked-ETag": f'"{blob.oid}"'}
        # The same server under another host name, as the real Hub redirects to another host: clients then do not send their token.
        store = request.host.replace("127.0.0.1", "localhost")
        return HubResponse(content=b"", status=302, headers=headers | linked | {"Location": f"{store}/lfs/{blob.oid}"})

    def get_lfs_object(self, request: HubRequest, oid: str) -> HubResponse:
        if oid not in self._lfs_objects:
            raise HubError(404, "NoSuchKey")
        return content_response(self._lfs_objects[oid], request, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    # --- writing files -----------------------------------------------------------------------------------------------

    def validate(self, request: HubRequest) -> HubResponse:
        if re.match(r"---\r?\n.*?\n---\r?\n", request.json["content"], re.DOTALL):
            return HubResponse({"errors": [], "warnings": []})
        return HubResponse({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})

    def preupload(self, request: HubRequest, repo_id: str, revision: str) -> HubResponse:
        files = self._writable_repo(request, repo_id).commit_at(revision).files
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if is_large(file["path"], file["size"]) else "regular",
                "shouldIgnore": False,
                "oid": files[file["path"]].oid if file["path"] in files else None,
            }
            for file in request.json["files"]
        ]
        return HubResponse({"files": modes})

    def lfs_batch(self, request: HubRequest, repo_id: str) -> HubResponse:
        repo, objects = self._writable_repo(request, repo_id), request.json["objects"]
        new = sum(item["size"] for item in objects if item["oid"] not in self._lfs_objects)
        if repo.private and self.quota_bytes is not None and self._private_lfs_bytes() + new > self.quota_bytes:
            raise HubError(
                403, "Private repository storage limit reached, please upgrade your plan to increase your private storage limit."
            )

        def actions(item: dict[str, Any]) -> dict[str, Any]:
            upload = {"href": f"{request.host}/lfs/{item['oid']}", "header": {}}
            verify = {"href": f"{request.host}/{repo_id}.git/info/lfs/objects/verify", "header": {}}
            return {} if item["oid"] in self._lfs_objects else {"actions": {"upload": upload, "verify": verify}}

        return HubResponse(
            {"transfer": "basic", "objects": [{"oid": item["oid"], "size": item["size"], **actions(item)} for item in objects]}
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
        header, *operations = [json.loads(line) for line in request.body.splitlines() if line]
        repo.commit_at(revision)
        if header["value"].get("parentCommit", repo.head.oid) != repo.head.oid:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.files)
        for operation in operations:
            self._apply(files, operation["key"], operation["value"])
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
        """The repository, if the caller may know that it exists. Raises HubError."""
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and not (request.token and self.tokens[request.token].can_read(repo_id))):
            raise HubError(404 if request.token else 401, "Repository not found", "RepoNotFound")
        return repo

    def _check_gated_access(self, request: HubRequest, repo: Repo) -> None:
        """Raises HubError if the repository is gated and the caller has no access to its files."""
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
        """The repository, if the caller may change it. Raises HubError."""
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

# The first match counts, so the longer patterns come before `info`, whose repository name matches anything.
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


def _sibling_json(path: str, blob: Blob) -> dict[str, Any]:
    lfs = {"lfs": {"sha256": blob.oid, "size": len(blob.content), "pointerSize": POINTER_BYTES}} if blob.lfs else {}
    return {"rfilename": path, "size": len(blob.content), "blobId": blob.git_oid, **lfs}


def _tree_entry_json(path: str, blob: Blob) -> dict[str, Any]:
    lfs = {"lfs": {"oid": blob.oid, "size": len(blob.content), "pointerSize": POINTER_BYTES}} if blob.lfs else {}
    return {"type": "file", "oid": blob.git_oid, "size": len(blob.content), "path": path, **lfs}


def _list_folders(files: Iterable[str], below: str, *, deep: bool) -> list[dict[str, Any]]:
    folders: set[str] = set()
    for path in files:
        parts = path.removeprefix(below).split("/")[:-1]
        folders |= {below + "/".join(parts[:depth]) for depth in range(1, len(parts) + 1) if deep or depth == 1}
    return [{"type": "directory", "oid": sha1(name.encode()).hexdigest(), "size": 0, "path": name} for name in sorted(folders)]


def main() -> None:
    """Run until SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m infra.loopback.hub", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 (the default) takes a free port")
    parser.add_argument("--token", action="append", default=[], metavar="TOKEN=USER", help="a token with write access; can be repeated")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end like Ctrl-C
    with suppress(KeyboardInterrupt), LoopbackHub(port=args.port) as hub:
        hub.tokens.update({token: Token(user) for token, _, user in (each.partition("=") for each in args.token)})
        print(hub.url, flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
