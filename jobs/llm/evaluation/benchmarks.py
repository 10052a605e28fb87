"""Runs lm-evaluation-harness tasks on a model that is already in memory.

The harness has three dozen dependencies and is optional: jobs/environments/llm/requirements-lm-eval.txt installs it. A task
that cannot run has the value None under `lm_eval/{task}`, and the reason in the notes.
"""

import logging
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.llm.evaluation.state import evaluation_state
from jobs.llm.oom import free_memory, is_out_of_memory

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerBase

PREFIX = "lm_eval/"
MAX_REASON_CHARACTERS = 300
NOT_INSTALLED = "lm-evaluation-harness is not installed; add jobs/environments/llm/requirements-lm-eval.txt to the trainer's environment"

Values = dict[str, float | None]


def evaluate_with_lm_eval(
    model: Any,  # any model of transformers or peft
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[str],
    *,
    limit: int | None,
    batch_size: int,
    check_stop: Callable[[], None] = lambda: None,
    include_path: Path | None = None,
) -> tuple[Values, dict[str, str]]:
    """The harness's metrics as `lm_eval/{task}/{metric}`, and the reason why a task could not run as `lm_eval/{task}`.

    A metric that a task computes after a filter is named `{metric},{filter}`, as in the harness. `limit` is the maximum number of rows per
    task. No chat template is applied, as in published results of the harness. `include_path` is a folder with additional tasks. The
    model and every random number generator are restored; `check_stop` is called before each batch, and may raise.
    """
    if not find_spec("lm_eval"):
        return {PREFIX + task: None for task in tasks}, {PREFIX + task: NOT_INSTALLED for task in tasks}

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about every model in memory and every default
    manager = _load_task_manager(include_path)
    values: Values = {}
    notes: dict[str, str] = {}
    for task in tasks:  # one at a time: a task that fails does not affect the others
        try:
            values |= _run_task(task, manager, model, tokenizer, limit, batch_size, check_stop)
        except _TaskFailed as reason:
            values[PREFIX + task], notes[PREFIX + task] = None, str(reason)
    return values, notes


def collect_values(task: str, results: dict[str, dict[str, Any]]) -> Values:
    """The task's metrics in the harness's results; for a group or tag without its own, those of all its tasks."""
    own = _numeric_metrics(task, results.get(task, {}))
    return own or {name: value for subtask, metrics in results.items() for name, value in _numeric_metrics(subtask, metrics).items()}


@cache
def _load_task_manager(include_path: Path | None) -> "TaskManager":
    """All known tasks, loaded once: the harness reads 26,000 files for them, which takes eight seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(include_path) if include_path else None)


class _StoppableModel:
    """The part of a model that the harness uses; calls `check_stop` before each batch.

    Not a torch module: the harness would tie the module's weights again, which overwrites peft's trained tokens.
    """

    def __init__(self, model: Any, check_stop: Callable[[], None]) -> None:  # any model
        self.device = model.device
        self.config = model.config
        self._model = model
        self._check_stop = check_stop

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # the model's own signature
        self._check_stop()
        return self._model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        self._check_stop()
        return self._model.generate(*args, **kwargs)


class _TaskFailed(Exception):
    """The task has no result; the message says why."""


def _run_task(
    task: str,
    manager: "TaskManager",
    model: Any,  # any model
    tokenizer: "PreTrainedTokenizerBase",
    limit: int | None,
    batch_size: int,
    check_stop: Callable[[], None],
) -> Values:
    """The task's metrics, with a smaller batch when memory runs out. Raises _TaskFailed."""
    from datasets.exceptions import DatasetsError
    from httpx2 import TransportError
    from jinja2 import TemplateError
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    if task not in manager.task_index:  # the harness also accepts file paths, and such a file may contain code
        raise _TaskFailed(f"lm-evaluation-harness has no task {task!r}")
    while True:
        try:
            with evaluation_state(model):
                # HFLM changes the model's and the tokenizer's attributes, so it gets a wrapper and a copy.
                wrapped = HFLM(_StoppableModel(model, check_stop), tokenizer=deepcopy(tokenizer), backend="causal", batch_size=batch_size)
                # bootstrap_iters=0: no standard errors by resampling, which starts processes.
                output = simple_evaluate(wrapped, tasks=[task], task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False)
            values = collect_values(task, output["results"] if output else {})
            if not values:
                raise _TaskFailed("the task has no numeric metric")
            return values
        except (OSError, TransportError, DatasetsError) as error:
            raise _TaskFailed(
                f"its data could not be fetched ({_describe_error(error)}); most tasks need network access the first time"
            ) from error
        except (
            ArithmeticError,
            AssertionError,
            AttributeError,
            ImportError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
            TemplateError,
        ) as error:
            if not is_out_of_memory(error):
                raise _TaskFailed(f"the task failed: {_describe_error(error)}") from error
            if batch_size == 1:
                raise _TaskFailed("memory ran out with a single row") from error
        batch_size //= 2
        free_memory()


def _numeric_metrics(task: str, results: dict[str, Any]) -> Values:
    """The metrics of a task's results; the harness names them `{metric},{filter}`, such as `acc,none`."""
    return {
        f"{PREFIX}{task}/{name.removesuffix(',none')}": float(value)
        for name, value in results.items()
        if "," in name and isinstance(value, int | float)
    }


def _describe_error(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
    return text if len(text) <= MAX_REASON_CHARACTERS else text[: MAX_REASON_CHARACTERS - 1] + "…"
