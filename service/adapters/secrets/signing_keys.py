"""The key files in the home folder that sign tokens and links: the current key, and the ones that it replaced.

signing-key            the key that signs
signing-key.previous   JSON: replaced keys, each accepted until the last token that it may have signed has expired
"""

import base64
import json
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from secrets import token_bytes
from typing import cast
from uuid import uuid4

from service.adapters.secrets.local import load_or_create_key, write_private_file
from service.core.errors import Unavailable
from service.core.tokens import LAUNCH_TOKEN_TTL

KEY_FILE = "signing-key"
PREVIOUS_KEYS_FILE = "signing-key.previous"
KEY_BYTES = 32


def load_signing_keys(home: Path, now: datetime) -> tuple[bytes, tuple[bytes, ...]]:
    """The key that signs, created at first use, and the previous keys that are still accepted. Raises Unavailable."""
    current = load_or_create_key(home / KEY_FILE, lambda: token_bytes(KEY_BYTES))
    accepted = [key for key, replaced_at in _read_previous_keys(home) if replaced_at + LAUNCH_TOKEN_TTL > now]
    return current, tuple(accepted)


def rotate_signing_key(
    home: Path, now: datetime, *, keep_previous: bool = True, generate: Callable[[], bytes] = lambda: token_bytes(KEY_BYTES)
) -> None:
    """Replace the signing key; a service uses the new one from its next start on. Raises Unavailable.

    The replaced key stays accepted, so attempts go on and links work. With `keep_previous=False` every token and link that exists
    becomes invalid, which is the answer to a stolen key.
    """
    replaced = load_or_create_key(home / KEY_FILE, generate)
    kept = [(replaced, now), *(row for row in _read_previous_keys(home) if row[1] + LAUNCH_TOKEN_TTL > now)] if keep_previous else []
    rows = [{"key": base64.b64encode(key).decode(), "replaced_at": at.isoformat()} for key, at in kept]
    # First the previous keys: after a crash between the two writes, the current key is also listed as a previous one.
    _replace_private_file(home / PREVIOUS_KEYS_FILE, json.dumps(rows).encode())
    _replace_private_file(home / KEY_FILE, generate())


def _read_previous_keys(home: Path) -> list[tuple[bytes, datetime]]:
    path = home / PREVIOUS_KEYS_FILE
    try:
        rows = cast(list[dict[str, str]], json.loads(path.read_bytes()))
        return [(base64.b64decode(row["key"], validate=True), datetime.fromisoformat(row["replaced_at"])) for row in rows]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise Unavailable(f"{path} is damaged", hint="delete it; tokens and links of earlier keys then become invalid") from error


def _replace_private_file(path: Path, content: bytes) -> None:
    part = path.with_name(f"{path.name}.{uuid4().hex}.part")
    write_private_file(part, content)
    os.replace(part, path)
