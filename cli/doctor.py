"""The command `doctor`: what is installed, reachable and writable, and what to do about the rest."""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast

import httpx2
import typer
from rich.markup import escape

from cli.errors import ApiError
from cli.http_client import Client, Json
from cli.options import JsonOption, create_client
from cli.output import out, print_json
from cli.settings import SOURCE_ROOT, Settings
from schema.version import VERSION

State = Literal["ok", "warning", "problem"]

ENOUGH_FREE_BYTES, LEAST_FREE_BYTES = 20e9, 2e9  # a job on a model of 270M parameters leaves about 2 GB, one of 1B four times that
HUB_TIMEOUT_S, GPU_TIMEOUT_S = 4.0, 10.0
SHOWN_PACKAGES = ("torch", "transformers", "trl", "peft")
COLORS = {"ok": "green", "warning": "yellow", "problem": "red"}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: State
    detail: str
    advice: str = ""


def doctor(context: typer.Context, as_json: JsonOption = False) -> None:
    """Tell what is installed, reachable and writable, and what to do about problems. Exits with 1 if there is one."""
    settings = Settings.from_environment()
    checks: list[Check] = []
    for check in (*check_machine(settings), check_hub(settings), *check_service(context)):
        checks.append(check)
        if not as_json:
            advice = f"\n{'':21}{escape(check.advice)}" if check.advice else ""
            color = COLORS[check.state]
            out.print(f"[{color}]{check.state:8}[/] {check.name:11} {escape(check.detail)}{advice}", highlight=False, soft_wrap=True)
    is_well = all(check.state != "problem" for check in checks)
    if as_json:
        print_json({"ok": is_well, "checks": [asdict(check) for check in checks]})
    if not is_well:
        raise typer.Exit(1)


def check_machine(settings: Settings) -> Iterator[Check]:
    """What is installed on this machine, and where it writes."""
    yield Check("version", "ok", f"Tunesmith {VERSION}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    yield check_home(settings.home_folder)
    yield from check_environments(settings.venvs, SOURCE_ROOT / "jobs/environments")
    yield check_gpu()


def check_home(home: Path) -> Check:
    """Whether TUNESMITH_HOME can be written, and how much space is left there."""
    existing = next(folder for folder in (home, *home.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Check("home", "problem", f"{home} cannot be written", "set TUNESMITH_HOME to a folder of your own")
    free = shutil.disk_usage(existing).free
    detail = f"{home}, {free / 1e9:.1f} GB free"
    if free >= ENOUGH_FREE_BYTES:
        return Check("home", "ok", detail)
    advice = "models and checkpoints take gigabytes: `tunesmith du` shows what uses space, `tunesmith prune` frees it"
    return Check("home", "warning" if free >= LEAST_FREE_BYTES else "problem", detail, advice)


def check_environments(venvs: Path, environments: Path) -> Iterator[Check]:
    """The environments that jobs on this machine run in, and llama.cpp, which writes GGUF files and chats."""
    for folder in sorted(environments.iterdir()):
        if not (venvs / folder.name / "bin/python").exists():
            if folder.name == "llm":
                advice = "`make setup` installs it; a service elsewhere does not need it"
                yield Check("trainer", "warning", f"the environment llm is not installed below {venvs}", advice)
            continue
        manifest = _read_manifest(folder / "capabilities.json")
        if manifest is None:
            yield Check("trainer", "warning", f"{folder.name}: what it can run is not known yet", f"`make setup-{folder.name}` finds out")
            continue
        packages = [f"{name} {manifest['packages'][name]}" for name in SHOWN_PACKAGES if name in manifest["packages"]]
        yield Check("trainer", "ok", f"{folder.name}: {', '.join(packages) or 'installed'}")
        capabilities: Json = manifest["families"].get("llm", {})
        has_gguf = capabilities.get("features", {}).get("gguf", False)
        missing = "`make setup` builds it: without it there are no GGUF files and no `tunesmith chat`"
        yield Check("llama.cpp", "ok" if has_gguf else "warning", "built" if has_gguf else "missing", "" if has_gguf else missing)


def _read_manifest(path: Path) -> Json | None:
    try:
        return cast(Json, json.loads(path.read_text()))
    except (OSError, ValueError):
        return None


def check_gpu() -> Check:
    """The NVIDIA GPUs of this machine."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=GPU_TIMEOUT_S)
    except FileNotFoundError:
        return Check("gpu", "ok", "no NVIDIA GPU; jobs on this machine train on the CPU")
    except (OSError, subprocess.SubprocessError) as error:
        return Check("gpu", "warning", f"nvidia-smi fails: {error}", "check the NVIDIA driver")
    return Check("gpu", "ok", "; ".join(line.strip() for line in done.stdout.splitlines() if line.strip()))


def check_hub(settings: Settings) -> Check:
    """Whether base models can be downloaded."""
    if settings.is_hub_offline:
        return Check("hub", "ok", "not used: HF_HUB_OFFLINE is set")
    advice = "base models must be in the store: `tunesmith models list` shows them, `tunesmith models import` adds a folder"
    try:
        response = httpx2.head(f"{settings.hub_url}/api/models", timeout=HUB_TIMEOUT_S, follow_redirects=True)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        return Check("hub", "warning", f"{settings.hub_url} does not answer from this machine ({error})", advice)
    if response.is_server_error:
        return Check("hub", "warning", f"{settings.hub_url} answers {response.status_code}", advice)
    return Check("hub", "ok", f"{settings.hub_url} answers")


def check_service(context: typer.Context) -> Iterator[Check]:
    """The service, its parts, its launchers, and who it takes the caller for."""
    with create_client(context) as client:
        try:
            health = client.get_health()
        except ApiError as error:
            yield Check("service", "warning", error.message, "`tunesmith train` starts one on this machine, and so does `tunesmith serve`")
            return
        yield from describe_health(client.url, health)
        yield from check_caller(client)


def describe_health(url: str, health: Json) -> Iterator[Check]:
    """What a service says about itself."""
    version: str = health.get("version", "of an earlier version")
    if version == VERSION:
        yield Check("service", "ok", f"{url}, version {version}")
    else:
        yield Check("service", "warning", f"{url}, version {version}; this command line is {VERSION}", "use the same version of both")
    for name, answer in health["checks"].items():
        yield Check(name, "ok" if answer == "ok" else "problem", answer, "" if answer == "ok" else "see the log of the service")
    for name, answer in health["launchers"].items():
        yield Check("launcher", "ok" if answer == "ok" else "problem", f"{name}: {answer}")


def check_caller(client: Client) -> Iterator[Check]:
    """Who the caller is to the service, and the hardware that a job gets."""
    try:
        caller = client.get("/whoami")
        yield Check("identity", "ok", f"{caller['subject']} of tenant {caller['tenant_id']}: {', '.join(caller['scopes'])}")
        yield Check(
            "hardware", "ok", f"{client.get('/capabilities')['default_hardware']} is the default; `tunesmith capabilities` shows all"
        )
    except ApiError as error:
        yield Check("identity" if error.status in (401, 403) else "hardware", "problem", error.message, error.hint)
