"""The state of the loopback Hub: accounts, repositories and uploaded files, with the checks of a token's rights."""

from collections.abc import Iterable, Mapping

from infra.loopback.hub_repository import Blob, HubError, Repo, Token, is_large


class HubState:
    """What the Hub stores. `quota_bytes` limits the large files of private repositories."""

    def __init__(self, quota_bytes: int | None = None) -> None:
        self.tokens: dict[str, Token] = {}
        self.repos: dict[str, Repo] = {}
        self.quota_bytes = quota_bytes
        self.lfs_objects: dict[str, bytes] = {}  # by sha256: uploaded content, whether a commit uses it or not

    def add_repository(
        self, repo_id: str, files: Mapping[str, bytes], *, private: bool = False, gated: bool = False, readers: Iterable[str] = ()
    ) -> Repo:
        """Create a repository with these files."""
        repo = Repo(repo_id, private, gated, set(readers))
        blobs = {path: Blob(content, is_large(path, len(content))) for path, content in files.items()}
        self.lfs_objects |= {blob.oid: blob.content for blob in blobs.values() if blob.lfs}
        repo.commit("files", {**repo.files, **blobs})
        self.repos[repo_id] = repo
        return repo

    def readable_repo(self, token: str | None, repo_id: str) -> Repo:
        """The repository, if the caller may know that it exists. Raises HubError."""
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and not (token and self.tokens[token].can_read(repo_id))):
            raise HubError(404 if token else 401, "Repository not found", "RepoNotFound")
        return repo

    def check_gated_access(self, token: str | None, repo: Repo) -> None:
        """Raises HubError if the repository is gated and the caller has no access to its files."""
        if not repo.gated:
            return
        if token is None:
            message = f"Access to model {repo.repo_id} is restricted. You must have access to it and be authenticated to access it."
            raise HubError(401, message, "GatedRepo")
        access = self.tokens[token]
        if access.role == "fineGrained" and not access.can_read_gated:
            raise HubError(403, "Please enable access to public gated repositories in your fine-grained token settings.", "GatedRepo")
        if access.user not in repo.readers and access.user != repo.repo_id.partition("/")[0]:
            raise HubError(403, f"Access to model {repo.repo_id} is restricted and you are not in the authorized list.", "GatedRepo")

    def writable_repo(self, token: str | None, repo_id: str) -> Repo:
        """The repository, if the caller may change it. Raises HubError."""
        repo = self.readable_repo(token, repo_id)
        if token is None:
            raise HubError(401, "Invalid username or password.")
        if not self.tokens[token].can_write(repo_id):
            raise HubError(403, "Forbidden: you must use a token with write access to this repository")
        return repo

    def private_lfs_bytes(self) -> int:
        """The size of all large files in private repositories."""
        large = {blob.oid: len(blob.content) for repo in self.repos.values() if repo.private for blob in repo.files.values() if blob.lfs}
        return sum(large.values())
