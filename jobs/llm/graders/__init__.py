"""Graders: functions that score a completion, as configured in `reward_config`. One file per kind; one line adds a kind.

Code that grades one completion of one row belongs here. A grader returns a number or a FailedGrade with a reason, never 0 for a
failure: an endpoint that is down would then train the model as if the completions were bad. reward.py decides what happens to failed
grades and when a training with failing graders ends; the trainer decides what the rewards do.

Nothing that a user or a model wrote runs in this process: Python runs in a sandbox (python.py), and expressions and schemas, whose
evaluation may never end, in a child process that can be killed (subprocess_graders.py).
"""

from collections.abc import Sequence
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from jobs.llm.graders.base import Grader, GradingInput
from jobs.llm.graders.reward import RewardFunction
from schema.training import GrpoConfig

if TYPE_CHECKING:
    from jobs.runtime.context import JobContext

# The grader's type → "module:function". The function takes the grader's config and the job's context.
GRADERS = {
    "format": "jobs.llm.graders.text:format_grader",
    "string_check": "jobs.llm.graders.text:string_grader",
    "numeric_accuracy": "jobs.llm.graders.text:numeric_grader",
    "expression_accuracy": "jobs.llm.graders.subprocess_graders:expression_grader",
    "text_similarity": "jobs.llm.graders.similarity:similarity_grader",
    "score_model": "jobs.llm.graders.judge:score_model_grader",
    "json_schema": "jobs.llm.graders.subprocess_graders:schema_grader",
    "python": "jobs.llm.graders.python:python_grader",
}


def build_graders(config: GrpoConfig, context: "JobContext") -> list[RewardFunction]:
    """The reward functions of a job, in the order of its `reward_config`. Close them with `close_graders`. Raises JobFailed."""
    functions: list[RewardFunction] = []
    for grader_config in config.reward_config:
        grader: Grader = resolve_name(GRADERS[grader_config.type])(grader_config, context)
        functions.append(RewardFunction(grader_config, grader, context))
    return functions


def check_graders(functions: Sequence[RewardFunction], cases: Sequence[GradingInput]) -> None:
    """Check before training that every grader can grade completions of these rows. Raises JobFailed."""
    for function in functions:
        function.check(cases)


def close_graders(functions: Sequence[RewardFunction]) -> None:
    """Close the graders' child processes and connections."""
    for function in functions:
        function.close()
