"""Adding one of everything to a copy of the tree, and running a job through all of them over HTTP.

The job trains with a toy family on the local launcher, is paused, resumes on the toy launcher, whose attempts see only the runtime and
that family, and its checkpoint is exported again.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.e2e.conftest import TRAINER_PYTHON
from tests.local_token import local_headers
from tests.toys import FILES, REGISTRY_LINES, SOURCE, copy_one_family, copy_tree_with_toys
from tests.waiting import wait_until

ROWS = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 3
STEPS = 60


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tree")
    copy_tree_with_toys(folder)
    return folder


@pytest.fixture(scope="module")
def client(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    folder = tmp_path_factory.mktemp("deployment")
    copy_one_family(tree, folder / "toy-code", "toy")
    interpreter = folder / "venvs/toy/bin/python"
    interpreter.parent.mkdir(parents=True)
    interpreter.write_text(f'#!/bin/sh\nexec {TRAINER_PYTHON} "$@"\n')
    interpreter.chmod(0o755)
    variables = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(tree),
        "TUNESMITH_HOME": str(folder / "home"),
        "TUNESMITH_LAUNCHERS": "local,toy",
        "TUNESMITH_LOCAL_VENVS": str(folder / "venvs"),
        "TUNESMITH_INGEST_PYTHON": str(SOURCE / ".venvs/data/bin/python"),
        "TUNESMITH_LOCAL_ENVIRONMENTS": str(tree / "jobs/environments"),
        "TUNESMITH_TOY_SOURCE": str(folder / "toy-code"),
        "TUNESMITH_OBJECTS_URL": f"toy://{folder}/objects",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-P", "-m", "service", "--port", "0"]
    with (
        (folder / "service.log").open("w") as log,
        subprocess.Popen(command, cwd=tree, env=variables, stdout=subprocess.PIPE, stderr=log, text=True) as service,
    ):
        assert service.stdout is not None
        url = service.stdout.readline().strip()
        assert url, (folder / "service.log").read_text()
        try:
            with httpx2.Client(base_url=url, headers=local_headers(folder / "home"), timeout=30) as client:
                yield client
        finally:
            service.terminate()


def submit(client: httpx2.Client, **changes: Any) -> str:
    dataset = client.post("/datasets", files={"file": ("rows.jsonl", ROWS)}, data={"eval_fraction": "0"}).json()
    config = {"trainer_type": "toy_counter", "hyperparameters": {"max_steps": STEPS}, "toy_config": {"name": "mine"}} | changes
    body = {"processed_dataset_id": dataset["processed_dataset_id"], "hardware": "local/local", "training_config": config}
    response = client.post("/train", json=body)
    assert response.status_code == 201, response.text
    return response.json()["job_id"]


def wait_for(client: httpx2.Client, job_id: str, status: str) -> Any:
    def reached() -> Any:
        job = client.get(f"/jobs/{job_id}").json()
        assert job["status"] in (status, "queued", "preparing", "training", "pausing"), job
        return job if job["status"] == status else None

    return wait_until(reached, 60, description=lambda: client.get(f"/jobs/{job_id}/logs").json()["text"][-3000:])


def read_artifact(client: httpx2.Client, job_id: str) -> str:
    return client.get(client.get(f"/jobs/download/{job_id}").json()["download_url"]).text


def test_capabilities_show_the_toys(client: httpx2.Client) -> None:
    def is_probed() -> bool:
        return client.get("/health").json()["launchers"] == {"local": "ok", "toy": "ok"}

    wait_until(is_probed, 60)  # the environment's folder is newer than its manifest
    capabilities = client.get("/capabilities").json()
    assert set(capabilities["launchers"]) == {"local", "toy"}
    assert set(capabilities["launchers"]["toy"]["environments"]) == {"toy"}
    assert capabilities["trainer_types"]["toy_doubler"]["hardware"] == ["local/local", "toy/toy"]


def test_job_trains_pauses_resumes_on_another_launcher_and_exports(client: httpx2.Client) -> None:
    job_id = submit(client)
    wait_until(lambda: client.get(f"/jobs/{job_id}").json()["checkpoint"], 60)
    assert client.post(f"/jobs/{job_id}/pause").status_code == 202
    paused = wait_for(client, job_id, "paused")
    step = paused["checkpoint"]["step"]
    assert 10 <= step < STEPS
    assert client.post(f"/jobs/{job_id}/resume", json={"hardware": "toy"}).status_code == 202
    job = wait_for(client, job_id, "completed")
    used = [(attempt["launcher"], attempt["hardware"], attempt["environment"], attempt["resumed_step"]) for attempt in job["attempts"]]
    assert used == [("local", "local", "toy", None), ("toy", "toy", "toy", step)]
    assert (job["trainer_type"], [artifact["kind"] for artifact in job["artifacts"]]) == ("toy_counter", ["count"])
    assert read_artifact(client, job_id) == str(STEPS)
    exported = client.post(f"/jobs/{job_id}/export", json={"hardware": "toy"}).json()["job_id"]
    wait_for(client, exported, "completed")
    assert read_artifact(client, exported) == str(STEPS)


def test_second_trainer_type_and_its_tracker_run(client: httpx2.Client) -> None:
    job_id = submit(client, trainer_type="toy_doubler", hyperparameters={"max_steps": 5})
    wait_for(client, job_id, "completed")
    assert read_artifact(client, job_id) == "10"
    events = client.get(f"/jobs/{job_id}/events", params={"limit": 1000}).json()["events"]
    assert "toy" in [event["event"].get("tracker") for event in events]
    assert [event["event"]["values"]["count"] for event in events if event["event"]["type"] == "metrics"] == [2, 4, 6, 8, 10]


def test_family_refuses_before_compute(client: httpx2.Client) -> None:
    dataset = client.post("/datasets", files={"file": ("rows.jsonl", '{"text": "a"}\n{"text": "b"}\n')}).json()
    body = {"processed_dataset_id": dataset["processed_dataset_id"], "training_config": {"trainer_type": "toy_counter"}}
    error = client.post("/train", json=body).json()["error"]
    assert "needs a dataset of messages" in error["message"]
    unlucky = body["training_config"] | {"hyperparameters": {"max_steps": 13}}  # type: ignore[operator]
    dataset = client.post("/datasets", files={"file": ("rows.jsonl", ROWS)}, data={"eval_fraction": "0"}).json()
    body |= {"processed_dataset_id": dataset["processed_dataset_id"], "training_config": unlucky}
    assert client.post("/train", json=body).json()["error"]["param"] == "training_config.hyperparameters.max_steps"


def test_only_the_listed_files_change(tree: Path) -> None:
    """CONTRIBUTING lists every file that an addition needs."""
    text = (SOURCE / "CONTRIBUTING.md").read_text()
    for name in REGISTRY_LINES:
        assert f"`{name}`" in text, name
    for folder in sorted({path.relative_to(FILES).parent.as_posix() for path in FILES.rglob("*.py")}):
        assert folder.replace("toy", "NAME") in text, folder  # in CONTRIBUTING's own words
    assert (tree / "jobs/toy").is_dir()
