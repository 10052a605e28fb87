"""`POST /train?dry_run=true`: what a job would do, need, take and cost; and what is chosen where a request says "auto"."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from starlette.testclient import TestClient

from schema.dataset import TRAIN_SPLIT, Split, WeightedDataset
from schema.estimate.row_lengths import RowLengths, read_histogram
from schema.ingestion import DatasetReport, Finding, NearDuplicates, TokenLengths
from schema.placement import Placement
from schema.training import TRAINING_CONFIG, GrpoConfig, LlmTrainingConfig, SftConfig
from service.core.dry_run.data_warnings import find_data_warnings
from service.core.dry_run.facts import JobFacts
from service.core.dry_run.llm_choices import choose_numbers, set_defaults
from service.core.dry_run.llm_facts import LlmFacts, find_shape, make_device, make_step_plan, read_llm_facts
from service.core.dry_run.llm_warnings import find_warnings
from service.core.dry_run.planner import choose_hardware, find_planner, require_planner
from service.core.errors import DoesNotFit, InvalidRequest, Unsupported
from service.core.launchers import LauncherPool, Offer
from service.core.models.sizes import BaseSizes, StoredBase
from service.core.quotas import Quotas
from service.core.validation.placement import place
from storage.registry import open_store
from tests.factories import make_config, make_dataset, make_grpo_config, make_manifest, make_profile, make_train_request
from tests.fakes import FakeLauncher
from tests.unit.api_harness import ROWS, get_error, get_services, make_request_body_with_config, upload
from tests.unit.jobs_harness import PRINCIPAL, JobsHarness

GIB = 1 << 30
L4 = make_profile("l4", device="cuda", device_name="NVIDIA L4, 24 GB", gpus=1, gpu_memory_bytes=24 * GIB, memory_bytes=32 * GIB)
H200 = make_profile("h200", device="cuda", device_name="NVIDIA H200", gpus=1, gpu_memory_bytes=131 * GIB, memory_bytes=128 * GIB)
CPU = make_profile("cpu", cpus=8, memory_bytes=32 * GIB)


def make_offer(profile: Any, launcher: str = "cloud-run") -> Offer:
    return Offer(Placement(launcher=launcher, profile=profile.name, environment="llm"), profile, make_manifest())


def make_rows(*tokens: int) -> RowLengths:
    """Rows that were counted one by one."""
    ordered = sorted(tokens)
    return read_histogram([(length, ordered.count(length)) for length in sorted(set(tokens))], sum(tokens), ordered, exact=True)


def make_facts(*tokens: int, base_model_id: str = "google/gemma-3-1b-it", **changes: Any) -> LlmFacts:
    model, size_from = find_shape(base_model_id, None)
    facts: dict[str, Any] = {"model": model, "size_from": size_from, "train": make_rows(*tokens), "held_out": make_rows(20, 30)}
    return LlmFacts(**facts | changes)


def make_llm_config(trainer_type: str = "sft", **changes: Any) -> LlmTrainingConfig:
    body = {"base_model_id": "google/gemma-3-1b-it", "trainer_type": trainer_type} | changes
    return TRAINING_CONFIG.validate_python(body)


def dry_run(client: TestClient, body: dict[str, Any], status: int = 200) -> dict[str, Any]:
    response = client.post("/train?dry_run=true", json=body)
    assert response.status_code == status, response.text
    return response.json()


# --- the answer ---


def test_dry_run_describes_the_job_and_creates_none(client: TestClient, dataset_id: str) -> None:
    plan = dry_run(
        client, make_request_body_with_config(dataset_id, "hyperparameters", epochs=2, batch_size=2, gradient_accumulation_steps=2)
    )
    assert plan["steps"]["total_steps"] == 2 * -(-18 // 4)
    assert plan["steps"]["exact"]
    assert plan["base"]["size_from"] == "known_name"
    assert plan["placements"] == ["local/local"]
    assert plan["training_config"]["hyperparameters"]["warmup_ratio"] == 0.03
    assert {each["name"] for each in plan["artifacts"]} == {"merged", "gguf-q8_0"}
    assert "hf_..." not in json.dumps(plan)
    (profile,) = plan["profiles"]
    assert [each["phase"] for each in profile["phases"]][:3] == ["start", "downloading", "tokenizing"]
    assert 0 < profile["seconds"]["low"] < profile["seconds"]["high"]
    assert {each["hardware"] for each in plan["accelerators"]} >= {"NVIDIA L4, 24 GB", "NVIDIA H200, 141 GB", "CPU with 8 cores, 32 GB"}
    assert client.get("/jobs").json()["jobs"] == []
    assert list(get_services(client).buckets.configs.iter_objects("configs/")) == []


def test_tokens_are_estimated_from_characters_until_they_are_counted(client: TestClient, dataset_id: str) -> None:
    tokens = dry_run(client, make_request_body_with_config(dataset_id))["tokens"]
    assert not tokens["exact"]
    assert tokens["longest"] is None
    assert "token_lengths" in tokens["note"]


def test_refused_requests_are_refused_alike(client: TestClient, dataset_id: str) -> None:
    for body in (
        make_request_body_with_config("dataset_none"),
        make_request_body_with_config(dataset_id) | {"hardware": "moon"},
        make_request_body_with_config(dataset_id, "hyperparameters", batch_size=0),
        make_request_body_with_config("dataset_none", "hyperparameters", batch_size="auto", max_seq_length="auto"),
        make_request_body_with_config(dataset_id, base_model_id="job:none"),
    ):
        refused = client.post("/train", json=body)
        assert 400 <= refused.status_code < 500
        assert client.post("/train?dry_run=true", json=body).json() == refused.json()


def test_dry_run_of_a_family_without_estimates_is_refused() -> None:
    class ToyConfig(SftConfig):
        family: ClassVar[str] = "toy"

    config = ToyConfig(base_model_id="google/gemma-3-270m")
    assert find_planner(config) is None
    with pytest.raises(Unsupported, match="cannot be estimated"):
        require_planner(config)


def test_quota_refuses_a_dry_run(tmp_path: Path) -> None:
    harness = JobsHarness(tmp_path, quotas=Quotas.model_validate({"default": {"max_queued_jobs": 0}}))
    with pytest.raises(Exception, match="max_queued_jobs"):
        harness.jobs.submission.dry_run(PRINCIPAL, make_train_request())


def test_dry_run_stores_and_wakes_nothing(tmp_path: Path) -> None:
    harness = JobsHarness(tmp_path)
    plan = harness.jobs.submission.dry_run(PRINCIPAL, make_train_request(hf_token="hf_secret"))
    assert "hf_secret" not in plan.model_dump_json()
    assert harness.wake_count == 0
    assert harness.store.count_jobs("local", "queued") == 0
    assert list(harness.objects.iter_objects("")) == []


def test_dataset_that_is_not_ready_is_refused(tmp_path: Path) -> None:
    harness = JobsHarness(tmp_path)
    for status, reason in (("processing", "still being made"), ("failed", "has no rows")):
        harness.store.create_dataset(make_dataset(f"dataset_{status}", status=status, splits={}))
        with pytest.raises(InvalidRequest, match=reason) as caught:
            harness.jobs.submission.dry_run(PRINCIPAL, make_train_request(processed_dataset_id=f"dataset_{status}"))
        assert caught.value.param == "processed_dataset_id"


def test_cap_that_is_too_small_is_a_warning(tmp_path: Path) -> None:
    launcher = FakeLauncher("cloud-run", ["l4"])
    launcher.profiles = {"l4": L4}
    harness = JobsHarness(tmp_path, launchers=[launcher])
    plan = harness.jobs.submission.dry_run(PRINCIPAL, make_train_request(max_cost_usd=0.001, max_gpu_seconds=1.0))
    assert plan.profiles[0].usd is not None
    assert plan.profiles[0].usd.low <= plan.profiles[0].usd.high
    assert plan.budget.cost_share is not None
    assert plan.budget.cost_share > 1
    assert {each.param for each in plan.warnings} >= {"max_cost_usd", "max_gpu_seconds"}


def test_time_limit_makes_slices(tmp_path: Path) -> None:
    launcher = FakeLauncher("cloud-run", ["cpu"])
    launcher.profiles = {"cpu": make_profile("cpu", cpus=1, memory_bytes=32 * GIB, time_limit_s=600)}
    harness = JobsHarness(tmp_path, launchers=[launcher])
    config = {"base_model_id": "google/gemma-3-1b-it", "hyperparameters": {"max_steps": 1000}}
    (profile,) = harness.jobs.submission.dry_run(PRINCIPAL, make_train_request(training_config=config)).profiles
    assert profile.time_slices is not None
    assert 1 <= profile.time_slices.low <= profile.time_slices.high
    assert profile.time_slices.high > 10


# --- facts ---


def test_counted_lengths_are_exact_and_cut_rows_are_counted(client: TestClient, dataset_id: str) -> None:
    services = get_services(client)
    dataset = services.store.find_dataset(dataset_id)
    assert dataset is not None
    rows = {name: split.rows for name, split in dataset.splits.items()}
    split_tokens = {name: 40 * count for name, count in rows.items()}
    write_lengths(client, dataset_id, [40] * dataset.rows, split_tokens=split_tokens)
    plan = dry_run(client, make_request_body_with_config(dataset_id, "hyperparameters", epochs=3, batch_size=1))
    assert plan["tokens"] | {"note": ""} == {
        "per_epoch": 40 * rows[TRAIN_SPLIT],
        "total": 3 * 40 * rows[TRAIN_SPLIT],
        "longest": 40,
        "truncated_rows": 0,
        "exact": True,
        "note": "",
    }
    cut = dry_run(client, make_request_body_with_config(dataset_id, "hyperparameters", max_seq_length=16))
    assert cut["tokens"]["truncated_rows"] == rows[TRAIN_SPLIT]
    assert (cut["tokens"]["exact"], cut["steps"]["exact"]) == (False, False)  # a row of whose answer nothing is left is dropped
    assert any(each["param"].endswith("max_seq_length") for each in cut["warnings"])


def write_lengths(client: TestClient, dataset_id: str, tokens: list[int], **changes: Any) -> None:
    """Keep token lengths of a dataset, as counting them does."""
    services = get_services(client)
    dataset = services.store.find_dataset(dataset_id)
    assert dataset is not None
    lengths = TokenLengths(
        base_model_id="google/gemma-3-270m",
        tokenizer_digest="0",
        exact=True,
        rows=len(tokens),
        total_tokens=sum(tokens),
        mean=sum(tokens) / len(tokens),
        percentiles={},
        histogram=((max(tokens), len(tokens)),),
        longest=tuple(sorted(tokens, reverse=True)[:64]),
        **changes,
    )
    report = DatasetReport(rows_read=len(tokens), rows_kept=len(tokens), token_lengths=lengths)
    services.store.replace_dataset(dataset.model_copy(update={"report": report}))


def test_stored_base_tells_its_size(tmp_path: Path) -> None:
    store = open_store(tmp_path.as_uri())
    sizes = BaseSizes(store)
    assert sizes.find("a/b") is None
    folder = "pretrained_weights/huggingface/a/b/"
    store.write(f"{folder}model.safetensors", b"x" * 100)
    store.write(f"{folder}config.json", b'{"hidden_size": 64, "dtype": "bfloat16"}')
    found = sizes.find("a/b")
    assert found == StoredBase({"hidden_size": 64, "dtype": "bfloat16"}, 100)
    assert sizes.find("a/b") is found  # read once
    store.write(f"{folder}config.json", b"[1]")
    assert sizes.find("a/b") is None  # written again, and no object
    model, source = find_shape("a/b", found)
    assert model is not None
    assert (model.parameters, source) == (50, "model_store")


def test_mixed_datasets_count_the_rows_that_an_epoch_takes() -> None:
    datasets = [make_dataset(f"dataset_{n}", splits={TRAIN_SPLIT: make_split(rows)}) for n, rows in enumerate((100, 300))]
    weighted = [WeightedDataset(dataset=dataset) for dataset in datasets]
    request = JobFacts(None, tuple(weighted), (None, None))
    facts = read_llm_facts(make_llm_config(), request)
    assert facts.train.rows == 400


def make_split(rows: int) -> Split:
    return Split(rows=rows, size_bytes=200 * rows, sha256="0" * 64, key="k")


def test_kto_learns_both_answers_of_a_pair() -> None:
    dataset = make_dataset(dataset_type="preference", splits={TRAIN_SPLIT: make_split(10)})
    facts = JobFacts(None, (WeightedDataset(dataset=dataset),), (None,))
    assert read_llm_facts(make_llm_config("kto"), facts).train.rows == 20
    assert read_llm_facts(make_llm_config("dpo"), facts).train.rows == 10


# --- auto ---


def choose(config: LlmTrainingConfig, facts: LlmFacts, *profiles: Any) -> dict[str, Any]:
    chosen, resolved = choose_numbers(config, facts, [make_device(profile) for profile in profiles or (L4,)])
    assert all(each.reason for each in resolved)
    return {each.field.rpartition(".")[2]: each.value for each in resolved} | {"config": chosen}


def auto(*names: str) -> dict[str, Any]:
    return {"hyperparameters": dict.fromkeys(names, "auto")}


def test_length_truncates_at_most_one_row_in_a_hundred() -> None:
    tokens = [*[100] * 197, 700, 900, 3000]
    chosen = choose(make_llm_config(**auto("max_seq_length")), make_facts(*tokens))
    assert chosen["max_seq_length"] == 768  # the two longest of 200 rows are cut


def test_length_stays_within_what_the_base_and_the_memory_hold() -> None:
    config = make_llm_config(**auto("max_seq_length"))
    assert choose(config, make_facts(*[5000] * 10, max_positions=2048))["max_seq_length"] == 2048
    small = make_profile("small", cpus=2, memory_bytes=8 * GIB)
    limited = choose(config, make_facts(*[100_000] * 10), small)["max_seq_length"]
    assert limited < choose(config, make_facts(*[100_000] * 10), H200)["max_seq_length"]


def test_length_of_grpo_has_room_for_the_completion() -> None:
    grpo = make_grpo_config(hyperparameters={"max_seq_length": "auto", "max_completion_length": 300})
    assert isinstance(grpo, GrpoConfig)
    assert choose(grpo, make_facts(*[100] * 50))["max_seq_length"] == 512


def test_step_has_sixteen_rows_unless_there_are_few() -> None:
    names = ("batch_size", "gradient_accumulation_steps")
    many = choose(make_llm_config(**auto(*names)), make_facts(*[100] * 1000))
    assert many["batch_size"] * many["gradient_accumulation_steps"] == 16
    few = choose(make_llm_config(**auto(*names)), make_facts(*[100] * 50))
    assert few["batch_size"] * few["gradient_accumulation_steps"] == 4


def test_number_that_was_sent_decides_the_other_one() -> None:
    fixed_steps = make_llm_config(hyperparameters={"batch_size": "auto", "gradient_accumulation_steps": 8})
    assert choose(fixed_steps, make_facts(*[100] * 1000))["batch_size"] == 2
    fixed_size = make_llm_config(hyperparameters={"batch_size": 4, "gradient_accumulation_steps": "auto"})
    assert choose(fixed_size, make_facts(*[100] * 1000))["gradient_accumulation_steps"] == 4


def test_batch_fits_into_every_profile() -> None:
    config = make_llm_config("orpo", base_model_id="google/gemma-3-4b-it", **auto("batch_size"))
    facts = make_facts(*[1024] * 1000, base_model_id="google/gemma-3-4b-it")
    small, large = (choose(config, facts, *profiles)["batch_size"] for profiles in ((L4, H200), (H200,)))
    assert small < large


def test_unknown_base_takes_the_least_batch() -> None:
    facts = make_facts(*[100] * 1000, model=None, size_from="unknown")
    assert choose(make_llm_config(**auto("batch_size")), facts)["batch_size"] == 1
    assert choose(make_llm_config("kto", **auto("batch_size")), facts)["batch_size"] == 2


def test_grpo_keeps_whole_groups_and_leaves_the_passes_to_the_attempt() -> None:
    grpo = make_grpo_config(hyperparameters={"batch_size": "auto", "gradient_accumulation_steps": "auto", "num_generations": 6})
    chosen = choose(grpo, make_facts(*[50] * 100))  # type: ignore[arg-type]
    assert chosen["gradient_accumulation_steps"] is None
    assert chosen["config"].hyperparameters.batch_size in (6, 3, 2, 1)


def test_auto_is_a_number_only_where_it_was_sent() -> None:
    config = make_llm_config(**auto("batch_size", "gradient_accumulation_steps", "max_seq_length"))
    usual = set_defaults(config).hyperparameters
    assert (usual.batch_size, usual.gradient_accumulation_steps, usual.max_seq_length) == (2, 4, 1024)
    assert set_defaults(make_llm_config(hyperparameters={"batch_size": 7})).hyperparameters.batch_size == 7


def test_submitted_job_stores_what_was_chosen(client: TestClient, dataset_id: str) -> None:
    names = ("batch_size", "gradient_accumulation_steps", "max_seq_length")
    body = make_request_body_with_config(dataset_id, "hyperparameters", **dict.fromkeys(names, "auto")) | {"hardware": "auto"}
    planned = dry_run(client, body)
    job = client.get(f"/jobs/{client.post('/train', json=body).json()['job_id']}").json()
    assert job["resolved"] == planned["resolved"]
    assert [each["field"].rpartition(".")[2] for each in job["resolved"]] == [
        "max_seq_length",
        "batch_size",
        "gradient_accumulation_steps",
        "hardware",
    ]
    for each in job["resolved"][:3]:
        assert job["training_config"]["hyperparameters"][each["field"].rpartition(".")[2]] == each["value"]
    assert [f"{each['launcher']}/{each['profile']}" for each in job["placements"]] == job["resolved"][3]["value"]


def test_word_that_is_not_auto_is_refused(client: TestClient, dataset_id: str) -> None:
    for word in ("Auto", "automatic", "4"):
        error = get_error(client.post("/train", json=make_request_body_with_config(dataset_id, "hyperparameters", batch_size=word)), 422)
        assert "auto" in error["message"]
        assert error["param"] == "training_config.hyperparameters.batch_size"


# --- hardware ---


def test_cheapest_hardware_that_fits_comes_first() -> None:
    planner = find_planner(make_llm_config())
    assert planner is not None
    facts = JobFacts(None, (WeightedDataset(dataset=make_dataset(splits={TRAIN_SPLIT: make_split(5000)})),), (None,))
    offers = [make_offer(each) for each in (CPU, H200, L4)]
    resolution = choose_hardware(planner, make_llm_config(), facts, offers)
    assert resolution.hardware == ["cloud-run/l4", "cloud-run/cpu", "cloud-run/h200"]  # the last one's price is not known
    large = make_llm_config(base_model_id="meta-llama/Llama-3.1-70B", method="LoRA", hyperparameters={"max_seq_length": 512})
    with pytest.raises(DoesNotFit, match="fits on no hardware"):
        choose_hardware(planner, large, facts, offers[:1])


def test_job_that_cannot_fit_is_refused_with_the_hardware_that_would(tmp_path: Path) -> None:
    launcher = FakeLauncher("cloud-run", ["l4", "h200"])
    launcher.profiles = {"l4": L4, "h200": H200}
    pool = LauncherPool([launcher])
    with pytest.raises(DoesNotFit, match="needs at least") as caught:
        place(make_config(base_model_id="google/gemma-3-27b-it"), "l4", pool, is_new=True)
    assert caught.value.hint == "it fits on hardware cloud-run/h200"
    with pytest.raises(DoesNotFit) as caught:
        place(make_config(base_model_id="google/gemma-3-27b-it", method="Full"), "h200", pool, is_new=True)
    assert caught.value.hint == "no hardware of this deployment has the memory"


def test_export_that_cannot_fit_is_refused(tmp_path: Path) -> None:
    small = make_profile("small", cpus=2, memory_bytes=3 * GIB)
    launcher = FakeLauncher("fake", ["small"])
    launcher.profiles = {"small": small}
    launcher.manifests = {
        "llm": make_manifest(make_manifest().families["llm"].model_copy(update={"features": {"gguf": True, "onnx": True}}))
    }
    pool = LauncherPool([launcher])
    config = make_config(base_model_id="google/gemma-3-270m", export_config={"format": ["adapter", "onnx"]})
    with pytest.raises(DoesNotFit, match="the export of google/gemma-3-270m needs") as caught:
        place(config, "small", pool)
    assert caught.value.param == "training_config.export_config.format"
    with pytest.raises(DoesNotFit, match=r"1\.5 billion parameters"):
        place(make_config(base_model_id="google/gemma-3-4b-it", export_config={"format": "onnx"}), "small", pool)
    place(make_config(base_model_id="google/gemma-3-270m"), "small", pool)


def test_stored_base_of_an_unknown_name_is_checked(tmp_path: Path) -> None:
    launcher = FakeLauncher("cloud-run", ["l4"])
    launcher.profiles = {"l4": L4}
    base = StoredBase({"hidden_size": 8192, "num_hidden_layers": 80, "vocab_size": 128_256}, 140_000_000_000)
    with pytest.raises(DoesNotFit):
        place(make_config(base_model_id="someone/large"), "l4", LauncherPool([launcher]), base=base)
    place(make_config(base_model_id="someone/large"), "l4", LauncherPool([launcher]))


def test_several_gpus_share_what_does_not_fit_into_one(tmp_path: Path) -> None:
    body = {"base_model_id": "google/gemma-3-4b-it", "method": "Full", "hyperparameters": {"batch_size": 1, "max_seq_length": 512}}
    fits: dict[int, str] = {}
    for gpus in (1, 8):
        launcher = FakeLauncher("fake", ["gpu", "h200"])
        launcher.profiles = {"h200": H200, "gpu": replace(L4, name="gpu", gpus=gpus, gpu_memory_bytes=40 * GIB)}
        harness = JobsHarness(tmp_path / str(gpus), launchers=[launcher])
        plan = harness.jobs.submission.dry_run(PRINCIPAL, make_train_request(training_config=body, hardware="h200"))
        fits[gpus] = next(each.fit for each in plan.profiles if each.hardware == "fake/gpu")
    assert fits == {1: "does_not_fit", 8: "fits_with_gradient_checkpointing"}


# --- warnings ---


def warn(config: LlmTrainingConfig, *tokens: int) -> set[str]:
    """The fields of the warnings, by their last name."""
    facts = make_facts(*(tokens or [100] * 600))
    found = find_warnings(config, facts, make_step_plan(config, facts, on_gpu=True))
    assert all(each.message and each.hint for each in found)
    return {each.param.rpartition(".")[2] for each in found}


def test_usual_job_has_no_warning() -> None:
    assert warn(make_llm_config()) == set()


@pytest.mark.parametrize(
    ("trainer_type", "hyperparameters", "field"),
    [
        ("sft", {"learning_rate": 0.05}, "learning_rate"),
        ("sft", {"learning_rate": 1e-7}, "learning_rate"),
        ("sft", {"max_seq_length": 64}, "max_seq_length"),
        ("sft", {"max_seq_length": 8192}, "max_seq_length"),
        ("sft", {"lora_rank": 8, "lora_alpha": 256}, "lora_alpha"),
        ("sft", {"lora_rank": 64, "lora_alpha": 1}, "lora_alpha"),
        ("sft", {"batch_size": 512, "gradient_accumulation_steps": 4}, "batch_size"),
        ("sft", {"packing": True, "max_seq_length": 65_536, "batch_size": 1, "gradient_accumulation_steps": 1}, "packing"),
        ("sft", {"save_strategy": "steps", "save_steps": 9999}, "save_steps"),
        ("sft", {"logging_steps": 9999}, "logging_steps"),
        ("sft", {"warmup_ratio": 0.9}, "warmup_ratio"),
        (
            "sft",
            {"max_steps": 10, "lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 100}},
            "lr_scheduler_kwargs",
        ),
        ("dpo", {"beta": 5.0}, "beta"),
        ("kto", {"beta": 0.001}, "beta"),
    ],
)
def test_unusual_hyperparameter_is_a_warning(trainer_type: str, hyperparameters: dict[str, Any], field: str) -> None:
    assert warn(make_llm_config(trainer_type, hyperparameters=hyperparameters)) == {field}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"method": "QLoRA"}, "method"),
        ({"prompt_format": "raw"}, "prompt_format"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"eval_config": {"eval_strategy": "steps", "eval_steps": 9999}}, "eval_steps"),
        ({"export_config": {"destination": "hfhub", "hf_repo_id": "a/b", "hf_private": False}}, "hf_private"),
    ],
)
def test_unusual_setting_is_a_warning(changes: dict[str, Any], field: str) -> None:
    assert warn(make_llm_config(**changes)) == {field}


def test_preferences_on_a_base_without_answers_are_a_warning() -> None:
    assert warn(make_llm_config("dpo", base_model_id="google/gemma-3-1b-pt")) == {"base_model_id"}


def test_few_rows_and_many_epochs_are_warnings() -> None:
    assert warn(make_llm_config(hyperparameters={"epochs": 30}), *[100] * 100) == {"epochs"}
    assert warn(make_llm_config(hyperparameters={"max_steps": 3000}), *[100] * 100) == {"max_steps"}
    assert warn(make_llm_config(), *[100] * 20) == {"processed_dataset_id"}


def test_report_of_a_dataset_is_told() -> None:
    report = DatasetReport(
        rows_read=10,
        rows_kept=10,
        near_duplicates=NearDuplicates(compared_rows=10, held_out_rows_with_a_near_duplicate=3),
        secrets=(Finding(kind="private_key", rows=1),),
        personal_data=(Finding(kind="email", rows=2),),
        warnings=("half of the answers are empty",),
    )
    dataset = make_dataset(report=report)
    found = find_data_warnings([WeightedDataset(dataset=dataset)])
    assert [each.message.partition(": ")[2].split(" ", 1)[0] for each in found] == ["2", "half"]  # of the others the report itself warns
    assert {each.param for each in found} == {"processed_dataset_id"}
    without = make_dataset(splits={TRAIN_SPLIT: make_split(3)})
    assert "no rows are held out" in find_data_warnings([WeightedDataset(dataset=without)])[0].message
    assert find_data_warnings([WeightedDataset(dataset=make_dataset())]) == ()


def test_rows_of_the_harness_are_planned(client: TestClient) -> None:
    without = upload(client, ROWS, eval_fraction="0").json()["processed_dataset_id"]
    body = make_request_body_with_config(without, eval_config={"eval_strategy": "no"})
    assert any("no rows are held out" in each["message"] for each in dry_run(client, body)["warnings"])
