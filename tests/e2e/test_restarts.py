"""The service dies and comes back; the job does not notice."""

import signal

from tests.e2e.conftest import Service, until


def test_a_killed_service_adopts_the_attempt_which_completes(own_service: Service) -> None:
    job_id = own_service.train(own_service.upload(), {"max_steps": 120, "logging_steps": 2})
    until(lambda: own_service.job(job_id)["status"] == "training")
    [attempt] = own_service.attempts()
    own_service.stop(signal.SIGKILL)
    own_service.start()
    assert [process.pid for process in own_service.attempts()] == [attempt.pid]
    job = own_service.finished(job_id)
    assert (job["status"], len(job["attempts"])) == ("completed", 1), own_service.log(job_id)
    events = own_service.http.get(f"/jobs/{job_id}/events", params={"limit": 1000}).json()["events"]
    seqs = [row["seq"] for row in events if row["attempt"] == 1]
    assert seqs == list(range(len(seqs)))  # nothing reported meanwhile was lost


def test_a_service_that_was_away_when_the_attempt_ended_believes_its_result(own_service: Service) -> None:
    job_id = own_service.train(own_service.upload(), {"max_steps": 50})
    until(lambda: own_service.job(job_id)["status"] == "training")
    own_service.stop(signal.SIGKILL)
    until(lambda: own_service.attempts() == [], within_s=90)
    own_service.start()
    assert own_service.finished(job_id)["status"] == "completed"


def test_a_service_that_is_stopped_leaves_no_process_and_the_job_starts_again(own_service: Service) -> None:
    job_id = own_service.train(own_service.upload(), {"max_steps": 100})
    until(lambda: own_service.job(job_id)["status"] == "training")
    own_service.stop(signal.SIGTERM)
    assert own_service.attempts() == []
    own_service.start()
    job = own_service.finished(job_id)
    assert [attempt["outcome"] for attempt in job["attempts"]] == ["preempted", "completed"], own_service.log(job_id)


def test_a_job_whose_attempts_are_always_killed_fails_with_a_reason(own_service: Service) -> None:
    job_id = own_service.train(own_service.upload(), {"max_steps": 100_000, "save_strategy": "no"})
    for number in (1, 2, 3):
        until(lambda number=number: len(own_service.job(job_id)["attempts"]) == number and own_service.attempts() != [])
        [attempt] = own_service.attempts()
        attempt.kill()
    job = own_service.finished(job_id)
    assert [attempt["outcome"] for attempt in job["attempts"]] == ["lost"] * 3
    assert job["failure"]["code"] == "lost"
    assert "3 attempts in a row" in job["failure"]["message"]
    assert job["failure"]["hint"]


def test_a_second_service_in_the_same_home_is_refused(own_service: Service) -> None:
    assert "at work in" in own_service.tunesmith("serve", "--port", "0", fails=True)
