"""What a job that is being watched looks like: step lines, the panel, samples and the chart."""

import io
import math
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from cli.http_client import Json
from cli.render.chart import MAX_POINTS, LossCurve, draw_chart
from cli.render.live import WatchState
from cli.render.watching import WatchView
from tests.unit.cli.api_json import (
    make_console,
    make_cost_json,
    make_event_json,
    make_job_json,
    make_metrics_json,
    make_progress_json,
    read_console,
    render_text,
)

PROMPT = "Write a function\n    def f(x):\n        [...]"


class Viewer:
    """A view and its console."""

    def __init__(self, width: int = 200, *, is_terminal: bool = False, height: int = 40, **changes: Any) -> None:
        self.console = make_console(width, is_terminal=is_terminal, height=height)
        self.view = WatchView(self.console, make_job_json(**changes), is_live=is_terminal)
        self.now = 0.0

    def show(self, second: int = 0, **body: Any) -> None:
        self.now = float(second)
        self.view.show(make_event_json(second, **body), self.now, self.now)

    def progress(self, second: int, step: int, **changes: Any) -> None:
        self.view.show({"event": make_progress_event(step, **changes)}, float(second), float(second))

    def panel(self, now: float | None = None) -> str:
        text = render_text(self.view.render(self.now if now is None else now), width=self.console.width, is_terminal=True)
        return "\n".join(line.rstrip() for line in text.splitlines())

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in read_console(self.console).splitlines()]


def make_progress_event(step: int, phase: str = "training", **changes: Any) -> Json:
    return {"type": "progress", "phase": phase, "progress": make_progress_json(step, **changes)}


def make_metrics_event(step: int, loss: float, **changes: Any) -> Json:
    values = {"loss": loss, "learning_rate": 1e-4}
    return {"type": "metrics", "step": step, "values": values, "progress": make_progress_json(step, **changes)}


# --- lines -----------------------------------------------------------------------------------------------------------


def test_piped_output_has_a_line_per_slow_step() -> None:
    viewer = Viewer()
    viewer.show(status="preparing", type="status", attempt=1, reason="")
    viewer.show(type="phase", phase="evaluating")
    for step in (1, 2, 3):
        viewer.progress(12 * step, step, loss=2.5 / step, remaining_s=120.0)
    assert viewer.lines == [
        "preparing",
        "evaluating",
        "step 1/80, epoch 0.10/8, loss 2.500, about 2 min left",
        "step 2/80, epoch 0.20/8, loss 1.250, about 2 min left",
        "step 3/80, epoch 0.30/8, loss 0.833, about 2 min left",
    ]


def test_piped_output_has_at_most_one_step_in_ten_seconds_and_the_last() -> None:
    viewer = Viewer()
    for step in range(1, 81):
        viewer.progress(step // 4, step)
    assert [line.split(",")[0] for line in viewer.lines] == ["step 1/80", "step 40/80", "step 80/80"]


def test_metrics_of_the_past_are_printed_by_their_own_times() -> None:
    viewer = Viewer()
    for step in range(1, 5):
        viewer.show(6 * step, **make_metrics_event(step, 1.0))
    assert viewer.lines == ["step 1/80, epoch 0.10/8, loss 1.000, lr 0.0001", "step 3/80, epoch 0.30/8, loss 1.000, lr 0.0001"]


def test_step_is_printed_once_although_progress_and_metrics_report_it() -> None:
    viewer = Viewer()
    for step in (1, 2):
        viewer.progress(20 * step, step, loss=1.5)
        viewer.show(20 * step + 15, **make_metrics_event(step, 1.0))
    assert [line.split(",")[0] for line in viewer.lines] == ["step 1/80", "step 2/80"]
    assert "lr 0.0001" in viewer.lines[1]


def test_attempt_that_continues_from_an_earlier_step_is_printed_again() -> None:
    viewer = Viewer()
    viewer.progress(0, 40)
    viewer.show(1, type="status", status="preparing", attempt=2, reason="")
    viewer.progress(2, 31)
    assert [line.split(",")[0] for line in viewer.lines] == ["step 40/80", "preparing", "step 31/80"]


def test_progress_without_steps_yet_prints_nothing() -> None:
    viewer = Viewer()
    viewer.view.show({"event": {"type": "progress", "phase": "downloading", "progress": None}}, 0.0, 0.0)
    assert viewer.lines == []


def test_piped_output_has_no_escape_sequences() -> None:
    viewer = Viewer()
    viewer.show(type="warning", message="no [room]")
    viewer.progress(1, 1, loss=0.5)
    viewer.view.print_chart()
    assert "\x1b" not in read_console(viewer.console)
    assert viewer.lines[0] == "warning no [room]"


def test_new_pending_reason_is_printed_once() -> None:
    viewer = Viewer(pending_reason="no quota for [l4]")
    viewer.view.update(make_job_json(pending_reason="no quota for [l4]"))
    viewer.view.update(make_job_json(pending_reason=None))
    viewer.view.update(make_job_json(pending_reason="the launcher does not answer"))
    assert viewer.lines == ["waiting no quota for [l4]", "waiting the launcher does not answer"]


# --- samples ---------------------------------------------------------------------------------------------------------


def show_samples(viewer: Viewer, when: str, step: int, text: str) -> None:
    viewer.show(type="samples", when=when, step=step, samples=[{"prompt": PROMPT, "text": text}])


def test_samples_keep_lines_and_indentation_and_show_a_prompt_once() -> None:
    viewer = Viewer()
    show_samples(viewer, "before", 0, "no idea")
    show_samples(viewer, "during", 40, "def f(x):\n    pass")
    assert viewer.lines == [
        "sample 1",
        "    Write a function",
        "        def f(x):",
        "            [...]",
        "sample 1, base",
        "    no idea",
        "sample 1, step 40",
        "    def f(x):",
        "        pass",
    ]


def finish(viewer: Viewer) -> list[str]:
    """The lines of the comparison at the end."""
    show_samples(viewer, "before", 0, "no idea")
    known = len(viewer.lines)
    show_samples(viewer, "after", 80, "def f(x):\n    return x")
    viewer.show(type="evaluation", when="after", step=80, metrics=make_metrics_json(eval_loss=0.5))
    return viewer.lines[known:]


def test_answers_are_compared_at_the_end() -> None:
    assert finish(Viewer()) == [
        "evaluated after training: loss 0.500",
        "sample 1",
        "    Write a function",
        "        def f(x):",
        "            [...]",
        "  base",
        "    no idea",
        "  tuned",
        "    def f(x):",
        "        return x",
    ]


def test_wide_terminal_compares_side_by_side() -> None:
    assert finish(Viewer(80, is_terminal=True))[-3:] == [
        "  base                                    → tuned",
        "    no idea                                 def f(x):",
        "                                                return x",
    ]
    assert "    no idea" in finish(Viewer(60, is_terminal=True))


def test_published_step_that_was_evaluated_during_training_is_compared() -> None:
    viewer = Viewer()
    show_samples(viewer, "before", 0, "no idea")
    show_samples(viewer, "during", 80, "x")
    viewer.show(type="evaluation", when="after", step=80, metrics=make_metrics_json(eval_loss=0.5))
    assert viewer.lines[-4:] == ["  base", "    no idea", "  tuned", "    x"]


def test_long_answer_is_cut() -> None:
    viewer = Viewer()
    show_samples(viewer, "during", 1, "word\n" * 40)
    assert viewer.lines[-1] == "    word …"
    assert len(viewer.lines) == 4 + 1 + 12


def test_empty_answer_is_visible() -> None:
    viewer = Viewer()
    show_samples(viewer, "during", 1, "\n")
    assert viewer.lines[-1] == "    (nothing)"


# --- panel -----------------------------------------------------------------------------------------------------------


def test_panel_shows_step_loss_time_left_and_cost() -> None:
    viewer = Viewer(80, is_terminal=True, height=10, cost=make_cost_json(usd=0.12))
    viewer.show(0, type="status", status="training", attempt=1, reason="")
    viewer.progress(10, 43, loss=0.7484, remaining_s=120.0)
    assert (
        viewer.panel(12.0)
        == """\
…89ab  mine  google/gemma-3-270m
training  ━━━━━━━━━━━━╸             step 43/80, epoch 4.30/8
loss 0.748 · about 2 min left · $0.12"""
    )
    assert "about 50 s left" in viewer.panel(80.0)
    assert "a few seconds left" in viewer.panel(500.0)


def test_panel_shows_the_phase_after_the_last_step() -> None:
    viewer = Viewer(80, is_terminal=True, height=10)
    viewer.progress(10, 80, phase="merging", loss=0.4, remaining_s=30.0)
    assert "merging  ━" in viewer.panel(10.0)
    assert "about 30 s left" in viewer.panel(10.0)


def test_panel_says_nothing_of_an_unknown_time_left() -> None:
    viewer = Viewer(80, is_terminal=True, height=10)
    viewer.progress(10, 1, eta_s=0.0)
    assert "left" not in viewer.panel(10.0)


@pytest.mark.parametrize(
    ("status", "note"),
    [
        ("queued", "queued  waiting for compute"),
        ("preparing", "preparing  starting the attempt"),
        ("pausing", "pausing  finishing the current step and saving a checkpoint"),
        ("paused", "paused  no compute is held"),
    ],
)
def test_panel_explains_what_a_job_waits_for(status: str, note: str) -> None:
    assert note in Viewer(80, is_terminal=True, status=status).panel()


def test_panel_shows_the_pending_reason() -> None:
    assert "waiting no quota for [l4]" in Viewer(80, is_terminal=True, status="queued", pending_reason="no quota for [l4]").panel()


@pytest.mark.parametrize("width", [20, 60, 80, 120])
def test_panel_never_wraps_and_fits_the_terminal(width: int) -> None:
    viewer = Viewer(width, is_terminal=True, height=20, job_name="a very long name " * 20, cost=make_cost_json(usd=0.12, usd_per_hour=0.7))
    for step in range(1, 40):
        viewer.progress(step, step, loss=3.0 / step, remaining_s=4000.0)
    lines = viewer.panel().splitlines()
    assert len(lines) <= 20
    assert all(Text(line).cell_len <= width for line in lines)


def test_panel_draws_the_curve_where_there_is_room() -> None:
    viewer = Viewer(80, is_terminal=True, height=30)
    viewer.show(type="evaluation", when="before", step=0, metrics=make_metrics_json(eval_loss=3.0))
    for step in range(1, 10):
        viewer.progress(step, step, loss=3.0 / step)
    assert "◆ held-out loss, by step" in viewer.panel()
    viewer.console.size = (80, 9)  # type: ignore[assignment]  # rich accepts a pair
    assert "held-out" not in viewer.panel()


def test_panel_of_a_metric_without_progress_keeps_the_step() -> None:
    state = WatchState("training_1").apply({"event": make_progress_event(3, loss=1.0)}, 5.0)
    state = state.apply(make_event_json(type="metrics", step=4, values={"loss": 0.5}, progress=None), 6.0)
    assert (state.step, state.loss, state.progress_at) == (3, 1.0, 5.0)


def test_late_metrics_do_not_move_the_panel_back() -> None:
    state = WatchState("training_1").apply({"event": make_progress_event(12, loss=1.0)}, 5.0)
    assert state.apply(make_event_json(**make_metrics_event(10, 2.0)), 6.0).step == 12


def test_loss_of_an_earlier_attempt_comes_from_its_metrics() -> None:
    event = make_event_json(**make_metrics_event(10, 2.0))
    del event["event"]["progress"]["loss"]
    assert WatchState("training_1").apply(event, 6.0).loss == 2.0


def test_saved_checkpoints_move_the_panel_and_are_lines_elsewhere() -> None:
    saved = {"type": "checkpoint_saved", "step": 40, "size_bytes": 1_200_000, "reason": "interval"}
    terminal, pipe = Viewer(80, is_terminal=True, height=10), Viewer()
    terminal.show(**saved)
    pipe.show(**saved)
    assert (terminal.lines, pipe.lines) == ([], ["saved step 40 (1.2 MB, interval)"])
    assert "saved step 40" in terminal.panel()


def test_panel_can_be_drawn_by_another_thread_while_an_event_is_printed() -> None:
    viewer = Viewer(80, is_terminal=True)
    finished: list[bool] = []

    class Output(io.StringIO):
        def write(self, text: str) -> int:
            thread = threading.Thread(target=viewer.view.render, args=(0.0,), daemon=True)
            thread.start()
            thread.join(5)
            finished.append(not thread.is_alive())
            return super().write(text)

    viewer.console.file = Output()
    viewer.show(type="warning", message="m")
    viewer.view.update(make_job_json(pending_reason="no quota"))
    assert finished
    assert all(finished)


# --- chart -----------------------------------------------------------------------------------------------------------


def draw(curve: LossCurve, width: int = 60, height: int = 4) -> list[str]:
    return [line.plain for line in draw_chart(curve, width=width, height=height)]


def make_curve(losses: dict[int, float], evaluations: dict[int, float] | None = None) -> LossCurve:
    curve = LossCurve()
    for step, loss in losses.items():
        curve.add_loss(step, loss)
    for step, loss in (evaluations or {}).items():
        curve.add_evaluation(step, loss)
    return curve


def test_chart_is_drawn_with_axes_and_evaluations() -> None:
    curve = make_curve({step: 2.0 / step for step in range(1, 17)}, {0: 2.0, 16: 0.25})
    assert draw(curve, 50) == [
        "         2 ┤◆ ⠈⢧                                  ",
        "           │   ⠈⢧                                 ",
        "      1.06 ┤    ⠈⠒⠤⣀⡀                             ",
        "     0.125 ┤        ⠈⠉⠉⠒⠒⠒⠒⠢⠤⠤⠤⠤⠤⠤⠤⠤⠤⣀⣀⣀⣀⣀⣀⣀⣀⣀⣀⣀⣀◆",
        "           └──────────────────────────────────────",
        "            0       training, ◆ held-out        16",
    ]


@pytest.mark.parametrize("width", [30, 60, 80, 120])
def test_chart_fits_its_width(width: int) -> None:
    assert {len(line) for line in draw(make_curve({1: 3.0, 1_000_000: 1.0}, {5: 2.0}), width)} == {width}


def test_constant_loss_is_a_line_in_the_middle() -> None:
    lines = draw(make_curve({1: 2.0, 2: 2.0}))
    assert [line.strip("⠉⠒⠤⣀ ") for line in lines[:4]] == ["│", "│", "2 ┤", "│"]


def test_chart_of_less_than_two_losses_is_empty() -> None:
    assert draw(make_curve({})) == draw(make_curve({1: 2.0}, {0: 3.0})) == draw(make_curve({1: 2.0, 2: 1.0}), width=20) == []


def test_what_is_not_a_number_is_left_out() -> None:
    curve = make_curve({1: math.nan, 2: math.inf, 3: 1.0}, {0: math.nan})
    curve.add_loss(4, None)
    assert (curve.training, curve.evaluations) == ({3: 1.0}, {})


def test_steps_after_a_restored_checkpoint_are_forgotten() -> None:
    viewer = Viewer(80, is_terminal=True)
    for step in range(1, 11):
        viewer.progress(step, step, loss=float(step))
    viewer.show(type="checkpoint_restored", step=4, from_attempt=1)
    viewer.progress(20, 5, loss=1.0)
    assert viewer.panel().splitlines()[-1].strip().endswith(" 5")


def test_no_spike_is_lost_in_a_long_training() -> None:
    curve = make_curve({step: 9.0 if step == 4_321 else 1.0 for step in range(20_000)})
    assert len(curve.training) <= MAX_POINTS
    assert (max(curve.training.values()), min(curve.training.values())) == (9.0, 1.0)
    assert draw(curve)[0].startswith("         9 ┤")


@given(
    st.dictionaries(st.integers(0, 10**6), st.floats(), min_size=2),
    st.dictionaries(st.integers(0, 10**6), st.floats()),
    st.integers(30, 140),
    st.integers(3, 30),
)
def test_any_curve_can_be_drawn(losses: dict[int, float], evaluations: dict[int, float], width: int, height: int) -> None:
    lines = draw(make_curve(losses, evaluations), width, height)
    assert len(lines) in (0, height + 2)
    assert {len(line) for line in lines} <= {width}


def test_chart_can_be_exported() -> None:
    console = Console(record=True, width=60, file=make_console().file)
    for line in draw_chart(make_curve({1: 2.0, 2: 1.0}), width=60, height=4):
        console.print(line)
    assert "training loss" in console.export_svg().replace("&#160;", " ")
