"""The service's settings: what the environment may set, what it must set, and what attempts inherit."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.adapters.launchers import LauncherDeployment, create_launchers
from service.adapters.launchers.cloud_run.settings import CloudRunSettings
from service.settings import Settings, attempt_variables, inherited_variables


def test_cloud_settings_come_from_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROJECT_ID", "p")
    monkeypatch.setenv("REGION", "r")
    monkeypatch.setenv("GCS_CONFIG_BUCKET_NAME", "p-configs")
    monkeypatch.setenv("TUNESMITH_MODELS_URL", "gs://p-models")
    monkeypatch.setenv("TUNESMITH_DATASETS_URL", "s3://rows/here")
    monkeypatch.setenv("TUNESMITH_LAUNCHERS", "cloud-run, local")
    monkeypatch.setenv("TUNESMITH_CLOUD_RUN_PROFILES", "l4, cpu")
    settings, cloud_run = Settings(), CloudRunSettings()  # type: ignore[call-arg]
    assert (settings.project_id, settings.launchers) == ("p", ("cloud-run", "local"))
    assert (cloud_run.project_id, cloud_run.region, cloud_run.profiles) == ("p", "r", ("l4", "cpu"))
    assert settings.object_urls == {"configs": "gs://p-configs", "datasets": "s3://rows/here", "models": "gs://p-models"}


def test_local_default_stores_objects_in_one_folder(tmp_path: Path) -> None:
    urls = Settings(home=tmp_path).object_urls  # type: ignore[call-arg]
    assert set(urls.values()) == {(tmp_path / "objects").as_uri()}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"job_store": "firestore"}, "firestore needs PROJECT_ID"),
        ({"secret_store": "secret-manager"}, "secret-manager needs PROJECT_ID"),
    ],
)
def test_missing_setting_error_names_environment_variable(given: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Settings(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("variables", "public_url", "message"),
    [
        ({"PROJECT_ID": "p"}, "https://t.example", "cloud-run needs REGION"),
        ({"REGION": "r"}, "https://t.example", "cloud-run needs PROJECT_ID"),
        ({"PROJECT_ID": "p", "REGION": "r"}, None, "cloud-run needs TUNESMITH_PUBLIC_URL"),
        ({"PROJECT_ID": "p", "REGION": "r", "TUNESMITH_CLOUD_RUN_PROFILES": "moon"}, "https://t.example", "no hardware profile moon"),
        ({"PROJECT_ID": "p", "REGION": "r", "TUNESMITH_CLOUD_RUN_TIME_LIMIT_S": "1"}, "https://t.example", "time_limit_s: .* 10"),
    ],
)
def test_missing_launcher_setting_error_names_environment_variable(
    variables: dict[str, str], public_url: str | None, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("PROJECT_ID", "REGION", "GOOGLE_CLOUD_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    deployment = LauncherDeployment(
        home=tmp_path, service_url="http://127.0.0.1:1", public_url=public_url, service_audience=None, variables={}
    )
    with pytest.raises(ValueError, match=message):
        create_launchers(["cloud-run"], deployment)


def test_signing_key_has_minimum_length_and_is_hidden() -> None:
    with pytest.raises(ValidationError, match="signing_key"):
        Settings(signing_key="short")  # type: ignore[arg-type, call-arg]
    assert "k" * 32 not in repr(Settings(signing_key="k" * 32))  # type: ignore[arg-type, call-arg]


def test_only_attempts_using_s3_inherit_aws_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert "AWS_SECRET_ACCESS_KEY" not in inherited_variables(Settings())  # type: ignore[call-arg]
    assert inherited_variables(Settings(models_url="s3://models"))["AWS_SECRET_ACCESS_KEY"] == "secret"  # type: ignore[call-arg]


def test_attempts_inherit_process_and_parallelism_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"JOB_PROCESSES": "2", "JOB_PARALLELISM": "ddp"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert variables.items() <= inherited_variables(Settings()).items()  # type: ignore[call-arg]


def test_trackers_setting_is_json_and_hides_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "TUNESMITH_TRACKERS", '{"mlflow_config": {"tracking_uri": "https://m", "token": "canary"}, "tensorboard_config": {}}'
    )
    settings = Settings()  # type: ignore[call-arg]
    assert settings.trackers is not None
    assert settings.trackers.mlflow_config is not None
    assert settings.trackers.mlflow_config.token is not None
    assert "canary" not in repr(settings)
    for invalid in ('{"mlflow": {}}', '{"wandb_config": {"api_key": "k"}}', '{"mlflow_config": {}}'):
        monkeypatch.setenv("TUNESMITH_TRACKERS", invalid)
        with pytest.raises(ValidationError, match="trackers"):
            Settings()  # type: ignore[call-arg]


def test_attempts_use_the_service_hub_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TUNESMITH_HF_ENDPOINT", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert "HF_ENDPOINT" not in attempt_variables(Settings())  # type: ignore[call-arg]
    for name in ("HF_ENDPOINT", "TUNESMITH_HF_ENDPOINT"):
        monkeypatch.setenv(name, f"https://{name.lower().replace('_', '-')}.example")
        settings = Settings()  # type: ignore[call-arg]
        assert settings.hf_endpoint.startswith(f"https://{name.lower().replace('_', '-')}")
        assert attempt_variables(settings)["HF_ENDPOINT"] == settings.hf_endpoint


@pytest.mark.parametrize("prefix", ["bucket/folder", "https://host/", "gs://", "gs://bucket/*", "file:///x"])
def test_prefix_that_names_no_source_is_refused(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    monkeypatch.setenv("TUNESMITH_DATASET_SOURCES", json.dumps({"acme": ["gs://acme/data", prefix]}))
    with pytest.raises(ValidationError, match="is no prefix of sources"):
        Settings()  # type: ignore[call-arg]


def test_sources_of_a_tenant_are_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_DATASET_SOURCES", '{"acme": ["gs://acme/data", "hf://acme"]}')
    assert Settings().dataset_sources == {"acme": ("gs://acme/data", "hf://acme")}  # type: ignore[call-arg]
