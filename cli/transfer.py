"""Downloads of artifacts: verified, continued after an interruption, and never over a file of the user's."""

import hashlib
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path, PurePosixPath

import httpx2
from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

from cli.errors import ApiError, CliError
from cli.http_client import MAX_RETRY_AFTER_S, TIMEOUT, Client, Json
from cli.output import err

MAX_TRIES = 5  # in a row without a byte: over half a minute, enough for a service to restart
FIRST_DELAY_S = 1.0
# A link works for minutes, and a large file takes longer.
EXPIRED = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND, HTTPStatus.GONE)


@dataclass(frozen=True)
class LocalFile:
    """A file of an artifact on this machine."""

    path: Path
    size_bytes: int
    sha256: str
    kept: bool  # it was there already


@dataclass(frozen=True)
class LocalArtifact:
    """An artifact on this machine."""

    name: str
    folder: Path
    files: tuple[LocalFile, ...]

    def find(self, suffix: str) -> Path | None:
        """The file whose name ends like that."""
        return next((file.path for file in self.files if file.path.name.endswith(suffix)), None)


class Downloader:
    """Downloads artifacts of jobs to `folder`/<artifact>/."""

    def __init__(self, client: Client, folder: Path, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._client = client
        self._folder = folder
        self._sleep = sleep

    def download(
        self,
        job_id: str,
        artifact: str | None,
        *,
        overwrite: bool = False,
        trust_sizes: bool = False,
        only: Collection[str] | None = None,
    ) -> LocalArtifact:
        """Download an artifact, by default the one that the service prefers. Raises CliError.

        A file that is there already is kept if it has the right digest, or with `trust_sizes` the right size. Another file in its place
        is an error before anything is downloaded, unless `overwrite`. `only` names the files to download.
        """
        answer = self._client.get(f"/jobs/download/{job_id}", artifact=artifact)
        name = answer["artifact"]
        folder = self._folder / _check_relative(name)
        wanted = [file for file in answer["files"] if only is None or file["path"] in only]
        targets = {file["path"]: folder / _check_relative(file["path"]) for file in wanted}
        kept = {file["path"] for file in wanted if _is_same(targets[file["path"]], file, trust_size=trust_sizes)}
        others = [targets[file["path"]] for file in wanted if file["path"] not in kept and targets[file["path"]].exists()]
        if others and not overwrite:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            raise CliError(f"{others[0]}{more} exists with other content", "--overwrite replaces it, --to names another folder")
        columns = (*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
            for file in wanted:
                if file["path"] not in kept:
                    task = bar.add_task(targets[file["path"]].name, total=file["size_bytes"])
                    fetch = _Fetch(self._client, job_id, name, file, targets[file["path"]], self._sleep)
                    fetch.run(lambda count, task=task: bar.update(task, completed=count))
        files = tuple(LocalFile(targets[file["path"]], file["size_bytes"], file["sha256"], file["path"] in kept) for file in wanted)
        return LocalArtifact(name, folder, files)


class _Fetch:
    """The download of one file. What has arrived stays in a file that ends in .part, until all of it is there and verified."""

    def __init__(self, client: Client, job_id: str, artifact: str, file: Json, target: Path, sleep: Callable[[float], None]) -> None:
        self._client, self._job_id, self._artifact = client, job_id, artifact
        self._file = file
        self._target = target
        self._part = target.with_name(target.name + ".part")
        self._sleep = sleep

    def run(self, report: Callable[[int], None]) -> None:
        """Download until the file is complete; `report` gets the number of bytes that have arrived. Raises CliError."""
        try:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            was_continued = self._size() > 0
            self._complete(report)
            is_right = self._is_right()
            if not is_right and was_continued:  # what an earlier download left was of another file
                self._part.unlink()
                self._complete(report)
                is_right = self._is_right()
            if not is_right:
                self._part.unlink()
                raise CliError(f"the SHA-256 digest of {self._target.name} does not match", "download it again")
            self._part.replace(self._target)
        except OSError as error:
            raise CliError(f"cannot write {self._target}: {error.strerror or error}", "--to names another folder") from error

    def _complete(self, report: Callable[[int], None]) -> None:
        failures = 0
        while self._size() != self._file["size_bytes"] or not self._part.exists():
            before = self._size()
            try:
                problem = self._append(report)
            except httpx2.TransportError as error:
                problem = str(error) or type(error).__name__
            if problem is None:
                continue
            failures = failures + 1 if self._size() <= before else 1
            if failures == MAX_TRIES:
                raise CliError(
                    f"the download of {self._target.name} ended at {self._size()} of {self._file['size_bytes']} bytes: {problem}",
                    "repeat the command: it continues where it ended",
                )
            self._sleep(min(FIRST_DELAY_S * 2 ** (failures - 1), MAX_RETRY_AFTER_S))

    def _append(self, report: Callable[[int], None]) -> str | None:
        """Download what is missing; returns why not all of it came. Raises TransportError, and CliError for what is final."""
        start = self._size()
        if start > self._file["size_bytes"]:
            self._part.unlink()
            start = 0
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        with httpx2.stream("GET", self._file["url"], headers=headers, timeout=TIMEOUT) as response:
            if response.status_code in EXPIRED:
                self._renew_link()
                return f"its link answered {response.status_code}"
            if response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                self._part.unlink(missing_ok=True)
                return "the server has fewer bytes"
            if response.is_server_error or response.status_code == HTTPStatus.TOO_MANY_REQUESTS:
                return f"its link answered {response.status_code}"
            if response.is_error:
                raise ApiError(f"the link to {self._target.name} answered {response.status_code}", status=response.status_code)
            is_rest = response.status_code == HTTPStatus.PARTIAL_CONTENT
            arrived = start if is_rest else 0
            with self._part.open("ab" if is_rest else "wb") as out:
                for chunk in response.iter_bytes():  # as they arrive: what waited for a full chunk would be lost with the connection
                    out.write(chunk)
                    arrived += len(chunk)
                    report(arrived)
        return None if arrived == self._file["size_bytes"] else "the connection ended early"

    def _renew_link(self) -> None:
        answer = self._client.get(f"/jobs/download/{self._job_id}", artifact=self._artifact)
        self._file = next((file for file in answer["files"] if file["path"] == self._file["path"]), self._file)

    def _size(self) -> int:
        with suppress(FileNotFoundError):
            return self._part.stat().st_size
        return 0

    def _is_right(self) -> bool:
        return _digest(self._part) == self._file["sha256"]


def _is_same(target: Path, file: Json, *, trust_size: bool) -> bool:
    if not target.is_file() or target.stat().st_size != file["size_bytes"]:
        return False
    return trust_size or _digest(target) == file["sha256"]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_relative(path: str) -> str:
    """The path, which a service must not let lead out of the folder. Raises CliError."""
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts:
        raise CliError(f"the service names a file outside the folder: {path!r}", "ask the operator of the service")
    return path
