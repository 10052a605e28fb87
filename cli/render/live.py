"""Renders the panel of a job that is being watched: its status, progress, time left, cost and loss."""

from dataclasses import dataclass, replace

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cli.http_client import Json
from cli.render.chart import LossCurve, draw_chart
from cli.render.formats import format_cost, format_loss, format_status, format_step, format_time_left, humanize

BAR_WIDTH = 24
CHART_HEIGHT, MIN_CHART_HEIGHT = 10, 4
MAX_CHART_WIDTH = 120
PANEL_LINES = 7  # beside the chart: three of text, the axis and its labels, and room for the last event above
# What happens in a status that a person may wait for.
STATUS_NOTES = {
    "queued": "waiting for compute",
    "preparing": "starting the attempt",
    "pausing": "finishing the current step and saving a checkpoint",
    "paused": "no compute is held",
    "cancelling": "stopping",
}


@dataclass(frozen=True)
class WatchState:
    """What is known of a job that is being watched."""

    job_id: str
    title: str = ""  # the name and the base of the job
    status: str = "queued"
    phase: str | None = None
    progress: Json | None = None
    progress_at: float = 0.0  # when the progress was received, in seconds of a monotonic clock
    learning_rate: float | None = None
    saved_step: int | None = None
    pending_reason: str | None = None
    cost: Json | None = None

    def apply(self, event: Json, now: float) -> "WatchState":
        """The state after an event of the job, received at `now`."""
        body = event["event"]
        match body["type"]:
            case "status":
                starts = body["status"] == "preparing"  # an attempt may continue from an earlier step
                return replace(self, status=body["status"], phase=None, pending_reason=None, progress=None if starts else self.progress)
            case "phase":
                return replace(self, phase=body["phase"])
            case "progress":
                return replace(self, phase=body["phase"])._at(body["progress"], now)
            case "checkpoint_saved":
                return replace(self, saved_step=body["step"])
            case "metrics":
                state = replace(self, learning_rate=body["values"].get("learning_rate", self.learning_rate))
                progress: Json | None = body["progress"]
                if progress and progress.get("loss") is None:  # an attempt of an earlier version
                    progress = progress | {"loss": body["values"].get("loss")}
                return state._at(progress, now)
            case _:
                return self

    def _at(self, progress: Json | None, now: float) -> "WatchState":
        """The state with this progress, unless a later one is known: metrics are sent later than the progress of their step."""
        if not progress or progress["step"] < self.step:
            return self
        return replace(self, progress=progress, progress_at=now)

    @property
    def step(self) -> int:
        """The latest optimizer step; 0 before the first."""
        return self.progress["step"] if self.progress else 0

    @property
    def loss(self) -> float | None:
        """The training loss of the latest step, if it is known."""
        return self.progress.get("loss") if self.progress else None


def record_losses(curve: LossCurve, event: Json) -> None:
    """Add the losses of an event to the curve."""
    body = event["event"]
    match body["type"]:
        case "metrics":
            curve.add_loss(body["step"], body["values"].get("loss"))
        case "progress" if body["progress"]:
            curve.add_loss(body["progress"]["step"], body["progress"].get("loss"))
        case "evaluation":
            curve.add_evaluation(body["step"], body["metrics"].get("eval_loss"))
        case "checkpoint_restored":
            curve.restart_after(body["step"])
        case _:
            pass


def render_watch(state: WatchState, curve: LossCurve, *, width: int, height: int, now: float, has_unicode: bool = True) -> RenderableType:
    """The panel for a terminal of this size at `now`, the time of the clock that the state's events have."""
    lines: list[RenderableType] = [_one_line(f"[bold]{escape(state.title)}[/]"), _status_row(state)]
    if facts := _describe(state, now):
        lines.append(_one_line(" · ".join(facts)))
    if has_unicode and (chart_height := min(CHART_HEIGHT, height - PANEL_LINES)) >= MIN_CHART_HEIGHT:
        lines += draw_chart(curve, width=min(width, MAX_CHART_WIDTH), height=chart_height)
    return Group(*lines)


def _status_row(state: WatchState) -> RenderableType:
    """The status or phase, and a bar with the steps once there are any."""
    status = format_status(state.status)
    if state.phase and state.status in ("preparing", "training") and state.phase != state.status:
        status = f"[cyan]{escape(humanize(state.phase))}[/]"
    if state.progress is None:
        return _one_line(f"{status}  [dim]{STATUS_NOTES.get(state.status, '')}[/]")
    row = Table.grid(padding=(0, 2))
    bar = ProgressBar(total=max(state.progress["total_steps"], 1), completed=state.step, width=BAR_WIDTH)
    row.add_row(Text.from_markup(status), bar, Text(format_step(state.progress), no_wrap=True, overflow="ellipsis"))
    return row


def _describe(state: WatchState, now: float) -> list[str]:
    """What is known besides the steps, as markup: the loss, the time left, the cost, and what a waiting job waits for."""
    facts: list[str] = []
    if state.pending_reason:
        facts.append(f"[yellow]waiting[/] {escape(state.pending_reason)}")
    elif state.progress and state.status in STATUS_NOTES:
        facts.append(f"[dim]{STATUS_NOTES[state.status]}[/]")
    if state.loss is not None:
        facts.append(f"loss {format_loss(state.loss)}")
    if state.status in ("preparing", "training") and (left := format_time_left(state.progress, now - state.progress_at)):
        facts.append(left)
    if state.saved_step is not None:
        facts.append(f"saved step {state.saved_step}")
    if state.cost and (cost := format_cost(state.cost)):
        facts.append(cost)
    return facts


def _one_line(markup: str) -> Text:
    """A text that is cut where the terminal ends: a panel of changing height would flicker."""
    text = Text.from_markup(markup)
    text.no_wrap, text.overflow = True, "ellipsis"
    return text
