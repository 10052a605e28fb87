"""`tunesmith datasets`: upload, import, list, show and delete."""

from pathlib import Path
from typing import Annotated

import typer

from cli.options import CursorOption, DatasetNameOption, EvalFractionOption, JsonOption, LimitOption, ProjectOption, create_client
from cli.output import err, out, print_answer, print_next_cursor
from cli.render.tables import dataset_table

app = typer.Typer(help="Upload, list and show datasets.", no_args_is_help=True)


@app.command("upload")
def upload_dataset(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="JSONL; docs/api.md shows the forms of rows.")],
    name: DatasetNameOption = None,
    eval_fraction: EvalFractionOption = 0.1,
    project: ProjectOption = None,
    as_json: JsonOption = False,
) -> None:
    """Upload rows; every one is checked before any is kept."""
    with create_client(context) as client, file.open("rb") as stream:
        dataset = client.upload(stream, file.name, _form_fields(name, eval_fraction, project))
    print_answer(dataset, as_json, dataset["processed_dataset_id"])
    if not as_json:
        err.print(f"{dataset['rows']} rows of {dataset['dataset_type']}: {dataset['splits']}", style="dim")


@app.command("import")
def import_dataset(
    context: typer.Context,
    key: Annotated[str, typer.Argument(help="Of a file in the dataset store, such as incoming/rows.jsonl.")],
    name: DatasetNameOption = None,
    eval_fraction: EvalFractionOption = 0.1,
    project: ProjectOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a dataset of a file that lies in the store already: for those that are too large for an upload."""
    with create_client(context) as client:
        dataset = client.import_dataset({"incoming": key} | _form_fields(name, eval_fraction, project))
    print_answer(dataset, as_json, dataset["processed_dataset_id"])


def _form_fields(name: str | None, eval_fraction: float, project: str | None) -> dict[str, str]:
    fields = {"eval_fraction": str(eval_fraction)}
    return fields | ({"name": name} if name else {}) | ({"project_id": project} if project else {})


@app.command("list")
def list_datasets(context: typer.Context, limit: LimitOption = 50, cursor: CursorOption = None, as_json: JsonOption = False) -> None:
    """Datasets, newest first."""
    with create_client(context) as client:
        page = client.get("/datasets", limit=limit, cursor=cursor)
    print_answer(page, as_json, dataset_table(page["datasets"]))
    print_next_cursor(page, as_json)


@app.command("show")
def show_dataset(context: typer.Context, dataset_id: Annotated[str, typer.Argument()], as_json: JsonOption = False) -> None:
    """A dataset and its first rows."""
    with create_client(context) as client:
        dataset = client.get(f"/datasets/{dataset_id}")
    print_answer(dataset, as_json, dataset_table([dataset]))
    if not as_json:
        out.print_json(data=dataset["preview"])


@app.command("delete")
def delete_dataset(context: typer.Context, dataset_id: Annotated[str, typer.Argument()], as_json: JsonOption = False) -> None:
    """Remove a dataset that no unfinished job needs."""
    with create_client(context) as client:
        deleted = client.delete(f"/datasets/{dataset_id}")
    print_answer(deleted, as_json, f"deleted {dataset_id}")
