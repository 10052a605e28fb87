"""lm-evaluation-harness tasks run where the harness is installed; elsewhere the metrics have a note that says why they did not."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from jobs.llm.evaluation.benchmarks import collect_values, evaluate_with_lm_eval
from jobs.runtime.promotion_gate import evaluate_gate
from schema.job import EvalMetrics
from schema.training.evaluation import Threshold
from tests.jobs.test_evaluation_generation import capture_rng_state
from tests.jobs.test_trainable_tokens import make_input_ids, make_tuned_model

LM_EVAL_INSTALLED = find_spec("lm_eval") is not None
requires_lm_eval = pytest.mark.skipif(
    not LM_EVAL_INSTALLED, reason="jobs/environments/llm/requirements-lm-eval.txt is not installed; it is optional"
)

CHOICE_TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
GENERATION_TASK = """
task: tiny_free
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
NAMES = "abcdef"


@pytest.mark.skipif(LM_EVAL_INSTALLED, reason="lm-evaluation-harness is installed")
def test_missing_harness_is_noted_for_every_task() -> None:
    values, notes = evaluate_with_lm_eval(None, None, ["arc_easy", "mmlu"], limit=None, batch_size=1)
    assert values == {"lm_eval/arc_easy": None, "lm_eval/mmlu": None}
    assert notes.keys() == values.keys()
    assert all("jobs/environments/llm/requirements-lm-eval.txt" in note for note in notes.values())
    threshold = Threshold.model_validate({"metric": "lm_eval/arc_easy/acc", "at_least": 0.1})
    gate = evaluate_gate([threshold], EvalMetrics(values=values, notes=notes), None)
    assert "jobs/environments/llm/requirements-lm-eval.txt" in gate.checks[0].reason


def test_metric_name_contains_task_and_filter() -> None:
    results = {"gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.25, "exact_match,none": 1, "exact_match_stderr,none": "N/A"}}
    assert collect_values("gsm8k", results) == {"lm_eval/gsm8k/exact_match,strict-match": 0.25, "lm_eval/gsm8k/exact_match": 1.0}


def test_group_metric_is_used_when_present() -> None:
    results = {"mmlu": {"alias": "mmlu", "acc,none": 0.3}, "mmlu_virology": {"alias": " - virology", "acc,none": 0.2}}
    assert collect_values("mmlu", results) == {"lm_eval/mmlu/acc": 0.3}


def test_group_without_metric_gives_task_metrics() -> None:
    results = {"arc": {"alias": "arc", " ": " "}, "arc_easy": {"acc,none": 0.3}, "arc_challenge": {"acc,none": 0.2}}
    assert collect_values("arc", results) == {"lm_eval/arc_easy/acc": 0.3, "lm_eval/arc_challenge/acc": 0.2}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two local tasks of six rows."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"what does {name} do", "choices": ["a list", "a name"], "answer": n % 2} for n, name in enumerate(NAMES)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in {"choice": CHOICE_TASK, "free": GENERATION_TASK}.items():
        (folder / f"{name}.yaml").write_text(task.replace("ROWS", str(folder / "rows.jsonl")))
    return folder


@pytest.fixture
def model(base: Path) -> Any:
    """A model as during training: an adapter, and tied embeddings with a few trained rows."""
    tuned = make_tuned_model(base)
    tuned.config.use_cache = False
    return tuned.train()


def expected_accuracy(model: Any, tokenizer: Any, rows: int) -> float:
    """Fraction of questions whose right choice has the higher sum of token log probabilities."""
    import torch

    def likelihood(question: str, choice: str) -> float:
        question_ids, ids = tokenizer(question)["input_ids"], tokenizer(f"{question} {choice}")["input_ids"]
        with torch.no_grad():
            log_probs = model.eval()(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(float(log_probs[n - 1, ids[n]]) for n in range(len(question_ids), len(ids)))

    scores = [[likelihood(f"what does {name} do", choice) for choice in ("a list", "a name")] for name in NAMES[:rows]]
    return sum(pair.index(max(pair)) == n % 2 for n, pair in enumerate(scores)) / rows


@requires_lm_eval
def test_harness_evaluates_model_in_memory_and_restores_it(model: Any, tokenizer: Any, tasks: Path) -> None:
    import torch

    calls: list[int] = []
    before = model.eval()(input_ids=make_input_ids()).logits
    accuracy = expected_accuracy(model, tokenizer, 5)
    model.train()
    state, padding = capture_rng_state(), tokenizer.padding_side
    values, notes = evaluate_with_lm_eval(
        model, tokenizer, ["tiny_choice", "tiny_free"], limit=5, batch_size=2, check_stop=lambda: calls.append(1), include_path=tasks
    )
    assert notes == {}
    assert values == {"lm_eval/tiny_choice/acc": accuracy, "lm_eval/tiny_free/exact_match": 0.0}
    assert len(calls) >= 3 + 3  # five questions of each task, two at a time
    assert model.training
    assert (capture_rng_state(), tokenizer.padding_side) == (state, padding)
    assert torch.equal(model.eval()(input_ids=make_input_ids()).logits, before)


@requires_lm_eval
def test_task_that_cannot_run_is_noted_and_others_run(model: Any, tokenizer: Any, tasks: Path) -> None:
    tasks_to_run = ["nothing_like_it", str(tasks / "choice.yaml"), "arc_easy", "tiny_free"]
    values, notes = evaluate_with_lm_eval(model, tokenizer, tasks_to_run, limit=2, batch_size=2, include_path=tasks)
    assert values == {f"lm_eval/{task}": None for task in tasks_to_run[:3]} | {"lm_eval/tiny_free/exact_match": 0.0}
    assert notes["lm_eval/nothing_like_it"] == "lm-evaluation-harness has no task 'nothing_like_it'"
    assert "has no task" in notes[f"lm_eval/{tasks_to_run[1]}"]  # a file may contain code
    assert "its data could not be fetched" in notes["lm_eval/arc_easy"]


@requires_lm_eval
def test_harness_can_be_interrupted(model: Any, tokenizer: Any, tasks: Path) -> None:
    class Interrupted(Exception):
        pass

    def check_stop() -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        evaluate_with_lm_eval(model, tokenizer, ["tiny_choice"], limit=2, batch_size=2, check_stop=check_stop, include_path=tasks)
    assert model.training


@requires_lm_eval
@pytest.mark.parametrize(("rows_that_fit", "ran"), [(1, True), (0, False)])
def test_harness_batch_shrinks_when_memory_is_short(
    model: Any, tokenizer: Any, tasks: Path, monkeypatch: pytest.MonkeyPatch, rows_that_fit: int, ran: bool
) -> None:
    import torch

    embedding = torch.nn.functional.embedding

    def look_up(input: Any, *rest: Any, **named: Any) -> Any:  # the name that torch uses and peft passes
        if len(input) > rows_that_fit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return embedding(input, *rest, **named)

    monkeypatch.setattr(torch.nn.functional, "embedding", look_up)
    values, notes = evaluate_with_lm_eval(model, tokenizer, ["tiny_choice"], limit=2, batch_size=4, include_path=tasks)
    assert (set(values), notes) == (
        ({"lm_eval/tiny_choice/acc"}, {}) if ran else ({"lm_eval/tiny_choice"}, {"lm_eval/tiny_choice": "memory ran out with a single row"})
    )
