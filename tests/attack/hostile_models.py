"""Base models that try to run code, read files, or use up memory and time, trained and exported by the real trainer.

A success is: code that ran, a file of the machine in a log or an artifact, an attempt that does not end or grows beyond its limit, or a
/health that takes a second.
"""

import json
import pickle
import shutil
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import psutil

from tests.attack.campaign import Row, Size, make_row
from tests.attack.real_trainer import BASE, build_base, build_glm, install_base
from tests.attack.target import HEALTH_LIMITS_S, Caller, HealthProber, Json, Target, run_target_in

SECRET = "canary-of-the-home-folder"
MEMORY_LIMIT_BYTES = 3 << 30  # of the tree of one attempt, which needs 1 GB for a tiny base
END_LIMIT_S = 240
WATCH_INTERVAL_S = 0.25
FINAL = ("completed", "failed", "cancelled")
CODE = "import pathlib\npathlib.Path({canary!r}).write_text('ran')\nclass Stolen:\n    def __init__(self, *a, **k): pass\n"
BOMBS = {
    "a loop in the chat template": "{% for a in range(99999999) %}{% for b in range(99999999) %}{% endfor %}{% endfor %}x",
    "a string that grows in the chat template": "{% set ns = namespace(s='x') %}"
    "{% for a in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "a product in the chat template": "{{ 'x' * 9999999999 }}",
    "an escape from the chat template": "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}"
    "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages.__class__.__base__.__subclasses__() }}x",
}
HONEST = "an honest base"
GLM = "code in auto_map of a Glm4, exported as GGUF"  # a class whose converter would load it
SHORT = (GLM, "a pickle beside safetensors", "a string that grows in the chat template")


class _Exploit:
    def __init__(self, canary: str) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self._canary, "w"))


@dataclass
class AttemptWatcher:
    """Ends an attempt whose processes grow beyond the limit, before the machine suffers, and remembers that."""

    target: Target
    grown: set[str] = field(default_factory=set[str])
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="attempt watcher", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(10)

    def _watch(self) -> None:
        while not self._stopping.wait(WATCH_INTERVAL_S):
            for attempt in self.target.attempts():
                try:
                    tree = [attempt, *attempt.children(recursive=True)]
                    size_bytes = sum(process.memory_info().rss for process in tree)
                    self.peak_bytes = max(self.peak_bytes, size_bytes)
                    if size_bytes > MEMORY_LIMIT_BYTES:
                        self.grown.add(attempt.cmdline()[-1].rpartition(".")[0])
                        for process in tree:
                            process.kill()
                except psutil.Error:  # it has ended
                    continue


def run(size: Size) -> Row:
    """Train every hostile base, two at a time."""
    problems: list[str] = []
    with TemporaryDirectory(prefix="tunesmith-attack-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        canary = folder / "canary"
        base = build_base(folder / "base")
        bases = {GLM: build_glm(folder / "glm", base)}
        models = {name: spoil for name, spoil in _make_models(canary).items() if size == "full" or name in SHORT}
        variables = {"TUNESMITH_LOCAL_MAX_CONCURRENT_JOBS": "2"}
        with run_target_in(folder / "home", **variables) as target, HealthProber(target) as prober, AttemptWatcher(target) as watcher:
            (target.home / "secret.txt").write_text(SECRET)
            statuses = _train_all(target, base, bases, models)
            problems += [f"{name} is {status} after {END_LIMIT_S} s" for name, (_, status) in statuses.items() if status not in FINAL]
            problems += [
                f"{name} grew beyond {MEMORY_LIMIT_BYTES >> 30} GB" for name, (job_id, _) in statuses.items() if job_id in watcher.grown
            ]
            problems += _check_outcome(target, statuses)
            problems += [f"{HONEST} is {statuses[HONEST][1]}"] if HONEST in statuses and statuses[HONEST][1] != "completed" else []
            problems += prober.problems(HEALTH_LIMITS_S[size])
        problems += ["code of a model ran"] if canary.exists() else []
    failed = sum(status == "failed" for _, status in statuses.values())
    measured = (
        f"{len(models)} bases: {failed} refused, {len(models) - failed} trained without it; attempts up to {watcher.peak_bytes >> 20} MB"
    )
    return make_row("hostile base models", "0 successes, /health under 1 s", f"{measured}; {prober.describe()}", problems)


def _train_all(target: Target, base: Path, bases: dict[str, Path], models: dict[str, Callable[[Path], None]]) -> dict[str, tuple[str, str]]:
    """The job and the final status of each model, which is made of the base, or of a base of its own."""
    owner = target.owner()
    rows = "".join(
        json.dumps({"messages": [{"role": "user", "content": f"what is {n}"}, {"role": "assistant", "content": "a list"}]}) + "\n"
        for n in range(16)
    )
    dataset_id = owner.upload(rows)
    jobs: dict[str, str] = {}
    for index, (name, spoil) in enumerate(models.items()):
        model_id = f"{BASE}-{index}"
        spoil(install_base(target, bases.get(name, base), model_id))
        jobs[name] = _submit(owner, dataset_id, model_id)
    until = time.monotonic() + END_LIMIT_S
    statuses = dict.fromkeys(jobs, "not submitted")
    while time.monotonic() < until:
        statuses = {
            name: str(owner.expect(200, "GET", f"/jobs/{job_id}")["status"]) if job_id else "failed" for name, job_id in jobs.items()
        }
        if all(status in FINAL for status in statuses.values()):
            break
        time.sleep(0.5)
    return {name: (jobs[name], statuses[name]) for name in jobs}


def _submit(owner: Caller, dataset_id: str, model_id: str) -> str:
    """The id of the training; empty when the service refuses the base at once."""
    config: Json = {"base_model_id": model_id, "hyperparameters": {"max_steps": 1, "batch_size": 1, "max_seq_length": 64, "lora_rank": 4}}
    config |= {"export_config": {"format": "adapter", "destination": "gcs", "include_gguf": True, "gguf_quantization": "q8_0"}}
    config |= {"eval_config": {"compute_eval_metrics": False}}
    response = owner.request("POST", "/train", json={"processed_dataset_id": dataset_id, "training_config": config})
    return str(response.json()["job_id"]) if response.is_success else ""


def _check_outcome(target: Target, statuses: dict[str, tuple[str, str]]) -> list[str]:
    """No file of the machine got into a log, an answer or an object."""
    problems: list[str] = []
    for name, (job_id, _) in statuses.items():
        if job_id:
            owner = target.owner()
            log = owner.request("GET", f"/jobs/{job_id}/logs", params={"limit": str(1 << 20)}).text
            answer = owner.request("GET", f"/jobs/{job_id}").text
            print(f"{name}: {json.loads(answer).get('error') or 'trained'}", file=sys.stderr)
            if SECRET in log + answer or "root:x:0" in log + answer:
                problems.append(f"{name}: a file of the machine is in the log or the answer")
            if "JOB_TOKEN" in log:
                problems.append(f"{name}: the log shows the environment")
    for path in target.objects.rglob("*"):
        if path.is_file() and not path.is_symlink() and SECRET.encode() in path.read_bytes():
            problems.append(f"a file of the machine is in {path.name}")
    return problems


# --- models


def _make_models(canary: Path) -> dict[str, Callable[[Path], None]]:
    """What is done to a valid base, by name."""
    code = CODE.format(canary=str(canary))

    def add_code(folder: Path) -> None:
        auto_map = {
            "AutoTokenizer": ["stolen.Stolen", "stolen.Stolen"],
            "AutoConfig": "stolen.Stolen",
            "AutoModelForCausalLM": "stolen.Stolen",
        }
        for file in ("config.json", "tokenizer_config.json", "generation_config.json"):
            _change_json(folder / file, auto_map=auto_map, trust_remote_code=True)
        for file in (
            "stolen.py",
            "modeling_gemma3.py",
            "tokenization_gemma.py",
            "__init__.py",
            "setup.py",
            "conftest.py",
            "sitecustomize.py",
        ):
            (folder / file).write_text(code)

    def replace_class(folder: Path) -> None:
        add_code(folder)
        _change_json(folder / "config.json", model_type="stolen", architectures=["Stolen"])
        _change_json(folder / "tokenizer_config.json", tokenizer_class="Stolen")

    def add_pickles(folder: Path) -> None:
        content = pickle.dumps(_Exploit(str(canary)))
        for file in ("pytorch_model.bin", "training_args.bin", "adapter_model.bin", "optimizer.pt", "model.pkl", "rust_model.ot"):
            (folder / file).write_bytes(content)

    def replace_weights_with_pickle(folder: Path) -> None:
        add_pickles(folder)
        for file in folder.glob("*.safetensors"):
            file.unlink()

    def empty_weights_beside_pickle(folder: Path) -> None:
        add_pickles(folder)
        for file in folder.glob("*.safetensors"):
            file.write_bytes(struct.pack("<Q", 2) + b"{}")

    def bomb(template: str) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            text = template.replace("CANARY", str(canary))
            _change_json(folder / "tokenizer_config.json", chat_template=text)
            (folder / "chat_template.jinja").write_text(text)

        return write

    def link_out(folder: Path) -> None:
        secret = folder.parents[4] / "secret.txt"
        for file in ("README.md", "LICENSE", "merges.txt", "special_tokens_map.json", "added_tokens.json"):
            (folder / file).unlink(missing_ok=True)
            (folder / file).symlink_to(secret)
        (folder / "more").symlink_to("/etc")

    def huge_header(folder: Path) -> None:
        for file in folder.glob("*.safetensors"):
            file.write_bytes(struct.pack("<Q", 1 << 60) + b"{" * 64)

    def deep_config(folder: Path) -> None:
        text = (folder / "config.json").read_text().rstrip().removesuffix("}")
        (folder / "config.json").write_text(text + ', "a": ' + "[" * 200_000 + "]" * 200_000 + "}")

    def huge_sizes(folder: Path) -> None:
        _change_json(folder / "config.json", hidden_size=1 << 30, intermediate_size=1 << 30, vocab_size=1 << 40)

    def huge_json(folder: Path) -> None:
        with (folder / "tokenizer_config.json").open("w") as out:
            out.write('{"a": [')
            for _ in range(400):  # in pieces: one string would stop the prober's thread for a second
                out.write("1," * 500_000)
            out.write("1]}")

    def replace_folder(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "config.json").write_text("[]")

    return {
        HONEST: lambda _: None,
        GLM: add_code,
        "code in auto_map": add_code,
        "a class of its own": replace_class,
        "a pickle beside safetensors": empty_weights_beside_pickle,
        "pickles beside good safetensors": add_pickles,
        "a pickle instead of safetensors": replace_weights_with_pickle,
        **{name: bomb(template) for name, template in BOMBS.items()},
        "links out of the folder": link_out,
        "a safetensors header of 2^60 bytes": huge_header,
        "a deeply nested config": deep_config,
        "a config of huge sizes": huge_sizes,
        "400 MB of JSON": huge_json,
        "a config that is a list": replace_folder,
    }


def _change_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))
