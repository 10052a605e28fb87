"""The routes of the loopback Hub: one function per request that `huggingface_hub` sends.

Each takes the state of the Hub, the request and the parts of its path, and raises HubError to refuse.
"""

import base64
import json
import re
from collections.abc import Callable, Iterable
from hashlib import sha1, sha256
from typing import Any
from urllib.parse import parse_qs

from infra.loopback.hub_repository import DATE, Blob, HubError, Repo, is_large
from infra.loopback.hub_server import HubRequest, HubResponse, content_response
from infra.loopback.hub_state import HubState

POINTER_BYTES = 134  # of a Git LFS pointer file

# --- accounts -----------------------------------------------------------------------------------------------------


def whoami(hub: HubState, request: HubRequest) -> HubResponse:
    if request.token is None:
        raise HubError(401, "Invalid username or password.")
    return HubResponse(hub.tokens[request.token].whoami())


def check_read(hub: HubState, request: HubRequest, repo_id: str) -> HubResponse:
    hub.check_gated_access(request.token, hub.readable_repo(request.token, repo_id))
    return HubResponse({})


def check_write(hub: HubState, request: HubRequest, repo_id: str) -> HubResponse:
    hub.writable_repo(request.token, repo_id)
    return HubResponse({})


# --- repositories ------------------------------------------------------------------------------------------------


def create_repository(hub: HubState, request: HubRequest) -> HubResponse:
    name, organization = request.json["name"], request.json.get("organization")
    if request.token is None:
        raise HubError(401, "Invalid username or password.")
    repo_id = f"{organization or hub.tokens[request.token].user}/{name}"
    if not hub.tokens[request.token].can_write(repo_id):
        raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{repo_id.partition("/")[0]}"')
    url = f"{request.host}/{repo_id}"
    if repo_id in hub.repos:
        raise HubError(409, "You already created this model repo", url=url)
    private = request.json.get("visibility") == "private" or request.json.get("private") is True
    hub.repos[repo_id] = Repo(repo_id, private)
    return HubResponse({"url": url, "name": repo_id, "id": repo_id})


def delete_repository(hub: HubState, request: HubRequest) -> HubResponse:
    user = hub.tokens[request.token].user if request.token else ""
    repo = hub.writable_repo(request.token, f"{request.json.get('organization') or user}/{request.json['name']}")
    del hub.repos[repo.repo_id]
    return HubResponse({})


def update_settings(hub: HubState, request: HubRequest, repo_id: str) -> HubResponse:
    repo = hub.writable_repo(request.token, repo_id)
    if "visibility" in request.json or "private" in request.json:
        repo.private = request.json.get("visibility") == "private" or request.json.get("private") is True
    repo.gated = bool(request.json.get("gated", repo.gated))
    return HubResponse({})


def get_info(hub: HubState, request: HubRequest, repo_id: str, revision: str = "main") -> HubResponse:
    repo = hub.readable_repo(request.token, repo_id)
    commit = repo.commit_at(revision)
    info: dict[str, Any] = {"_id": "0", "id": repo_id, "modelId": repo_id, "author": repo_id.partition("/")[0], "sha": commit.oid}
    info |= {"private": repo.private, "gated": "manual" if repo.gated else False, "disabled": False, "tags": [], "downloads": 0}
    info |= {"lastModified": DATE, "createdAt": DATE, "siblings": [_sibling_json(*file) for file in sorted(commit.files.items())]}
    return HubResponse(info)


def list_refs(hub: HubState, request: HubRequest, repo_id: str) -> HubResponse:
    main = {"name": "main", "ref": "refs/heads/main", "targetCommit": hub.readable_repo(request.token, repo_id).head.oid}
    return HubResponse({"branches": [main], "converts": [], "tags": []})


def list_commits(hub: HubState, request: HubRequest, repo_id: str, revision: str) -> HubResponse:
    repo = hub.readable_repo(request.token, repo_id)
    end = repo.commits.index(repo.commit_at(revision)) + 1
    commits = [{"id": commit.oid, "title": commit.title, "message": "", "authors": [], "date": DATE} for commit in repo.commits[:end]]
    return HubResponse(commits[::-1])


# --- reading files -----------------------------------------------------------------------------------------------


def list_tree(hub: HubState, request: HubRequest, repo_id: str, revision: str, folder: str = "") -> HubResponse:
    commit = hub.readable_repo(request.token, repo_id).commit_at(revision)
    prefix = f"{folder}/" if folder else ""
    inside = {path: blob for path, blob in sorted(commit.files.items()) if path.startswith(prefix)}
    if folder and not inside:
        raise HubError(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
    if request.query.get("recursive", "false").lower() in ("true", "1"):
        return HubResponse([*_list_folders(inside, prefix, deep=True), *(_tree_entry_json(*file) for file in inside.items())])
    children = {path: blob for path, blob in inside.items() if "/" not in path.removeprefix(prefix)}
    return HubResponse([*_list_folders(inside, prefix, deep=False), *(_tree_entry_json(*file) for file in children.items())])


def get_paths_info(hub: HubState, request: HubRequest, repo_id: str, revision: str) -> HubResponse:
    files = hub.readable_repo(request.token, repo_id).commit_at(revision).files
    is_form = "json" not in request.headers.get("content-type", "")
    paths = parse_qs(request.body.decode()).get("paths", []) if is_form else request.json["paths"]
    return HubResponse([_tree_entry_json(path, files[path]) for path in paths if path in files])


def download_file(hub: HubState, request: HubRequest, repo_id: str, revision: str, path: str) -> HubResponse:
    repo = hub.readable_repo(request.token, repo_id)
    hub.check_gated_access(request.token, repo)
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


def get_lfs_object(hub: HubState, request: HubRequest, oid: str) -> HubResponse:
    if oid not in hub.lfs_objects:
        raise HubError(404, "NoSuchKey")
    return content_response(hub.lfs_objects[oid], request, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


# --- writing files -----------------------------------------------------------------------------------------------


def validate_card(_hub: HubState, request: HubRequest) -> HubResponse:
    if re.match(r"---\r?\n.*?\n---\r?\n", request.json["content"], re.DOTALL):
        return HubResponse({"errors": [], "warnings": []})
    return HubResponse({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})


def choose_upload_modes(hub: HubState, request: HubRequest, repo_id: str, revision: str) -> HubResponse:
    files = hub.writable_repo(request.token, repo_id).commit_at(revision).files
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


def plan_lfs_upload(hub: HubState, request: HubRequest, repo_id: str) -> HubResponse:
    repo, objects = hub.writable_repo(request.token, repo_id), request.json["objects"]
    new_bytes = sum(item["size"] for item in objects if item["oid"] not in hub.lfs_objects)
    if repo.private and hub.quota_bytes is not None and hub.private_lfs_bytes() + new_bytes > hub.quota_bytes:
        raise HubError(403, "Private repository storage limit reached, please upgrade your plan to increase your private storage limit.")

    def actions(item: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{request.host}/lfs/{item['oid']}", "header": {}}
        verify = {"href": f"{request.host}/{repo_id}.git/info/lfs/objects/verify", "header": {}}
        return {} if item["oid"] in hub.lfs_objects else {"actions": {"upload": upload, "verify": verify}}

    return HubResponse({"transfer": "basic", "objects": [{"oid": item["oid"], "size": item["size"], **actions(item)} for item in objects]})


def upload_lfs_object(hub: HubState, request: HubRequest, oid: str) -> HubResponse:
    if sha256(request.body).hexdigest() != oid:
        raise HubError(400, "XAmzContentSHA256Mismatch")
    hub.lfs_objects[oid] = request.body
    return HubResponse(content=b"", headers={"ETag": f'"{oid}"'})


def verify_lfs_object(hub: HubState, request: HubRequest, repo_id: str) -> HubResponse:
    hub.writable_repo(request.token, repo_id)
    if len(hub.lfs_objects.get(request.json["oid"], b"")) != request.json["size"]:
        raise HubError(404, "the object was not uploaded")
    return HubResponse({})


def create_commit(hub: HubState, request: HubRequest, repo_id: str, revision: str) -> HubResponse:
    repo = hub.writable_repo(request.token, repo_id)
    header, *operations = [json.loads(line) for line in request.body.splitlines() if line]
    repo.commit_at(revision)
    if header["value"].get("parentCommit", repo.head.oid) != repo.head.oid:
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(repo.files)
    for operation in operations:
        _apply_operation(hub, files, operation["key"], operation["value"])
    commit = repo.commit(header["value"]["summary"], files)
    return HubResponse(
        {"success": True, "commitOid": commit.oid, "commitUrl": f"{request.host}/{repo_id}/commit/{commit.oid}", "hookOutput": ""}
    )


def _apply_operation(hub: HubState, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
    path = value["path"]
    match key:
        case "file":
            files[path] = Blob(base64.b64decode(value["content"]), lfs=False)
        case "lfsFile" if value["oid"] in hub.lfs_objects:
            files[path] = Blob(hub.lfs_objects[value["oid"]], lfs=True)
        case "lfsFile":
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
        case "deletedFile" if path in files:
            del files[path]
        case "deletedFile":
            raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        case "deletedFolder":
            for child in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[child]
        case _:
            raise HubError(400, f"unknown operation {key}")


REPO = r"([\w.-]+(?:/[\w.-]+)?)"
REV = r"([^/]+)"
MODEL = rf"/api/models/{REPO}"
DATASET = rf"/api/datasets/{REPO}"  # of datasets, what reads them; the same names as models

# The first match counts, so the longer patterns come before `get_info`, whose repository name matches anything.
ROUTES: list[tuple[str, str, Callable[..., HubResponse]]] = [
    ("GET", r"/api/whoami-v2", whoami),
    ("POST", r"/api/repos/create", create_repository),
    ("DELETE", r"/api/repos/delete", delete_repository),
    ("POST", r"/api/validate-yaml", validate_card),
    ("PUT", rf"{MODEL}/settings", update_settings),
    ("GET", rf"{MODEL}/auth-check", check_read),
    ("GET", rf"{MODEL}/auth-check/write", check_write),
    ("GET", rf"{MODEL}/refs", list_refs),
    ("GET", rf"{MODEL}/commits/{REV}", list_commits),
    ("GET", rf"{MODEL}/tree/{REV}", list_tree),
    ("GET", rf"{MODEL}/tree/{REV}/(.+)", list_tree),
    ("POST", rf"{MODEL}/paths-info/{REV}", get_paths_info),
    ("POST", rf"{MODEL}/preupload/{REV}", choose_upload_modes),
    ("POST", rf"{MODEL}/commit/{REV}", create_commit),
    ("GET", rf"{MODEL}/revision/{REV}", get_info),
    ("GET", MODEL, get_info),
    ("GET", rf"{DATASET}/revision/{REV}", get_info),
    ("GET", DATASET, get_info),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", plan_lfs_upload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/verify", verify_lfs_object),
    ("PUT", r"/lfs/([0-9a-f]{64})", upload_lfs_object),
    ("GET", r"/lfs/([0-9a-f]{64})", get_lfs_object),
    ("GET", rf"/datasets/{REPO}/resolve/{REV}/(.+)", download_file),
    ("GET", rf"/{REPO}/resolve/{REV}/(.+)", download_file),
]


def _sibling_json(path: str, blob: Blob) -> dict[str, Any]:
    lfs = {"lfs": {"sha256": blob.oid, "size": len(blob.content), "pointerSize": POINTER_BYTES}} if blob.lfs else {}
    return {"rfilename": path, "size": len(blob.content), "blobId": blob.git_oid, **lfs}


def _tree_entry_json(path: str, blob: Blob) -> dict[str, Any]:
    lfs = {"lfs": {"oid": blob.oid, "size": len(blob.content), "pointerSize": POINTER_BYTES}} if blob.lfs else {}
    return {"type": "file", "oid": blob.git_oid, "size": len(blob.content), "path": path, **lfs}


def _list_folders(files: Iterable[str], prefix: str, *, deep: bool) -> list[dict[str, Any]]:
    folders: set[str] = set()
    for path in files:
        parts = path.removeprefix(prefix).split("/")[:-1]
        folders |= {prefix + "/".join(parts[:depth]) for depth in range(1, len(parts) + 1) if deep or depth == 1}
    return [{"type": "directory", "oid": sha1(name.encode()).hexdigest(), "size": 0, "path": name} for name in sorted(folders)]
