"""infra/deploy.sh and infra/destroy.sh, run with stubs of gcloud and terraform that record their calls."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.infra.terraform_tree import read_files

ROOT = Path(__file__).resolve().parents[2]
PROJECT, REGION = "my-project", "europe-west4"

# Each stub records its arguments, and its standard input where that matters, and responds like a new project.
GCLOUD_STUB = """#!/bin/bash
echo "gcloud $*" >>"$CALLS_FILE"
case "$*" in
  "auth list"*) echo "$FAKE_ACCOUNT" ;;
  "auth print-access-token") echo a-token ;;
  "projects describe"*) [[ -z "$NO_PROJECT" ]] && echo 123456 ;;
  "billing projects describe"*) echo "${FAKE_BILLING-True}" ;;
  "storage buckets describe"*) [[ -f "$STUB_HOME/bucket" ]] ;;
  "storage buckets create"*) touch "$STUB_HOME/bucket" ;;
  "secrets versions list"*) [[ ! -f "$STUB_HOME/key" ]] || echo 1 ;;
  "secrets versions add"*) cat >"$STUB_HOME/key" ;;
esac
"""
TERRAFORM_STUB = """#!/bin/bash
echo "terraform $*" >>"$CALLS_FILE"
echo "token=$GOOGLE_OAUTH_ACCESS_TOKEN" >>"$STUB_HOME/tokens"
case "$*" in
  *" output -raw region") [[ -n "$FAKE_REGION" ]] && echo "$FAKE_REGION" ;;
  *" output -raw profiles") echo l4,cpu ;;
  *" output -raw repository") echo tunesmith ;;
  *" output -raw next_steps") echo "curl the service" ;;
  *" state list") printf '%s\\n' "$FAKE_STATE" ;;
  *" apply "*) if [[ -s "$STUB_HOME/errors" ]]; then head -1 "$STUB_HOME/errors"; sed -i 1d "$STUB_HOME/errors"; exit 1; fi ;;
esac
"""
TERRAFORM_STATE = """data.google_project.this
google_project_service.apis["run.googleapis.com"]
google_storage_bucket.buckets["models"]
google_storage_bucket_iam_member.job_uses_models
google_firestore_database.records
google_firestore_field.overrides["jobs.record"]
google_cloud_run_v2_job.profiles["l4"]
google_cloud_run_v2_service.tunesmith"""


@dataclass(frozen=True)
class ScriptHarness:
    """A copy of the scripts, with stubs of the programs."""

    home: Path

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a script of infra/ from this copy."""
        stub_variables = {
            "STUB_HOME": str(self.home),
            "CALLS_FILE": str(self.home / "calls"),
            "FAKE_ACCOUNT": "me@example.com",
            "PAUSE_S": "0",
        }
        environment = (
            {"PATH": f"{self.home}/bin:{os.environ['PATH']}", "NO_PROJECT": "", "FAKE_REGION": "", "FAKE_STATE": TERRAFORM_STATE}
            | stub_variables
            | variables
        )
        command = [str(self.home / "infra" / script), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)

    @property
    def calls(self) -> list[str]:
        """Every call of gcloud and terraform, in order."""
        calls = self.home / "calls"
        return calls.read_text().splitlines() if calls.exists() else []

    def position_of(self, part: str) -> int:
        """The index of the first call that contains `part`."""
        return next(index for index, call in enumerate(self.calls) if part in call)


@pytest.fixture
def cloud(tmp_path: Path) -> ScriptHarness:
    (tmp_path / "infra/terraform").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    for name in ("deploy.sh", "destroy.sh", "deployment.sh"):
        (tmp_path / "infra" / name).write_text((ROOT / "infra" / name).read_text())
        (tmp_path / "infra" / name).chmod(0o755)
    for name, text in (("gcloud", GCLOUD_STUB), ("terraform", TERRAFORM_STUB)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return ScriptHarness(tmp_path)


@pytest.mark.parametrize("script", ["deploy.sh", "destroy.sh"])
@pytest.mark.parametrize(("arguments", "message"), [((), "PROJECT_ID is missing"), (("p", ""), "REGION is missing")])
def test_missing_prerequisite_is_reported_first(cloud: ScriptHarness, script: str, arguments: tuple[str, ...], message: str) -> None:
    run = cloud.run(script, *arguments)
    assert run.returncode == 1
    assert message in run.stderr
    assert cloud.calls == []


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FAKE_ACCOUNT": ""}, "gcloud auth login"),
        ({"NO_PROJECT": "1"}, "gcloud projects create my-project"),
        ({"FAKE_BILLING": "False"}, "gcloud billing projects link my-project"),
    ],
)
def test_unusable_project_error_names_fix(cloud: ScriptHarness, variables: dict[str, str], message: str) -> None:
    run = cloud.run("deploy.sh", PROJECT, REGION, **variables)
    assert run.returncode == 1
    assert message in run.stderr
    assert not [call for call in cloud.calls if call.startswith("terraform") or "create" in call or "enable" in call]


def test_deploy_to_empty_project_runs_steps_in_order(cloud: ScriptHarness) -> None:
    run = cloud.run("deploy.sh", PROJECT, REGION)
    assert run.returncode == 0, run.stderr
    steps = [
        "services enable",
        "buckets create",
        "terraform -chdir=infra/terraform init",
        "apply",
        "versions add",
        "builds submit",
        "next_steps",
    ]
    positions = [cloud.position_of(step) for step in steps]
    assert positions == sorted(positions)
    assert "curl the service" in run.stdout


def test_terraform_state_bucket_is_private_and_versioned(cloud: ScriptHarness) -> None:
    cloud.run("deploy.sh", PROJECT, REGION)
    create, update = cloud.calls[cloud.position_of("buckets create")], cloud.calls[cloud.position_of("buckets update")]
    assert "gs://my-project-tunesmith-terraform" in create
    assert "--public-access-prevention" in create
    assert "--uniform-bucket-level-access" in create
    assert "--versioning" in update
    assert "-backend-config=bucket=my-project-tunesmith-terraform" in cloud.calls[cloud.position_of(" init ")]


def test_signing_key_is_only_passed_through_stdin(cloud: ScriptHarness) -> None:
    run = cloud.run("deploy.sh", PROJECT, REGION)
    key = (cloud.home / "key").read_text()
    assert len(key) == 64
    assert not key.endswith("\n")
    assert key not in run.stdout + run.stderr + "".join(cloud.calls)
    first, second = [call for call in cloud.calls if " apply " in call]
    assert "-target=google_secret_manager_secret.signing_key" in first
    assert "-target" not in second


def test_existing_signing_key_is_kept(cloud: ScriptHarness) -> None:
    (cloud.home / "key").write_text("old")
    assert cloud.run("deploy.sh", PROJECT, REGION).returncode == 0
    assert (cloud.home / "key").read_text() == "old"
    assert len([call for call in cloud.calls if " apply " in call]) == 1


def test_terraform_reuses_gcloud_login_without_printing_token(cloud: ScriptHarness) -> None:
    run = cloud.run("deploy.sh", PROJECT, REGION)
    assert set((cloud.home / "tokens").read_text().split()) == {"token=a-token"}
    assert "a-token" not in run.stdout + run.stderr + "".join(cloud.calls)


def test_not_yet_visible_resources_are_retried(cloud: ScriptHarness) -> None:
    (cloud.home / "key").write_text("old")
    (cloud.home / "errors").write_text("Error 404: If a metric was created recently, it could take up to 10 minutes\n" * 2)
    assert cloud.run("deploy.sh", PROJECT, REGION).returncode == 0
    assert len([call for call in cloud.calls if " apply " in call]) == 3


def test_other_errors_stop_deployment(cloud: ScriptHarness) -> None:
    (cloud.home / "key").write_text("old")
    (cloud.home / "errors").write_text("Error 403: quota\n" * 9)
    run = cloud.run("deploy.sh", PROJECT, REGION)
    assert run.returncode == 1
    assert "run this again" in run.stderr
    assert len([call for call in cloud.calls if " apply " in call]) == 1
    assert not [call for call in cloud.calls if "builds submit" in call]


def test_first_deployer_gets_invoker_role_and_settings_persist(cloud: ScriptHarness) -> None:
    settings = cloud.home / "infra/terraform/my-project.tfvars"
    cloud.run("deploy.sh", PROJECT, REGION)
    assert 'invokers = ["user:me@example.com"]' in settings.read_text()
    assert '\nalert_email = "me@example.com"' in settings.read_text()
    settings.write_text('profiles = ["cpu"]\n')
    cloud.run("deploy.sh", PROJECT, REGION)
    assert settings.read_text() == 'profiles = ["cpu"]\n'
    assert all("-var-file=my-project.tfvars" in call for call in cloud.calls if " apply " in call)


def test_initial_settings_are_known_variables(cloud: ScriptHarness) -> None:
    cloud.run("deploy.sh", PROJECT, REGION)
    written = (cloud.home / "infra/terraform/my-project.tfvars").read_text()
    named = {line.lstrip("# ").partition(" ")[0] for line in written.splitlines() if " = " in line}
    declared = {item.labels[0] for item in read_files(ROOT / "infra/terraform").items_of("variable")}
    assert named <= declared
    assert {"profiles", "invokers", "alert_email", "billing_account"} <= named


def test_service_account_can_deploy_without_alert_email(cloud: ScriptHarness) -> None:
    cloud.run("deploy.sh", PROJECT, REGION, FAKE_ACCOUNT="ci@other.iam.gserviceaccount.com")
    settings = (cloud.home / "infra/terraform/my-project.tfvars").read_text()
    assert 'invokers = ["serviceAccount:ci@other.iam.gserviceaccount.com"]' in settings
    assert "\nalert_email" not in settings


def test_deployment_region_cannot_change(cloud: ScriptHarness) -> None:
    run = cloud.run("deploy.sh", PROJECT, REGION, FAKE_REGION="us-east4")
    assert run.returncode == 1
    assert "REGION=us-east4" in run.stderr
    assert not [call for call in cloud.calls if " apply " in call]


@pytest.mark.parametrize("answer", ["", "yes", "my-projec"])
def test_destroy_requires_project_name(cloud: ScriptHarness, answer: str) -> None:
    run = cloud.run("destroy.sh", PROJECT, REGION, CONFIRM=answer)
    assert run.returncode == 1
    assert "CONFIRM=my-project" in run.stderr
    assert not [call for call in cloud.calls if call.startswith("terraform")]


def test_destroy_keeps_data_and_prints_delete_commands(cloud: ScriptHarness) -> None:
    run = cloud.run("destroy.sh", PROJECT, REGION, CONFIRM=PROJECT)
    assert run.returncode == 0, run.stderr
    (call,) = [call for call in cloud.calls if " destroy " in call]
    targets = {word.removeprefix("-target=") for word in call.split() if word.startswith("-target=")}
    removed = {
        "google_storage_bucket_iam_member.job_uses_models",
        'google_cloud_run_v2_job.profiles["l4"]',
        "google_cloud_run_v2_service.tunesmith",
    }
    assert targets == removed
    for command in ("gs://my-project-tunesmith-models", "firestore databases delete", "--no-delete-protection"):
        assert command in run.stdout
    assert not [call for call in cloud.calls if "storage rm" in call or "databases delete" in call]


def test_destroy_is_idempotent(cloud: ScriptHarness) -> None:
    run = cloud.run("destroy.sh", PROJECT, REGION, CONFIRM=PROJECT, FAKE_STATE='google_storage_bucket.buckets["models"]')
    assert run.returncode == 0, run.stderr
    assert not [call for call in cloud.calls if " destroy " in call]
