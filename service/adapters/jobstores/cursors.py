"""Cursors of record pages: opaque text that names the last row of a page."""

import base64
import binascii
import json

from service.core.errors import InvalidRequest


def encode_cursor(created_at: str, row_id: str) -> str:
    """The cursor that continues after a row."""
    return base64.urlsafe_b64encode(json.dumps([created_at, row_id]).encode()).decode().rstrip("=")


def decode_cursor(cursor: str) -> tuple[str, str]:
    """The row that a cursor continues after. Raises InvalidRequest for text that `encode_cursor` did not produce."""
    try:
        created_at, row_id = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    except (ValueError, binascii.Error, TypeError, RecursionError) as error:
        raise invalid_cursor_error() from error
    if not isinstance(created_at, str) or not isinstance(row_id, str) or not (created_at + row_id).isascii():
        raise invalid_cursor_error()
    return created_at, row_id


def invalid_cursor_error() -> InvalidRequest:
    """The error for a cursor that the API did not issue."""
    return InvalidRequest("the cursor is not one that this API issued", hint="leave it out to get the first page", param="cursor")
