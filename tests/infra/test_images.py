"""The images, as far as they can be shown without a container engine: linted, read, and the service's installed and run."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.infra.dockerfile import Dockerfile, Instruction, parse, parse_ignored, read

ROOT = Path(__file__).resolve().parents[2]
HADOLINT = Path(sys.executable).with_name("hadolint")
SERVICE, LLM = "service/Dockerfile", "jobs/images/llm.Dockerfile"
BOTH = pytest.mark.parametrize("path", [SERVICE, LLM])
IGNORED = parse_ignored((ROOT / ".dockerignore").read_text())

MB = 1_000_000
IMAGE_MOST = 300 * MB
BASE = 135 * MB  # python:3.11-slim-bookworm unpacked: an estimate, there is no engine here to measure it with
START_MOST_S = 30
STOP_MOST_S = 8  # Cloud Run gives ten


def image(path: str) -> Dockerfile:
    return read(ROOT / path)


# --- linted -------------------------------------------------------------------------------------------------------------


@BOTH
def test_the_linter_has_nothing_to_say(path: str) -> None:
    assert hadolint(ROOT / path) == (0, "")


def test_the_linter_would_say_it(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python\nADD . /app\nENTRYPOINT python -m service\n")
    code, said = hadolint(bad)
    assert code != 0
    assert {"DL3006", "DL3020", "DL3025"} <= set(re.findall(r"DL\d+", said))


def hadolint(path: Path) -> tuple[int, str]:
    command = [HADOLINT, "--no-color", "--config", ROOT / ".hadolint.yaml", path]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.returncode, answer.stdout + answer.stderr


# --- read ---------------------------------------------------------------------------------------------------------------


@BOTH
def test_every_base_is_pinned_by_digest(path: str) -> None:
    for stage in image(path).stages:
        assert re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", stage.base)


@BOTH
def test_it_does_not_run_as_root(path: str) -> None:
    user, _, group = image(path).image.last("USER").text.partition(":")
    assert int(user) >= 1000
    assert int(group) >= 1000


@BOTH
def test_no_shell_stands_between_a_signal_and_the_process(path: str) -> None:
    shipped = image(path).image
    entry = shipped.last("ENTRYPOINT").exec_form
    assert entry is not None
    assert entry[0] == "python"
    assert not shipped.each("CMD")


@BOTH
def test_the_image_holds_only_what_the_build_stage_made(path: str) -> None:
    for copy in image(path).image.each("COPY"):
        assert copy.from_stage == "build"


@BOTH
def test_what_is_copied_exists_and_is_let_in(path: str) -> None:
    for copy in image(path).stage("build").each("COPY"):
        for source in copy.words[:-1]:
            assert (ROOT / source).exists(), source
            assert source.rstrip("/") not in IGNORED


@BOTH
def test_nothing_is_fetched_beside_the_package_managers(path: str) -> None:
    stages = image(path).stages
    assert not [stage for stage in stages if stage.each("ADD")]
    runs = [run.text for stage in stages for run in stage.each("RUN")]
    assert not [run for run in runs if re.search(r"\b(curl|wget|git)\b|://", run)]


@BOTH
def test_no_secret_is_in_it(path: str) -> None:
    dockerfile = image(path)
    names = [name for stage in dockerfile.stages for name in stage.environment] + list(dockerfile.arguments)
    assert not [name for name in names if re.search("TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL", name)]


@BOTH
def test_libraries_are_installed_before_the_code_is_copied(path: str) -> None:
    order = [f"{instruction.keyword} {instruction.text}" for instruction in image(path).stage("build").instructions]
    installed = max(index for index, step in enumerate(order) if " -m pip " in step)
    code = min(index for index, step in enumerate(order) if step.startswith("COPY schema/"))
    assert installed < code
    assert [copy.words[0] for copy in image(path).image.each("COPY")] == ["/opt/venv", "/app"]


@pytest.mark.parametrize(
    "path",
    [
        *("tests/factories.py", "bench/__main__.py", "docs/api.md", "README.md", "infra/demo.py", "cloudbuild.yaml"),
        *(".venvs/service/bin/python", ".git/config", ".env", ".tunesmith/records.db", "service.db", "data/rows.jsonl"),
        *("service/__pycache__/main.cpython-311.pyc", "service/api/__pycache__/jobs.cpython-311.pyc", SERVICE, LLM),
    ],
)
def test_the_context_leaves_out(path: str) -> None:
    assert path in IGNORED


@pytest.mark.parametrize(
    "path", ["service/main.py", "storage/gcs.py", "jobs/run.py", "requirements/llm.txt", "infra/llama_cpp.sh", "LICENSE"]
)
def test_the_context_has(path: str) -> None:
    assert path not in IGNORED


def test_the_service_says_whether_it_is_well_and_the_attempt_is_not_asked() -> None:
    assert image(SERVICE).image.last("HEALTHCHECK").exec_form is not None
    assert image(LLM).image.last("HEALTHCHECK").text == "NONE"


# --- the trainer's image ------------------------------------------------------------------------------------------------


def test_torch_is_built_for_cuda_12_which_the_driver_of_the_l4_can_run() -> None:
    torch, cuda = torch_and_cuda(image(LLM).image.base)
    assert torch == constraints()["torch"]
    assert cuda[0] == 12


def test_blackwell_has_the_same_torch_for_a_newer_cuda() -> None:
    base = re.search(r"BASE=(\S+)", (ROOT / "cloudbuild.yaml").read_text())
    assert base is not None
    torch, cuda = torch_and_cuda(base[1])
    assert torch == constraints()["torch"]
    assert cuda >= (12, 8)  # the first that knows it
    assert re.search(r"@sha256:[0-9a-f]{64}$", base[1])


def test_no_pin_moves_torch() -> None:
    install = next(run.text for run in image(LLM).stage("build").each("RUN") if "llm.txt" in run.text)
    assert "--constraint requirements/llm-constraints.txt" in install
    pins = pinned(ROOT / "requirements/llm.txt")
    assert not {name for name, version in constraints().items() if pins.get(name, version) != version}
    assert not [name for name in pins if name.startswith(("nvidia-cu", "triton"))]  # the base's, like torch


def test_llama_cpp_is_built_for_any_processor() -> None:
    steps = [run.text for run in image(LLM).stage("build").each("RUN")]
    assert "infra/llama_cpp.sh /opt/venv/bin/python" in steps
    assert "-DGGML_NATIVE=OFF" in (ROOT / "infra/llama_cpp.sh").read_text()


def test_its_entry_is_the_attempt() -> None:
    assert image(LLM).image.last("ENTRYPOINT").exec_form == ["python", "-m", "jobs.run"]
    assert image(LLM).image.last("WORKDIR").text == "/app"
    assert "COPY jobs/ /app/jobs/" in (ROOT / LLM).read_text()


def torch_and_cuda(base: str) -> tuple[str, tuple[int, ...]]:
    found = re.fullmatch(r"pytorch/pytorch:([\d.]+)-cuda([\d.]+)-cudnn\d+-runtime@.*", base)
    assert found, base
    return found[1], tuple(int(part) for part in found[2].split("."))


def constraints() -> dict[str, str]:
    return pinned(ROOT / "requirements/llm-constraints.txt")


def pinned(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)", path.read_text().lower(), re.MULTILINE))


# --- the service's image: its install steps, in an empty environment ------------------------------------------------------


@dataclass(frozen=True)
class Installed:
    """A folder that stands for the root of the service's image."""

    root: Path

    def run(self, *command: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        """A command in the image, with nothing of this machine's environment."""
        environment = self.environment(**variables)
        python = str(self.root / "opt/venv/bin/python")  # what PATH finds first in the image
        return subprocess.run([python, *command[1:]], env=environment, cwd=self.root / "app", capture_output=True, text=True, check=False)

    def environment(self, **variables: str) -> dict[str, str]:
        """What ENV sets, below the root."""
        own = {name: self.inside(value) for name, value in image(SERVICE).image.environment.items()}
        return own | {"PATH": f"{self.root}/opt/venv/bin:{self.root}/usr/local/bin:/usr/bin:/bin"} | variables

    def inside(self, text: str) -> str:
        """The text with its absolute paths put below the root."""
        return re.sub(r"(?<![\w.\"'])/(opt|app|build|tmp)\b", rf"{self.root}/\1", text)

    @contextmanager
    def serving(self) -> Iterator[tuple["subprocess.Popen[str]", str]]:
        """Its entry point at work, and its url."""
        entry = image(SERVICE).image.last("ENTRYPOINT").exec_form or []
        command = [str(self.root / "opt/venv/bin/python"), *entry[1:]]
        process = subprocess.Popen(
            command, env=self.environment(PORT="0"), cwd=self.root / "app", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        with process:
            try:
                yield process, process.stdout.readline().strip()
            finally:
                process.kill()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The build stage's steps, carried out one after the other in an empty folder with a bare Python."""
    here = Installed(tmp_path_factory.mktemp("image"))
    (here.root / "tmp").mkdir()
    subprocess.run([base_python(), "-m", "venv", here.root / "usr/local"], check=True)  # the base: a Python with pip
    folder = here.root
    for step in image(SERVICE).stage("build").instructions:
        match step.keyword:
            case "WORKDIR":
                folder = Path(here.inside(step.text))
                folder.mkdir(parents=True, exist_ok=True)
            case "COPY":
                copy(step, here, folder)
            case "RUN":
                carry_out(step, here, folder)
            case other:
                raise NotImplementedError(other)
    return here


def base_python() -> str:
    """Python 3.11, like the image's."""
    found = shutil.which("python3.11")
    assert found, "no python3.11 on the PATH"
    return found


def copy(step: Instruction, here: Installed, folder: Path) -> None:
    *sources, target = step.words
    to = folder / here.inside(target)
    for source in sources:
        given = ROOT / source
        for file in [given] if given.is_file() else (file for file in given.rglob("*") if file.is_file()):
            path = file.relative_to(ROOT).as_posix()
            if path not in IGNORED:
                place = to / (file.name if given.is_file() else file.relative_to(given))
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, place)


def carry_out(step: Instruction, here: Installed, folder: Path) -> None:
    # How this machine reaches the package registry, which a builder knows by itself; and what it has fetched before.
    mine = {name: value for name, value in os.environ.items() if re.match(r"PIP_|SSL_|.*_proxy$|.*_PROXY$|HOME$", name)}
    command = here.inside(step.text).replace("--no-cache-dir ", "--quiet ")
    path = f"{here.root}/usr/local/bin:/usr/bin:/bin"
    done = subprocess.run(["/bin/sh", "-ec", command], env=mine | {"PATH": path}, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"RUN {step.text}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def test_the_service_starts_from_its_image_and_stops_when_told(installed: Installed) -> None:
    with installed.serving() as (process, url):
        status, body = get(url, "/health")
        assert (status, '"status":"ok"' in body) == (200, True), body
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_MOST_S) in (0, -signal.SIGTERM)


def test_the_health_check_tells_a_service_that_runs_from_one_that_does_not(installed: Installed) -> None:
    check = image(SERVICE).image.last("HEALTHCHECK").exec_form
    assert check is not None
    with installed.serving() as (_, url):
        port = str(urlsplit(url).port)
        get(url, "/health")
        assert installed.run(*check, PORT=port).returncode == 0
    assert installed.run(*check, PORT=port).returncode != 0


def test_the_image_stays_below_its_size(installed: Installed) -> None:
    files = (file.lstat() for folder in ("opt", "app") for file in (installed.root / folder).rglob("*"))
    size = sum(file.st_blocks * 512 for file in files)
    assert BASE + size < IMAGE_MOST, f"{size / MB:.0f} MB beside the base"


def test_every_adapter_finds_its_libraries(installed: Installed) -> None:
    modules = [
        file.relative_to(installed.root / "app").with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        for package in ("schema", "storage", "service")
        for file in sorted((installed.root / "app" / package).rglob("*.py"))
    ]
    done = installed.run("python", "-c", f"import {', '.join(modules)}")
    assert done.returncode == 0, done.stderr[-2000:]


def test_s3_is_among_the_services_that_botocore_still_knows(installed: Installed) -> None:
    client = "boto3.client('s3', region_name='auto', aws_access_key_id='a', aws_secret_access_key='b')"
    signed = f"import boto3; print({client}.generate_presigned_url('get_object', Params=dict(Bucket='b', Key='k')))"
    assert installed.run("python", "-c", signed).stdout.startswith("https://")


def test_nothing_can_be_installed_while_it_runs(installed: Installed) -> None:
    assert "No module named pip" in installed.run("python", "-m", "pip").stderr


def test_the_image_holds_neither_tests_nor_trainers(installed: Installed) -> None:
    assert sorted(path.name for path in (installed.root / "app").iterdir()) == ["LICENSE", "schema", "service", "storage"]


def get(url: str, path: str) -> tuple[int, str]:
    assert url.startswith("http://127.0.0.1:"), f"it said: {url}"
    connection = HTTPConnection(urlsplit(url).netloc, timeout=START_MOST_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


# --- the reader of Dockerfiles itself -----------------------------------------------------------------------------------


def test_a_step_over_several_lines_is_one() -> None:
    read_back = parse('ARG A=b\nFROM ${A} AS build\nRUN one \\\n# said\n    && two\nFROM c\nENTRYPOINT ["x"]\n')
    assert read_back.stage("build").base == "b"
    assert read_back.stage("build").each("RUN")[0].text == "one && two"
    assert read_back.image.last("ENTRYPOINT").exec_form == ["x"]
