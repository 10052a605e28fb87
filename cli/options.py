"""Options that several commands share, and the client that the global options describe."""

from collections.abc import Callable
from typing import Annotated

import typer

from cli.http_client import Client

JsonOption = Annotated[bool, typer.Option("--json", help="Print the API's JSON.")]
JobIdArgument = Annotated[str, typer.Argument(help="As `tunesmith train` or `tunesmith jobs` printed it.")]
DatasetNameOption = Annotated[str | None, typer.Option("--name", help="Left out: the file's name.")]
EvalFractionOption = Annotated[float, typer.Option("--eval-fraction", help="Share of the rows held out for evaluation.")]
ProjectOption = Annotated[str | None, typer.Option("--project", help="The project that it belongs to.")]
LimitOption = Annotated[int, typer.Option("--limit", min=1, max=200)]
CursorOption = Annotated[str | None, typer.Option("--cursor", help="Continue behind a page.")]
WatchOption = Annotated[bool, typer.Option("--watch", help="Follow it until it ends.")]
ContinueHardwareOption = Annotated[
    str | None, typer.Option("--hardware", help="Go on with another profile; `tunesmith capabilities` lists them.")
]
EpochsOption = Annotated[int | None, typer.Option("--epochs", min=1, help="In all; more than before.")]
MaxStepsOption = Annotated[
    int | None, typer.Option("--max-steps", min=1, help="In all; more than before, where the job is counted in steps.")
]
HfTokenOption = Annotated[str | None, typer.Option("--hf-token", envvar="HF_TOKEN", help="For gated or private bases.", show_envvar=True)]
ResentHfTokenOption = Annotated[
    str | None, typer.Option("--hf-token", envvar="HF_TOKEN", show_envvar=True, help="The variable is sent only where it is needed again.")
]
ResentWandbKeyOption = Annotated[str | None, typer.Option("--wandb-api-key", envvar="WANDB_API_KEY", show_envvar=True, help="Likewise.")]
SecretsOption = Annotated[
    list[str] | None, typer.Option("--secret", help="Another one that the job had, such as mlflow_token=…; can be repeated.")
]


def create_client(context: typer.Context) -> Client:
    """A client of the service that the options before the command name."""
    create: Callable[[], Client] = context.obj
    return create()
