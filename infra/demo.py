"""`make demo`: fine-tunes the real Gemma 3 270M through the HTTP API and compares its answers before and after.

Every step is a command that you can type yourself; each is printed before it runs. Run it in the service's environment; steps that need
the trainer's environment use that environment's Python. `--picture FILE` also writes the answers and the metrics as an SVG image, as in
the README.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

SOURCE = Path(__file__).resolve().parent.parent
TUNESMITH = Path(sys.executable).with_name("tunesmith")
TRAINER_PYTHON = SOURCE / ".venvs/llm/bin/python"
HOME = Path(os.environ.get("TUNESMITH_HOME", "~/.tunesmith")).expanduser().absolute()
MODELS_URL = os.environ.get("TUNESMITH_MODELS_URL", (HOME / "objects").as_uri())
SERVICE_URL = os.environ.get("TUNESMITH_URL")  # a running service, such as that of `make cloud-local`
ENVIRONMENT = {**os.environ, "TUNESMITH_HOME": str(HOME), "PYTHONPATH": str(SOURCE)}
ANSWER_TOKENS = 48
QUESTION_COUNT = 3

PICTURE_WIDTH = 118  # characters

console = Console()


def main(picture: Path | None = None) -> int:
    """Run the demo; 0 if the tuned model is better on the held-out questions."""
    started_at = time.monotonic()
    print_heading("1. The base model: Gemma 3 270M, from its package")
    run_command([TRAINER_PYTHON, "infra/gemma_270m.py", "--store", MODELS_URL])
    print_heading("2. A service" + ("" if SERVICE_URL else " on this machine"))
    with use_running_service(SERVICE_URL) if SERVICE_URL else run_service():
        print_heading("3. A dataset: what the functions of Python's standard library do")
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder, "stdlib-docstrings.jsonl")
            run_command([TRAINER_PYTHON, "infra/stdlib_docstrings.py", rows])
            dataset = json.loads(run_and_capture([TUNESMITH, "datasets", "upload", rows, "--eval-fraction", "0.06", "--json"]))
        console.print(f"   {dataset['processed_dataset_id']}: {dataset['splits']}")
        print_heading("4. POST /train, and watch the job")
        job_id = run_and_capture(
            [TUNESMITH, "train", "infra/demo.yaml", "--dataset", dataset["processed_dataset_id"], "--name", "stdlib-tutor"]
        ).strip()
        run_command([TUNESMITH, "watch", job_id])
        job = json.loads(run_and_capture([TUNESMITH, "show", job_id, "--json"]))
        print_heading("5. Download the GGUF file through a signed link")
        target = HOME / "downloads" / job_id
        run_command([TUNESMITH, "download", job_id, "--artifact", "gguf-f16", "--to", target])
        print_heading("6. Ask the base and the tuned model the same held-out questions")
        detail = json.loads(run_and_capture([TUNESMITH, "datasets", "show", dataset["processed_dataset_id"], "--json"]))
        questions = [row["messages"][0]["content"] for row in detail["preview"]["eval"]][:QUESTION_COUNT]
        answers = compare_answers(job_id, questions)
        console.print(answers)
    if picture:
        draw_picture(answers, job, picture)
    return print_results(job, time.monotonic() - started_at)


@contextmanager
def run_service() -> Generator[None]:
    """Run a service on a free port; commands find its URL through TUNESMITH_HOME."""
    command = [TUNESMITH, "serve", "--port", "0"]
    print_command(command)
    with (HOME / "service.log").open("ab") as log:
        process = subprocess.Popen(command, env=ENVIRONMENT, cwd=SOURCE, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    if not url:
        raise SystemExit(f"the service did not start; see {HOME / 'service.log'}")
    console.print(f"   {url}  (documentation at {url}/docs)")
    try:
        yield
    finally:
        process.terminate()
        process.wait()


@contextmanager
def use_running_service(url: str) -> Generator[None]:
    """Use a service that is already running."""
    capabilities = json.loads(run_and_capture([TUNESMITH, "capabilities", "--json"]))
    launcher, _, profile = capabilities["default_hardware"].partition("/")
    console.print(f"   {url} trains on {capabilities['launchers'][launcher]['profiles'][profile]['device_name']}")
    yield


def compare_answers(job_id: str, questions: list[str]) -> Table:
    """A table with the answers of the base and the tuned model."""
    command = [
        TUNESMITH,
        "chat",
        job_id,
        "--artifact",
        "gguf-f16",
        "--compare",
        "--json",
        "--temperature",
        "0",
        "--max-tokens",
        ANSWER_TOKENS,
    ]
    lines = "\n".join(json.dumps({"prompt": question, "reset": True}) for question in questions)
    answers = read_answers(run_and_capture(command, stdin=lines))
    table = Table(show_lines=True)
    for heading in ("question", "base", "tuned"):
        table.add_column(heading, overflow="fold")
    for question, base_answer, tuned_answer in zip(questions, answers["base"], answers["tuned"], strict=True):
        table.add_row(question, base_answer.strip(), tuned_answer.strip())
    return table


def read_answers(output: str) -> dict[str, list[str]]:
    """The answers of each model in the lines of `tunesmith chat --compare --json`."""
    answers: dict[str, list[str]] = {"base": [""], "tuned": [""]}
    for line in map(json.loads, output.splitlines()):
        if line.get("done"):
            answers[line["model"]].append("")
        else:
            answers[line["model"]][-1] += line["token"]
    return {model: texts[:-1] for model, texts in answers.items()}


def print_results(job: dict, seconds: float) -> int:  # type: ignore[type-arg]  # the API's JSON
    """Print metrics, artifacts and next steps; 0 if the perplexity is lower, also without end-of-turn tokens."""
    base, tuned = job["base_metrics"], job["metrics"]
    print_metrics(console, job)
    improvement, content_improvement = (1 - tuned[name] / base[name] for name in ("perplexity", "content_perplexity"))
    console.print(f"   perplexity is {improvement:.0%} lower on {tuned['eval_rows']} held-out questions;")
    console.print(
        f"   {content_improvement:.0%} lower without the end-of-turn tokens, which the base never saw: the gain in the answers themselves"
    )
    for artifact in job["artifacts"]:
        console.print(f"   {artifact['name']:10} {artifact['uri']}", soft_wrap=True)
    if not SERVICE_URL:
        print_next_steps(job)
    console.print(f"\nThe demo took {seconds:.0f} s.")
    return 0 if min(improvement, content_improvement) > 0 else 1


def print_metrics(output: Console, job: dict) -> None:  # type: ignore[type-arg]  # the API's JSON
    """Metrics of base and tuned model on the held-out questions."""
    for name in ("eval_loss", "perplexity", "content_perplexity", "accuracy"):
        output.print(f"   {name:18} {job['base_metrics'][name]:8.3f} → {job['metrics'][name]:.3f}")


def draw_picture(answers: Table, job: dict, path: Path) -> None:  # type: ignore[type-arg]  # the API's JSON
    """Write answers and metrics as an SVG image that loads nothing from elsewhere."""
    with open(os.devnull, "w") as nowhere:
        recorder = Console(record=True, width=PICTURE_WIDTH, file=nowhere)
        recorder.print(answers)
        print_metrics(recorder, job)
        svg = recorder.export_svg(title="make demo: Gemma 3 270M before and after", unique_id="demo")
    path.write_text(re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL))  # rich links to fonts on a CDN


def print_next_steps(job: dict) -> None:  # type: ignore[type-arg]
    """Print commands to try next."""
    command = TUNESMITH.relative_to(SOURCE) if TUNESMITH.is_relative_to(SOURCE) else TUNESMITH
    print_heading("Next")
    console.print(f"   {command} serve                      # in another terminal")
    console.print(f"   {command} chat {job['job_id']}", soft_wrap=True)
    console.print(f"   {command} jobs")


def print_heading(text: str) -> None:
    """Print a heading."""
    console.print(f"\n[bold]{text}[/]", highlight=False)


def print_command(command: list[object]) -> None:
    """Show a command as a person would type it."""
    console.print("   $ " + " ".join(str(word).replace(f"{SOURCE}/", "") for word in command), style="dim", highlight=False, soft_wrap=True)


def run_command(command: list[object]) -> None:
    """Run a command with its output on the terminal; stop the demo if it fails."""
    print_command(command)
    if subprocess.run([str(word) for word in command], env=ENVIRONMENT, cwd=SOURCE, check=False).returncode:
        raise SystemExit("the demo stopped: the command above failed")


def run_and_capture(command: list[object], *, stdin: str | None = None, quiet: bool = False) -> str:
    """Run a command and return its output; stop the demo if it fails."""
    if not quiet:
        print_command(command)
    done = subprocess.run(
        [str(word) for word in command], env=ENVIRONMENT, cwd=SOURCE, input=stdin, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"the demo stopped:\n{done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="make demo", description="Fine-tune Gemma 3 270M and compare its answers before and after.")
    parser.add_argument("--picture", type=Path, help="also write the answers and the metrics to this SVG file")
    raise SystemExit(main(parser.parse_args().picture))
