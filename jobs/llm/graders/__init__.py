"""Graders: what a completion is worth, as the job's `reward_config` says. One file per kind; one line adds a kind.

Here belongs whatever judges one completion of one row. A grader gives a number or says why it could not: that is never a 0, for
a judge that is down would then teach as much as a bad answer does. What is done with the grades, and when a training with graders
that fail is given up, is decided in reward.py; what comes of the rewards, in the trainer.

Nothing that a user or a model wrote runs in this process: Python goes to a sandbox (python.py), and expressions and schemas,
which can compute for ever, to a child that can be killed (apart.py).
"""

from collections.abc import Sequence
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from jobs.llm.graders.base import Grader, GradingInput
from jobs.llm.graders.reward import RewardFunction
from schema.training import GrpoConfig

if TYPE_CHECKING:
    from jobs.runtime.context import JobContext

# The grader's type → "module:function"; the function takes the grader's configuration and the job's context.
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
    """The reward functions of a job, in the order of its `reward_config`. Each is to be closed. Raises JobFailed."""
    functions: list[RewardFunction] = []
    for grader_config in config.reward_config:
        grader: Grader = resolve_name(GRADERS[grader_config.type])(grader_config, context)
        functions.append(RewardFunction(grader_config, grader, context))
    return functions


def check_graders(functions: Sequence[RewardFunction], cases: Sequence[GradingInput]) -> None:
    """Ask every grader, before anything is computed, whether it can judge completions of these rows. Raises JobFailed."""
    for function in functions:
        function.check(cases)


def close_graders(functions: Sequence[RewardFunction]) -> None:
    """End what the graders started: children, connections."""
    for function in functions:
        function.close()
