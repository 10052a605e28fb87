"""`https://…`: one file of the web, at addresses that the deployment's egress policy allows.

Each redirect is checked like the URL itself. A download that breaks off goes on where it was, if the server says that the file is still
the same one.
"""

import time
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import unquote, urljoin, urlsplit

from jobs.ingest.sources import URL_SECRET, Downloaded, SourceRequest, check_size, local_path, too_large
from jobs.runtime.egress import checked_addresses, guard_connections
from jobs.runtime.errors import JobFailed
from jobs.runtime.http_retry import is_transient_status
from jobs.runtime.retry import RETRY_INITIAL_S, RETRY_MAX_S, TRIES
from schema.egress import EgressRefused, parse_url
from schema.ingestion import InputFile

if TYPE_CHECKING:
    import httpx2

MAX_REDIRECTS = 5
TIMEOUT_S = 60.0  # without receiving a byte
HTML_TYPES = ("text/html", "application/xhtml+xml")
HTML_SUFFIXES = (".html", ".htm", ".txt", ".md")


class _Interrupted(Exception):
    """The server did not answer, or the connection broke; a later try may go on."""


def download(request: SourceRequest, *, sleep: Callable[[float], None] = time.sleep) -> Downloaded:
    """Download the file. Raises JobFailed."""
    import httpx2

    url = request.secrets.get(URL_SECRET) or request.config.source
    path = local_path(request, 0)
    with httpx2.Client(timeout=TIMEOUT_S, follow_redirects=False) as client, path.open("wb") as target:
        transfer = _Transfer(request, client, target, url)
        for wait in range(TRIES):
            try:
                transfer.run()
                break
            except _Interrupted as error:
                if wait == TRIES - 1:
                    raise JobFailed("internal", f"{request.config.source} cannot be read now: {error}", "retry the job") from error
                sleep(min(RETRY_INITIAL_S * 2**wait, RETRY_MAX_S))
    return Downloaded((InputFile(path=str(path), name=transfer.name),), request.config.source)


class _Transfer:
    """One download, in as many connections as it takes."""

    def __init__(self, request: SourceRequest, client: "httpx2.Client", target: BinaryIO, url: str) -> None:
        self.name = unquote(PurePosixPath(urlsplit(url).path).name) or "rows"
        self._request = request
        self._client = client
        self._target = target
        self._url = url
        self._validator: str | None = None  # by which the server knows the version of the file that was begun
        self._received = 0

    def run(self) -> None:
        """Receive what is missing. Raises _Interrupted, JobFailed."""
        import httpx2

        try:
            self._follow(self._url, MAX_REDIRECTS)
        except EgressRefused as error:
            raise JobFailed("invalid_config", f"{self._request.config.source} is refused: {error}", error.hint) from error
        except httpx2.UnsupportedProtocol as error:
            raise JobFailed("invalid_config", f"{self._request.config.source} leads to an address that is not https") from error
        except (httpx2.TransportError, OSError) as error:
            raise _Interrupted(str(error) or type(error).__name__) from error

    def _follow(self, url: str, redirects: int) -> None:
        target = parse_url(url)
        checked_addresses(target, self._request.policy)
        headers = {"Accept-Encoding": "identity"}
        if self._received and self._validator:
            headers |= {"Range": f"bytes={self._received}-", "If-Range": self._validator}
        with guard_connections(target, self._request.policy), self._client.stream("GET", url, headers=headers) as response:
            if not response.has_redirect_location:
                return self._receive(response)
            location = urljoin(url, response.headers["location"])
        if not redirects:
            raise JobFailed("invalid_config", f"{self._request.config.source} redirects more than {MAX_REDIRECTS} times")
        return self._follow(location, redirects - 1)

    def _receive(self, response: "httpx2.Response") -> None:
        source, config = self._request.config.source, self._request.config
        status = response.status_code
        if is_transient_status(status):
            raise _Interrupted(f"the server answers {status}")
        if status in (401, 403):
            hint = "it must be readable without a login, or by a signed URL that has not expired"
            raise JobFailed("auth", f"{source} may not be read: the server answers {status}", hint)
        if status not in (200, 206):
            raise JobFailed("invalid_data", f"{source} cannot be read: the server answers {status}", "check the address")
        if status == 200:  # from the beginning
            self._target.seek(0)
            self._target.truncate()
            self._received = 0
            self._check_type(response)
            self._validator = _find_validator(response)
        length = response.headers.get("content-length", "")
        check_size(self._request, [source], self._received + (int(length) if length.isdecimal() else 0))
        for chunk in response.iter_raw():
            self._request.check_stop()
            self._received += len(chunk)
            if self._received > config.limits.max_source_bytes:
                raise too_large(self._request)
            self._target.write(chunk)

    def _check_type(self, response: "httpx2.Response") -> None:
        """Raise JobFailed for a page about a file instead of the file."""
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind in HTML_TYPES and not self.name.lower().endswith(HTML_SUFFIXES):
            hint = "copy the address of the download itself; a page for people often has a link called raw or download"
            raise JobFailed("invalid_data", f"{self._request.config.source} is a web page, not a file", hint)


def _find_validator(response: "httpx2.Response") -> str | None:
    """What identifies this version of the file: a strong ETag, or else the date of its last change."""
    etag = response.headers.get("etag", "")
    return etag if etag and not etag.startswith("W/") else response.headers.get("last-modified")
