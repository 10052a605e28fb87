"""What the account that runs a service sends with each request."""

from pathlib import Path


def local_headers(home: Path) -> dict[str, str]:
    """The header with the token of a service's home folder."""
    return {"Authorization": f"Bearer {(home / 'token').read_text()}"}
