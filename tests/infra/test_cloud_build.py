"""cloudbuild.yaml, what it uploads, and its scripts, run with stubs of docker and gcloud that record their calls."""

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra.gcloud import Gcloud

ROOT = Path(__file__).resolve().parents[2]
BUILD_CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "cloudbuild.yaml").read_text())
STEPS: dict[str, dict[str, Any]] = {step["id"]: step for step in BUILD_CONFIG["steps"]}
BUILT_IN_SUBSTITUTIONS = {"PROJECT_ID", "BUILD_ID"}
REPOSITORY = "europe-west4-docker.pkg.dev/my-project/tunesmith"


# --- the file -----------------------------------------------------------------------------------------------------------


def test_gcloud_accepts_build_config(gcloud: Gcloud) -> None:
    assert gcloud.load_build(ROOT / "cloudbuild.yaml") == str(len(STEPS))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("entrypoint: bash", "entrypiont: bash"),
        ("machineType: E2_HIGHCPU_8", "machineType: E2_HIGHCPU_9"),
        ("timeout: 3600s", "timeuot: 3600s"),
        ("  _REGION: europe-west4", "  REGION: europe-west4"),
    ],
)
def test_gcloud_detects_typo(gcloud: Gcloud, tmp_path: Path, right: str, wrong: str) -> None:
    text = (ROOT / "cloudbuild.yaml").read_text()
    assert right in text
    copy = tmp_path / "cloudbuild.yaml"
    copy.write_text(text.replace(right, wrong, 1))
    assert wrong.split(":")[0].strip() in gcloud.load_build(copy)


def test_substitutions_are_defined_and_used() -> None:
    used = set(re.findall(r"\$\{?(\w+)", strip_comments((ROOT / "cloudbuild.yaml").read_text())))
    assert used - BUILT_IN_SUBSTITUTIONS == set(BUILD_CONFIG["substitutions"])


def test_files_named_by_steps_are_uploaded(uploaded_files: set[str]) -> None:
    named = [word for step in STEPS.values() for word in step["args"] if "/" in word and "=" not in word]
    assert named
    assert not [path for path in named if path not in uploaded_files]


def test_deploy_steps_wait_for_all_other_steps() -> None:
    builds_and_checks = {name for name in STEPS if not name.startswith("deploy")}
    assert set(STEPS["deploy-service"]["waitFor"]) == builds_and_checks
    assert STEPS["deploy-jobs"]["waitFor"] == ["deploy-service"]


def test_build_tools_are_pinned() -> None:
    assert not [step["name"] for step in STEPS.values() if not re.search(r":\d+\.\d+\.\d+(-\w+)?$", step["name"])]


def test_build_uses_own_service_account() -> None:
    assert "/serviceAccounts/tunesmith-build@" in BUILD_CONFIG["serviceAccount"]
    assert BUILD_CONFIG["options"]["logging"] == "CLOUD_LOGGING_ONLY"  # Google requires it for a build with its own account


def strip_comments(text: str) -> str:
    return re.sub(r"(^|\s)#.*$", "", text, flags=re.MULTILINE)


# --- what is uploaded ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uploaded_files(gcloud: Gcloud) -> set[str]:
    return set(gcloud.files_for_upload(ROOT))


def test_sources_and_tests_are_in_upload(uploaded_files: set[str]) -> None:
    tracked = {
        path.relative_to(ROOT).as_posix()
        for folder in ("schema", "storage", "service", "jobs", "infra", "tests", "bench", "docs", "requirements")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".txt", ".in", ".sh", ".json", ".md", ".tf", ".Dockerfile"}
        and ".terraform" not in path.parts
        and path.name != "capabilities.json"  # the build writes it
    }
    assert tracked - uploaded_files == set()
    assert {"Makefile", "pyproject.toml", "cloudbuild.yaml", "service/Dockerfile", ".dockerignore", ".hadolint.yaml"} <= uploaded_files


def test_environments_caches_and_history_are_not_uploaded(uploaded_files: set[str]) -> None:
    excluded = re.compile(r"(^|/)(\.venvs|\.git|__pycache__|\.pytest_cache|\.ruff_cache|\.hypothesis|\.terraform|\w+\.egg-info)/|\.pyc$")
    assert not [path for path in uploaded_files if excluded.search(path)]


def test_records_datasets_models_and_secrets_are_not_uploaded(gcloud: Gcloud, tmp_path: Path) -> None:
    for name in (".gcloudignore", ".gitignore"):
        shutil.copy(ROOT / name, tmp_path)
    excluded = [
        *(".tunesmith/records.db", "records.db", "records.db-wal", "data/rows.jsonl", "objects/datasets/a/train.jsonl"),
        *("model.safetensors", "models/gemma-Q8_0.gguf", "weights.pt", ".env", ".env.local", "a-key.json", "tls.pem"),
        *("infra/terraform/my-project.tfvars", "infra/terraform/terraform.tfstate", "infra/terraform/.terraform/modules.json"),
        *(".venvs/dev/bin/python", ".git/config", "service/__pycache__/main.pyc"),
    ]
    included = ["service/main.py", "jobs/llm/data/tokenize.py", "tests/rows.jsonl", "infra/terraform/main.tf", "docs/api.md"]
    for path in excluded + included:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert set(gcloud.files_for_upload(tmp_path)) == {*included, ".gcloudignore", ".gitignore"}


# --- the scripts --------------------------------------------------------------------------------------------------------

DIGEST = "sha256:" + "d" * 64
DOCKER_STUB = f"""#!/bin/bash
echo "docker $*" >>"$CALLS_FILE"
case "$1" in
  buildx | pull) exit 1 ;;
  image) printf 'elsewhere/service@{DIGEST}\\n%s@{DIGEST}\\n' "${{5%:*}}" ;;
esac
"""
GCLOUD_STUB = """#!/bin/bash
echo "gcloud $*" >>"$CALLS_FILE"
case "$*" in
  *"services describe"*) echo https://tunesmith-abc-ez.a.run.app ;;
  *"print-identity-token"*) echo a-token ;;
esac
"""
CURL_STUB = """#!/bin/bash
echo "curl $*" >>"$CALLS_FILE"
cat >>"$STUB_HOME/headers"
exit "$HEALTH"
"""


RECORDING_STUB = """#!/bin/bash
echo "$(basename "$0") $*" >>"$CALLS_FILE"
"""


@dataclass(frozen=True)
class BuildHarness:
    """A working folder like Cloud Build's, with stubs of the programs."""

    home: Path

    def run_step(self, name: str, health: int = 0, **substituted: str) -> "subprocess.CompletedProcess[str]":
        """Run a step of cloudbuild.yaml as Cloud Build would."""
        values = {"PROJECT_ID": "my-project", "BUILD_ID": "b1"} | BUILD_CONFIG["substitutions"] | substituted
        variables = dict(substitute(line, values).split("=", 1) for line in STEPS[name].get("env", []))
        stub_variables = {
            "PATH": f"{self.home}/bin:/usr/bin:/bin",
            "CALLS_FILE": f"{self.home}/calls",
            "STUB_HOME": str(self.home),
            "HEALTH": str(health),
        }
        command = ["bash", *(substitute(word, values) for word in STEPS[name]["args"])]
        return subprocess.run(
            command, cwd=self.home, env=variables | stub_variables, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )

    @property
    def calls(self) -> list[str]:
        """Every call, in order."""
        return (self.home / "calls").read_text().splitlines()

    @property
    def images(self) -> dict[str, str]:
        """The digests that steps wrote for later ones."""
        return {path.name: path.read_text().strip() for path in (self.home / ".images").iterdir()}


def substitute(text: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], text)


@pytest.fixture
def builder(tmp_path: Path) -> BuildHarness:
    shutil.copytree(ROOT / "infra/cloud_build", tmp_path / "infra/cloud_build")
    (tmp_path / "bin").mkdir()
    programs = {"docker": DOCKER_STUB, "gcloud": GCLOUD_STUB, "curl": CURL_STUB, "apt-get": RECORDING_STUB, "make": RECORDING_STUB}
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return BuildHarness(tmp_path)


def test_first_step_runs_checks_and_tests(builder: BuildHarness) -> None:
    assert builder.run_step("check").returncode == 0
    assert builder.calls[-1] == "make check test-fast"
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"check", "test-fast"} <= targets


def test_image_is_built_pushed_and_referenced_by_digest(builder: BuildHarness) -> None:
    assert builder.run_step("service-image").returncode == 0
    service = f"{REPOSITORY}/service"
    verbs = [call.split()[1] for call in builder.calls]
    assert verbs == ["buildx", "pull", "build", "push", "pull", "build", "push", "push", "image"]
    assert "--target build" in builder.calls[2]
    assert f"--tag {service}:b1" in builder.calls[5]
    assert builder.images == {"service": f"{service}@{DIGEST}"}


def test_blackwell_trainer_is_built_only_for_blackwell_profile(builder: BuildHarness) -> None:
    skipped = builder.run_step("llm-cuda13-image")
    assert (skipped.returncode, "is not needed" in skipped.stdout) == (0, True)
    assert not (builder.home / "calls").exists()
    assert builder.run_step("llm-cuda13-image", _PROFILES="rtx-pro-6000,cpu").returncode == 0
    assert "--build-arg=BASE=pytorch/pytorch:2.13.0-cuda13.0" in builder.calls[2]
    assert list(builder.images) == ["llm-cuda13"]


def test_healthy_revision_gets_traffic(builder: BuildHarness) -> None:
    builder.run_step("service-image")
    done = builder.run_step("deploy-service")
    assert done.returncode == 0, done.stderr
    update, describe, token, health, traffic = builder.calls[-5:]
    assert f"--image={REPOSITORY}/service@{DIGEST} --no-traffic --tag=candidate" in update
    assert "services describe" in describe
    assert "--audiences=https://tunesmith-abc-ez.a.run.app" in token
    assert health.endswith("https://candidate---tunesmith-abc-ez.a.run.app/health")
    assert "update-traffic tunesmith --region=europe-west4 --to-latest" in traffic


def test_deploy_requires_image(builder: BuildHarness) -> None:
    assert builder.run_step("deploy-service").returncode != 0
    assert not (builder.home / "calls").exists()


def test_unhealthy_revision_gets_no_traffic(builder: BuildHarness) -> None:
    builder.run_step("service-image")
    assert builder.run_step("deploy-service", health=22).returncode != 0
    assert builder.calls[-1].startswith("curl")


def test_token_is_not_in_arguments_or_logs(builder: BuildHarness) -> None:
    builder.run_step("service-image")
    done = builder.run_step("deploy-service")
    assert "Authorization: Bearer a-token" in (builder.home / "headers").read_text()
    assert "a-token" not in done.stdout + done.stderr + "".join(builder.calls)


def test_each_profile_gets_image_for_its_gpu(builder: BuildHarness) -> None:
    profiles = "l4,rtx-pro-6000,cpu"
    builder.run_step("llm-image")
    builder.run_step("llm-cuda13-image", _PROFILES=profiles)
    builder.run_step("data-image")
    assert builder.run_step("deploy-jobs", _PROFILES=profiles).returncode == 0
    assert [re.findall(r"update (\S+) .*/([\w-]+)@sha256:d{64} ", call)[0] for call in builder.calls[-4:]] == [
        ("tunesmith-l4", "llm"),
        ("tunesmith-rtx-pro-6000", "llm-cuda13"),
        ("tunesmith-cpu", "llm"),
        ("tunesmith-data-cpu", "data"),
    ]


def test_manifest_is_copied_out_of_each_environment_image(builder: BuildHarness) -> None:
    for name in ("llm", "data"):
        assert builder.run_step(f"{name}-image").returncode == 0
        path = f"jobs/environments/{name}/"
        assert any(call.startswith("docker cp ") and call.endswith(f":/app/{path}capabilities.json {path}") for call in builder.calls)


def test_recorded_images_are_those_of_every_build() -> None:
    recorded = {image.rpartition("/")[2].partition(":")[0] for image in BUILD_CONFIG["images"]}
    built = {name.removesuffix("-image") for name in STEPS if name.endswith("-image")}
    assert built - recorded == {"llm-cuda13"}  # which a build without its profile does not make


def test_profile_without_image_is_rejected(builder: BuildHarness) -> None:
    builder.run_step("llm-image")
    done = builder.run_step("deploy-jobs", _PROFILES="h100")
    assert (done.returncode, "no image for the profile 'h100'; known:" in done.stderr) == (1, True)


def test_every_terraform_profile_has_image() -> None:
    known = re.search(r"known: (.+)\"", (ROOT / "infra/cloud_build/deploy_jobs.sh").read_text())
    offered = re.search(r"contains\(\[(.+?)\], name\)", (ROOT / "infra/terraform/variables.tf").read_text())
    assert known is not None
    assert offered is not None
    assert set(known[1].split(", ")) == set(re.findall(r'"([\w-]+)"', offered[1]))


def test_gcloud_accepts_every_call(builder: BuildHarness, gcloud: Gcloud) -> None:
    for step in ("service-image", "llm-image", "data-image", "deploy-service", "deploy-jobs"):
        builder.run_step(step)
    calls = [call for call in builder.calls if call.startswith("gcloud")]
    assert len(calls) == 7
    assert {command: error for command, error in gcloud.lint(calls).items() if error} == {}
