"""cloudbuild.yaml, what it uploads, and its scripts, with programs in place of docker and gcloud that note how they were called."""

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
BUILD: dict[str, Any] = yaml.safe_load((ROOT / "cloudbuild.yaml").read_text())
STEPS: dict[str, dict[str, Any]] = {step["id"]: step for step in BUILD["steps"]}
BUILT_IN = {"PROJECT_ID", "BUILD_ID"}
REPOSITORY = "europe-west4-docker.pkg.dev/my-project/tunesmith"


# --- the file -----------------------------------------------------------------------------------------------------------


def test_gcloud_takes_it(gcloud: Gcloud) -> None:
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
def test_gcloud_finds_a_slip_of_the_pen(gcloud: Gcloud, tmp_path: Path, right: str, wrong: str) -> None:
    text = (ROOT / "cloudbuild.yaml").read_text()
    assert right in text
    copy = tmp_path / "cloudbuild.yaml"
    copy.write_text(text.replace(right, wrong, 1))
    assert wrong.split(":")[0].strip() in gcloud.load_build(copy)


def test_every_substitution_is_given_and_each_given_one_used() -> None:
    used = set(re.findall(r"\$\{?(\w+)", without_comments((ROOT / "cloudbuild.yaml").read_text())))
    assert used - BUILT_IN == set(BUILD["substitutions"])


def test_every_file_that_a_step_names_exists_and_is_uploaded(uploaded: set[str]) -> None:
    named = [word for step in STEPS.values() for word in step["args"] if "/" in word and "=" not in word]
    assert named
    assert not [path for path in named if path not in uploaded]


def test_nothing_is_deployed_before_everything_has_succeeded() -> None:
    builds_and_checks = {name for name in STEPS if not name.startswith("deploy")}
    assert set(STEPS["deploy-service"]["waitFor"]) == builds_and_checks
    assert STEPS["deploy-jobs"]["waitFor"] == ["deploy-service"]


def test_the_tools_are_pinned() -> None:
    assert {step["name"] for step in STEPS.values()} == {
        "gcr.io/google.com/cloudsdktool/google-cloud-cli:583.0.0-emulators",
        "gcr.io/cloud-builders/docker:24.0.9",
    }


def test_it_runs_as_an_account_of_its_own() -> None:
    assert "/serviceAccounts/tunesmith-build@" in BUILD["serviceAccount"]
    assert BUILD["options"]["logging"] == "CLOUD_LOGGING_ONLY"  # what Google asks of a build with such an account


def without_comments(text: str) -> str:
    return re.sub(r"(^|\s)#.*$", "", text, flags=re.MULTILINE)


# --- what is uploaded ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uploaded(gcloud: Gcloud) -> set[str]:
    return set(gcloud.files_for_upload(ROOT))


def test_sources_and_tests_are_uploaded(uploaded: set[str]) -> None:
    tracked = {
        path.relative_to(ROOT).as_posix()
        for folder in ("schema", "storage", "service", "jobs", "infra", "tests", "bench", "docs", "requirements")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".txt", ".in", ".sh", ".json", ".md", ".tf", ".Dockerfile"} and ".terraform" not in path.parts
    }
    assert tracked - uploaded == set()
    assert {"Makefile", "pyproject.toml", "cloudbuild.yaml", "service/Dockerfile", ".dockerignore", ".hadolint.yaml"} <= uploaded


def test_environments_caches_and_history_stay_here(uploaded: set[str]) -> None:
    kept = re.compile(r"(^|/)(\.venvs|\.git|__pycache__|\.pytest_cache|\.ruff_cache|\.hypothesis|\.terraform|\w+\.egg-info)/|\.pyc$")
    assert not [path for path in uploaded if kept.search(path)]


def test_records_rows_models_and_secrets_stay_here(gcloud: Gcloud, tmp_path: Path) -> None:
    for name in (".gcloudignore", ".gitignore"):
        shutil.copy(ROOT / name, tmp_path)
    stay = [
        *(".tunesmith/records.db", "records.db", "records.db-wal", "data/rows.jsonl", "objects/datasets/a/train.jsonl"),
        *("model.safetensors", "models/gemma-Q8_0.gguf", "weights.pt", ".env", ".env.local", "a-key.json", "tls.pem"),
        *("infra/terraform/my-project.tfvars", "infra/terraform/terraform.tfstate", "infra/terraform/.terraform/modules.json"),
        *(".venvs/dev/bin/python", ".git/config", "service/__pycache__/main.pyc"),
    ]
    go = ["service/main.py", "jobs/data/render.py", "tests/rows.jsonl", "infra/terraform/main.tf", "docs/api.md"]
    for path in stay + go:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert set(gcloud.files_for_upload(tmp_path)) == {*go, ".gcloudignore", ".gitignore"}


# --- the scripts --------------------------------------------------------------------------------------------------------

DIGEST = "sha256:" + "d" * 64
DOCKER = f"""#!/bin/bash
echo "docker $*" >>"$CALLS"
case "$1" in
  buildx | pull) exit 1 ;;
  image) printf 'elsewhere/service@{DIGEST}\\n%s@{DIGEST}\\n' "${{5%:*}}" ;;
esac
"""
GCLOUD = """#!/bin/bash
echo "gcloud $*" >>"$CALLS"
case "$*" in
  *"services describe"*) echo https://tunesmith-abc-ez.a.run.app ;;
  *"print-identity-token"*) echo a-token ;;
esac
"""
CURL = """#!/bin/bash
echo "curl $*" >>"$CALLS"
cat >>"$WORLD/headers"
exit "$HEALTH"
"""


NOTES_ITS_CALL = """#!/bin/bash
echo "$(basename "$0") $*" >>"$CALLS"
"""


@dataclass(frozen=True)
class Builder:
    """A working folder as Cloud Build has it, with programs that only pretend."""

    home: Path

    def step(self, name: str, health: int = 0, **substituted: str) -> "subprocess.CompletedProcess[str]":
        """Run a step of cloudbuild.yaml as Cloud Build would."""
        values = {"PROJECT_ID": "my-project", "BUILD_ID": "b1"} | BUILD["substitutions"] | substituted
        variables = dict(substitute(line, values).split("=", 1) for line in STEPS[name].get("env", []))
        world = {"PATH": f"{self.home}/bin:/usr/bin:/bin", "CALLS": f"{self.home}/calls", "WORLD": str(self.home), "HEALTH": str(health)}
        command = ["bash", *(substitute(word, values) for word in STEPS[name]["args"])]
        return subprocess.run(command, cwd=self.home, env=variables | world, capture_output=True, text=True, stdin=subprocess.DEVNULL)

    @property
    def calls(self) -> list[str]:
        """Every call, in order."""
        return (self.home / "calls").read_text().splitlines()

    @property
    def images(self) -> dict[str, str]:
        """The digests that steps left for later ones."""
        return {path.name: path.read_text().strip() for path in (self.home / ".images").iterdir()}


def substitute(text: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\$\{(\w+)\}", lambda found: values[found[1]], text)


@pytest.fixture
def builder(tmp_path: Path) -> Builder:
    shutil.copytree(ROOT / "infra/cloud_build", tmp_path / "infra/cloud_build")
    (tmp_path / "bin").mkdir()
    programs = {"docker": DOCKER, "gcloud": GCLOUD, "curl": CURL, "apt-get": NOTES_ITS_CALL, "make": NOTES_ITS_CALL}
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return Builder(tmp_path)


def test_the_first_step_checks_and_tests(builder: Builder) -> None:
    assert builder.step("check").returncode == 0
    assert builder.calls[-1] == "make check test-fast"
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"check", "test-fast"} <= targets


def test_an_image_is_built_pushed_and_known_by_its_digest(builder: Builder) -> None:
    assert builder.step("service-image").returncode == 0
    service = f"{REPOSITORY}/service"
    verbs = [call.split()[1] for call in builder.calls]
    assert verbs == ["buildx", "pull", "build", "push", "pull", "build", "push", "push", "image"]
    assert "--target build" in builder.calls[2]
    assert f"--tag {service}:b1" in builder.calls[5]
    assert builder.images == {"service": f"{service}@{DIGEST}"}


def test_the_trainer_is_built_for_blackwell_only_where_there_is_one(builder: Builder) -> None:
    skipped = builder.step("llm-cuda13-image")
    assert (skipped.returncode, "is not needed" in skipped.stdout) == (0, True)
    assert not (builder.home / "calls").exists()
    assert builder.step("llm-cuda13-image", _PROFILES="rtx-pro-6000,cpu").returncode == 0
    assert "--build-arg=BASE=pytorch/pytorch:2.13.0-cuda13.0" in builder.calls[2]
    assert list(builder.images) == ["llm-cuda13"]


def test_a_new_revision_gets_requests_once_it_is_well(builder: Builder) -> None:
    builder.step("service-image")
    done = builder.step("deploy-service")
    assert done.returncode == 0, done.stderr
    update, describe, token, health, traffic = builder.calls[-5:]
    assert f"--image={REPOSITORY}/service@{DIGEST} --no-traffic --tag=candidate" in update
    assert "services describe" in describe
    assert "--audiences=https://tunesmith-abc-ez.a.run.app" in token
    assert health.endswith("https://candidate---tunesmith-abc-ez.a.run.app/health")
    assert "update-traffic tunesmith --region=europe-west4 --to-latest" in traffic


def test_nothing_is_deployed_without_an_image(builder: Builder) -> None:
    assert builder.step("deploy-service").returncode != 0
    assert not (builder.home / "calls").exists()


def test_a_revision_that_is_not_well_gets_none(builder: Builder) -> None:
    builder.step("service-image")
    assert builder.step("deploy-service", health=22).returncode != 0
    assert builder.calls[-1].startswith("curl")


def test_the_token_is_no_argument_and_in_no_log(builder: Builder) -> None:
    builder.step("service-image")
    done = builder.step("deploy-service")
    assert "Authorization: Bearer a-token" in (builder.home / "headers").read_text()
    assert "a-token" not in done.stdout + done.stderr + "".join(builder.calls)


def test_each_profile_gets_the_image_for_its_gpu(builder: Builder) -> None:
    profiles = "l4,rtx-pro-6000,cpu"
    builder.step("llm-image")
    builder.step("llm-cuda13-image", _PROFILES=profiles)
    assert builder.step("deploy-jobs", _PROFILES=profiles).returncode == 0
    assert [re.findall(r"update (\S+) .*/([\w-]+)@sha256:d{64} ", call)[0] for call in builder.calls[-3:]] == [
        ("tunesmith-l4", "llm"),
        ("tunesmith-rtx-pro-6000", "llm-cuda13"),
        ("tunesmith-cpu", "llm"),
    ]


def test_a_profile_without_an_image_is_refused(builder: Builder) -> None:
    builder.step("llm-image")
    done = builder.step("deploy-jobs", _PROFILES="h100")
    assert (done.returncode, "no image for the profile 'h100'; known:" in done.stderr) == (1, True)


def test_every_profile_of_terraform_has_an_image() -> None:
    known = re.search(r"known: (.+)\"", (ROOT / "infra/cloud_build/deploy_jobs.sh").read_text())
    offered = re.search(r"contains\(\[(.+?)\], name\)", (ROOT / "infra/terraform/variables.tf").read_text())
    assert known is not None
    assert offered is not None
    assert set(known[1].split(", ")) == set(re.findall(r'"([\w-]+)"', offered[1]))


def test_gcloud_knows_every_call(builder: Builder, gcloud: Gcloud) -> None:
    for step in ("service-image", "llm-image", "deploy-service", "deploy-jobs"):
        builder.step(step)
    calls = [call for call in builder.calls if call.startswith("gcloud")]
    assert len(calls) == 6
    assert {command: wrong for command, wrong in gcloud.lint(calls).items() if wrong} == {}
