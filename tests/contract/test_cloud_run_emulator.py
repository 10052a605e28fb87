"""The Cloud Run emulator: what its processes see, and how it starts and stops."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc
from google.cloud import run_v2

from infra.loopback.cloud_run.server import CloudRun
from service.adapters.launchers.cloud_run.launcher import CloudRunLauncher
from tests.contract.cloud_run_fixture import ATTEMPT_SCRIPT, JOB, make_launch_request, make_launcher
from tests.waiting import wait_until


def test_child_environment_holds_only_given_variables(launcher: CloudRunLauncher, cloud_run: CloudRun) -> None:
    handle = launcher.launch(make_launch_request())
    wait_until(lambda: launcher.check(handle) == "ended")
    execution = cloud_run.executions()[0]
    variables = {variable.name: variable.value for variable in execution.template.containers[0].env}
    assert variables["JOB_WORKDIR"] == "/tmp/attempt"
    printed, _, arguments = cloud_run.output_path(handle).read_text().rpartition("}")
    environment = json.loads(printed + "}")
    assert arguments.split() == ["--name", "job-1.1"]
    platform = {"CLOUD_RUN_JOB", "CLOUD_RUN_EXECUTION", "CLOUD_RUN_TASK_INDEX", "CLOUD_RUN_TASK_ATTEMPT", "CLOUD_RUN_TASK_COUNT"}
    assert set(environment) - {"LC_CTYPE"} == set(variables) | platform | {"INHERITED"}
    assert environment["CLOUD_RUN_EXECUTION"] == handle.rpartition("/")[2]
    assert environment["JOB_WORKDIR"] != "/tmp/attempt"  # all executions share /tmp here


def test_emulator_supports_job_create_update_delete(cloud_run: CloudRun) -> None:
    from google.cloud.run_v2.services.jobs.transports import JobsGrpcTransport

    with grpc.insecure_channel(cloud_run.host) as channel:
        client = run_v2.JobsClient(transport=JobsGrpcTransport(channel=channel))
        container = run_v2.Container(name="attempt", image="llm")
        job = run_v2.Job(template=run_v2.ExecutionTemplate(template=run_v2.TaskTemplate(containers=[container], max_retries=1)))
        parent = JOB.rpartition("/jobs/")[0]
        created = client.create_job(parent=parent, job=job, job_id="another").result()
        created.labels = {"profile": "another"}
        client.update_job(job=created).result()
        assert client.get_job(name=created.name).labels == {"profile": "another"}
        assert {job.name for job in client.list_jobs(parent=parent)} == {JOB, created.name}
        env = [run_v2.EnvVar(name="EXIT", value="1")]
        override = run_v2.RunJobRequest.Overrides.ContainerOverride(name="attempt", env=env)
        request = run_v2.RunJobRequest(name=created.name, overrides={"container_overrides": [override]})
        execution = client.run_job(request).metadata.name
        wait_until(lambda: "completion_time" in cloud_run.executions()[0])
        assert cloud_run.executions()[0].retried_count == 1
        assert cloud_run.executions()[0].name == execution
        client.delete_job(name=created.name).result()
        assert [job.name for job in client.list_jobs(parent=parent)] == [JOB]


def test_stopping_emulator_ends_children(tmp_path: Path) -> None:
    with CloudRun(tmp_path, {"llm": [sys.executable, "-c", ATTEMPT_SCRIPT]}, environment={}) as cloud_run:
        cloud_run.create_job(JOB, "llm")
        launcher = make_launcher(cloud_run.host)
        handle = launcher.launch(make_launch_request(BEHAVIOR="sleep"))
        wait_until(lambda: cloud_run.output_path(handle).exists() and cloud_run.output_path(handle).stat().st_size > 0)
        launcher.close()
        started_at_s = time.monotonic()
    assert time.monotonic() - started_at_s < 5
    assert "completion_time" in cloud_run.executions()[0]


def test_emulator_command_serves_until_sigterm(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/__init__.py").touch()
    (tmp_path / "jobs/run.py").write_text(f"import os, pathlib\npathlib.Path('pid').write_text(str(os.getpid()))\n{ATTEMPT_SCRIPT}")
    options = ["--folder", str(tmp_path / "run"), "--python", sys.executable, "--source", str(tmp_path)]
    options += ["--job", "tunesmith-cpu", "--project", "demo", "--region", "here", "--env", "GREETING=hello"]
    with subprocess.Popen([sys.executable, "-m", "infra.loopback.cloud_run", *options], stdout=subprocess.PIPE, text=True) as served:
        assert served.stdout is not None
        host = next(word.rstrip(":") for word in served.stdout.readline().split() if word.startswith("127."))
        launcher = make_launcher(host)
        handle = launcher.launch(make_launch_request(BEHAVIOR="sleep"))
        output = tmp_path / "run" / f"{handle.rpartition('/')[2]}.log"
        wait_until(lambda: output.exists() and "GREETING" in output.read_text())
        launcher.close()
        served.send_signal(signal.SIGTERM)
        assert served.wait(10) == 0
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()
