"""How long a training, its steps and its saves take, from which TrainingControl decides when to save and when to yield."""

from collections.abc import Callable, Generator
from contextlib import contextmanager


class TrainingTimer:
    """Times one training in one attempt. All times are in seconds of `clock`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.longest_step_s = 0.0
        self.save_s = 0.0  # how long the last save blocked the training
        self.evaluation_s: float | None = None  # of the last evaluation
        self.evaluations_s = 0.0  # of all evaluations since `start`
        self._clock = clock
        self._started_at = self._saved_at = self._step_started_at = clock()

    @property
    def elapsed_s(self) -> float:
        """Since `start`."""
        return self._clock() - self._started_at

    @property
    def since_last_save_s(self) -> float:
        """Since the end of the last save, or since the beginning of one that failed."""
        return self._clock() - self._saved_at

    def start(self) -> None:
        """The training begins."""
        self._started_at = self._saved_at = self._clock()
        self.evaluations_s = 0.0

    def begin_step(self) -> None:
        """An optimizer step begins."""
        self._step_started_at = self._clock()

    def end_step(self) -> None:
        """The optimizer step ended."""
        self.longest_step_s = max(self.longest_step_s, self._clock() - self._step_started_at)

    @contextmanager
    def pause_for_evaluation(self) -> Generator[None]:
        """Inside, another model is evaluated, which is no part of the training and its time."""
        started_at = self._clock()
        try:
            yield
            self.evaluation_s = self._clock() - started_at
        finally:
            self._started_at += self._clock() - started_at

    @contextmanager
    def time_evaluation(self) -> Generator[None]:
        """Inside, the model is evaluated. An evaluation that raises is not counted as one."""
        started_at = self._clock()
        yield
        self.evaluation_s = self._clock() - started_at
        self.evaluations_s += self.evaluation_s

    def begin_save(self) -> None:
        """A save begins, which blocks the training."""
        self._saved_at = self._clock()

    def end_save(self) -> None:
        """The save succeeded."""
        began_at, self._saved_at = self._saved_at, self._clock()
        self.save_s = self._saved_at - began_at
