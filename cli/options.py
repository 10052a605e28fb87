"""Options that several commands share, and the client that the global options configure."""

from collections.abc import Callable
from typing import Annotated

import typer

from cli.completion import complete_jobs
from cli.connection import Connection
from cli.http_client import Client

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document: the API's response, or the error.")]
JobArgument = Annotated[
    str,
    typer.Argument(
        autocompletion=complete_jobs, help="A job: its id, the end of its id such as 2d21, its name, or @last for your newest one."
    ),
]
JobsArgument = Annotated[
    list[str], typer.Argument(autocompletion=complete_jobs, help="Jobs, each as in `tunesmith show JOB`; several by spaces.")
]
DatasetNameOption = Annotated[str | None, typer.Option("--name", help="Name of the dataset. Default: the file name.")]
EvalFractionOption = Annotated[float, typer.Option("--eval-fraction", help="Fraction of the rows held out for evaluation.")]
ProjectOption = Annotated[str | None, typer.Option("--project", help="Project of the dataset.")]
LimitOption = Annotated[int, typer.Option("--limit", min=1, max=200, help="Maximum number of rows.")]
CursorOption = Annotated[str | None, typer.Option("--cursor", help="Cursor of the next page, as printed below the previous one.")]
WatchOption = Annotated[bool, typer.Option("--watch", help="Follow the job until it ends.")]
ContinueHardwareOption = Annotated[
    str | None,
    typer.Option("--hardware", help="Continue on other hardware, also of another launcher; `tunesmith capabilities` lists them."),
]
EpochsOption = Annotated[int | None, typer.Option("--epochs", min=1, help="New total number of epochs; must be larger than before.")]
MaxStepsOption = Annotated[
    int | None,
    typer.Option("--max-steps", min=1, help="New total number of steps, for a job that sets max_steps; must be larger than before."),
]
MaxGpuSecondsOption = Annotated[
    float | None,
    typer.Option("--max-gpu-seconds", min=0, help="Pause the job before its attempts have used more: seconds × GPUs."),
]
MaxCostOption = Annotated[
    float | None, typer.Option("--max-cost-usd", min=0, help="Pause the job before its compute has cost more, in US dollars.")
]
MetadataOption = Annotated[list[str] | None, typer.Option(help="A pair NAME=VALUE of your own, to find jobs by; can be repeated.")]
HfTokenOption = Annotated[
    str | None, typer.Option("--hf-token", envvar="HF_TOKEN", help="Hugging Face token for gated or private base models.", show_envvar=True)
]
ResentHfTokenOption = Annotated[
    str | None,
    typer.Option(
        "--hf-token",
        envvar="HF_TOKEN",
        show_envvar=True,
        help="Hugging Face token. The environment variable is sent only if the service asks for it.",
    ),
]
ResentWandbKeyOption = Annotated[
    str | None,
    typer.Option(
        "--wandb-api-key",
        envvar="WANDB_API_KEY",
        show_envvar=True,
        help="W&B API key. The environment variable is sent only if the service asks for it.",
    ),
]
SecretsOption = Annotated[
    list[str] | None, typer.Option("--secret", help="Another secret of the job, such as mlflow_token=VALUE; can be repeated.")
]


def create_client(context: typer.Context) -> Client:
    """A client for the service that the global options select."""
    connection: Connection | Callable[[], Client] = context.obj
    return connection.create_client() if isinstance(connection, Connection) else connection()
