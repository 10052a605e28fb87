"""The entry point of `tunesmith`: command names, global options and error output.

A command's module is imported when that command runs, so that a quick command does not load what a large one needs.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command, get_group

from cli.errors import CliError
from schema.version import VERSION

# In the order that `tunesmith --help` shows: a function, or a Typer app with commands of its own.
COMMANDS: dict[str, str] = {
    "serve": "cli.local:serve",
    "stop": "cli.background:stop",
    "train": "cli.train:train",
    "jobs": "cli.jobs:list_jobs",
    "show": "cli.jobs:show_job",
    "watch": "cli.watch:watch",
    "logs": "cli.watch:logs",
    "pause": "cli.control:pause",
    "resume": "cli.control:resume",
    "retry": "cli.control:retry",
    "cancel": "cli.control:cancel",
    "checkpoints": "cli.jobs:list_checkpoints",
    "export": "cli.submit:export",
    "clone": "cli.submit:clone",
    "delete": "cli.jobs:delete_jobs",
    "orphans": "cli.deployment:list_orphans",
    "download": "cli.download:download",
    "chat": "cli.chat:chat",
    "datasets": "cli.datasets:app",
    "models": "cli.models:app",
    "du": "cli.storage:show_usage",
    "prune": "cli.storage:prune",
    "capabilities": "cli.deployment:show_capabilities",
    "doctor": "cli.doctor:doctor",
    "whoami": "cli.access:show_whoami",
    "open": "cli.access:open_in_browser",
    "keys": "cli.access:app",
    "audit": "cli.access:list_audit_entries",
}


class LazyCommands(Mapping[str, "TyperCommand | TyperGroup"]):
    """The commands of a table, each imported when it is looked up."""

    def __init__(self, table: Mapping[str, str]) -> None:
        self._table = table

    def __getitem__(self, name: str) -> TyperCommand | TyperGroup:
        module, _, attribute = self._table[name].partition(":")
        target = getattr(import_module(module), attribute)
        if isinstance(target, typer.Typer):
            command: Any = get_group(target)
        else:
            single = typer.Typer(add_completion=False)
            single.command(name)(target)
            command = get_command(single)
        command.name = name
        return command

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)


class RootGroup(TyperGroup):
    """The group of all commands."""

    # Any: the parameters are those of Typer.
    def __init__(self, **parameters: Any) -> None:  # noqa: ANN401
        super().__init__(**parameters)
        self.commands = LazyCommands(COMMANDS)  # type: ignore[assignment]  # no command is added after this

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]  # noqa: ANN401
        """Run the command. An error gets the options of the command, for its hints."""
        words = tuple(ctx.args)  # after the name of the command; running it takes them away
        try:
            return super().invoke(ctx)
        except CliError as error:
            command = self.commands[ctx.invoked_subcommand or ""]
            if isinstance(command, TyperGroup) and words:
                command = command.commands.get(words[0], command)
            error.options = frozenset(option for parameter in command.params for option in parameter.opts)
            raise


app = typer.Typer(cls=RootGroup, no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(is_given: bool) -> None:
    if is_given:
        print(f"tunesmith {VERSION}")
        raise typer.Exit


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
    version: Annotated[  # noqa: ARG001  # its callback prints it
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """One HTTP request becomes a fine-tuned model."""
    if context.obj is None:  # tests pass their own client factory
        from cli.connection import Connection

        context.obj = Connection.choose(url, api_key, identity_token)


def main() -> None:
    """Run a command. An error is printed as a line per problem, each with a hint, never as a stack trace."""
    as_json = "--json" in sys.argv
    try:
        exit_code = app(standalone_mode=False, prog_name="tunesmith")
    except CliError as error:
        raise SystemExit(_report(error, as_json)) from None
    except typer.TyperException as error:  # a command or an option that does not exist, or a value of the wrong kind
        raise SystemExit(_report(_as_cli_error(error), as_json)) from None
    except (KeyboardInterrupt, typer.Abort):
        raise SystemExit(130) from None
    raise SystemExit(exit_code or 0)


def _as_cli_error(error: typer.TyperException) -> CliError:
    """The error with a command that helps. The text is empty if the help was printed instead of it."""
    context: Any = getattr(error, "ctx", None)  # not every error of Typer has one
    hint = f"{context.command_path} --help" if context is not None else ""
    return CliError(error.format_message(), hint, exit_code=error.exit_code)


def _report(error: CliError, as_json: bool) -> int:
    from cli.output import print_error

    if error.message:
        with suppress(BrokenPipeError):
            print_error(error, as_json)
    return error.exit_code


if __name__ == "__main__":
    main()
