"""`reward_config` of a GRPO request: what makes a good completion. The reward is the weighted sum of all graders.

A grader reads the completion, and most graders also a column of the row: `reference_field`. In a dataset of type prompt_completion
that column is `completion`, the row's own completion.

A grader that cannot grade a completion (a judge does not answer, a reference is not a number) has failed. Failures are counted and
shown and never become a 0: the completion's value is unknown, so it is not compared with the others.
"""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError, model_validator

from schema.base import Strict, field_error
from schema.json_limits import JsonObject
from schema.types import HubId, SecretText

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
Column = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
Tag = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,31}$")]
Prompt = Annotated[str, StringConstraints(min_length=1, max_length=32_768)]
# No "@": a password would precede it, and secrets belong in api_key.
Endpoint = Annotated[
    str,
    StringConstraints(max_length=2048, pattern=r"^https?://[^\s@]+$"),
    Field(description="Where an OpenAI-compatible API begins.", examples=["https://judge.example.com/v1"]),
]

# Names whose `{name}_api_key` is another secret.
RESERVED_NAMES = ("wandb",)


class _Grader(Strict):
    name: Name = Field(description="Unique in the request; the metrics carry it.")
    weight: float = Field(1.0, ge=-100, le=100, description="The factor of this grader's score in the reward.")


class _AnswerGrader(_Grader):
    answer_tag: Tag | None = Field(
        None,
        description="Grade only the text in the last <tag>…</tag>; 0 without one. Default: grade the whole completion.",
    )


class _ReferenceGrader(_AnswerGrader):
    reference_field: Column = Field("answer", description="The dataset column that holds the correct answer.")


class _ApiKeyGrader(_Grader):
    api_key: SecretText | None = Field(None, description="The endpoint's API key. Kept in the secret store only.")

    @property
    def secret_name(self) -> str:
        """The name of this grader's key in the secret store."""
        return f"{self.name}_api_key"

    @model_validator(mode="after")
    def _check_secret_name(self) -> Self:
        if self.name in RESERVED_NAMES:
            raise field_error("name", f"a grader with an api_key cannot be called {self.name!r}: {self.secret_name} is another secret")
        return self


class FormatGrader(_Grader):
    """1 when the completion is exactly <think>…</think><answer>…</answer>, on any number of lines."""

    type: Literal["format"]
    think_tag: Tag = "think"
    answer_tag: Tag = "answer"
    partial: bool = Field(
        True, description="Otherwise 0.25 for each of the four tags that occurs exactly once, at most 0.75. With false: 0."
    )

    @model_validator(mode="after")
    def _check_distinct_tags(self) -> Self:
        if self.think_tag == self.answer_tag:
            raise field_error("answer_tag", "answer_tag must not be the same as think_tag")
        return self


class StringCheckGrader(_ReferenceGrader):
    """1 when the comparison of answer and reference holds, else 0. Surrounding whitespace is ignored."""

    type: Literal["string_check"]
    operation: Literal["eq", "ne", "like", "ilike"] = Field(
        "eq", description="`like`: the answer contains the reference; `ilike`: likewise, ignoring case."
    )


class NumericGrader(_ReferenceGrader):
    """1 when the last number of the answer is the last number of the reference, within the tolerance, else 0."""

    type: Literal["numeric_accuracy"]
    tolerance: float = Field(1e-6, ge=0, le=1, description="Relative to the reference, or absolute where that is 0.")


class ExpressionGrader(_ReferenceGrader):
    """1 when the answer's mathematical expression, LaTeX or plain, equals the reference's (math-verify), else 0."""

    type: Literal["expression_accuracy"]
    timeout_s: float = Field(5.0, gt=0, le=60, description="For one completion; comparing expressions may not terminate.")


class TextSimilarityGrader(_ReferenceGrader, _ApiKeyGrader):
    """The similarity of answer and reference, 0..1: by characters (fuzzy_match), words (bleu, rouge) or meaning (cosine of embeddings)."""

    type: Literal["text_similarity"]
    metric: Literal["fuzzy_match", "bleu", "rouge_1", "rouge_2", "rouge_l", "cosine"] = "fuzzy_match"
    embedding_model: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = Field(
        None, description="With `cosine`: a model of the endpoint `base_url`, or without one `owner/name` in the deployment's model store."
    )
    base_url: Endpoint | None = None

    @model_validator(mode="after")
    def _check_compatibility(self) -> Self:
        if (self.metric == "cosine") != (self.embedding_model is not None):
            raise field_error("embedding_model", "embedding_model is needed with metric 'cosine', and only used with it")
        if self.base_url is not None and self.metric != "cosine":
            raise field_error("base_url", "base_url is only used with metric 'cosine'")
        if self.api_key is not None and self.base_url is None:
            raise field_error("api_key", "api_key is only used with base_url")
        return self

    @model_validator(mode="after")
    def _check_embedding_model(self) -> Self:
        if self.embedding_model is not None and self.base_url is None and not _is_hub_id(self.embedding_model):
            raise field_error("embedding_model", "without base_url, embedding_model is the `owner/name` of a stored model")
        return self


class ScoreModelGrader(_ApiKeyGrader):
    """A judge model scores the answer; the score is scaled to 0..1. Works with any OpenAI-compatible chat completions endpoint."""

    type: Literal["score_model"]
    base_url: Endpoint
    model: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    prompt: Prompt = Field(
        "Rate the answer to the question.\n\nQuestion:\n{{prompt}}\n\nAnswer:\n{{completion}}",
        description="{{prompt}}, {{completion}} and {{column}} are replaced by the row's values; nothing else is replaced. "
        "The grader adds the instructions for the format of the score.",
    )
    min_score: float = Field(0.0, ge=-1e6, le=1e6, description="The score that becomes 0.")
    max_score: float = Field(10.0, ge=-1e6, le=1e6, description="Becomes 1. A score outside the range is a failure of the judge.")
    concurrency: int = Field(8, ge=1, le=128, description="Concurrent calls.")
    timeout_s: float = Field(60.0, gt=0, le=600, description="For one call; calls to a busy endpoint are repeated.")

    @model_validator(mode="after")
    def _check_score_range(self) -> Self:
        if self.min_score >= self.max_score:
            raise field_error("max_score", "max_score must be above min_score")
        return self


class JsonSchemaGrader(_AnswerGrader):
    """1 when the answer is JSON that is valid under the schema (draft 2020-12 unless it names another), else 0."""

    type: Literal["json_schema"]
    json_schema: JsonObject
    timeout_s: float = Field(2.0, gt=0, le=60, description="For one completion; a regular expression in the schema may take very long.")


class PythonGrader(_Grader):
    """Your function `grade(completion, row) -> float`, run in a sandbox without files or network and with limited time and memory.

    `completion` is a string; `row` is a dict of the row's columns and its `prompt`. The sandbox runs a subset of Python: functions,
    classes, comprehensions, match, try, f-strings, and the modules base64, bisect, collections, copy, csv, dataclasses, datetime,
    decimal, functools, hashlib, itertools, json, math, random, re, time, typing and unicodedata. No `yield`, no other modules.
    """

    type: Literal["python"]
    source: Annotated[str, StringConstraints(min_length=1, max_length=65_536)]
    timeout_s: float = Field(1.0, gt=0, le=30, description="For one completion.")
    memory_mb: int = Field(64, ge=8, le=1024)


Grader = Annotated[
    FormatGrader
    | StringCheckGrader
    | NumericGrader
    | ExpressionGrader
    | TextSimilarityGrader
    | ScoreModelGrader
    | JsonSchemaGrader
    | PythonGrader,
    Field(discriminator="type"),
]

GRADER_TYPES = tuple(
    get_args(grader.model_fields["type"].annotation)[0]
    for grader in (
        FormatGrader,
        StringCheckGrader,
        NumericGrader,
        ExpressionGrader,
        TextSimilarityGrader,
        ScoreModelGrader,
        JsonSchemaGrader,
        PythonGrader,
    )
)

_HUB_ID: TypeAdapter[str] = TypeAdapter(HubId)


def _is_hub_id(name: str) -> bool:
    try:
        _HUB_ID.validate_python(name)
    except ValidationError:
        return False
    return True
