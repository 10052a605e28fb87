"""Renders what is known of a dataset: what its file was taken for, what was found in its rows, and what is wrong with them."""

from collections.abc import Iterator, Sequence

from rich.markup import escape
from rich.table import Table

from cli.http_client import Json
from cli.render.formats import format_rows, format_size, humanize

FORMATS = {"jsonl": "JSON Lines", "json": "JSON", "csv": "CSV", "parquet": "Parquet", "arrow": "Arrow", "xlsx": "Excel", "text": "text"}
CONTAINERS = {"gzip": "gzip", "zstd": "Zstandard", "zip": "zip archive", "folder": "folder"}
MAPPED_ELSEWHERE = ("roles", "role_key", "content_key", "keep")  # parts of a mapping that are not columns of one field
BAR_WIDTH = 32
MAX_BUCKETS = 16
SHOWN_LANGUAGES = 6


def describe_detected(detected: Json) -> str:
    """`CSV, question -> prompt, answer -> completion`."""
    kind: str = FORMATS.get(detected["format"], "") or detected["format"]
    delimiter = detected.get("delimiter")
    if detected["format"] == "csv" and delimiter == "\t":
        kind = "TSV"
    elif detected["format"] == "csv" and delimiter not in (",", None):
        kind += f" with {delimiter!r}"
    if container := detected.get("container"):
        kind += f" in a {CONTAINERS[container]}" if container in ("zip", "folder") else f", {CONTAINERS[container]}"
    if (encoding := detected.get("encoding")) and encoding.lower().replace("_", "-") not in ("utf-8", "utf8", "ascii"):
        kind += f" in {encoding}"
    if sheet := detected.get("sheet"):
        kind += f", sheet {sheet}"
    mapping: Json = detected.get("mapping") or {}
    fields = [f"{_quote(value)} -> {name}" for name, value in mapping.items() if value and name not in MAPPED_ELSEWHERE]
    return ", ".join([kind, *fields])


def describe_rows(dataset: Json) -> str:
    """`118 rows of messages: 106 to train on, 12 held out; 82 duplicates dropped`."""
    splits: dict[str, int] = dataset["splits"]
    held_out = splits.get("eval", 0)
    dropped = [f"{count:,} {_name_reason(reason, count)} dropped" for reason, count in _find_dropped(dataset).items() if count]
    parts = f"{splits.get('train', 0):,} to train on, {f'{held_out:,}' if held_out else 'none'} held out"
    rows = "1 row" if dataset["rows"] == 1 else f"{dataset['rows']:,} rows"
    return "; ".join([f"{rows} of {humanize(format_rows(dataset))}: {parts}", *dropped])


def describe_dataset(dataset: Json) -> str:
    """What the file was taken for, and its rows."""
    detected: Json | None = dataset.get("detected")  # a service of an earlier version sends none
    return f"{describe_detected(detected)}; {describe_rows(dataset)}" if detected else describe_rows(dataset)


def describe_phase(dataset: Json) -> str:
    """What the job of a dataset that is processed does."""
    phase = humanize(dataset.get("phase") or "waiting for the job")
    progress: Json | None = dataset.get("progress")
    return f"{phase}, {progress['step']:,} of about {progress['total_steps']:,} rows" if progress else phase


def problem_table(problems: Sequence[Json]) -> Table:
    """One row per problem. A problem has a place, or a part with a line, and a reason; the field is empty for a whole row."""
    table = Table(box=None, header_style="bold")
    has_fields = any(problem.get("field") for problem in problems)
    for column in ("where", *(["field"] if has_fields else []), "what is wrong"):
        table.add_column(column, no_wrap=column == "where", overflow="fold")
    for problem in problems:
        place = problem.get("place") or f"{problem['part']} {problem['unit']} {problem['line']}".lstrip()
        table.add_row(escape(place), *([escape(problem.get("field", ""))] if has_fields else []), escape(problem["reason"]))
    return table


def dataset_lines(dataset: Json) -> Iterator[str]:
    """Everything about a dataset but its rows, as lines of markup."""
    status = dataset.get("status", "ready")
    color = {"ready": "green", "failed": "red"}.get(status, "cyan")
    yield f"[bold]{dataset['processed_dataset_id']}[/]  {escape(dataset['name'])}  [{color}]{status}[/]"
    if dataset.get("source"):
        yield f"source      {escape(dataset['source'])}"
    if status == "processing":
        yield f"phase       {escape(describe_phase(dataset))}"
    if status == "failed" and (failure := dataset.get("failure")):
        yield f"failure     {escape(failure['message'])}" + (f"\n            {escape(failure['hint'])}" if failure["hint"] else "")
    if status == "ready":
        yield f"rows        {escape(describe_rows(dataset))}, {format_size(dataset['size_bytes'])}"
    if detected := dataset.get("detected"):
        yield f"recognized  {escape(describe_detected(detected))}"
        if detected["unused_columns"]:
            yield f"left out    {escape(', '.join(detected['unused_columns']))}"
    if report := dataset.get("report"):
        yield from report_lines(report)
    for warning in dataset.get("warnings", []):
        yield f"[yellow]warning[/]     {escape(warning)}"


def report_lines(report: Json) -> Iterator[str]:
    """What was found in the rows."""
    sample = report["sampled_rows"]
    of_sample = f" (of {sample:,} rows that were looked at)" if sample and sample < report["rows_kept"] else ""
    if languages := report["languages"]:
        shares = sorted(languages.items(), key=lambda pair: -pair[1])[:SHOWN_LANGUAGES]
        yield f"languages   {', '.join(f'{_name_language(code)} {share:.0%}' for code, share in shares)}{of_sample}"
    if near := report["near_duplicates"]:
        found = near["held_out_rows_with_a_near_duplicate"]
        examples = ", ".join(f"{held_out} and {train}" for held_out, train in near["examples"][:3])
        yield f"leaks       {found:,} of {near['compared_rows']:,} held-out rows nearly repeat a training row" + (
            f": held-out row and training row {examples}" if examples else ""
        )
    for label, kind in (("personal", "personal_data"), ("secrets", "secrets")):
        for finding in report[kind]:
            numbers = ", ".join(map(str, finding["first_rows"][:5]))
            rows = f"; training rows {numbers}" if numbers else ""
            yield f"{label:11} {humanize(finding['kind'])} in {finding['rows']:,} row{'s' if finding['rows'] != 1 else ''}{rows}{of_sample}"
    if lengths := report["token_lengths"]:
        yield from token_lines(lengths)


def token_lines(lengths: Json) -> Iterator[str]:
    """The token lengths of rows, with a bar chart."""
    exact = "" if lengths["exact"] else f", estimated: {escape(lengths['note'])}"
    yield f"tokens      {lengths['total_tokens']:,} by the tokenizer of {escape(lengths['base_model_id'])}{exact}"
    percentiles: dict[str, int] = lengths["percentiles"]
    shown = ", ".join(f"{'longest' if name == '100' else f'{name} % up to'} {value:,}" for name, value in percentiles.items())
    yield f"per row     {lengths['mean']:,.0f} on average; {shown}"
    if lengths["truncated_rows"] is not None:
        yield f"truncated   {lengths['truncated_rows']:,} of {lengths['rows']:,} rows are longer than {lengths['max_seq_length']:,} tokens"
    histogram: list[list[int]] = lengths["histogram"]
    most = max((rows for _, rows in histogram), default=0)
    for longest, rows in histogram[-MAX_BUCKETS:]:
        bar = "█" * max(round(rows / most * BAR_WIDTH), 1 if rows else 0)
        yield f"  up to {longest:>9,}  {bar} {rows:,}"


def _find_dropped(dataset: Json) -> dict[str, int]:
    """Rows that were not kept, by reason. A service of an earlier version tells duplicates only."""
    return dataset.get("dropped") or {"duplicate": dataset["duplicates_dropped"]}


def _name_reason(reason: str, count: int) -> str:
    if reason == "duplicate":
        return "duplicate" if count == 1 else "duplicates"
    return f"{'row' if count == 1 else 'rows'} not valid ({humanize(reason)})"


def _name_language(code: str) -> str:
    return "unknown" if code == "und" else code


def _quote(value: object) -> str:
    """A column as it is; a template in quotes, on one line."""
    text = str(value)
    return f'"{text}"'.replace("\n", "\\n") if "{" in text else text
