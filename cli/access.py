"""The commands about access: `whoami`, `keys` and `audit`."""

import webbrowser
from typing import Annotated

import typer

from cli.local import rotate_signing_key
from cli.options import CursorOption, JsonOption, LimitOption, create_client
from cli.output import err, print_answer, print_json, print_next_cursor
from cli.render.tables import audit_table, key_table

app = typer.Typer(no_args_is_help=True, help="API keys: create, list, revoke.")
app.command()(rotate_signing_key)

AllTenantsOption = Annotated[bool, typer.Option("--all-tenants", help="Of every tenant; for an operator of the deployment.")]


def show_whoami(context: typer.Context, as_json: JsonOption = False) -> None:
    """Show who the service takes you for, and what you may do."""
    with create_client(context) as client:
        answer = client.get("/whoami")
    scopes = ", ".join(answer["scopes"])
    print_answer(answer, as_json, f"{answer['subject']} of tenant {answer['tenant_id']}\nmay do: {scopes}")


def list_audit_entries(
    context: typer.Context,
    subject: Annotated[str | None, typer.Option(help="Only what this caller did, such as key:key_0123456789ab.")] = None,
    action: Annotated[str | None, typer.Option(help="Only this action, such as create_training_job.")] = None,
    all_tenants: AllTenantsOption = False,
    limit: LimitOption = 50,
    cursor: CursorOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what callers changed, and the links to models that they took, newest first."""
    with create_client(context) as client:
        query = {"subject": subject, "action": action, "limit": limit, "cursor": cursor}
        page = client.get("/audit", **query, all_tenants="true" if all_tenants else None)
    print_answer(page, as_json, audit_table(page["entries"]))
    print_next_cursor(page, as_json)


@app.command("create")
def create_key(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="What the key is for, such as ci or evaluation-service.")],
    scopes: Annotated[
        list[str] | None, typer.Option("--scope", help="read, submit or admin; each includes the one before it. Default: submit.")
    ] = None,
    days: Annotated[int, typer.Option("--days", min=1, max=3650, help="Days until it expires.")] = 90,
    tenant: Annotated[str | None, typer.Option(help="Tenant of the key; for an operator of the deployment. Default: yours.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Create an API key. It is printed once, on standard output, and stored nowhere."""
    request = {"name": name, "scopes": scopes or ["submit"], "expires_in_days": days} | ({"tenant_id": tenant} if tenant else {})
    with create_client(context) as client:
        answer = client.create_key(request)
    if as_json:
        print_answer(answer, as_json, "")
        return
    print(answer["key"])  # for scripts: nothing but the key
    err.print(
        f"{answer['key_id']} of tenant {answer['tenant_id']}, {', '.join(answer['scopes'])}, until {answer['expires_at'][:10]}", style="dim"
    )


@app.command("list")
def list_keys(context: typer.Context, all_tenants: AllTenantsOption = False, as_json: JsonOption = False) -> None:
    """List API keys, without their secret part."""
    with create_client(context) as client:
        answer = client.get("/keys", all_tenants="true" if all_tenants else None)
    print_answer(answer, as_json, key_table(answer["keys"]))


@app.command("revoke")
def revoke_key(
    context: typer.Context,
    key_id: Annotated[str, typer.Argument(help="Id of the key, as `tunesmith keys list` shows it.")],
    as_json: JsonOption = False,
) -> None:
    """Revoke an API key: the service refuses it within ten seconds."""
    with create_client(context) as client:
        answer = client.delete(f"/keys/{key_id}")
    if as_json:
        print_json(answer)
    else:
        err.print(f"{answer['key_id']} ({answer['name']}) is revoked", style="dim")


def open_in_browser(
    context: typer.Context,
    print_only: Annotated[bool, typer.Option("--print", help="Print the link instead of opening it.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Log this machine's browser in, and open the service in it. The link works once, for a minute."""
    with create_client(context) as client:
        answer = client.post("/login-codes")
    if as_json:
        print_json(answer)
    elif print_only or not webbrowser.open(answer["url"]):
        print(answer["url"])
