"""The commands about a whole deployment: `capabilities` and `orphans`."""

from typing import Annotated

import typer

from cli.options import JsonOption, create_client
from cli.output import err, out, print_answer, print_json
from cli.render.formats import format_size
from cli.render.tables import capability_lines, orphan_table


def show_capabilities(context: typer.Context, as_json: JsonOption = False) -> None:
    """Show the hardware, trainers and export formats of this deployment."""
    with create_client(context) as client:
        answer = client.get("/capabilities")
    if as_json:
        print_json(answer)
    else:
        for line in capability_lines(answer):
            out.print(line, highlight=False)


def list_orphans(
    context: typer.Context,
    should_delete: Annotated[bool, typer.Option("--delete", help="Delete these files. Review the list first.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List files that belong to no job."""
    with create_client(context) as client:
        answer = client.post("/internal/cleanup", {"orphans": True}) if should_delete else client.get("/internal/orphans")
    print_answer(answer, as_json, orphan_table(answer["orphans"]))
    if as_json:
        return
    total = format_size(sum(orphan["size_bytes"] for orphan in answer["orphans"]))
    err.print(f"{'deleted' if should_delete else 'found'} {total}" if answer["orphans"] else "none", style="dim")
    if not answer["complete"]:
        err.print("the scan ran out of time; run the command again", style="dim")
