"""Which service the command line talks to, and with which credentials."""

from dataclasses import dataclass
from typing import Self

from httpx2 import InvalidURL, Timeout

from cli.errors import CliError
from cli.http_client import MAX_TRIES, Client
from cli.settings import Settings


@dataclass(frozen=True)
class Connection:
    """The URL of a service, and what a caller proves who it is with."""

    url: str
    api_key: str | None = None
    identity_token: str | None = None
    is_named: bool = False  # the caller named the service, by an option or an environment variable
    may_start_soon: bool = True  # a service that does not answer may be restarting

    @classmethod
    def choose(cls, url: str | None, api_key: str | None, identity_token: str | None) -> Self:
        """The global options, else the service that runs in TUNESMITH_HOME.

        The token of the home folder is sent to the service of that home only: any other could keep it and use it.
        """
        settings = Settings.from_environment()
        is_named = url is not None
        url = (url or settings.service_url).rstrip("/")
        if api_key is None and identity_token is None and url == settings.service_url:
            api_key = settings.local_token
        # Where the caller named none and the home has none, nobody waits for one that nobody starts.
        may_start_soon = is_named or settings.service_pid is not None
        return cls(url, api_key, identity_token, is_named, may_start_soon)

    def create_client(self) -> Client:
        """A client of the service. Raises CliError if the URL is none."""
        max_tries = MAX_TRIES if self.may_start_soon else 1
        try:
            return Client(self.url, api_key=self.api_key, identity_token=self.identity_token, max_tries=max_tries)
        except InvalidURL as error:
            raise CliError(f"{self.url} is not a URL: {error}", "set --url or TUNESMITH_URL, such as http://127.0.0.1:8080") from error

    def create_impatient_client(self, timeout_s: float) -> Client:
        """A client that tries once, and gives up soon."""
        timeout = Timeout(timeout_s)
        return Client(self.url, api_key=self.api_key, identity_token=self.identity_token, timeout=timeout, max_tries=1)
