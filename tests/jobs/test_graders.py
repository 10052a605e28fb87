"""What each grader gives. The faults of another project's graders are among the tests: those with `never` in their name."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from jobs.errors import JobFailed
from jobs.graders import GRADERS, build_graders, check_graders, close_graders
from jobs.graders.endpoint import Endpoint
from jobs.graders.grading import Case, Failed, answer_of
from jobs.graders.judge import Judge
from jobs.graders.reward import HOPELESS, RewardFunction, incomparable_left_out, summary, text_of
from jobs.graders.text import last_number
from schema.graders import GRADER_TYPES, Grader, ScoreModelGrader
from tests.jobs.conftest import BASE, Record, a_context, a_spec
from tests.jobs.fake_openai import FakeOpenAI, question

THOUGHT = "<think>\nfirst\nthen\n</think>\n<answer>\n4\n</answer>"
Make = Callable[..., RewardFunction]


@pytest.fixture
def record() -> Record:
    return Record()


@pytest.fixture
def make(store: Path, tmp_path: Path, record: Record) -> Iterator[Make]:
    """Makes the reward function of one grader."""
    made: list[RewardFunction] = []

    def one(kind: str, /, secrets: dict[str, str] | None = None, **knobs: Any) -> RewardFunction:
        spec = a_spec(
            store,
            train=[{"prompt": "p", "answer": "a"}],
            held_out=[],
            dataset_type="prompt",
            trainer_type="grpo",
            reward_config=[{"name": "g", "type": kind} | knobs],
            hyperparameters={"batch_size": 2, "num_generations": 2, "max_completion_length": 32},
        )
        made.extend(build_graders(spec.training_config, a_context(spec, tmp_path, record, secrets)))  # type: ignore[arg-type]
        return made[-1]

    yield one
    close_graders(made)


@pytest.fixture
def endpoint() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as running:
        yield running


def grade(function: RewardFunction, completion: str, answer: object = None, **columns: object) -> float | Failed:
    return function.grade([Case("the prompt", completion, {"answer": answer} | columns)])[0]


def test_every_type_of_grader_in_the_contract_has_one_that_judges() -> None:
    assert set(GRADERS) == set(GRADER_TYPES)


# --- format --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (THOUGHT, 1.0),
        (THOUGHT + "\n", 1.0),
        ("<think>a</think><answer>b</answer>", 1.0),
        ("<think>a</think><answer>b</answer> and more", 0.75),
        ("<answer>b</answer><think>a</think>", 0.75),
        ("<think>a</think>b", 0.5),
        ("<think>a</think><think>a</think><answer>b</answer>", 0.5),
        ("<think>a", 0.25),
        ("a", 0.0),
    ],
)
def test_the_format_is_graded_by_its_tags(make: Make, completion: str, expected: float) -> None:
    assert grade(make("format"), completion) == expected
    assert grade(make("format", partial=False), completion) == (1.0 if expected == 1 else 0.0)


def test_the_format_never_needs_a_single_line_or_a_line_feed_at_the_end(make: Make) -> None:
    assert not THOUGHT.endswith("\n")
    assert grade(make("format"), THOUGHT) == 1.0


def test_the_format_is_graded_for_each_completion_and_never_one_number_for_all(make: Make) -> None:
    assert make("format")(["p", "p"], [THOUGHT, "no"], row=[{}, {}], trainer_state=None) == [1.0, 0.0]


def test_the_tags_of_a_format_are_the_callers(make: Make) -> None:
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
def test_a_string_is_compared_as_asked(make: Make, operation: str, completion: str, answer: object, expected: float) -> None:
    assert grade(make("string_check", operation=operation), completion, answer) == expected


def test_only_what_the_answer_tag_holds_is_compared(make: Make) -> None:
    assert grade(make("string_check", answer_tag="answer"), THOUGHT, "4") == 1.0
    assert grade(make("string_check"), THOUGHT, "4") == 0.0


def test_a_completion_without_the_tag_is_worth_nothing_whatever_is_compared(make: Make) -> None:
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
def test_the_answer_is_the_last_whole_pair_of_tags(completion: str, tag: str | None, answer: str | None) -> None:
    assert answer_of(completion, tag) == answer


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
def test_the_last_number_of_a_text_is_found(text: str, number: str | None) -> None:
    found = last_number(text)
    assert (None if found is None else float(found)) == (None if number is None else float(number))


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


def test_a_reference_that_is_no_number_is_a_failure_and_no_zero(make: Make) -> None:
    assert grade(make("numeric_accuracy"), "7", "seven") == Failed("column 'answer' of the row holds no number")


def test_a_row_without_the_reference_is_a_failure_and_no_zero(make: Make) -> None:
    for kind in ("string_check", "numeric_accuracy", "expression_accuracy", "text_similarity"):
        assert grade(make(kind), "7") == Failed("the row has nothing in column 'answer'")


# --- expressions ---------------------------------------------------------------------------------------------------------


def test_expressions_are_equal_when_they_mean_the_same(make: Make) -> None:
    same = make("expression_accuracy")
    assert grade(same, r"So it is $\frac{1}{2}$.", "1/2") == 1.0
    assert grade(same, r"\boxed{0.5}", "1/2") == 1.0
    assert grade(same, "$(x+1)^2$", "x^2+2x+1") == 1.0
    assert grade(same, "72 apples", 72) == 1.0
    assert grade(same, "$x+1$", "x^2+2x+1") == 0.0
    assert grade(same, "I do not know", 3) == 0.0
    assert grade(make("expression_accuracy", answer_tag="answer"), "<answer>(x+1)^2</answer>", "$x^2+2x+1$") == 1.0


def test_expressions_are_compared_outside_of_the_main_thread_too(make: Make) -> None:
    """math-verify's own alarm would raise there."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(grade, make("expression_accuracy"), "$4$", 4).result() == 1.0


def test_an_expression_that_takes_for_ever_is_a_failure_and_the_next_one_is_graded(make: Make) -> None:
    same = make("expression_accuracy", timeout_s=1.0)
    assert grade(same, "$9^{9^{9}}$", 1) == Failed("it took longer than 1 s")
    assert grade(same, "$4$", 4) == 1.0


def test_an_answer_is_never_run_as_python(make: Make, tmp_path: Path) -> None:
    written = tmp_path / "written"
    for attack in (f"__import__('os').system('touch {written}')", f"$__import__('os').system('touch {written}')$"):
        assert grade(make("expression_accuracy"), attack, 3) == 0.0
    assert not written.exists()


# --- similarity ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["fuzzy_match", "bleu", "rouge_1", "rouge_2", "rouge_l"])
def test_a_text_is_like_itself_and_less_like_another(make: Make, metric: str) -> None:
    alike = make("text_similarity", metric=metric)
    same, near, far = (
        grade(alike, text, "the cat sat on the mat") for text in ("the cat sat on the mat", "the cat sat on a mat", "no dogs here")
    )
    assert same == pytest.approx(1.0)
    assert isinstance(near, float)
    assert isinstance(far, float)
    assert 0 <= far < near < 1


def test_rouge_never_reads_a_key_that_the_library_does_not_have(make: Make) -> None:
    """Two of four words, one of three pairs, and two in order."""
    found = [grade(make("text_similarity", metric=f"rouge_{kind}"), "a b x y", "a b c d") for kind in "12l"]
    assert found == [pytest.approx(1 / 2), pytest.approx(1 / 3), pytest.approx(1 / 2)]


def test_fuzzy_match_is_never_the_same_for_all(make: Make) -> None:
    fuzzy = make("text_similarity", metric="fuzzy_match")
    assert grade(fuzzy, "kitten", "sitting") == pytest.approx(0.615, abs=1e-3)
    assert grade(fuzzy, "kitten", "kitten") == 1.0


def test_words_of_every_language_count(make: Make) -> None:
    assert grade(make("text_similarity", metric="rouge_1"), "кошка спит", "кошка ест") == pytest.approx(0.5)


def test_embeddings_of_an_endpoint_are_compared(make: Make, endpoint: FakeOpenAI) -> None:
    knobs = {"metric": "cosine", "embedding_model": "embedder", "base_url": endpoint.url}
    cosine = make("text_similarity", {"g_api_key": "mine"}, **knobs)
    cases = [Case("p", text, {"answer": "aab"}) for text in ("baa", "c", "", "aab")]
    assert cosine.grade(cases) == [pytest.approx(1.0), 0.0, 0.0, pytest.approx(1.0)]
    assert [asked["input"] for asked in endpoint.asked] == [["aab", "baa", "c"]]
    assert set(endpoint.keys) == {"mine"}


def test_an_embedding_that_cannot_be_had_is_never_a_zero(make: Make, endpoint: FakeOpenAI) -> None:
    endpoint.key = "another"
    cosine = make("text_similarity", metric="cosine", embedding_model="embedder", base_url=endpoint.url)
    assert grade(cosine, "a", "a") == Failed(f"{endpoint.url} answered 401 (the key is wrong)")


def test_embeddings_of_a_stored_model_are_compared(make: Make) -> None:
    cosine = make("text_similarity", metric="cosine", embedding_model=BASE)
    same, other = grade(cosine, "read the file", "read the file"), grade(cosine, "number of values", "read the file")
    assert same == pytest.approx(1.0)
    assert isinstance(other, float)
    assert other < 0.999


def test_an_embedding_model_that_is_not_stored_is_told_before_the_training(make: Make) -> None:
    with pytest.raises(JobFailed, match="tiny/none is not in the model store"):
        make("text_similarity", metric="cosine", embedding_model="tiny/none")


# --- a model as judge ----------------------------------------------------------------------------------------------------


def impatient_judge(base_url: str) -> Judge:
    config = ScoreModelGrader(name="g", type="score_model", base_url=base_url, model="m")
    return Judge(config, Endpoint(base_url, None, 0.2, tries_more=0), decided=lambda *_: None)


def test_a_judge_gives_points_that_are_scaled(make: Make, endpoint: FakeOpenAI) -> None:
    endpoint.answer = lambda body: json.dumps({"score": len(question(body))})
    judge = make("score_model", base_url=endpoint.url, model="m", prompt="{{completion}}", min_score=0, max_score=10)
    assert judge.grade([Case("p", "x" * count) for count in (0, 5, 10)]) == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("answer", ["7", ' {"score": 7} ', '{"score": 7.0, "reason": "good"}'])
def test_points_are_read_as_json_or_as_a_number(make: Make, endpoint: FakeOpenAI, answer: str) -> None:
    endpoint.answer = lambda _: answer
    assert grade(make("score_model", base_url=endpoint.url, model="m"), "c") == pytest.approx(0.7)


@pytest.mark.parametrize(
    "answer", ["seven", "7/10", "I say 7", "", "{}", '{"score": "7"}', '{"score": true}', "[7]", '{"score": NaN}', "11", "-1"]
)
def test_an_answer_without_points_is_a_failure_and_never_a_zero(make: Make, endpoint: FakeOpenAI, answer: str) -> None:
    endpoint.answer = lambda _: answer
    assert isinstance(grade(make("score_model", base_url=endpoint.url, model="m"), "c"), Failed)


def test_a_judge_that_is_down_is_a_failure_and_never_a_zero(make: Make, endpoint: FakeOpenAI) -> None:
    endpoint.answer = lambda _: 500
    judge = make("score_model", base_url=endpoint.url, model="m")
    assert grade(judge, "c") == Failed(f"{endpoint.url} answered 500")
    assert len(endpoint.asked) == 5  # the client tried again


def test_a_judge_that_is_busy_is_asked_again(make: Make, endpoint: FakeOpenAI) -> None:
    answers: Iterator[str | int] = iter([429, 503, '{"score": 5}'])
    endpoint.answer = lambda _: next(answers)
    assert grade(make("score_model", base_url=endpoint.url, model="m"), "c") == 0.5


def test_a_judge_that_takes_too_long_is_a_failure(endpoint: FakeOpenAI) -> None:
    waiting = threading.Event()
    endpoint.answer = lambda _: str(waiting.wait(10))
    judge = impatient_judge(endpoint.url)
    assert judge.grade([Case("p", "c")]) == [Failed(f"{endpoint.url} did not answer within 0.2 s")]
    judge.close()
    waiting.set()


def test_only_names_in_double_braces_are_filled_in_and_only_once(make: Make, endpoint: FakeOpenAI) -> None:
    judge = make("score_model", base_url=endpoint.url, model="m", prompt="{prompt} {{prompt}} {{ prompt }} {{level}} {{completion}}")
    judge.grade([Case("P", "{{prompt}} {{level}} {x}", {"level": 3})])
    assert question(endpoint.asked[0]) == "{prompt} P {{ prompt }} 3 {{prompt}} {{level}} {x}"


def test_each_judge_has_its_own_key_and_never_the_first_ones(make: Make, endpoint: FakeOpenAI) -> None:
    for key in ("one", "two"):
        grade(make("score_model", {"g_api_key": key}, base_url=endpoint.url, model="m"), "c")
    assert endpoint.keys == ["one", "two"]


def test_a_key_of_the_environment_is_never_sent(make: Make, endpoint: FakeOpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "the deployment's")
    grade(make("score_model", base_url=endpoint.url, model="m"), "c")
    assert endpoint.keys == ["none"]


def test_several_completions_are_judged_at_once_but_no_more_than_asked_for(make: Make, endpoint: FakeOpenAI) -> None:
    endpoint.answer = lambda _: time.sleep(0.02) or "5"
    make("score_model", base_url=endpoint.url, model="m", concurrency=3).grade([Case("p", str(n)) for n in range(12)])
    assert 2 <= endpoint.at_once <= 3


def test_a_judge_with_a_wrong_key_ends_the_job_before_it_begins(make: Make, endpoint: FakeOpenAI) -> None:
    endpoint.key = "right"
    judge = make("score_model", {"g_api_key": "a-wrong-key"}, base_url=endpoint.url, model="m")
    with pytest.raises(JobFailed, match=r"grader 'g': .* answered 401") as failed:
        check_graders([judge], [Case("p", "c")])
    assert failed.value.failure.code == "auth"
    assert "a-wrong-key" not in failed.value.failure.model_dump_json()


def test_a_judge_that_is_not_there_ends_the_job_before_it_begins() -> None:
    judge = impatient_judge("http://127.0.0.1:9/v1")
    with pytest.raises(JobFailed, match="cannot be reached"):
        judge.check([Case("p", "c")])
    judge.close()


def test_an_endpoint_that_knows_no_schemas_is_asked_in_plain_words(make: Make, endpoint: FakeOpenAI, record: Record) -> None:
    endpoint.answer = lambda body: 400 if "response_format" in body else "5"
    judge = make("score_model", base_url=endpoint.url, model="m")
    check_graders([judge], [Case("p", "c")])
    assert grade(judge, "c") == 0.5
    assert record.decisions["grader g"] == "plain"


def test_a_template_that_names_no_column_is_told_before_the_training(make: Make, endpoint: FakeOpenAI) -> None:
    judge = make("score_model", base_url=endpoint.url, model="m", prompt="{{completion}} {{solution}}")
    with pytest.raises(JobFailed, match=r"names \{\{solution\}\}, which no row has"):
        check_graders([judge], [Case("p", "c", {"answer": "a"})])
    assert not endpoint.asked


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


def test_a_schema_that_is_none_is_told_before_the_training(make: Make) -> None:
    with pytest.raises(JobFailed, match="is no JSON schema: see properties/a/type"):
        check_graders([make("json_schema", json_schema={"properties": {"a": {"type": "text"}}})], [Case("p", "c")])


def test_a_schema_that_refers_elsewhere_is_refused_and_nothing_is_fetched(make: Make, endpoint: FakeOpenAI) -> None:
    schema = {"$ref": endpoint.url + "/schema.json"}
    with pytest.raises(JobFailed, match="refers to something outside"):
        check_graders([make("json_schema", json_schema=schema)], [Case("p", "c")])
    assert not endpoint.asked


def test_a_pattern_that_takes_for_ever_is_a_failure(make: Make) -> None:
    slow = make("json_schema", json_schema={"pattern": "^(a+)+$"}, timeout_s=0.5)
    assert grade(slow, json.dumps("a" * 40 + "b")) == Failed("it took longer than 0.5 s")
    assert grade(slow, '"aaa"') == 1.0


def test_json_that_is_nested_without_end_is_a_failure(make: Make) -> None:
    assert grade(make("json_schema", json_schema={}), "[" * 200_000) == Failed("it is nested too deeply")


# --- what is done with failures ------------------------------------------------------------------------------------------


def test_a_failure_reaches_the_trainer_as_none_and_the_curves_as_a_share(make: Make) -> None:
    numbers = make("numeric_accuracy")
    told: dict[str, float] = {}
    rows: list[dict[str, Any]] = [{"answer": 1}, {"answer": 1}, {"answer": "?"}, {}]
    assert numbers(["p"] * 4, ["1", "2", "1", "1"], row=rows, log_metric=told.__setitem__) == [1.0, 0.0, None, None]
    assert told == {"graders/g/mean": 0.5, "graders/g/failed": 0.5}


def test_a_mean_of_nothing_is_no_number() -> None:
    assert summary("g", [Failed("why")]) == {"graders/g/mean": None, "graders/g/failed": 1.0}


def test_the_first_failure_is_told_and_then_one_now_and_again(make: Make, record: Record) -> None:
    numbers = make("numeric_accuracy")
    for _ in range(60):
        numbers(["p", "p"], ["1", "1"], row=[{"answer": 1}, {}])
    told = [event for event in record.events if event.type == "warning"]
    assert [event.message for event in told] == [  # type: ignore[union-attr]
        "grader 'g' could not grade 1 of 2 completions: the row has nothing in column 'answer'"
    ] * 2


def test_a_grader_that_fails_on_everything_again_and_again_ends_the_job(make: Make) -> None:
    numbers = make("numeric_accuracy")
    for _ in range(HOPELESS - 1):
        numbers(["p"], ["1"], row=[{}])
    numbers(["p"], ["1"], row=[{"answer": 1}])  # it works once, and the count begins anew
    for _ in range(HOPELESS - 1):
        numbers(["p"], ["1"], row=[{}])
    with pytest.raises(JobFailed, match="grader 'g' has failed on every completion 10 times in a row: the row has nothing"):
        numbers(["p"], ["1"], row=[{}])


def test_a_column_that_no_row_has_is_told_before_the_training(make: Make, record: Record) -> None:
    with pytest.raises(JobFailed, match="compares with column 'answer', which no row has") as failed:
        check_graders([make("string_check")], [Case("p", "c", {"solution": "s"})])
    assert failed.value.failure.hint == "set reference_field to one of: solution"
    check_graders([make("string_check")], [Case("p", "c", {"answer": "s"}), Case("p", "c", {"answer": None})])
    assert record.warnings["reference_missing"] == "1 of 2 rows have no 'answer' for grader 'g'"


def test_messages_are_graded_by_their_text() -> None:
    assert text_of([{"role": "assistant", "content": "a"}]) == "a"
    assert text_of([{"role": "user", "content": [{"type": "text", "text": "a"}]}]) == "a"
    assert text_of([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]) == "system: s\n\nuser: u"


def test_a_completion_that_some_grader_failed_on_is_not_compared_with_its_group() -> None:
    import torch

    nan = float("nan")
    rewards = torch.tensor([[1, 1], [1, nan], [0, 1], [1, nan], [0, nan], [nan, nan]])
    known = incomparable_left_out(rewards, group=3)
    # Of the first group the second completion is unknown; in the second one the second grader counts for nobody.
    assert known.isnan().all(dim=1).tolist() == [False, True, False, False, False, True]
    assert known.nansum(dim=1).tolist() == [2, 0, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("grader", "place"),
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
def test_a_grader_that_does_not_fit_itself_is_refused(grader: dict[str, Any], place: str) -> None:
    from pydantic import ValidationError

    reading: TypeAdapter[Any] = TypeAdapter(Grader)
    with pytest.raises(ValidationError) as refused:
        reading.validate_python({"name": "g"} | grader)
    error = refused.value.errors()[0]
    assert place in (error["loc"][-1], error.get("ctx", {}).get("field"))
