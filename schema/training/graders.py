"""`reward_config` of a GRPO request: what is a good completion. The reward is the weighted sum of all graders.

A grader reads the completion, and most of them a column of the row: `reference_field`. In a dataset of type prompt_completion
that is `completion`: the row's own one, with which the model's are compared.

A grader that could not judge a completion (a judge that did not answer, a reference that is no number) has failed, which is
counted and shown and never a 0: what such a completion is worth is not known, so it is not compared with the others.
"""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, JsonValue, SecretStr, StringConstraints, TypeAdapter, ValidationError, model_validator

from schema.base import Strict, field_error
from schema.types import HubId

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
Column = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
Tag = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,31}$")]
Prompt = Annotated[str, StringConstraints(min_length=1, max_length=32_768)]
# No "@": what stands before it would be a password, and the request's place for secrets is api_key.
Endpoint = Annotated[
    str,
    StringConstraints(max_length=2048, pattern=r"^https?://[^\s@]+$"),
    Field(description="Where an OpenAI-compatible API begins.", examples=["https://judge.example.com/v1"]),
]

# Names whose `{name}_api_key` is somebody else's secret.
RESERVED_NAMES = ("wandb",)


class _Grader(Strict):
    name: Name = Field(description="Unique in the request; the metrics carry it.")
    weight: float = Field(1.0, ge=-100, le=100, description="Times what the grader gives, in the sum.")


class _AnswerGrader(_Grader):
    answer_tag: Tag | None = Field(
        None, description="Only what stands in the last <tag>…</tag> is graded, and a completion without it gets 0; left out, all of it is."
    )


class _ReferenceGrader(_AnswerGrader):
    reference_field: Column = Field("answer", description="The column of the dataset that has the right answer.")


class _ApiKeyGrader(_Grader):
    api_key: SecretStr | None = Field(None, description="Of the endpoint; kept in the secret store only.")

    @property
    def secret_name(self) -> str:
        """What the job's secret store calls this grader's key."""
        return f"{self.name}_api_key"

    @model_validator(mode="after")
    def _check_secret_name(self) -> Self:
        if self.name in RESERVED_NAMES:
            raise field_error(
                "name", f"a grader with a key of its own cannot be called {self.name!r}: {self.secret_name} is another secret"
            )
        return self


class FormatGrader(_Grader):
    """1 when the completion is <think>…</think><answer>…</answer> and nothing else, over as many lines as it likes."""

    type: Literal["format"]
    think_tag: Tag = "think"
    answer_tag: Tag = "answer"
    partial: bool = Field(
        True, description="Otherwise 0.25 for each of the four tags that stands exactly once, 0.75 at most; false: all or nothing."
    )

    @model_validator(mode="after")
    def _check_distinct_tags(self) -> Self:
        if self.think_tag == self.answer_tag:
            raise field_error("answer_tag", "answer_tag must not be the same as think_tag")
        return self


class StringCheckGrader(_ReferenceGrader):
    """1 when the answer compares with the reference as asked, else 0. Surrounding whitespace does not count."""

    type: Literal["string_check"]
    operation: Literal["eq", "ne", "like", "ilike"] = Field(
        "eq", description="`like`: the answer contains the reference; `ilike`: whatever the case."
    )


class NumericGrader(_ReferenceGrader):
    """1 when the last number of the answer is the last number of the reference, within the tolerance, else 0."""

    type: Literal["numeric_accuracy"]
    tolerance: float = Field(1e-6, ge=0, le=1, description="Relative to the reference, or absolute where that is 0.")


class ExpressionGrader(_ReferenceGrader):
    """1 when the answer's mathematical expression, LaTeX or plain, equals the reference's (math-verify), else 0."""

    type: Literal["expression_accuracy"]
    timeout_s: float = Field(5.0, gt=0, le=60, description="For one completion; comparing expressions can take forever.")


class TextSimilarityGrader(_ReferenceGrader, _ApiKeyGrader):
    """How like the reference the answer is, 0..1: by characters (fuzzy_match), words (bleu, rouge) or meaning (cosine of embeddings)."""

    type: Literal["text_similarity"]
    metric: Literal["fuzzy_match", "bleu", "rouge_1", "rouge_2", "rouge_l", "cosine"] = "fuzzy_match"
    embedding_model: Annotated[str, StringConstraints(min_length=1, max_length=256)] | None = Field(
        None, description="With `cosine`: a model of the endpoint `base_url`; without that, `owner/name` of the deployment's model store."
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
    """A judge gives points, which are scaled to 0..1: any endpoint that speaks OpenAI's chat completions."""

    type: Literal["score_model"]
    base_url: Endpoint
    model: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    prompt: Prompt = Field(
        "Rate the answer to the question.\n\nQuestion:\n{{prompt}}\n\nAnswer:\n{{completion}}",
        description="{{prompt}}, {{completion}} and {{column}} stand for the row's own; nothing else is a template. "
        "How to write the points down is added by the grader.",
    )
    min_score: float = Field(0.0, ge=-1e6, le=1e6, description="Becomes 0.")
    max_score: float = Field(10.0, ge=-1e6, le=1e6, description="Becomes 1. Points outside of these two are a failure of the judge.")
    concurrency: int = Field(8, ge=1, le=128, description="Calls at once.")
    timeout_s: float = Field(60.0, gt=0, le=600, description="For one call; it is repeated when the endpoint is busy.")

    @model_validator(mode="after")
    def _check_score_range(self) -> Self:
        if self.min_score >= self.max_score:
            raise field_error("max_score", "max_score must be above min_score")
        return self


class JsonSchemaGrader(_AnswerGrader):
    """1 when the answer is JSON that the schema (draft 2020-12, unless it names another) accepts, else 0."""

    type: Literal["json_schema"]
    json_schema: dict[str, JsonValue]
    timeout_s: float = Field(2.0, gt=0, le=60, description="For one completion; a pattern of the schema can take forever.")


class PythonGrader(_Grader):
    """A function of yours, `grade(completion, row) -> float`, run in a sandbox without files, network, or more than its limits.

    `completion` is a string, and `row` a dict of the row's columns and its `prompt`. The sandbox runs a part of Python: functions,
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
    get_args(kind.model_fields["type"].annotation)[0]
    for kind in (
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
