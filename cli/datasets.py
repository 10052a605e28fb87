"""The commands `tunesmith datasets upload`, `import`, `list`, `show` and `delete`."""

from pathlib import Path
from typing import Annotated

import typer

from cli.options import CursorOption, DatasetNameOption, EvalFractionOption, JsonOption, LimitOption, ProjectOption, create_client
from cli.output import err, out, print_answer, print_next_cursor
from cli.render.tables import dataset_table
from cli.rows import UploadOptions, check_rows_file, describe_rows, find_row_warning, upload_rows

app = typer.Typer(help="Upload, import, list, show and delete datasets.", no_args_is_help=True)


@app.command("upload")
def upload_dataset(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="JSONL file; docs/api.md shows the row formats.")],
    name: DatasetNameOption = None,
    eval_fraction: EvalFractionOption = 0.1,
    project: ProjectOption = None,
    as_json: JsonOption = False,
) -> None:
    """Upload a dataset. The service validates all rows before it stores any."""
    check_rows_file(file)
    with create_client(context) as client:
        dataset = upload_rows(client, file, UploadOptions(name, eval_fraction, project))
    print_answer(dataset, as_json, dataset["processed_dataset_id"])
    if not as_json:
        err.print(describe_rows(dataset), style="dim")
        if warning := find_row_warning(dataset):
            err.print(f"[yellow]warning[/] {warning}")


@app.command("import")
def import_dataset(
    context: typer.Context,
    key: Annotated[str, typer.Argument(help="Key of a file in the dataset store, such as incoming/rows.jsonl.")],
    name: DatasetNameOption = None,
    eval_fraction: EvalFractionOption = 0.1,
    project: ProjectOption = None,
    as_json: JsonOption = False,
) -> None:
    """Create a dataset from a file in the dataset store, for files that are too large to upload."""
    with create_client(context) as client:
        dataset = client.import_dataset({"incoming": key} | UploadOptions(name, eval_fraction, project).form_fields)
    print_answer(dataset, as_json, dataset["processed_dataset_id"])


@app.command("list")
def list_datasets(context: typer.Context, limit: LimitOption = 50, cursor: CursorOption = None, as_json: JsonOption = False) -> None:
    """List datasets, newest first."""
    with create_client(context) as client:
        page = client.get("/datasets", limit=limit, cursor=cursor)
    print_answer(page, as_json, dataset_table(page["datasets"]))
    print_next_cursor(page, as_json)


@app.command("show")
def show_dataset(
    context: typer.Context, dataset_id: Annotated[str, typer.Argument(help="processed_dataset_id")], as_json: JsonOption = False
) -> None:
    """Show a dataset and its first rows."""
    with create_client(context) as client:
        dataset = client.get(f"/datasets/{dataset_id}")
    print_answer(dataset, as_json, dataset_table([dataset]))
    if not as_json:
        out.print_json(data=dataset["preview"])


@app.command("delete")
def delete_dataset(
    context: typer.Context, dataset_id: Annotated[str, typer.Argument(help="processed_dataset_id")], as_json: JsonOption = False
) -> None:
    """Delete a dataset that no unfinished job uses."""
    with create_client(context) as client:
        deleted = client.delete(f"/datasets/{dataset_id}")
    print_answer(deleted, as_json, f"deleted {dataset_id}")
