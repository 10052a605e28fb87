"""Shows the events of a job as they come: lines that stay, and on a terminal a panel that is drawn again."""

import threading
from dataclasses import dataclass, replace
from datetime import datetime

from rich.console import Console, RenderableType
from rich.markup import escape

from cli.http_client import Json
from cli.job_names import shorten_job_id
from cli.render.chart import LossCurve, draw_chart
from cli.render.events import event_line, step_line
from cli.render.formats import format_time_left, humanize
from cli.render.live import CHART_HEIGHT, MAX_CHART_WIDTH, WatchState, record_losses, render_watch
from cli.render.samples import SampleBook, render_comparison, render_samples

STEP_LINE_INTERVAL_S = 10.0


@dataclass
class StepPace:
    """Decides which steps get a line of their own where no panel shows them: every one, but not two within ten seconds."""

    last_step: int = 0
    last_at: float | None = None
    is_live: bool = False  # progress comes as it happens, each step before its metrics

    def restart(self) -> None:
        """An attempt begins, perhaps at an earlier step."""
        self.last_step, self.last_at = 0, None

    def is_due(self, progress: Json, at: float, *, is_live: bool) -> bool:
        """Whether to print this progress of the time `at`, in seconds. The last step always is.

        `is_live` says that it comes as it happens. From then on metrics are not printed: their times are of another clock.
        """
        if is_live and not self.is_live:
            self.is_live, self.last_at = True, None
        step, is_last = progress["step"], progress["step"] == progress["total_steps"]
        is_early = self.last_at is not None and at - self.last_at < STEP_LINE_INTERVAL_S
        if step <= self.last_step or is_live != self.is_live or (is_early and not is_last):
            return False
        self.last_step, self.last_at = step, at
        return True


class WatchView:
    """Prints the events of a job, and draws its panel.

    One thread shows events, others may call `render` and `update`. The lock is never held while something is printed: the thread that
    draws the panel holds the console while it waits for `render`.
    """

    def __init__(self, console: Console, job: Json, *, is_live: bool) -> None:
        """`is_live` says that a panel is drawn, which shows the steps, phases and checkpoints."""
        title = f"{shorten_job_id(job['job_id'])}  {job['job_name']}  {job['base_model_id']}"
        self._console = console
        self._is_live = is_live
        self._samples = SampleBook()
        self._pace = StepPace()
        self._lock = threading.Lock()  # of the next two
        self._state = WatchState(job["job_id"], title, status=job["status"], cost=job["cost"])
        self._curve = LossCurve()
        self.update(job)

    def render(self, now: float) -> RenderableType:
        """The panel at `now`, in seconds of a monotonic clock."""
        (width, height), has_unicode = self._console.size, self._has_unicode
        with self._lock:
            return render_watch(self._state, self._curve, width=width, height=height, now=now, has_unicode=has_unicode)

    def show(self, event: Json, now: float, wall_time_s: float) -> None:
        """Show an event that was received now, by the monotonic clock and by the wall clock."""
        with self._lock:
            record_losses(self._curve, event)
            self._state = self._state.apply(event, now)
        if not self._is_live:
            self._print_progress(event, wall_time_s)
        self._print_event(event)

    def update(self, job: Json) -> None:
        """Take over what events do not carry: the cost, and why the job is not launched yet. A new reason is printed."""
        reason: str | None = job["pending_reason"]
        with self._lock:
            is_new = reason != self._state.pending_reason
            self._state = replace(self._state, pending_reason=reason, cost=job["cost"])
        if reason and is_new:
            self.print(f"[yellow]waiting[/] {escape(reason)}")

    def print(self, markup: str) -> None:
        """Print a line above the panel."""
        self._console.print(markup, highlight=False, soft_wrap=not self._is_live)

    def print_chart(self) -> None:
        """Print the losses of the whole training, where a terminal showed them."""
        if self._is_live and self._has_unicode:
            self._print_all(*draw_chart(self._curve, width=min(self._console.width, MAX_CHART_WIDTH), height=CHART_HEIGHT))

    @property
    def _has_unicode(self) -> bool:
        return self._console.encoding.startswith("utf")

    def _print_event(self, event: Json) -> None:
        """Print what stays to be read, and not only moves the panel."""
        body = event["event"]
        if body["type"] == "samples":
            if body["when"] != "after":  # these are compared with the base's once the evaluation is complete
                self._print_all(*render_samples(self._samples, body, self._console))
            self._samples = self._samples.add(body)
        if (line := event_line(event)) and not (self._is_live and body["type"] == "checkpoint_saved"):
            self.print(line)
        if body["type"] == "evaluation" and body["when"] == "after":
            self._print_all(*render_comparison(self._samples, self._console))

    def _print_progress(self, event: Json, wall_time_s: float) -> None:
        """Print steps and phases, which no panel shows."""
        body = event["event"]
        match body["type"]:
            case "progress":
                self._print_step(body["progress"], wall_time_s, is_live=True)
            case "metrics":
                self._print_step(body["progress"], datetime.fromisoformat(event["at"]).timestamp(), is_live=False)
            case "phase" if body["phase"] != "training":  # which the status says
                left = format_time_left(self._state.progress)
                self.print(f"[dim]{escape(humanize(body['phase']))}[/]" + (f", {left}" if left else ""))
            case "status" if body["status"] == "preparing":
                self._pace.restart()
            case _:
                pass

    def _print_step(self, progress: Json | None, at: float, *, is_live: bool) -> None:
        if progress and self._pace.is_due(progress, at, is_live=is_live):
            self.print(step_line(progress, self._state.loss, self._state.learning_rate))

    def _print_all(self, *renderables: RenderableType) -> None:
        for renderable in renderables:
            self._console.print(renderable, highlight=False)
