"""Commands about a deployment as a whole: capabilities, orphans."""

from typing import Annotated

import typer

from cli.options import JsonOption, create_client
from cli.output import err, out, print_answer
from cli.render.formats import format_size
from cli.render.tables import capability_lines, orphan_table


def show_capabilities(context: typer.Context, as_json: JsonOption = False) -> None:
    """What this deployment can train, on what, and into what."""
    with create_client(context) as client:
        answer = client.get("/capabilities")
    if as_json:
        out.print_json(data=answer)
    else:
        for line in capability_lines(answer):
            out.print(line, highlight=False)


def list_orphans(
    context: typer.Context,
    should_delete: Annotated[bool, typer.Option("--delete", help="Remove them. Look at the list first.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Files that belong to no job."""
    with create_client(context) as client:
        answer = client.post("/internal/cleanup", {"orphans": True}) if should_delete else client.get("/internal/orphans")
    print_answer(answer, as_json, orphan_table(answer["orphans"]))
    if as_json:
        return
    total = format_size(sum(orphan["size_bytes"] for orphan in answer["orphans"]))
    err.print(f"{'deleted' if should_delete else 'found'} {total}" if answer["orphans"] else "there are none", style="dim")
    if not answer["complete"]:
        err.print("not everything could be looked at in the time there was; repeat the command", style="dim")
