"""Renders the answer of a dry run: what a job would do, need, take and cost."""

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from cli.hints import OPTIONS, translate_hint
from cli.http_client import Json
from cli.render.formats import format_duration, format_size, humanize

FITS = {
    "fits": "[green]yes[/]",
    "fits_with_gradient_checkpointing": "[green]yes[/], with gradient checkpointing",
    "fits_with_smaller_batch": "[yellow]with a smaller batch[/]",
    "does_not_fit": "[red]no[/]",
    "unknown": "[dim]not known[/]",
}


def render_plan(plan: Json) -> Iterator[RenderableType]:
    """Everything that a person decides by, from the training to the warnings."""
    yield from _training_lines(plan)
    if plan["profiles"]:
        yield ""
        yield _hardware_table("on this deployment", plan["profiles"], plan["placements"], plan["cheapest"])
        yield from _reasons(plan["profiles"])
    if plan["accelerators"]:
        yield ""
        yield _hardware_table("elsewhere", plan["accelerators"], (), None)
    yield ""
    yield from _result_lines(plan)
    for warning in plan["warnings"]:
        yield f"[yellow]warning[/] {escape(_name_field(warning['param']))}: {escape(warning['message'])}"
        if warning["hint"]:
            yield f"  [dim]hint: {escape(_translate(warning['hint']))}[/]"


def describe_estimate(plan: Json) -> str:
    """One line: `estimate  2 to 9 min, $0.03 to $0.12 on local/cpu`. Empty if nothing is known of where the job would run."""
    first = next((each for each in plan["profiles"] if each["hardware"] in plan["placements"][:1]), None)
    if first is None or first["seconds"] is None:
        return ""
    price = f", {_format_usd(first['usd'])}" if first["usd"] else ""
    tokens = f"{plan['tokens']['total']:,} tokens in {plan['steps']['total_steps']:,} steps"
    return f"estimate  {_format_seconds(first['seconds'])}{price}; {'' if plan['tokens']['exact'] else 'about '}{tokens}"


def _training_lines(plan: Json) -> Iterator[str]:
    base, steps, tokens, config = plan["base"], plan["steps"], plan["tokens"], plan["training_config"]
    size = f", {base['parameters'] / 1e6:,.0f}M parameters" if base["parameters"] else ", of unknown size"
    stored = "" if base["stored"] else ", downloaded from the Hub"
    yield f"base      {escape(base['base_model_id'])}{size}{stored}"
    yield f"trainer   {config['trainer_type']}, {config['method']}"
    about = "" if steps["exact"] else "about "
    each = "row" if steps["examples"] == steps["rows"] else "example"
    yield (
        f"steps     {about}{steps['total_steps']:,}: {steps['epochs']:g} epochs of {steps['examples']:,} {each}s, "
        f"{steps['examples_per_step']} a step"
    )
    about = "" if tokens["exact"] else "about "
    longest = f", the longest row has {tokens['longest']:,}" if tokens["longest"] is not None else ""
    cut = f", {tokens['truncated_rows']:,} rows are cut" if tokens["truncated_rows"] else ""
    yield f"tokens    {about}{tokens['total']:,}{longest}{cut}"
    if tokens["note"]:
        yield f"          [dim]{escape(_translate(tokens['note']))}[/]"
    for resolved in plan["resolved"]:
        yield f"auto      {escape(_name_field(resolved['field']))} {_format_value(resolved['value'])}: {escape(resolved['reason'])}"


def _hardware_table(title: str, estimates: Sequence[Json], placements: Sequence[str], cheapest: str | None) -> Table:
    """What each hardware needs and takes. Prices and time slices have a column where there are some."""
    optional = [name for name, field in (("price", "usd"), ("time slices", "time_slices")) if any(each[field] for each in estimates)]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in (title, "fits", "training", "evaluation", "export", "available", "time", *optional):
        table.add_column(column, no_wrap=column == title, overflow="fold")
    for each in estimates:
        cells = {
            "price": _format_usd(each["usd"]) if each["usd"] else "–",
            "time slices": _format_range(each["time_slices"]) if each["time_slices"] else "–",
        }
        table.add_row(
            _mark(each, placements, cheapest),
            FITS[each["fit"]] if each["supported"] else "[red]cannot run it[/]",
            *_format_memory(each["memory"]),
            _format_seconds(each["seconds"]) if each["seconds"] else "–",
            *(cells[name] for name in optional),
        )
    return table


def _mark(estimate: Json, placements: Sequence[str], cheapest: str | None) -> str:
    """The name, and whether the job would run there, and for the least money."""
    marks = ["chosen"] if estimate["hardware"] in placements[:1] else []
    if estimate["hardware"] == cheapest and estimate["usd"]:
        marks.append("cheapest")
    return escape(estimate["hardware"]) + (f" [dim]({', '.join(marks)})[/]" if marks else "")


def _format_memory(memory: Json | None) -> Iterator[str]:
    for field in ("peak_bytes", "evaluation_bytes", "export_bytes", "available_bytes"):
        size: int | None = memory[field] if memory else None
        yield "–" if size is None else format_size(size)


def _reasons(estimates: Sequence[Json]) -> Iterator[str]:
    """Why the job does not run as requested on some hardware."""
    for each in estimates:
        if each["reason"] and (each["fit"] != "fits" or not each["supported"]):
            yield f"[dim]{escape(each['hardware'])}: {escape(_translate(each['reason']))}[/]"


def _result_lines(plan: Json) -> Iterator[str]:
    artifacts = ", ".join(f"{artifact['name']} {format_size(artifact['size_bytes'])}" for artifact in plan["artifacts"])
    if artifacts:
        yield f"artifacts {escape(artifacts)}"
    if disk := plan["disk"]:
        checkpoints = f"{disk['checkpoints']} checkpoints of {format_size(disk['checkpoint_bytes'])}"
        yield f"disk      {format_size(disk['attempt_bytes'])} while it runs, with {checkpoints}"
    budget: Json = plan["budget"]
    if budget["cost_share"] is not None:
        yield f"budget    up to {budget['cost_share']:.0%} of ${budget['max_cost_usd']:.2f}"
    if budget["gpu_seconds_share"] is not None:
        yield f"budget    up to {budget['gpu_seconds_share']:.0%} of {budget['max_gpu_seconds']:g} GPU seconds"


def _format_seconds(estimate: Json) -> str:
    low, high = format_duration(estimate["low"]), format_duration(estimate["high"])
    return low if low == high else f"{low} to {high}"


def _format_usd(estimate: Json) -> str:
    low, high = (f"${amount:.2f}" if amount >= 0.01 or amount == 0 else f"${amount:.4f}" for amount in (estimate["low"], estimate["high"]))
    return low if low == high else f"{low} to {high}"


def _format_range(estimate: Json) -> str:
    low, high = round(estimate["low"]), round(estimate["high"])
    return str(low) if low == high else f"{low} to {high}"


def _format_value(value: object) -> str:
    return " or ".join(map(str, value)) if isinstance(value, list) else str(value)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]  # JSON


def _name_field(path: str) -> str:
    return humanize(path.removeprefix("training_config.").removeprefix("hyperparameters."))


def _translate(advice: str) -> str:
    """Advice with the options of `train` for fields."""
    return translate_hint(advice, frozenset(OPTIONS.values()))
