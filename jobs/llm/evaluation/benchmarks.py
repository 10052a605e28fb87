"""Tasks of lm-evaluation-harness on a model that is already in memory.

The harness brings three dozen packages and is optional: jobs/environments/llm/requirements-lm-eval.txt adds it. A task
that cannot be run has the value None under its own name, `lm_eval/{task}`, and the reason in the notes.
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
NOT_INSTALLED = (
    "lm-evaluation-harness is not installed here; add jobs/environments/llm/requirements-lm-eval.txt to the trainer's environment"
)

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
    """What the harness measures, as `lm_eval/{task}/{metric}`, and why a task could not be run, as `lm_eval/{task}`.

    A metric that a task computes after a filter of its own is `{metric},{filter}`, in the harness's words. `limit` is rows of each
    task, at most; no chat template is applied, as in the figures that the harness's users publish. Beside its own, tasks are
    found in `include_path`. The model is left as it was found, and so is every random number generator; `pulse` is called before
    each batch, and may raise.
    """
    if not find_spec("lm_eval"):
        return {PREFIX + task: None for task in tasks}, {PREFIX + task: NOT_INSTALLED for task in tasks}

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every model in memory, and of every default
    manager = _load_task_manager(include_path)
    values: Values = {}
    notes: dict[str, str] = {}
    for task in tasks:  # one by one: what one of them lacks, the others need not do without
        try:
            values |= _run_task(task, manager, model, tokenizer, limit, batch_size, check_stop)
        except _TaskFailed as reason:
            values[PREFIX + task], notes[PREFIX + task] = None, str(reason)
    return values, notes


def collect_values(task: str, results: dict[str, dict[str, Any]]) -> Values:
    """The numbers of the task in the harness's results; of a group or tag without any of its own, those of all its tasks."""
    own = _numeric_metrics(task, results.get(task, {}))
    return own or {name: value for part, numbers in results.items() for name, value in _numeric_metrics(part, numbers).items()}


@cache
def _load_task_manager(include_path: Path | None) -> "TaskManager":
    """All tasks that there are; once, for the harness reads 26,000 files to know them: eight seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(include_path) if include_path else None)


class _StoppableModel:
    """A model as far as the harness uses it, with a pulse before each batch.

    No torch module: of those the harness ties the weights again, and peft's trained tokens do not survive that.
    """

    def __init__(self, model: Any, check_stop: Callable[[], None]) -> None:  # any model
        self.device = model.device
        self.config = model.config
        self._model = model
        self._check_stop = check_stop

    def __call__(self, *args: Any, **named: Any) -> Any:  # the model's own signature
        self._check_stop()
        return self._model(*args, **named)

    def generate(self, *args: Any, **named: Any) -> Any:
        self._check_stop()
        return self._model.generate(*args, **named)


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
    """The task's metrics; with fewer rows at once when memory runs out. Raises _CannotRun."""
    from datasets.exceptions import DatasetsError
    from httpx2 import TransportError
    from jinja2 import TemplateError
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    if task not in manager.task_index:  # the harness would also take it for the path of a file, which may hold code
        raise _TaskFailed(f"lm-evaluation-harness has no task {task!r}")
    size = batch_size
    while True:
        try:
            with evaluation_state(model):
                asked = HFLM(
                    _StoppableModel(model, check_stop), tokenizer=deepcopy(tokenizer), backend="causal", batch_size=size
                )  # it writes into both
                # No stderr by resampling: that starts processes.
                found = simple_evaluate(asked, tasks=[task], task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False)
            values = collect_values(task, found["results"] if found else {})
            if not values:
                raise _TaskFailed("the task has no metric that is a number")
            return values
        except (OSError, TransportError, DatasetsError) as error:
            raise _TaskFailed(
                f"its data could not be fetched ({_describe_error(error)}); most tasks need a network the first time"
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
            if size == 1:
                raise _TaskFailed("memory ran out with a single row") from error
        size //= 2
        free_memory()


def _numeric_metrics(task: str, results: dict[str, Any]) -> Values:
    """The harness writes `acc,none`: the metric, and the filter that the answers went through."""
    return {
        f"{PREFIX}{task}/{name.removesuffix(',none')}": float(value)
        for name, value in results.items()
        if "," in name and isinstance(value, int | float)
    }


def _describe_error(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
    return text if len(text) <= MAX_REASON_CHARACTERS else text[: MAX_REASON_CHARACTERS - 1] + "…"
