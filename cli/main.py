"""The entry point of `tunesmith`: command names, global options and error output."""

from collections.abc import Callable
from typing import Annotated

import typer
from rich.markup import escape

from cli import access, control, datasets, deployment, download, jobs, local, submit, watch
from cli.errors import CliError
from cli.http_client import Client
from cli.output import err
from cli.settings import Settings

# In the order that `tunesmith --help` shows.
COMMANDS: dict[str, Callable[..., None]] = {
    "serve": local.serve,
    "train": submit.train,
    "jobs": jobs.list_jobs,
    "show": jobs.show_job,
    "watch": watch.watch,
    "logs": watch.logs,
    "pause": control.pause,
    "resume": control.resume,
    "retry": control.retry,
    "cancel": control.cancel,
    "checkpoints": jobs.list_checkpoints,
    "export": submit.export,
    "clone": submit.clone,
    "delete": jobs.delete_job,
    "orphans": deployment.list_orphans,
    "download": download.download,
    "chat": local.chat,
    "capabilities": deployment.show_capabilities,
    "whoami": access.show_whoami,
    "open": access.open_in_browser,
    "audit": access.list_audit_entries,
}

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)
app.add_typer(datasets.app, name="datasets")
app.add_typer(access.app, name="keys")
access.app.command("rotate-signing-key")(local.rotate_signing_key)


@app.callback()
def set_global_options(
    context: typer.Context,
    url: Annotated[
        str | None, typer.Option(envvar="TUNESMITH_URL", help="URL of the service. Default: the service that runs in TUNESMITH_HOME.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="TUNESMITH_API_KEY", help="API key. Default, for the service that runs in TUNESMITH_HOME: that folder's token."
        ),
    ] = None,
    identity_token: Annotated[
        str | None,
        typer.Option(
            envvar="TUNESMITH_IDENTITY_TOKEN",
            help="Identity token for a service on Cloud Run, from `gcloud auth print-identity-token`.",
        ),
    ] = None,
) -> None:
    """One HTTP request becomes a fine-tuned model."""
    if context.obj is None:  # tests pass their own client factory
        context.obj = lambda: _create_client(url, api_key, identity_token)


def _create_client(url: str | None, api_key: str | None, identity_token: str | None) -> Client:
    """The token of the home folder is sent to the service of that home only: any other could keep it and use it."""
    settings = Settings.from_environment()
    url = (url or settings.service_url).rstrip("/")
    if api_key is None and identity_token is None and url == settings.service_url:
        api_key = settings.local_token
    return Client(url, api_key=api_key, identity_token=identity_token)


def main() -> None:
    """Run a command. An error is printed as one line and a hint, never as a stack trace."""
    try:
        app()
    except CliError as error:
        err.print(f"[red]error[/] {escape(error.message)}", highlight=False)
        if error.hint:
            err.print(f"  hint: {escape(error.hint)}", style="dim", highlight=False)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
