"""The service dies and comes back; the job does not notice."""

import signal

from tests.e2e.conftest import Service, wait_until


def test_restarted_service_adopts_running_attempt(own_service: Service) -> None:
    job_id = own_service.train(own_service.upload(), {"max_steps": 120, "logging_steps": 2})
    wait_until(lambda: own_service.job(job_id)["status"] == "training")
    [attempt] = own_service.attempts()
    own_service.stop(signal.SIGKILL)
    own_service.start()
    assert [process.pid for process in own_service.attempts()] == [attempt.pid]
    job = own_service.wait_until_final(job_id)
    assert (job["status"], len(job["attempts"])) == ("completed", 1), own_service.log(job_id)
    events = own_service.http.get(f"/jobs/{job_id}/events", params={"limit": 1000}).json()["events"]
    seqs = [row["seq"] for row in events if row["attempt"] == 1]
    assert seqs == list(range(len(seqs)))  # nothing reported meanwhile was lost


def test_result_written_during_outage_is_accepted(own_service: Service) -> None:
    job_id = own_service.train(own_service.upload(), {"max_steps": 50})
    wait_until(lambda: own_service.job(job_id)["status"] == "training")
    own_service.stop(signal.SIGKILL)
    wait_until(lambda: own_service.attempts() == [], timeout_s=90)
    own_service.start()
    assert own_service.wait_until_final(job_id)["status"] == "completed"


def test_stopped_service_ends_attempts_and_job_restarts(own_service: Service) -> None:
    job_id = own_service.train(own_service.upload(), {"max_steps": 100})
    wait_until(lambda: own_service.job(job_id)["status"] == "training")
    own_service.stop(signal.SIGTERM)
    assert own_service.attempts() == []
    own_service.start()
    job = own_service.wait_until_final(job_id)
    assert [attempt["outcome"] for attempt in job["attempts"]] == ["preempted", "completed"], own_service.log(job_id)


def test_repeatedly_killed_job_fails_with_reason(own_service: Service) -> None:
    job_id = own_service.train(own_service.upload(), {"max_steps": 100_000, "save_strategy": "no"})
    for number in (1, 2, 3):
        wait_until(lambda number=number: len(own_service.job(job_id)["attempts"]) == number and own_service.attempts() != [])
        [attempt] = own_service.attempts()
        attempt.kill()
    job = own_service.wait_until_final(job_id)
    assert [attempt["outcome"] for attempt in job["attempts"]] == ["lost"] * 3
    assert job["failure"]["code"] == "lost"
    assert "3 attempts in a row" in job["failure"]["message"]
    assert job["failure"]["hint"]


def test_second_service_in_same_home_is_rejected(own_service: Service) -> None:
    assert "already uses" in own_service.run_cli("serve", "--port", "0", expect_failure=True)
