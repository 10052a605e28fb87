"""The images without a container engine: Dockerfiles are linted and parsed; the service's image is installed and run."""

import json
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
import yaml

from tests.infra.dockerfile import Dockerfile, Instruction, parse_dockerfile, parse_dockerignore, read_dockerfile

ROOT = Path(__file__).resolve().parents[2]
HADOLINT = Path(sys.executable).with_name("hadolint")
SERVICE, LLM, DATA = "service/Dockerfile", "jobs/environments/llm/Dockerfile", "jobs/environments/data/Dockerfile"
parametrize_dockerfile = pytest.mark.parametrize("path", [SERVICE, LLM, DATA])
DOCKER_IGNORE = parse_dockerignore((ROOT / ".dockerignore").read_text())

MB = 1_000_000
MAX_IMAGE_BYTES = 560 * MB  # without the bytecode of libraries; half of it reads datasets: Arrow, tokenizers, numpy
BASE_IMAGE_BYTES = 135 * MB  # python:3.11-slim-bookworm unpacked: an estimate, because no container engine is available to measure it
START_TIMEOUT_S = 30
STOP_TIMEOUT_S = 8  # Cloud Run allows 10 s


def load_dockerfile(path: str) -> Dockerfile:
    return read_dockerfile(ROOT / path)


# --- lint ---------------------------------------------------------------------------------------------------------------


@parametrize_dockerfile
def test_dockerfile_passes_hadolint(path: str) -> None:
    assert run_hadolint(ROOT / path) == (0, "")


def test_hadolint_detects_problems(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python\nADD . /app\nENTRYPOINT python -m service\n")
    code, output = run_hadolint(bad)
    assert code != 0
    assert {"DL3006", "DL3020", "DL3025"} <= set(re.findall(r"DL\d+", output))


def run_hadolint(path: Path) -> tuple[int, str]:
    command = [HADOLINT, "--no-color", "--config", ROOT / ".hadolint.yaml", path]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.returncode, answer.stdout + answer.stderr


# --- contents -----------------------------------------------------------------------------------------------------------


@parametrize_dockerfile
def test_base_images_are_pinned_by_digest(path: str) -> None:
    for stage in load_dockerfile(path).stages:
        assert re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", stage.base)


@parametrize_dockerfile
def test_image_does_not_run_as_root(path: str) -> None:
    user, _, group = load_dockerfile(path).final_stage.last_instruction("USER").text.partition(":")
    assert int(user) >= 1000
    assert int(group) >= 1000


@parametrize_dockerfile
def test_entrypoint_uses_no_shell(path: str) -> None:
    stage = load_dockerfile(path).final_stage
    entry = stage.last_instruction("ENTRYPOINT").exec_form
    assert entry is not None
    assert entry[0] == "python"
    assert not stage.instructions_with("CMD")


@parametrize_dockerfile
def test_copied_files_exist_and_are_not_ignored(path: str) -> None:
    for copy in load_dockerfile(path).stage("build").instructions_with("COPY"):
        for source in copy.words[:-1]:
            assert (ROOT / source).exists() or is_built_manifest(source), source
            assert source.rstrip("/") not in DOCKER_IGNORE


def is_built_manifest(source: str) -> bool:
    """Whether the file is the manifest of an environment, which the build of that environment's image writes."""
    folder, _, name = source.rpartition("/")
    return name == "capabilities.json" and (ROOT / folder / "Dockerfile").exists()


def test_each_environment_writes_its_manifest_before_the_service_image_is_built() -> None:
    copied = [
        source for copy in load_dockerfile("service/Dockerfile").stage("build").instructions_with("COPY") for source in copy.words[:-1]
    ]
    environments = sorted(path.parent.name for path in (ROOT / "jobs/environments").glob("*/Dockerfile"))
    steps = {step["id"]: step for step in yaml.safe_load((ROOT / "cloudbuild.yaml").read_text())["steps"]}
    for name in environments:
        path = f"jobs/environments/{name}/capabilities.json"
        assert path in copied
        runs = [step.text for step in load_dockerfile(f"jobs/environments/{name}/Dockerfile").final_stage.instructions_with("RUN")]
        assert f"python -m jobs.runtime.probe {name} --output {path}" in runs
        assert f"{name}-image" in steps["service-image"]["waitFor"]
    assert "docker cp" in (ROOT / "infra/cloud_build/image.sh").read_text()


@parametrize_dockerfile
def test_libraries_are_installed_before_the_code_is_copied(path: str) -> None:
    order = [f"{instruction.keyword} {instruction.text}" for instruction in load_dockerfile(path).stage("build").instructions]
    installed = max(index for index, step in enumerate(order) if " -m pip " in step)
    copied = min(index for index, step in enumerate(order) if step.startswith("COPY schema/"))
    assert installed < copied


@pytest.mark.parametrize(
    "path",
    [
        *("tests/factories.py", "bench/__main__.py", "docs/api.md", "README.md", "infra/demo.py", "cloudbuild.yaml"),
        *(".venvs/service/bin/python", ".git/config", ".env", ".tunesmith/records.db", "service.db", "data/rows.jsonl"),
        *("service/__pycache__/main.cpython-311.pyc", "service/api/__pycache__/jobs.cpython-311.pyc", SERVICE, LLM, DATA),
    ],
)
def test_build_context_excludes(path: str) -> None:
    assert path in DOCKER_IGNORE


@pytest.mark.parametrize(
    "path", ["service/main.py", "storage/gs.py", "jobs/run.py", "jobs/environments/data/constraints.txt", "infra/llama_cpp.sh", "LICENSE"]
)
def test_build_context_includes(path: str) -> None:
    assert path not in DOCKER_IGNORE


# --- the trainer's image ------------------------------------------------------------------------------------------------


def test_torch_uses_cuda_12_for_l4_driver() -> None:
    torch, cuda = parse_torch_and_cuda(load_dockerfile(LLM).final_stage.base)
    assert torch == read_constraints()["torch"]
    assert cuda[0] == 12


def test_blackwell_uses_same_torch_with_newer_cuda() -> None:
    base = re.search(r"BASE=(\S+)", (ROOT / "cloudbuild.yaml").read_text())
    assert base is not None
    torch, cuda = parse_torch_and_cuda(base[1])
    assert torch == read_constraints()["torch"]
    assert cuda >= (12, 8)  # the first with kernels for Blackwell
    assert re.search(r"@sha256:[0-9a-f]{64}$", base[1])


def test_requirements_do_not_pin_another_torch() -> None:
    install = next(run.text for run in load_dockerfile(LLM).stage("build").instructions_with("RUN") if "llm/requirements.txt" in run.text)
    assert "--constraint jobs/environments/llm/constraints.txt" in install
    pins = read_pins(ROOT / "jobs/environments/llm/requirements.txt")
    assert not {name for name, version in read_constraints().items() if pins.get(name, version) != version}
    assert not [name for name in pins if name.startswith(("nvidia-cu", "triton"))]  # the base has them, as it has torch


def test_llama_cpp_is_built_for_generic_cpu() -> None:
    steps = [run.text for run in load_dockerfile(LLM).stage("build").instructions_with("RUN")]
    assert "infra/llama_cpp.sh /opt/venv/bin/python" in steps
    assert "-DGGML_NATIVE=OFF" in (ROOT / "infra/llama_cpp.sh").read_text()


def test_trainer_entrypoint_runs_attempt() -> None:
    assert load_dockerfile(LLM).final_stage.last_instruction("ENTRYPOINT").exec_form == ["python", "-m", "jobs.run"]
    assert (ROOT / "jobs/run.py").exists()


def parse_torch_and_cuda(base: str) -> tuple[str, tuple[int, ...]]:
    match = re.fullmatch(r"pytorch/pytorch:([\d.]+)-cuda([\d.]+)-cudnn\d+-runtime@.*", base)
    assert match, base
    return match[1], tuple(int(part) for part in match[2].split("."))


def read_constraints() -> dict[str, str]:
    return read_pins(ROOT / "jobs/environments/llm/constraints.txt")


def read_pins(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)", path.read_text().lower(), re.MULTILINE))


# --- the service's image, installed in an empty environment ---------------------------------------------------------------


@dataclass(frozen=True)
class InstalledImage:
    """A folder that acts as the root of the service's image."""

    root: Path

    def run(self, *command: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        """Run a command in the image, without this machine's environment variables."""
        environment = self.environment(**variables)
        python = str(self.root / "opt/venv/bin/python")  # the first on PATH in the image
        return subprocess.run([python, *command[1:]], env=environment, cwd=self.root / "app", capture_output=True, text=True, check=False)

    def environment(self, **variables: str) -> dict[str, str]:
        """The variables that ENV sets, with paths below the root."""
        own = {name: self.relocate_paths(value) for name, value in load_dockerfile(SERVICE).final_stage.environment.items()}
        return own | {"PATH": f"{self.root}/opt/venv/bin:{self.root}/usr/local/bin:/usr/bin:/bin"} | variables

    def relocate_paths(self, text: str) -> str:
        """The text with its absolute paths moved below the root."""
        return re.sub(r"(?<![\w.\"'])/(opt|app|build|tmp)\b", rf"{self.root}/\1", text)

    @contextmanager
    def run_service(self) -> Iterator[tuple["subprocess.Popen[str]", str]]:
        """The running entry point, and its URL."""
        entry = load_dockerfile(SERVICE).final_stage.last_instruction("ENTRYPOINT").exec_form or []
        command = [str(self.root / "opt/venv/bin/python"), *entry[1:]]
        process = subprocess.Popen(
            command,
            env=self.environment(PORT="0", TUNESMITH_IDENTITY="{}"),
            cwd=self.root / "app",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        with process:
            try:
                yield process, process.stdout.readline().strip()
            finally:
                process.kill()


@pytest.fixture(scope="module")
def installed_image(tmp_path_factory: pytest.TempPathFactory) -> InstalledImage:
    """The build stage's steps, executed in order in an empty folder with a bare Python."""
    image = InstalledImage(tmp_path_factory.mktemp("image"))
    (image.root / "tmp").mkdir()
    subprocess.run([find_base_python(), "-m", "venv", image.root / "usr/local"], check=True)  # the base image: a Python with pip
    folder = image.root
    for step in load_dockerfile(SERVICE).stage("build").instructions:
        match step.keyword:
            case "WORKDIR":
                folder = Path(image.relocate_paths(step.text))
                folder.mkdir(parents=True, exist_ok=True)
            case "COPY":
                run_copy_instruction(step, image, folder)
            case "RUN":
                run_shell_instruction(step, image, folder)
            case other:
                raise NotImplementedError(other)
    return image


def find_base_python() -> str:
    """Python 3.11, the version of the image."""
    python = shutil.which("python3.11")
    assert python, "no python3.11 on the PATH"
    return python


def write_manifest(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": path.parent.name, "python": "3.12.0", "families": {}}))


def run_copy_instruction(step: Instruction, image: InstalledImage, folder: Path) -> None:
    *sources, target = step.words
    target_folder = folder / image.relocate_paths(target)
    for source in sources:
        source_path = ROOT / source
        if is_built_manifest(source) and not source_path.exists():  # here no image of the environment was built
            write_manifest(target_folder / source_path.name)
        for file in [source_path] if source_path.is_file() else (file for file in source_path.rglob("*") if file.is_file()):
            path = file.relative_to(ROOT).as_posix()
            if path not in DOCKER_IGNORE:
                copy = target_folder / (file.name if source_path.is_file() else file.relative_to(source_path))
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, copy)


def run_shell_instruction(step: Instruction, image: InstalledImage, folder: Path) -> None:
    # Settings for access to the package index, and the home folder, which has pip's cache.
    network = {name: value for name, value in os.environ.items() if re.match(r"PIP_|SSL_|.*_proxy$|.*_PROXY$|HOME$", name)}
    # No bytecode of libraries: it takes a minute to compile, and changes nothing but the time of the first start.
    command = image.relocate_paths(step.text).replace("--no-cache-dir ", "--quiet --no-compile ")
    path = f"{image.root}/usr/local/bin:/usr/bin:/bin"
    done = subprocess.run(
        ["/bin/sh", "-ec", command], env=network | {"PATH": path}, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"RUN {step.text}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


def test_service_image_starts_and_stops_on_sigterm(installed_image: InstalledImage) -> None:
    with installed_image.run_service() as (process, url):
        status, body = http_get(url, "/health")
        assert (status, '"status":"ok"' in body) == (200, True), body
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_TIMEOUT_S) in (0, -signal.SIGTERM)


def test_healthcheck_detects_stopped_service(installed_image: InstalledImage) -> None:
    check = load_dockerfile(SERVICE).final_stage.last_instruction("HEALTHCHECK").exec_form
    assert check is not None
    with installed_image.run_service() as (_, url):
        port = str(urlsplit(url).port)
        http_get(url, "/health")
        assert installed_image.run(*check, PORT=port).returncode == 0
    assert installed_image.run(*check, PORT=port).returncode != 0


def test_image_stays_below_size_limit(installed_image: InstalledImage) -> None:
    files = (file.lstat() for folder in ("opt", "app") for file in (installed_image.root / folder).rglob("*"))
    size = sum(file.st_blocks * 512 for file in files)
    assert BASE_IMAGE_BYTES + size < MAX_IMAGE_BYTES, f"{size / MB:.0f} MB in addition to the base"


def test_every_adapter_imports_in_image(installed_image: InstalledImage) -> None:
    modules = [
        file.relative_to(installed_image.root / "app").with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        for package in ("schema", "storage", "service")
        for file in sorted((installed_image.root / "app" / package).rglob("*.py"))
    ]
    done = installed_image.run("python", "-c", f"import {', '.join(modules)}")
    assert done.returncode == 0, done.stderr[-2000:]


def test_pruned_botocore_keeps_s3(installed_image: InstalledImage) -> None:
    client = "boto3.client('s3', region_name='auto', aws_access_key_id='a', aws_secret_access_key='b')"
    signed = f"import boto3; print({client}.generate_presigned_url('get_object', Params=dict(Bucket='b', Key='k')))"
    assert installed_image.run("python", "-c", signed).stdout.startswith("https://")


def test_image_has_no_pip(installed_image: InstalledImage) -> None:
    assert "No module named pip" in installed_image.run("python", "-m", "pip").stderr


def test_service_image_has_no_tests_or_trainers(installed_image: InstalledImage) -> None:
    assert sorted(path.name for path in (installed_image.root / "app").iterdir()) == ["LICENSE", "jobs", "schema", "service", "storage"]
    jobs = installed_image.root / "app/jobs"
    assert sorted(path.name for path in jobs.iterdir() if path.name != "__pycache__") == [
        "__init__.py",
        "environments",
        "ingest",
        "runtime",
    ]
    assert [path.name for path in (jobs / "runtime").iterdir() if path.is_file()] == ["isolated_process.py"]
    assert {path.name for path in (jobs / "environments").rglob("*") if path.is_file()} == {"capabilities.json"}


def test_service_image_reads_uploads_in_process_of_its_own(installed_image: InstalledImage, tmp_path: Path) -> None:
    """By the command of service/adapters/ingester.py: the environment `data` is complete for it."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "out").mkdir()
    task = {"files": [{"path": str(rows), "name": "rows.jsonl"}], "output": str(tmp_path / "out")}
    (tmp_path / "task.json").write_text(json.dumps(task))
    python = load_dockerfile(SERVICE).final_stage.environment["TUNESMITH_INGEST_PYTHON"]
    done = run_in_data_environment(installed_image, python, "-m", "jobs.ingest", str(tmp_path / "task.json"))
    assert done.returncode == 0, done.stderr[-2000:]
    outcome = json.loads((tmp_path / "out/outcome.json").read_text())
    assert (outcome["refused"], outcome["rows_read"], outcome["rows"]["dataset_type"]) == (None, 2, "text")


def test_pruned_libraries_read_every_format_and_tokenize(installed_image: InstalledImage) -> None:
    python = load_dockerfile(SERVICE).final_stage.environment["TUNESMITH_INGEST_PYTHON"]
    done = run_in_data_environment(installed_image, python, "-c", READ_EVERYTHING)
    assert (done.returncode, done.stdout.strip()) == (0, "2 2 LlamaTokenizer"), done.stderr[-2000:]


# Every library of the formats, and the class of a tokenizer by the name in its configuration, as `AutoTokenizer` finds it.
READ_EVERYTHING = """
import charset_normalizer, orjson, PIL.Image, pyarrow, pyarrow.csv, pyarrow.dataset, pyarrow.feather, pyarrow.ipc, pyarrow.parquet
import io, python_calamine, tempfile, zstandard
from transformers import AutoTokenizer, LlamaTokenizerFast
from tokenizers import Tokenizer, models, pre_tokenizers
table = pyarrow.table({"text": ["one", "two"]})
parquet, feather = io.BytesIO(), io.BytesIO()
pyarrow.parquet.write_table(table, parquet, compression="zstd")
pyarrow.feather.write_feather(table, feather, compression="zstd")
tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
with tempfile.TemporaryDirectory() as folder:
    LlamaTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
rows = [pyarrow.parquet.read_table(parquet).num_rows, pyarrow.feather.read_table(feather).num_rows]
print(*rows, type(tokenizer).__name__.removesuffix("Fast"))
"""


def run_in_data_environment(image: InstalledImage, python: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the Python that reads uploads, with the variables that the service gives it."""
    app = image.root / "app"
    variables = {"PATH": "/usr/bin:/bin", "HOME": str(image.root / "tmp"), "PYTHONPATH": str(app), "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"}
    command = [image.relocate_paths(python), *arguments]
    return subprocess.run(command, env=variables, cwd=app, capture_output=True, text=True, check=False)


# --- the image of what reads datasets ------------------------------------------------------------------------------------


def test_data_entrypoint_runs_attempt() -> None:
    assert load_dockerfile(DATA).final_stage.last_instruction("ENTRYPOINT").exec_form == ["python", "-m", "jobs.run"]


def test_data_image_has_base_of_service() -> None:
    assert {stage.base for stage in load_dockerfile(DATA).stages} == {stage.base for stage in load_dockerfile(SERVICE).stages}


def test_data_image_has_runtime_and_one_family() -> None:
    copied = {source.rstrip("/") for copy in load_dockerfile(DATA).stage("build").instructions_with("COPY") for source in copy.words[:-1]}
    assert {source for source in copied if "environments" not in source} == {
        *("LICENSE", "schema", "storage", "jobs/__init__.py", "jobs/run.py", "jobs/runtime", "jobs/ingest")
    }


def test_environments_pin_same_versions_of_shared_packages() -> None:
    """Rows that one environment writes, another reads: by the same Arrow, tokenizers and templates."""
    llm, data = (normalize_names(read_pins(ROOT / f"jobs/environments/{name}/requirements.txt")) for name in ("llm", "data"))
    shared = llm.keys() & data.keys()
    assert {"pyarrow", "tokenizers", "transformers", "jinja2"} <= shared
    assert {name: (llm[name], data[name]) for name in shared if llm[name] != data[name]} == {}


def normalize_names(pins: dict[str, str]) -> dict[str, str]:
    return {re.sub(r"[-_.]+", "-", name): version for name, version in pins.items()}


def http_get(url: str, path: str) -> tuple[int, str]:
    assert url.startswith("http://127.0.0.1:"), f"unexpected first line: {url}"
    connection = HTTPConnection(urlsplit(url).netloc, timeout=START_TIMEOUT_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


# --- the Dockerfile parser itself ---------------------------------------------------------------------------------------


def test_multiline_instruction_is_parsed_as_one() -> None:
    parsed = parse_dockerfile('ARG A=b\nFROM ${A} AS build\nRUN one \\\n# comment\n    && two\nFROM c\nENTRYPOINT ["x"]\n')
    assert parsed.stage("build").base == "b"
    assert parsed.stage("build").instructions_with("RUN")[0].text == "one && two"
    assert parsed.final_stage.last_instruction("ENTRYPOINT").exec_form == ["x"]
