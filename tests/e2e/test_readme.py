"""The README's commands work: `make demo` as documented with the real Gemma, the others with a tiny base."""

import csv
import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest

from schema.types import TextDatasetType
from tests.e2e.conftest import BASE, ROWS, SOURCE, TUNESMITH, Service

README = (SOURCE / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def find_commands(text: str) -> list[str]:
    """The commands in blocks of bash, in order."""
    lines = re.findall(r"^(?:export \w.*|tunesmith \w.*|curl (?:[^'\n]|'[^']*')*)", text.replace("\\\n", " "), re.MULTILINE)
    return [re.sub(r"\s+# .*$", "", command) for command in lines]


def is_first_minute(block: str) -> bool:
    return "tunesmith train faq.csv" in block


def commands() -> list[str]:
    """The commands that the README shows for a running service, in order."""
    return find_commands("".join(block for block in blocks("bash") if "make " not in block and not is_first_minute(block)))


def run_line(line: str, folder: Path, environment: dict[str, str], exports: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run a line of the README as a user's shell would, with `tunesmith` of this environment."""
    script = "\n".join(["set -euo pipefail", f'tunesmith() {{ "{TUNESMITH}" "$@"; }}', *exports, line])
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, input="hello\n", capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done


# The longest test comes first, so that the other files run at the same time.
@pytest.mark.timeout(1200)
def test_first_minute_tunes_real_gemma(tmp_path: Path, service: Service) -> None:
    environment = {**service.environment, "TUNESMITH_HOME": str(tmp_path / "home"), "COLUMNS": "200"}
    del environment["HF_HUB_OFFLINE"]  # as a user would run it
    done = subprocess.run(["make", "demo"], cwd=SOURCE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    match = re.search(r"perplexity is (\d+)% lower", done.stdout)
    assert match, done.stdout
    assert int(match.group(1)) >= 40
    for text in ("Gemma Terms of Use", "base", "tuned", "gguf-q8_0", "gguf-f16", "chat training_"):
        assert text in done.stdout
    assert list((tmp_path / "home/downloads").rglob("*-f16.gguf"))

    with (tmp_path / "faq.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Question", "Answer"])
        writer.writerows((f"Which color has the number {n}?", f"The number {n} is {('red', 'blue')[n % 2]}.") for n in range(20))
    [first_minute] = filter(is_first_minute, blocks("bash"))
    check, dry_run, train, chat, download = find_commands(first_minute)
    try:
        checked = run_line(check, tmp_path, environment)
        assert "started a service" in checked.stderr
        for text in ("faq.csv: CSV, Question -> prompt, Answer -> completion", "20 of 20 rows are valid", "would make"):
            assert text in checked.stdout + checked.stderr
        planned = run_line(dry_run, tmp_path, environment).stdout
        for text in ("google/gemma-3-270m", "sft, LoRA", "steps", "tokens", "local/local", "gguf-q8_0"):
            assert text in planned
        trained = run_line(train, tmp_path, environment)
        for text in ("faq.csv: CSV, Question -> prompt", "20 rows", "google/gemma-3-270m", "learning rate"):  # what it chose
            assert text in trained.stderr
        for text in ("step 1/", "loss", "completed", "tunesmith chat"):
            assert text in trained.stdout
        assert run_line(chat, tmp_path, environment).stdout.strip()
        run_line(download, tmp_path, environment)
        [gguf] = tmp_path.glob("tunesmith-*/gguf-q8_0/*.gguf")
        assert f"FROM ./{gguf.name}" in gguf.with_suffix(".Modelfile").read_text()
    finally:
        run_line("tunesmith stop", tmp_path, environment)


def test_readme_commands_run_in_order(service: Service, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    ids = {"dataset_…": "", "training_…": ""}
    readme_commands = commands()
    exports: list[str] = []
    assert len(readme_commands) >= 18
    for command in readme_commands:
        line = command.replace("http://127.0.0.1:8080", str(service.http.base_url).rstrip("/")).replace("google/gemma-3-270m", BASE)
        line = line.replace("--max-steps 40", "--max-steps 3")
        for placeholder, id_ in ids.items():
            line = line.replace(placeholder, id_)
        if line.startswith("export "):
            exports.append(line)
        done = run_line(line, tmp_path, service.environment, exports)
        assert '"error":{' not in done.stdout, f"{line}\n{done.stdout}"
        for placeholder in ids:
            if match := re.search(rf'(?:^|")({placeholder[:-1]}[\w.-]+)(?:$|")', done.stdout, re.MULTILINE):  # a line, or a string of JSON
                ids[placeholder] = match.group(1)
    assert service.wait_until_final(ids["training_…"])["status"] == "completed"


def test_readme_example_rows_are_accepted(service: Service) -> None:
    [rows] = [block for block in blocks("json") if '"messages"' in block]
    rows_by_fields: dict[tuple[str, ...], list[str]] = {}
    for line in rows.strip().splitlines():
        rows_by_fields.setdefault(tuple(json.loads(line)), []).append(line)
    assert len(rows_by_fields) == len(get_args(TextDatasetType))
    for lines in rows_by_fields.values():
        response = service.http.post("/datasets", files={"file": ("rows.jsonl", "\n".join(lines))}, data={"eval_fraction": "0"})
        assert response.status_code == 201, response.text


def test_documented_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):.*## ", (SOURCE / "Makefile").read_text(), re.MULTILINE))
    for page in (README, (SOURCE / "CONTRIBUTING.md").read_text()):
        for target in re.findall(r"\bmake ([A-Za-z0-9-]+)", page):
            assert target in targets or target == "setup-NAME", target


def test_every_environment_has_a_setup_target() -> None:
    for path in (SOURCE / "jobs/environments").glob("*/requirements.txt"):
        command = ["make", "--dry-run", "--always-make", f"setup-{path.parent.name}"]
        planned = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True, check=True).stdout
        assert f"-m jobs.runtime.probe {path.parent.name} --output jobs/environments/{path.parent.name}/capabilities.json" in planned


def test_make_without_target_prints_help() -> None:
    assert "demo" in subprocess.run(["make"], cwd=SOURCE, capture_output=True, text=True, check=True).stdout
