"""Where commands print: answers on standard output, everything said about them on standard error."""

import json
import sys
from typing import Any

from rich.console import Console

from cli.http_client import Json

# Into a pipe or a file a line is as long as it must be.
out = Console(width=None if sys.stdout.isatty() else 240)
err = Console(stderr=True)


# Any: whatever rich can render.
def print_answer(answer: Json, as_json: bool, readable: Any) -> None:  # noqa: ANN401
    """Print the API's answer as JSON, or the readable form of it."""
    if as_json:
        print(json.dumps(answer))  # for programs: never wrapped or colored
    else:
        out.print(readable)


def print_next_cursor(page: Json, as_json: bool) -> None:
    """Print the option that shows the next page, if there is one."""
    if page["next_cursor"] and not as_json:
        err.print(f"more: --cursor {page['next_cursor']}", style="dim", soft_wrap=True)
