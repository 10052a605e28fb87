"""What the loopback Hub stores: tokens with their rights, and repositories with their commits and files.

Nothing here knows HTTP, except that a `HubError` carries the status that the real Hub answers with.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from typing import Any, Literal

LFS_SUFFIXES = (".safetensors", ".gguf", ".bin", ".model", ".onnx", ".pt", "tokenizer.json")
LFS_THRESHOLD_BYTES = 10_000_000  # smaller text files are stored by Git itself
DATE = "2026-01-01T00:00:00.000Z"  # nothing here depends on a clock


@dataclass(frozen=True)
class Token:
    """What a token allows, in the Hub's terms. `permissions` belong to a fine-grained token, by user, organization or repository."""

    user: str
    role: Literal["read", "write", "fineGrained"] = "write"
    orgs: Mapping[str, Literal["read", "contributor", "write", "admin"]] = field(default_factory=dict)
    permissions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # "repo.content.read", "repo.write"
    can_read_gated: bool = False  # matters for a fine-grained token only; the others can

    def can_write(self, repo_id: str) -> bool:
        """Whether the token allows creating or changing the repository."""
        owner = repo_id.partition("/")[0]
        if owner != self.user and self.orgs.get(owner) not in ("contributor", "write", "admin"):
            return False
        return self.role == "write" or (self.role == "fineGrained" and self._has_permission("repo.write", repo_id))

    def can_read(self, repo_id: str) -> bool:
        """Whether the token allows reading the repository if it is private."""
        owner = repo_id.partition("/")[0]
        if owner != self.user and owner not in self.orgs:
            return False
        return (
            self.role != "fineGrained" or self._has_permission("repo.content.read", repo_id) or self._has_permission("repo.write", repo_id)
        )

    def whoami(self) -> dict[str, Any]:
        """The response of `/api/whoami-v2`."""
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
    """A file of a commit."""

    content: bytes = field(repr=False)
    lfs: bool

    @property
    def oid(self) -> str:
        """The id that clients compare: Git's blob id of a small file, the sha256 of a large one."""
        return sha256(self.content).hexdigest() if self.lfs else self.git_oid

    @property
    def git_oid(self) -> str:
        content = self.content
        if self.lfs:
            content = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.oid}\nsize {len(self.content)}\n".encode()
        return sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Commit:
    """The state of a repository at one commit."""

    oid: str
    title: str
    files: Mapping[str, Blob]


@dataclass
class Repo:
    """A model repository. If it is gated, `readers` are the users with access."""

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
        """The files of the newest commit."""
        return self.head.files

    def commit_at(self, revision: str) -> Commit:
        """The commit of `main` or of a hash. Raises HubError."""
        commit = self.head if revision == "main" else next((commit for commit in self.commits if commit.oid == revision), None)
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def commit(self, title: str, files: Mapping[str, Blob]) -> Commit:
        """Add a commit with exactly these files."""
        identity = json.dumps([len(self.commits), self.repo_id, title, sorted((path, blob.oid) for path, blob in files.items())])
        commit = Commit(sha1(identity.encode()).hexdigest(), title, dict(files))
        self.commits.append(commit)
        return commit


class HubError(Exception):
    """The Hub refuses a request: HTTP status, message, and the error code that clients read."""

    def __init__(self, status: int, message: str, code: str = "", **details: object) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.details = status, message, code, details


def is_large(path: str, size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) or size > LFS_THRESHOLD_BYTES
