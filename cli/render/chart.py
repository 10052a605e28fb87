"""Draws the loss of a training as lines of text: the training loss in braille dots, evaluations as diamonds."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rich.text import Text

DOTS_ACROSS, DOTS_DOWN = 2, 4  # of a braille character
BRAILLE = 0x2800
DOT_BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # by row and column, as Unicode numbers them
LABEL_WIDTH = 10  # of the numbers beside the vertical axis
MIN_WIDTH, MIN_HEIGHT = 30, 3  # a smaller chart says nothing
MAX_LOSS = 1e100  # a larger one is a failure, as is what is not a number
MAX_POINTS = 4000  # several for every dot of a wide terminal


@dataclass
class LossCurve:
    """The losses of a job by optimizer step. A step that is trained again replaces what it was before."""

    training: dict[int, float] = field(default_factory=dict[int, float])
    evaluations: dict[int, float] = field(default_factory=dict[int, float])

    def add_loss(self, step: int, loss: float | None) -> None:
        """Record the training loss of a step, unless it is not a number."""
        if loss is not None and abs(loss) < MAX_LOSS:
            self.training[step] = loss
            if len(self.training) > MAX_POINTS:
                self.training = _halve(self.training)

    def add_evaluation(self, step: int, loss: float | None) -> None:
        """Record the loss on the held-out rows, unless it is not a number."""
        if loss is not None and abs(loss) < MAX_LOSS:
            self.evaluations[step] = loss

    def restart_after(self, step: int) -> None:
        """Forget the losses after a step, from which the training continues."""
        self.training = {each: loss for each, loss in self.training.items() if each <= step}
        self.evaluations = {each: loss for each, loss in self.evaluations.items() if each <= step}


def _halve(losses: Mapping[int, float]) -> dict[int, float]:
    """Of each four steps in a row the lowest and the highest loss."""
    points = sorted(losses.items())
    groups = [sorted(points[start : start + 4], key=lambda point: point[1]) for start in range(0, len(points), 4)]
    return dict(sorted({point for group in groups for point in (group[0], group[-1])}))


def draw_chart(curve: LossCurve, *, width: int, height: int) -> list[Text]:
    """The chart in `width` columns, `height` lines for the curve and two for the axis and its labels; empty if there is nothing to draw.

    The line passes through every loss, so that no spike is lost.
    """
    columns = width - LABEL_WIDTH - 2
    if len(curve.training) < 2 or width < MIN_WIDTH or height < MIN_HEIGHT:
        return []
    losses = [*curve.training.values(), *curve.evaluations.values()]
    low, high = min(losses), max(losses)
    steps = [*curve.training, *curve.evaluations]
    first, last = min(steps), max(steps)

    def column_of(step: int, count: int) -> int:
        return round((step - first) / (last - first) * (count - 1))

    def row_of(loss: float, count: int) -> int:
        return round((high - loss) / (high - low) * (count - 1)) if high > low else count // 2

    dots = _draw_dots(
        (column_of(step, columns * DOTS_ACROSS), row_of(loss, height * DOTS_DOWN)) for step, loss in sorted(curve.training.items())
    )
    marks = {(row_of(loss, height), column_of(step, columns)) for step, loss in curve.evaluations.items()}
    axis = {0: high, height // 2: (low + high) / 2, height - 1: low} if high > low else {height // 2: high}
    lines = [_draw_line(row, columns, dots, marks, axis.get(row)) for row in range(height)]
    return [*lines, Text(f"{'':{LABEL_WIDTH}} └{'─' * columns}", "dim"), _label_steps(first, last, columns, bool(marks))]


def _draw_dots(points: Iterable[tuple[int, int]]) -> Mapping[tuple[int, int], int]:
    """The bits of each braille character, by row and column, of the line through all points, which come from left to right."""
    bits: dict[tuple[int, int], int] = {}
    before: tuple[int, int] | None = None
    for x, y in points:
        left, start = before or (x, y)
        height_at = {left + n: round(start + (y - start) * n / (x - left)) for n in range(1, x - left)} | {x: y}
        last = start
        for column, height in height_at.items():
            for dot in range(min(last, height), max(last, height) + 1) if abs(last - height) > 1 else (height,):
                cell = (dot // DOTS_DOWN, column // DOTS_ACROSS)
                bits[cell] = bits.get(cell, 0) | DOT_BITS[dot % DOTS_DOWN][column % DOTS_ACROSS]
            last = height
        before = (x, y)
    return bits


def _draw_line(row: int, columns: int, dots: Mapping[tuple[int, int], int], marks: set[tuple[int, int]], value: float | None) -> Text:
    line = Text("" if value is None else f"{value:.3g}".rjust(LABEL_WIDTH), "dim", no_wrap=True)
    line.pad_left(LABEL_WIDTH - len(line))
    line.append(" ┤" if value is not None else " │", "dim")
    for column in range(columns):
        if (row, column) in marks:
            line.append("◆", "not dim yellow")
        else:
            bits = dots.get((row, column), 0)
            line.append(chr(BRAILLE + bits) if bits else " ", "not dim cyan")
    return line


def _label_steps(first: int, last: int, columns: int, has_evaluations: bool) -> Text:
    start, end = str(first), str(last)
    room = columns - len(start) - len(end)
    legends = ["training loss, ◆ held-out loss, by step", "training, ◆ held-out"] if has_evaluations else ["training loss by step"]
    legend = next((legend for legend in legends if len(legend) + 2 <= room), "")
    return Text(f"{'':{LABEL_WIDTH}}  {start}{legend:^{room}}{end}", "dim", no_wrap=True)
