"""Families that are not language models: epochs without steps, nothing to train in steps, no base model, no Hub."""

from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar, Literal

import pytest
from pydantic import Field, ValidationError
from pydantic_core import PydanticCustomError

from schema.job import Artifact, ComputeRate
from schema.requests import IMMUTABLE_FIELDS, ExportRequest, RetryRequest
from schema.training import FAMILIES, TRAINER_TYPES
from schema.training.base import ArtifactKindInfo, BaseHyperparameters, BaseTrainingConfig, TrainingSummary
from schema.training.export import BaseExportConfig
from schema.types import DatasetType, Phase
from service.api.responses import job_detail
from service.core.accrual import Spending
from service.core.errors import InvalidRequest
from service.core.job_lists import summarize_job
from service.core.jobs.clone import original_request
from service.core.jobs.control import _extend_training  # pyright: ignore[reportPrivateUsage]
from service.core.jobs.export import _make_export_config  # pyright: ignore[reportPrivateUsage]
from service.core.jobs.queries import (
    JobView,
    _pick_artifact,  # pyright: ignore[reportPrivateUsage]
)
from service.core.jobs.submit import make_job_id
from service.core.validation import FAMILY_CHECKS
from service.core.validation.hub import check_hub
from storage.file import LocalStore
from tests.factories import START, make_config, make_job


class TabularConfig(BaseTrainingConfig):
    """No base model, no epochs, no hyperparameters of its own."""

    family: ClassVar[str] = "tabular"
    environment: ClassVar[str] = "tabular"
    dataset_types: ClassVar[tuple[DatasetType, ...]] = ("table",)
    artifact_kinds: ClassVar[tuple[ArtifactKindInfo, ...]] = (
        ArtifactKindInfo("onnx", "onnx_models"),
        ArtifactKindInfo("predictor", "predictors"),
        ArtifactKindInfo("report", "predictors"),
    )
    phases: ClassVar[tuple[Phase, ...]] = ("fitting", "uploading")

    trainer_type: Literal["tabular"] = "tabular"


class DetectorHyperparameters(BaseHyperparameters):
    """Epochs, no max_steps."""

    epochs: int = Field(100, ge=1)


class DetectorExportConfig(BaseExportConfig):
    """One field of its own."""

    image_size: int = 640


class DetectorConfig(TabularConfig):
    """A base model that is not on the Hub."""

    trainer_type: Literal["detector"] = "detector"  # type: ignore[assignment]
    hyperparameters: DetectorHyperparameters = DetectorHyperparameters()  # type: ignore[call-arg]
    export_config: DetectorExportConfig = DetectorExportConfig()  # type: ignore[call-arg]

    def summarize(self) -> TrainingSummary:
        return TrainingSummary(base_model_id="tiny.pt", modality="images")

    @property
    def length_unit(self) -> str | None:
        return "epochs"


# Any: neither is a member of the union that the core's signatures name.
TABULAR: Any = TabularConfig()  # type: ignore[call-arg]
DETECTOR: Any = DetectorConfig()  # type: ignore[call-arg]


class AskedHub:
    """A Hub that raises the name of the model it is asked for."""

    def check_read_access(self, repo_id: str, token: str | None) -> None:
        raise AssertionError(repo_id)


def make_artifact(kind: str) -> Artifact:
    return Artifact(name=kind, kind=kind, uri="file:///x", key=f"{kind}/", size_bytes=1, files=[])


def test_every_family_has_checks_before_compute() -> None:
    assert FAMILY_CHECKS.keys() == FAMILIES.keys()
    assert all(callable(resolve_name(line)) for line in FAMILY_CHECKS.values())


def test_trainer_types_are_derived_from_the_union() -> None:
    assert list(TRAINER_TYPES) == ["sft", "dpo", "orpo", "kto", "grpo", "reward"]
    assert sorted(name for classes in FAMILIES.values() for name in (config.trainer_type_name() for config in classes)) == sorted(
        TRAINER_TYPES
    )


def test_job_of_any_family_is_shown() -> None:
    detail = job_detail(JobView(make_job(training_config=TABULAR), None, None, Spending(0.0, None), ComputeRate(), START))
    assert (detail.base_model_id, detail.modality, detail.method, detail.trainer_type) == ("", "", "", "tabular")
    row = summarize_job(make_job(training_config=DETECTOR))
    assert (row.base_model_id, row.modality, row.trainer_type) == ("tiny.pt", "images", "detector")


def test_id_of_job_without_base_model_has_no_empty_part() -> None:
    assert make_job_id("dataset_plants", TABULAR.summarize().base_model_id, "x1") == "training_plants_x1"
    assert make_job_id("dataset_plants", DETECTOR.summarize().base_model_id, "x1") == "training_plants_tiny-pt_x1"


def test_training_is_extended_in_its_own_unit() -> None:
    assert _extend_training(DETECTOR, RetryRequest(epochs=200)).hyperparameters.epochs == 200  # type: ignore[call-arg]
    with pytest.raises(InvalidRequest, match="counted in epochs; max_steps would not be used"):
        _extend_training(DETECTOR, RetryRequest(max_steps=200))  # type: ignore[call-arg]
    with pytest.raises(InvalidRequest, match="the length of this job cannot change"):
        _extend_training(TABULAR, RetryRequest(epochs=200))  # type: ignore[call-arg]


def test_clone_repeats_only_what_was_sent() -> None:
    assert original_request(TABULAR) == {}
    sent: Any = DetectorConfig(hyperparameters=DetectorHyperparameters(epochs=7))  # type: ignore[call-arg]
    assert original_request(sent) == {"hyperparameters": {"epochs": 7}}


def test_download_prefers_the_order_of_the_family() -> None:
    artifacts = tuple(make_artifact(kind) for kind in ("unknown", "report", "onnx", "predictor"))
    assert _pick_artifact(make_job(training_config=TABULAR, artifacts=artifacts), None).kind == "onnx"
    assert _pick_artifact(make_job(training_config=TABULAR, artifacts=artifacts[:2]), None).kind == "report"


def test_artifact_folders_are_those_of_the_kinds() -> None:
    assert TabularConfig.artifact_folders() == ("onnx_models", "predictors")
    assert TabularConfig.artifact_folder("report") == "predictors"


def test_hub_is_not_asked_for_the_base_of_a_family_without_one(tmp_path: Path) -> None:
    hub: Any = AskedHub()
    check_hub(DETECTOR, None, hub, LocalStore(f"file://{tmp_path}"))
    with pytest.raises(AssertionError, match="google/gemma-3-270m"):
        check_hub(make_config(), None, hub, LocalStore(f"file://{tmp_path}"))


def test_later_export_takes_the_defaults_of_the_jobs_own_family() -> None:
    exported: Any = _make_export_config(DETECTOR, ExportRequest())  # type: ignore[call-arg]
    assert exported == DETECTOR
    request = ExportRequest.model_validate({"export_config": {"include_gguf": True}})
    with pytest.raises(InvalidRequest, match="Extra inputs are not permitted"):
        _make_export_config(DETECTOR, request)


def test_fields_that_determined_the_finished_steps_cannot_change() -> None:
    assert {"base_model_id", "method", "learning_rate", "lora_rank", "seed", "num_generations"} <= set(IMMUTABLE_FIELDS)
    assert not {"epochs", "max_steps", "hardware"} & set(IMMUTABLE_FIELDS)


@pytest.mark.parametrize("kind", ["", "Adapter", "a b", "../x", "a" * 33])
def test_artifact_kind_is_a_short_plain_name(kind: str) -> None:
    with pytest.raises(ValidationError):
        make_artifact(kind)


def test_lora_formats_are_refused_for_full_training() -> None:
    config = make_config(method="Full", export_config={"format": "adapter"})
    for check, field in (
        (config.reject_unused_export, "export_config.format"),
        (config.reject_unused_fields, "training_config.export_config.format"),
    ):
        with pytest.raises(PydanticCustomError) as excinfo:
            check()
        assert excinfo.value.context == {"field": field, "reason": excinfo.value.message()}
