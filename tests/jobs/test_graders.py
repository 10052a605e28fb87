"""The grades of each grader, and how failures are handled."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from jobs.llm.graders import GRADERS, build_graders, check_graders, close_graders
from jobs.llm.graders.base import FailedGrade, GradingInput, extract_answer
from jobs.llm.graders.endpoint import Endpoint
from jobs.llm.graders.judge import Judge
from jobs.llm.graders.reward import MAX_CONSECUTIVE_FAILURES, RewardFunction, mask_incomparable, summarize_grades, to_text
from jobs.llm.graders.text import find_last_number
from jobs.runtime.errors import JobFailed
from schema.egress import EgressPolicy
from schema.training.llm_graders import GRADER_TYPES, Grader, ScoreModelGrader
from tests.jobs.conftest import BASE, EventRecorder, make_context, make_spec
from tests.jobs.fake_openai import FakeOpenAI, get_judge_prompt

THINKING_COMPLETION = "<think>\nfirst\nthen\n</think>\n<answer>\n4\n</answer>"
Make = Callable[..., RewardFunction]


@pytest.fixture
def record() -> EventRecorder:
    return EventRecorder()


@pytest.fixture
def make(store: Path, tmp_path: Path, record: EventRecorder) -> Iterator[Make]:
    """Makes the reward function of one grader."""
    made: list[RewardFunction] = []

    def build(kind: str, /, secrets: dict[str, str] | None = None, **settings: Any) -> RewardFunction:
        spec = make_spec(
            store,
            train=[{"prompt": "p", "answer": "a"}],
            held_out=[],
            dataset_type="prompt",
            trainer_type="grpo",
            reward_config=[{"name": "g", "type": kind} | settings],
            hyperparameters={"batch_size": 2, "num_generations": 2, "max_completion_length": 32},
        )
        made.extend(build_graders(spec.training_config, make_context(spec, tmp_path, record, secrets)))  # type: ignore[arg-type]
        return made[-1]

    yield build
    close_graders(made)


@pytest.fixture
def endpoint() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as running:
        yield running


def grade(function: RewardFunction, completion: str, answer: object = None, **columns: object) -> float | FailedGrade:
    return function.grade([GradingInput("the prompt", completion, {"answer": answer} | columns)])[0]


def test_every_grader_type_has_an_implementation() -> None:
    assert set(GRADERS) == set(GRADER_TYPES)


# --- format --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (THINKING_COMPLETION, 1.0),
        (THINKING_COMPLETION + "\n", 1.0),
        ("<think>a</think><answer>b</answer>", 1.0),
        ("<think>a</think><answer>b</answer> and more", 0.75),
        ("<answer>b</answer><think>a</think>", 0.75),
        ("<think>a</think>b", 0.5),
        ("<think>a</think><think>a</think><answer>b</answer>", 0.5),
        ("<think>a", 0.25),
        ("a", 0.0),
    ],
)
def test_format_is_graded_by_tags(make: Make, completion: str, expected: float) -> None:
    assert grade(make("format"), completion) == expected
    assert grade(make("format", partial=False), completion) == (1.0 if expected == 1 else 0.0)


def test_format_accepts_multiple_lines_without_trailing_newline(make: Make) -> None:
    assert not THINKING_COMPLETION.endswith("\n")
    assert grade(make("format"), THINKING_COMPLETION) == 1.0


def test_format_is_graded_per_completion(make: Make) -> None:
    assert make("format")(["p", "p"], [THINKING_COMPLETION, "no"], row=[{}, {}], trainer_state=None) == [1.0, 0.0]


def test_format_tags_are_configurable(make: Make) -> None:
    assert grade(make("format", think_tag="reason", answer_tag="final"), "<reason>a</reason><final>b</final>") == 1.0


# --- strings and numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "completion", "answer", "expected"),
    [
        ("eq", " Paris\n", "Paris", 1.0),
        ("eq", "paris", "Paris", 0.0),
        ("ne", "Rome", "Paris", 1.0),
        ("ne", "Paris", "Paris", 0.0),
        ("like", "It is Paris.", "Paris", 1.0),
        ("like", "It is paris.", "Paris", 0.0),
        ("ilike", "It is PARIS.", "Paris", 1.0),
        ("ilike", "STRASSE", "straße", 1.0),
        ("eq", "true", True, 1.0),
        ("eq", "3", 3, 1.0),
    ],
)
def test_string_is_compared_with_operation(make: Make, operation: str, completion: str, answer: object, expected: float) -> None:
    assert grade(make("string_check", operation=operation), completion, answer) == expected


def test_only_answer_tag_content_is_compared(make: Make) -> None:
    assert grade(make("string_check", answer_tag="answer"), THINKING_COMPLETION, "4") == 1.0
    assert grade(make("string_check"), THINKING_COMPLETION, "4") == 0.0


def test_completion_without_answer_tag_scores_zero(make: Make) -> None:
    assert grade(make("string_check", answer_tag="answer", operation="ne"), "5", "4") == 0.0


@pytest.mark.parametrize(
    ("completion", "tag", "answer"),
    [
        ("<a>1</a><a>2</a>", "a", "2"),
        ("<a>1</a> <a>2", "a", "1"),
        ("<a>\n1\n2</a>", "a", "1\n2"),
        ("1</a>", "a", None),
        (" 1 ", None, "1"),
    ],
)
def test_answer_is_last_complete_tag_pair(completion: str, tag: str | None, answer: str | None) -> None:
    assert extract_answer(completion, tag) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("it is 42.", "42"),
        ("-1,234.5 in all", "-1234.5"),
        ("6e23", "6e23"),
        (".5", "0.5"),
        ("5-3", "3"),
        ("= -3", "-3"),
        ("\N{MINUS SIGN}3", "-3"),
        ("1,2", "2"),
        ("1 of 2", "2"),
        ("#### 72", "72"),
        ("none", None),
        ("-", None),
    ],
)
def test_last_number_is_extracted(text: str, number: str | None) -> None:
    last = find_last_number(text)
    assert (None if last is None else float(last)) == (None if number is None else float(number))


@pytest.mark.parametrize(
    ("completion", "answer", "tolerance", "expected"),
    [
        ("3 and 4 is 7", 7, 0.0, 1.0),
        ("7.0", "7", 0.0, 1.0),
        ("8", 7, 0.0, 0.0),
        ("7.05", 7, 0.01, 1.0),
        ("0.005", 0, 0.01, 1.0),
        ("seven", 7, 0.0, 0.0),
        ("12345678901234567", "12345678901234568", 0.0, 0.0),
    ],
)
def test_numbers_are_compared_within_the_tolerance(make: Make, completion: str, answer: object, tolerance: float, expected: float) -> None:
    assert grade(make("numeric_accuracy", tolerance=tolerance), completion, answer) == expected


def test_non_numeric_reference_is_a_failure(make: Make) -> None:
    assert grade(make("numeric_accuracy"), "7", "seven") == FailedGrade("column 'answer' of the row has no number")


def test_missing_reference_is_a_failure(make: Make) -> None:
    for kind in ("string_check", "numeric_accuracy", "expression_accuracy", "text_similarity"):
        assert grade(make(kind), "7") == FailedGrade("the row has no value in column 'answer'")


# --- expressions ---------------------------------------------------------------------------------------------------------


def test_equivalent_expressions_are_equal(make: Make) -> None:
    grader = make("expression_accuracy")
    assert grade(grader, r"So it is $\frac{1}{2}$.", "1/2") == 1.0
    assert grade(grader, r"\boxed{0.5}", "1/2") == 1.0
    assert grade(grader, "$(x+1)^2$", "x^2+2x+1") == 1.0
    assert grade(grader, "72 apples", 72) == 1.0
    assert grade(grader, "$x+1$", "x^2+2x+1") == 0.0
    assert grade(grader, "I do not know", 3) == 0.0
    assert grade(make("expression_accuracy", answer_tag="answer"), "<answer>(x+1)^2</answer>", "$x^2+2x+1$") == 1.0


def test_expressions_are_compared_in_other_threads(make: Make) -> None:
    """math-verify's own timeout uses a signal, which raises outside the main thread."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(grade, make("expression_accuracy"), "$4$", 4).result() == 1.0


def test_expression_timeout_is_a_failure_and_next_one_is_graded(make: Make) -> None:
    grader = make("expression_accuracy", timeout_s=1.0)
    assert grade(grader, "$9^{9^{9}}$", 1) == FailedGrade("it took longer than 1 s")
    assert grade(grader, "$4$", 4) == 1.0


def test_answer_is_never_executed_as_python(make: Make, tmp_path: Path) -> None:
    written = tmp_path / "written"
    for attack in (f"__import__('os').system('touch {written}')", f"$__import__('os').system('touch {written}')$"):
        assert grade(make("expression_accuracy"), attack, 3) == 0.0
    assert not written.exists()


# --- similarity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["fuzzy_match", "bleu", "rouge_1", "rouge_2", "rouge_l"])
def test_similarity_ranks_same_similar_and_different_texts(make: Make, metric: str) -> None:
    similarity = make("text_similarity", metric=metric)
    same, similar, different = (
        grade(similarity, text, "the cat sat on the mat") for text in ("the cat sat on the mat", "the cat sat on a mat", "no dogs here")
    )
    assert same == pytest.approx(1.0)
    assert isinstance(similar, float)
    assert isinstance(different, float)
    assert 0 <= different < similar < 1


def test_rouge_scores_partial_overlap(make: Make) -> None:
    """In common: two of four words, one of three pairs, and a sequence of two words."""
    grades = [grade(make("text_similarity", metric=f"rouge_{kind}"), "a b x y", "a b c d") for kind in "12l"]
    assert grades == [pytest.approx(1 / 2), pytest.approx(1 / 3), pytest.approx(1 / 2)]


def test_fuzzy_match_differs_between_texts(make: Make) -> None:
    fuzzy = make("text_similarity", metric="fuzzy_match")
    assert grade(fuzzy, "kitten", "sitting") == pytest.approx(0.615, abs=1e-3)
    assert grade(fuzzy, "kitten", "kitten") == 1.0


def test_similarity_counts_words_of_any_language(make: Make) -> None:
    assert grade(make("text_similarity", metric="rouge_1"), "кошка спит", "кошка ест") == pytest.approx(0.5)


def test_endpoint_embeddings_are_compared(make: Make, endpoint: FakeOpenAI) -> None:
    settings = {"metric": "cosine", "embedding_model": "embedder", "base_url": endpoint.url}
    cosine = make("text_similarity", {"g_api_key": "mine"}, **settings)
    cases = [GradingInput("p", text, {"answer": "aab"}) for text in ("baa", "c", "", "aab")]
    assert cosine.grade(cases) == [pytest.approx(1.0), 0.0, 0.0, pytest.approx(1.0)]
    assert [request["input"] for request in endpoint.requests] == [["aab", "baa", "c"]]
    assert set(endpoint.keys) == {"mine"}


def test_failed_embedding_request_is_a_failure(make: Make, endpoint: FakeOpenAI) -> None:
    endpoint.key = "another"
    cosine = make("text_similarity", metric="cosine", embedding_model="embedder", base_url=endpoint.url)
    assert grade(cosine, "a", "a") == FailedGrade(f"{endpoint.url} answered 401 (the API key is wrong)")


def test_stored_model_embeddings_are_compared(make: Make) -> None:
    cosine = make("text_similarity", metric="cosine", embedding_model=BASE)
    same, other = grade(cosine, "read the file", "read the file"), grade(cosine, "number of values", "read the file")
    assert same == pytest.approx(1.0)
    assert isinstance(other, float)
    assert other < 0.999


def test_missing_embedding_model_fails_before_training(make: Make) -> None:
    with pytest.raises(JobFailed, match="tiny/none is not in the model store"):
        make("text_similarity", metric="cosine", embedding_model="tiny/none")


# --- a model as judge ----------------------------------------------------------------------------------------------------


def make_judge_with_short_timeout(base_url: str) -> Judge:
    config = ScoreModelGrader(name="g", type="score_model", base_url=base_url, model="m")
    return Judge(config, Endpoint(base_url, None, 0.2, EgressPolicy(allow_loopback=True), max_retries=0), log_decision=lambda *_: None)


def test_judge_scores_are_scaled(make: Make, endpoint: FakeOpenAI) -> None:
    endpoint.answer = lambda body: json.dumps({"score": len(get_judge_prompt(body))})
    judge = make("score_model", base_url=endpoint.url, model="m", prompt="{{completion}}", min_score=0, max_score=10)
    assert judge.grade([GradingInput("p", "x" * count) for count in (0, 5, 10)]) == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("answer", ["7", ' {"score": 7} ', '{"score": 7.0, "reason": "good"}'])
def test_judge_score_is_read_from_json_or_number(make: Make, endpoint: FakeOpenAI, answer: str) -> None:
    endpoint.answer = lambda _: answer
    assert grade(make("score_model", base_url=endpoint.url, model="m"), "c") == pytest.approx(0.7)


@pytest.mark.parametrize(
    "answer",
    [
        *["seven", "7/10", "I say 7", "", "{}", '{"score": "7"}', '{"score": true}', "[7]", '{"score": NaN}', "11", "-1"],
        *['{"score": 1e999}', f'{{"score": {"9" * 400}}}', f'{{"score": {"9" * 10_000}}}', "9" * 400, '{"score": [[7]]}'],
    ],
)
def test_answer_without_valid_score_is_a_failure(make: Make, endpoint: FakeOpenAI, answer: str) -> None:
    endpoint.answer = lambda _: answer
    assert isinstance(grade(make("score_model", base_url=endpoint.url, model="m"), "c"), FailedGrade)


def test_judge_server_error_is_a_failure(make: Make, endpoint: FakeOpenAI) -> None:
    endpoint.answer = lambda _: 500
    judge = make("score_model", base_url=endpoint.url, model="m")
    assert grade(judge, "c") == FailedGrade(f"{endpoint.url} answered 500")
    assert len(endpoint.requests) == 5  # the client retried


def test_busy_judge_is_retried(make: Make, endpoint: FakeOpenAI) -> None:
    answers: Iterator[str | int] = iter([429, 503, '{"score": 5}'])
    endpoint.answer = lambda _: next(answers)
    assert grade(make("score_model", base_url=endpoint.url, model="m"), "c") == 0.5


def test_judge_timeout_is_a_failure(endpoint: FakeOpenAI) -> None:
    waiting = threading.Event()
    endpoint.answer = lambda _: str(waiting.wait(10))
    judge = make_judge_with_short_timeout(endpoint.url)
    assert judge.grade([GradingInput("p", "c")]) == [FailedGrade(f"{endpoint.url} did not answer within 0.2 s")]
    judge.close()
    waiting.set()


def test_template_fills_only_double_brace_names_once(make: Make, endpoint: FakeOpenAI) -> None:
    judge = make("score_model", base_url=endpoint.url, model="m", prompt="{prompt} {{prompt}} {{ prompt }} {{level}} {{completion}}")
    judge.grade([GradingInput("P", "{{prompt}} {{level}} {x}", {"level": 3})])
    assert get_judge_prompt(endpoint.requests[0]) == "{prompt} P {{ prompt }} 3 {{prompt}} {{level}} {x}"


def test_each_judge_uses_its_own_key(make: Make, endpoint: FakeOpenAI) -> None:
    for key in ("one", "two"):
        grade(make("score_model", {"g_api_key": key}, base_url=endpoint.url, model="m"), "c")
    assert endpoint.keys == ["one", "two"]


def test_environment_api_key_is_never_sent(make: Make, endpoint: FakeOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "the deployment's")
    grade(make("score_model", base_url=endpoint.url, model="m"), "c")
    assert endpoint.keys == ["none"]


def test_concurrency_limit_is_respected(make: Make, endpoint: FakeOpenAI) -> None:
    endpoint.answer = lambda _: time.sleep(0.02) or "5"
    make("score_model", base_url=endpoint.url, model="m", concurrency=3).grade([GradingInput("p", str(n)) for n in range(12)])
    assert 2 <= endpoint.max_concurrent <= 3


def test_wrong_judge_key_fails_the_job_before_training(make: Make, endpoint: FakeOpenAI) -> None:
    endpoint.key = "right"
    judge = make("score_model", {"g_api_key": "a-wrong-key"}, base_url=endpoint.url, model="m")
    with pytest.raises(JobFailed, match=r"grader 'g': .* answered 401") as failed:
        check_graders([judge], [GradingInput("p", "c")])
    assert failed.value.failure.code == "auth"
    assert "a-wrong-key" not in failed.value.failure.model_dump_json()


def test_unreachable_judge_fails_the_job_before_training() -> None:
    with FakeOpenAI() as closed:
        judge = make_judge_with_short_timeout(closed.url)
    with pytest.raises(JobFailed, match="cannot be reached"):
        judge.check([GradingInput("p", "c")])
    judge.close()


def test_endpoint_without_schema_support_is_asked_for_plain_text(make: Make, endpoint: FakeOpenAI, record: EventRecorder) -> None:
    endpoint.answer = lambda body: 400 if "response_format" in body else "5"
    judge = make("score_model", base_url=endpoint.url, model="m")
    check_graders([judge], [GradingInput("p", "c")])
    assert grade(judge, "c") == 0.5
    assert record.decisions["grader g"] == "plain"


def test_unknown_template_column_fails_before_training(make: Make, endpoint: FakeOpenAI) -> None:
    judge = make("score_model", base_url=endpoint.url, model="m", prompt="{{completion}} {{solution}}")
    with pytest.raises(JobFailed, match=r"uses \{\{solution\}\}, which no row has"):
        check_graders([judge], [GradingInput("p", "c", {"answer": "a"})])
    assert not endpoint.requests


# --- json ----------------------------------------------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ('{"name": "a"}', 1.0),
        (' {"name": "a"}\n', 1.0),
        ('{"name": 1}', 0.0),
        ('{"name": "a", "more": 1}', 0.0),
        ("no json", 0.0),
        ("", 0.0),
        ('{"name": "a"} and more', 0.0),
        ("NaN", 0.0),
    ],
)
def test_json_is_graded_by_its_schema(make: Make, completion: str, expected: float) -> None:
    assert grade(make("json_schema", json_schema=SCHEMA), completion) == expected


def test_invalid_json_schema_fails_before_training(make: Make) -> None:
    with pytest.raises(JobFailed, match="is not a valid JSON schema: see properties/a/type"):
        check_graders([make("json_schema", json_schema={"properties": {"a": {"type": "text"}}})], [GradingInput("p", "c")])


def test_external_schema_reference_is_rejected_without_fetching(make: Make, endpoint: FakeOpenAI) -> None:
    schema = {"$ref": endpoint.url + "/schema.json"}
    with pytest.raises(JobFailed, match="refers to another document"):
        check_graders([make("json_schema", json_schema=schema)], [GradingInput("p", "c")])
    assert not endpoint.requests


def test_slow_pattern_is_a_failure(make: Make) -> None:
    slow = make("json_schema", json_schema={"pattern": "^(a+)+$"}, timeout_s=0.5)
    assert grade(slow, json.dumps("a" * 40 + "b")) == FailedGrade("it took longer than 0.5 s")
    assert grade(slow, '"aaa"') == 1.0


def test_deeply_nested_json_is_a_failure(make: Make) -> None:
    assert grade(make("json_schema", json_schema={}), "[" * 200_000) == FailedGrade("it is nested too deeply")


# --- failed grades --------------------------------------------------------------------------------------------------------


def test_failure_is_none_for_trainer_and_a_fraction_in_metrics(make: Make) -> None:
    numbers = make("numeric_accuracy")
    metrics: dict[str, float] = {}
    rows: list[dict[str, Any]] = [{"answer": 1}, {"answer": 1}, {"answer": "?"}, {}]
    assert numbers(["p"] * 4, ["1", "2", "1", "1"], row=rows, log_metric=metrics.__setitem__) == [1.0, 0.0, None, None]
    assert metrics == {"graders/g/mean": 0.5, "graders/g/failed": 0.5}


def test_mean_without_grades_is_none() -> None:
    assert summarize_grades("g", [FailedGrade("reason")]) == {"graders/g/mean": None, "graders/g/failed": 1.0}


def test_failures_warn_first_and_then_periodically(make: Make, record: EventRecorder) -> None:
    numbers = make("numeric_accuracy")
    for _ in range(60):
        numbers(["p", "p"], ["1", "1"], row=[{"answer": 1}, {}])
    warnings = [event for event in record.events if event.type == "warning"]
    assert [event.message for event in warnings] == [  # type: ignore[union-attr]
        "grader 'g' could not grade 1 of 2 completions: the row has no value in column 'answer'"
    ] * 2


def test_grader_failing_on_everything_fails_the_job(make: Make) -> None:
    numbers = make("numeric_accuracy")
    for _ in range(MAX_CONSECUTIVE_FAILURES - 1):
        numbers(["p"], ["1"], row=[{}])
    numbers(["p"], ["1"], row=[{"answer": 1}])  # one success resets the count
    for _ in range(MAX_CONSECUTIVE_FAILURES - 1):
        numbers(["p"], ["1"], row=[{}])
    with pytest.raises(JobFailed, match="grader 'g' failed on every completion 10 times in a row: the row has no value"):
        numbers(["p"], ["1"], row=[{}])


def test_missing_reference_column_fails_before_training(make: Make, record: EventRecorder) -> None:
    with pytest.raises(JobFailed, match="compares with column 'answer', which no row has") as failed:
        check_graders([make("string_check")], [GradingInput("p", "c", {"solution": "s"})])
    assert failed.value.failure.hint == "set reference_field to one of: solution"
    check_graders([make("string_check")], [GradingInput("p", "c", {"answer": "s"}), GradingInput("p", "c", {"answer": None})])
    assert record.warnings["reference_missing"] == "1 of 2 rows have no 'answer' for grader 'g'"


def test_messages_are_graded_by_their_text() -> None:
    assert to_text([{"role": "assistant", "content": "a"}]) == "a"
    assert to_text([{"role": "user", "content": [{"type": "text", "text": "a"}]}]) == "a"
    assert to_text([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]) == "system: s\n\nuser: u"


def test_completion_with_failed_grader_is_excluded_from_its_group() -> None:
    import torch

    nan = float("nan")
    rewards = torch.tensor([[1, 1], [1, nan], [0, 1], [1, nan], [0, nan], [nan, nan]])
    masked = mask_incomparable(rewards, group_size=3)
    # The second completion of the first group is excluded; the second grader failed on the whole second group.
    assert masked.isnan().all(dim=1).tolist() == [False, True, False, False, False, True]
    assert masked.nansum(dim=1).tolist() == [2, 0, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("grader", "field"),
    [
        ({"type": "score_model", "base_url": "ftp://x", "model": "m"}, "base_url"),
        ({"type": "score_model", "base_url": "https://me:secret@x/v1", "model": "m"}, "base_url"),
        ({"type": "score_model", "base_url": "https://x/v1", "model": "m", "name": "wandb"}, "name"),
        ({"type": "text_similarity", "metric": "cosine"}, "embedding_model"),
        ({"type": "text_similarity", "embedding_model": "a/b"}, "embedding_model"),
        ({"type": "text_similarity", "metric": "cosine", "embedding_model": "../../x"}, "embedding_model"),
        ({"type": "format", "think_tag": "a", "answer_tag": "a"}, "answer_tag"),
        ({"type": "format", "think_tag": "a>.*"}, "think_tag"),
    ],
)
def test_invalid_grader_config_is_rejected(grader: dict[str, Any], field: str) -> None:
    from pydantic import ValidationError

    adapter: TypeAdapter[Any] = TypeAdapter(Grader)
    with pytest.raises(ValidationError) as rejected:
        adapter.validate_python({"name": "g"} | grader)
    error = rejected.value.errors()[0]
    assert field in (error["loc"][-1], error.get("ctx", {}).get("field"))
