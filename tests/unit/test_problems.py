"""All problems of a request in one answer, each with its field, and what was probably meant."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from schema.requests import TrainRequest
from service.api.validation_errors import MAX_PROBLEMS
from service.core.errors import InvalidRequest, NotFound, Unavailable, Unsupported
from service.core.problems import Problems
from service.core.suggestions import did_you_mean, find_near_miss, find_parents, list_fields
from tests.unit.api_harness import get_error, make_request_body, make_request_body_with_config, submit_job

CONFIG = "training_config"


def post(client: TestClient, body: Any, status: int, path: str = "/train") -> dict[str, dict[str, str]]:
    """The problems of a refused request, by their field."""
    error = get_error(client.post(path, json=body), status)
    first = {name: error[name] for name in ("message", "hint", "param")}
    assert error["errors"][0] == first
    assert len({each["param"] for each in error["errors"]}) == len(error["errors"]), error["errors"]
    return {each["param"]: each for each in error["errors"]}


def test_all_wrong_fields_are_named_at_once(readonly_client: TestClient, readonly_dataset_id: str) -> None:
    body = make_request_body_with_config(readonly_dataset_id, "hyperparameters", learning_rte=1, epochs=-1, optim="adamw")
    body |= {"job_name": 7, CONFIG: body[CONFIG] | {"methd": "LoRA", "hyperparameters": body[CONFIG]["hyperparameters"]}}
    problems = post(readonly_client, body, 422)
    hyperparameters = f"{CONFIG}.hyperparameters"
    assert set(problems) == {
        "job_name",
        f"{CONFIG}.methd",
        f"{hyperparameters}.learning_rte",
        f"{hyperparameters}.epochs",
        f"{hyperparameters}.optim",
    }
    assert problems[f"{hyperparameters}.learning_rte"]["message"] == f"{hyperparameters}.learning_rte: is not a field of this request"
    assert problems[f"{hyperparameters}.learning_rte"]["hint"].startswith("did you mean learning_rate?")
    assert problems[f"{CONFIG}.methd"]["hint"].startswith("did you mean method?")
    assert problems[f"{hyperparameters}.optim"]["hint"] == "did you mean adamw_torch?"


def test_mistake_in_one_of_several_forms_is_named_once(readonly_client: TestClient, readonly_dataset_id: str) -> None:
    export = {"include_gguf": True, "format": ["merged", "adaptor"], "gguf_quantization": "q8"}
    problems = post(readonly_client, make_request_body_with_config(readonly_dataset_id, export_config=export), 422)
    assert set(problems) == {f"{CONFIG}.export_config.format.1", f"{CONFIG}.export_config.gguf_quantization"}
    assert problems[f"{CONFIG}.export_config.format.1"]["hint"] == "did you mean adapter?"
    assert problems[f"{CONFIG}.export_config.gguf_quantization"]["hint"] == "did you mean q8_0?"


def test_field_in_the_wrong_object_is_told_where_it_belongs(readonly_client: TestClient, readonly_dataset_id: str) -> None:
    body = make_request_body_with_config(readonly_dataset_id, learning_rate=1e-4, project_id="p") | {"gguf_quantization": "q8_0"}
    problems = post(readonly_client, body, 422)
    assert problems[f"{CONFIG}.learning_rate"]["hint"] == f"learning_rate belongs in {CONFIG}.hyperparameters"
    assert problems[f"{CONFIG}.project_id"]["hint"] == "project_id belongs at the top of the body"
    assert problems["gguf_quantization"]["hint"] == f"gguf_quantization belongs in {CONFIG}.export_config"


def test_near_miss_of_trainer_and_grader_is_suggested(readonly_client: TestClient, readonly_dataset_id: str) -> None:
    body = make_request_body_with_config(readonly_dataset_id, trainer_type="stf")
    assert "did you mean sft?" in post(readonly_client, body | {"jobname": "x"}, 400)[f"{CONFIG}.trainer_type"]["hint"]
    graders = [{"type": "string_chek", "name": "a"}, {"type": "numeric_accuracy", "name": "b", "referece_field": "x"}]
    problems = post(readonly_client, make_request_body_with_config(readonly_dataset_id, trainer_type="grpo", reward_config=graders), 422)
    assert problems[f"{CONFIG}.reward_config.0"]["hint"] == "did you mean string_check?"
    assert problems[f"{CONFIG}.reward_config.1.referece_field"]["hint"].startswith("did you mean reference_field?")


def test_near_miss_in_a_query_is_suggested(readonly_client: TestClient) -> None:
    assert "did you mean completed?" in get_error(readonly_client.get("/jobs?status=complete"), 422)["hint"]


def test_independent_problems_of_a_valid_body_come_together(readonly_client: TestClient, readonly_dataset_id: str) -> None:
    body = make_request_body_with_config(
        readonly_dataset_id,
        chat_template="{% if %}",
        eval_config={"promotion_gate": [{"metric": "rouge_l", "at_least": 0.5}, {"metric": "lm_eval/x/acc", "at_least": 0.5}]},
        export_config={"destination": "hfhub", "hf_repo_id": "me/model"},
    )
    body |= {"hardware": "locl", "hf_token": None}
    problems = post(readonly_client, body, 400)
    gate = f"{CONFIG}.eval_config.promotion_gate"
    assert list(problems) == ["hardware", f"{CONFIG}.chat_template", f"{gate}.0.metric", f"{gate}.1.metric", "hf_token"]
    assert "did you mean local?" in problems["hardware"]["hint"]


def test_unknown_datasets_are_not_suggested(readonly_client: TestClient, readonly_dataset_id: str) -> None:
    near_miss = readonly_dataset_id[:-1]
    problems = post(readonly_client, make_request_body(near_miss, hardware="moon"), 400)
    assert set(problems) == {"hardware", "processed_dataset_id"}
    assert readonly_dataset_id not in str(problems)


def test_clone_names_all_problems_of_the_changed_request(readonly_client: TestClient, readonly_dataset_id: str) -> None:
    job_id = submit_job(readonly_client, readonly_dataset_id)
    changes = {"hyperparameters": {"lora_rnk": 4, "epochs": 0}}
    problems = post(readonly_client, {"hf_token": "t", CONFIG: changes}, 422, f"/jobs/{job_id}/clone")
    assert set(problems) == {f"{CONFIG}.hyperparameters.lora_rnk", f"{CONFIG}.hyperparameters.epochs"}
    assert problems[f"{CONFIG}.hyperparameters.lora_rnk"]["hint"].startswith("did you mean lora_rank?")


def test_resume_names_all_problems(readonly_client: TestClient, readonly_dataset_id: str) -> None:
    job_id = submit_job(readonly_client, readonly_dataset_id)
    problems = post(readonly_client, {"hardware": "locale", "epochs": 1, "max_steps": 9}, 400, f"/jobs/{job_id}/resume")
    assert set(problems) == {"hardware", "epochs", "max_steps"}


def test_number_of_problems_in_an_answer_is_limited(readonly_client: TestClient, readonly_dataset_id: str) -> None:
    body = make_request_body(readonly_dataset_id) | {f"field{number}": 1 for number in range(300)}
    error = get_error(readonly_client.post("/train", json=body), 422)
    assert len(error["errors"]) == MAX_PROBLEMS


def test_only_what_a_caller_can_mend_is_collected() -> None:
    problems = Problems()
    problems.raise_found()
    with problems.collect():
        raise Unsupported("first", param="a")
    with problems.collect():
        raise NotFound("second", param="b")
    with problems.collect():
        raise Unsupported("first", param="a")
    with pytest.raises(Unavailable), problems.collect():
        raise Unavailable("no answer")
    outer = Problems()
    outer.add(InvalidRequest("before"))
    with outer.collect():
        problems.raise_found()
    with pytest.raises(InvalidRequest, match="before") as excinfo:
        outer.raise_found()
    assert [each.message for each in excinfo.value.problems] == ["before", "first", "second"]


@given(st.text(max_size=80), st.lists(st.text(max_size=80), max_size=8))
def test_near_miss_is_one_of_the_known_names(name: str, known: list[str]) -> None:
    assert find_near_miss(name, known) in (None, *known)


def test_names_that_are_not_alike_are_not_suggested() -> None:
    assert did_you_mean("zebra", ["adamw_torch", "sgd"], "see the list") == "see the list"
    assert did_you_mean("x" * 1000, ["x" * 1000]) == ""  # comparing would take long
    assert did_you_mean("ADAMW-torch", ["sgd", "adamw_torch"], "see the list") == "did you mean adamw_torch? see the list"


def test_fields_are_found_through_unions_and_lists() -> None:
    assert "learning_rate" in list_fields(TrainRequest, [CONFIG, "dpo", "hyperparameters"])
    assert "reference_field" in list_fields(TrainRequest, [CONFIG, "grpo", "reward_config", 0, "numeric_accuracy"])
    assert "weight" in list_fields(TrainRequest, ["datasets", 3])
    assert list_fields(TrainRequest, ["metadata", "x"]) == list_fields(None, []) == ()
    assert find_parents(TrainRequest, "beta") == (f"{CONFIG}.hyperparameters",)
