"""The commands of `tunesmith datasets`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from cli.background import ensure_service
from cli.choices import resolve_base
from cli.completion import complete_bases, complete_datasets
from cli.errors import CliError
from cli.hints import translate_hint
from cli.http_client import Json
from cli.options import (
    CursorOption,
    DatasetNameOption,
    EvalFractionOption,
    HfTokenOption,
    JsonOption,
    LimitOption,
    ProjectOption,
    create_client,
)
from cli.output import err, out, print_answer, print_json, print_next_cursor
from cli.render.dataset import dataset_lines, describe_detected, problem_table, report_lines, token_lines
from cli.render.formats import humanize
from cli.render.tables import dataset_table
from cli.row_options import (
    DelimiterOption,
    DropInvalidOption,
    EncodingOption,
    FileFormatOption,
    MapOption,
    MappingOption,
    RowOptions,
    SheetOption,
    SourceCredentialsOption,
    TextUnitOption,
    build_reading,
    build_secrets,
)
from cli.rows import find_rows, is_source, remember_upload
from cli.settings import Settings
from cli.upload import SHOWN_PROBLEMS, check_rows, import_key, import_source, print_dataset, upload_rows

app = typer.Typer(help="Upload, check, list, show and delete datasets.", no_args_is_help=True)

FileArgument = Annotated[
    Path,
    typer.Argument(exists=True, help="JSON Lines, JSON, CSV, TSV, Parquet, Arrow, XLSX or text, also as .gz, .zst, .zip or a folder."),
]
DatasetArgument = Annotated[str, typer.Argument(autocompletion=complete_datasets, help="processed_dataset_id")]
MAX_PROBLEMS = 1000  # that a service names
CHECK_OPTIONS = frozenset({"--mapping", "--encoding", "--delimiter", "--sheet", "--text-unit", "--file-format"})


@app.command("upload")
def upload_dataset(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            help="JSON Lines, JSON, CSV, TSV, Parquet, Arrow, XLSX or text, also as .gz, .zst, .zip or a folder; "
            "or hf://, gs://, s3://, https://."
        ),
    ],
    name: DatasetNameOption = None,
    eval_fraction: EvalFractionOption = 0.1,
    project: ProjectOption = None,
    mapping: MappingOption = None,
    pairs: MapOption = None,
    file_format: FileFormatOption = None,
    encoding: EncodingOption = None,
    delimiter: DelimiterOption = None,
    sheet: SheetOption = None,
    text_unit: TextUnitOption = None,
    drop_invalid: DropInvalidOption = False,
    hf_token: HfTokenOption = None,
    source_credentials: SourceCredentialsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a dataset. The service validates all rows before it stores any. Starts a service on this machine if none runs."""
    reading = build_reading(
        mapping=mapping,
        pairs=pairs,
        file_format=file_format,
        encoding=encoding,
        delimiter=delimiter,
        sheet=sheet,
        text_unit=text_unit,
        drop_invalid=drop_invalid,
    )
    options = RowOptions(name, eval_fraction, project, reading, build_secrets(source, hf_token, source_credentials))
    rows = None if is_source(source) else find_rows(_require_path(source))
    settings = Settings.from_environment()
    ensure_service(context, settings)
    with create_client(context) as client:
        if rows:
            dataset = upload_rows(client, rows, options, is_quiet=as_json)
            remember_upload(client, rows, options, settings, dataset["processed_dataset_id"])
        else:
            dataset = import_source(client, source, options, is_quiet=as_json)
    print_answer(dataset, as_json, dataset["processed_dataset_id"])
    if not as_json:
        print_dataset(rows.name if rows else source, dataset)


@app.command("check")
def check_dataset(
    context: typer.Context,
    file: FileArgument,
    eval_fraction: EvalFractionOption = 0.1,
    mapping: MappingOption = None,
    pairs: MapOption = None,
    file_format: FileFormatOption = None,
    encoding: EncodingOption = None,
    delimiter: DelimiterOption = None,
    sheet: SheetOption = None,
    text_unit: TextUnitOption = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=MAX_PROBLEMS, help="Problems to show.")] = SHOWN_PROBLEMS,
    as_json: JsonOption = False,
) -> None:
    """Find every row that is not valid, without keeping anything. Exits with 1 if there is one. Starts a service if none runs."""
    reading = build_reading(
        mapping=mapping,
        pairs=pairs,
        file_format=file_format,
        encoding=encoding,
        delimiter=delimiter,
        sheet=sheet,
        text_unit=text_unit,
        drop_invalid=False,
    )
    rows = find_rows(file)
    ensure_service(context, Settings.from_environment())
    with create_client(context) as client:
        found = check_rows(client, rows, RowOptions(eval_fraction=eval_fraction, reading=reading))
    if as_json:
        print_json(found)
    else:
        _print_check(rows.name, found, limit)
    if found["problem_count"] or found["refused"]:
        raise typer.Exit(1)


@app.command("import")
def import_dataset(
    context: typer.Context,
    key: Annotated[str, typer.Argument(help="Key of a file in the dataset store, such as incoming/rows.jsonl.")],
    name: DatasetNameOption = None,
    eval_fraction: EvalFractionOption = 0.1,
    project: ProjectOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a dataset of a file that is in the dataset store already."""
    with create_client(context) as client:
        dataset = import_key(client, key, RowOptions(name, eval_fraction, project), is_quiet=as_json)
    print_answer(dataset, as_json, dataset["processed_dataset_id"])


@app.command("list")
def list_datasets(context: typer.Context, limit: LimitOption = 50, cursor: CursorOption = None, as_json: JsonOption = False) -> None:
    """List datasets, newest first."""
    with create_client(context) as client:
        page = client.get("/datasets", limit=limit, cursor=cursor)
    print_answer(page, as_json, dataset_table(page["datasets"]))
    print_next_cursor(page, as_json)


@app.command("show")
def show_dataset(context: typer.Context, dataset_id: DatasetArgument, as_json: JsonOption = False) -> None:
    """Show a dataset: its status, what was recognized and found in its rows, and the first of them."""
    with create_client(context) as client:
        dataset = client.get(f"/datasets/{dataset_id}")
    if as_json:
        print_json(dataset)
        return
    for line in dataset_lines(dataset):
        out.print(line, highlight=False, soft_wrap=True)
    report: Json = dataset.get("report") or {}
    problems: list[Json] = dataset.get("problems") or report.get("problems") or []
    if problems:
        out.print(problem_table(problems[:SHOWN_PROBLEMS]))
        if len(problems) > SHOWN_PROBLEMS:
            err.print(f"and {len(problems) - SHOWN_PROBLEMS} more, which --json shows", style="dim", highlight=False)
    if any(dataset["preview"].values()):
        out.print_json(data=dataset["preview"])


@app.command("rows")
def show_rows(
    context: typer.Context,
    dataset_id: DatasetArgument,
    split: Annotated[str, typer.Option(help="train or eval.")] = "train",
    offset: Annotated[int, typer.Option(min=0, help="Number of the first row.")] = 0,
    limit: Annotated[int, typer.Option(min=1, max=200, help="Maximum number of rows.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """Show any rows of a dataset."""
    with create_client(context) as client:
        page = client.get(f"/datasets/{dataset_id}/rows", split=split, offset=offset, limit=limit)
    if as_json:
        print_json(page)
        return
    for number, row in enumerate(page["rows"], start=page["offset"]):
        out.print(f"[bold]{number}[/]")
        out.print_json(data=row)
    last = page["offset"] + len(page["rows"]) - 1
    more = f"; more: --offset {page['next_offset']}" if page["next_offset"] is not None else ""
    shown = f"rows {page['offset']} to {last}" if page["rows"] else "no row"
    err.print(f"{shown} of {page['total_rows']:,} ({page['split']}){more}", style="dim", highlight=False, soft_wrap=True)


@app.command("tokens")
def count_tokens(
    context: typer.Context,
    dataset_id: DatasetArgument,
    base: Annotated[str, typer.Option(autocompletion=complete_bases, help="Base model whose tokenizer counts, such as gemma-3-270m.")],
    max_length: Annotated[int | None, typer.Option(min=8, help="Also count the rows that are longer, in tokens.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Count the tokens of a dataset's rows with the tokenizer of a base model in the model store."""
    with create_client(context) as client:
        name = resolve_base(client, base, Settings.from_environment())
        lengths = client.post(f"/datasets/{dataset_id}/token_lengths", {"base_model_id": name, "max_seq_length": max_length})
    if as_json:
        print_json(lengths)
        return
    for line in token_lines(lengths):
        out.print(line, highlight=False, soft_wrap=True)


@app.command("delete")
def delete_dataset(context: typer.Context, dataset_id: DatasetArgument, as_json: JsonOption = False) -> None:
    """Delete a dataset that no unfinished job uses."""
    with create_client(context) as client:
        deleted = client.delete(f"/datasets/{dataset_id}")
    print_answer(deleted, as_json, f"deleted {dataset_id}")


def _require_path(text: str) -> Path:
    path = Path(text)
    if not path.exists():
        raise CliError("does not exist", "name a file, a folder or a source such as hf://owner/dataset", param=text)
    return path


def _print_check(name: str, found: Json, limit: int) -> None:
    """What a file was taken for, what is wrong with it, and what its valid rows would become."""
    detected: Json | None = found["detected"]
    kind = f"{describe_detected(detected)}; " if detected else ""
    valid = f"{found['valid_rows']:,} of {found['rows_read']:,} rows are valid"
    out.print(f"{escape(name)}: {escape(kind)}{valid}", highlight=False, soft_wrap=True)
    if detected and detected["unused_columns"]:
        out.print(f"left out    {escape(', '.join(detected['unused_columns']))}", highlight=False, soft_wrap=True)
    if found["problems"]:
        out.print(problem_table(found["problems"][:limit]))
        _print_counts(found, limit)
    if refused := found["refused"]:
        out.print(f"[red]refused[/]     {escape(refused['message'])}", highlight=False, soft_wrap=True)
        if refused["hint"]:
            out.print(f"            {escape(translate_hint(refused['hint'], CHECK_OPTIONS))}", style="dim", highlight=False, soft_wrap=True)
    if splits := found["splits"]:
        held_out = splits.get("eval", 0)
        out.print(f"would make  {splits.get('train', 0):,} rows to train on, {held_out or 'none'} held out", highlight=False)
    report: Json = found["report"] or {}
    for line in report_lines(report) if report else ():
        out.print(line, highlight=False, soft_wrap=True)
    for warning in report.get("warnings", []):
        out.print(f"[yellow]warning[/]     {escape(warning)}", highlight=False, soft_wrap=True)


def _print_counts(found: Json, limit: int) -> None:
    """How many problems there are of each kind, and how to see more of them."""
    counts = ", ".join(f"{count:,} {humanize(code)}" for code, count in found["problem_counts"].items())
    of_more = " or more: reading stopped there" if found["stopped_early"] else ""
    out.print(f"not valid   {found['problem_count']:,}{of_more} ({counts})", highlight=False, soft_wrap=True)
    if len(found["problems"]) > limit:
        err.print(f"more: --limit {len(found['problems'])}, or --json", style="dim")
