"""Printing: results on standard output, messages about them on standard error."""

import json
import sys
from typing import Any

from rich.console import Console

from cli.http_client import Json

# In a pipe or a file, wrapped lines would break scripts.
out = Console(width=None if sys.stdout.isatty() else 240)
err = Console(stderr=True)


# Any: rich renders strings, tables and more.
def print_answer(answer: Json, as_json: bool, readable: Any) -> None:  # noqa: ANN401
    """Print an API response as JSON or in its readable form."""
    if as_json:
        print(json.dumps(answer))  # for programs: not wrapped, not colored
    else:
        out.print(readable)


def print_next_cursor(page: Json, as_json: bool) -> None:
    """Print the option that shows the next page, if there is one."""
    if page["next_cursor"] and not as_json:
        err.print(f"more: --cursor {page['next_cursor']}", style="dim", soft_wrap=True)
