"""Why an execution ended, read from the messages of the Cloud Run API. Pure functions."""

# The client library is generated, and loosely typed where it wraps protocol buffers.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import re
from dataclasses import dataclass
from signal import SIGKILL, SIGTERM, Signals

import grpc
from google.cloud import run_v2

from schema.job import Failure, FailureCode
from service.adapters.launchers.cloud_run.errors import single_line
from service.core.ports import ExitReason

RETRY_HINT = "nothing to do: the service launches another attempt"
RETRY_REQUEST_HINT = "POST /jobs/{id}/retry continues the job"
COMPLETED = "Completed"  # the type of the condition that describes the whole execution

Common = run_v2.Condition.CommonReason
Reason = run_v2.Condition.ExecutionReason
State = run_v2.Condition.State


def classify_exit(execution: run_v2.Execution, task: run_v2.Task | None) -> ExitReason | None:
    """Why an execution failed; None when it did not fail or gives no reason.

    `task` is the execution's only task, which knows the exit code; None when the service may not read it.
    """
    if not is_finished(execution) or _completion_state(execution) == State.CONDITION_SUCCEEDED:
        return None
    evidence = _collect_evidence(execution, task)
    return next((exit_reason for rule in EXIT_RULES if (exit_reason := rule(evidence)) is not None), None)


def is_finished(execution: run_v2.Execution) -> bool:
    """Whether the execution holds no compute any more."""
    final_states = (State.CONDITION_FAILED, State.CONDITION_SUCCEEDED)
    return "completion_time" in execution or "delete_time" in execution or _completion_state(execution) in final_states


# --- what Cloud Run reports ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExitEvidence:
    """What an execution and its task report about their end."""

    cancelled: bool
    deleted: bool
    reasons: frozenset[int]  # CommonReason
    execution_reasons: frozenset[int]  # ExecutionReason
    messages: tuple[str, ...]
    exit_code: int  # 0 also when there is none
    signal: int
    status_code: int  # of google.rpc.Code

    def matches(self, pattern: str) -> bool:
        """Whether any message matches."""
        return any(re.search(pattern, message, re.IGNORECASE) for message in self.messages)

    @property
    def message_suffix(self) -> str:
        """The first message in parentheses; empty when there is none."""
        return f" ({single_line(self.messages[0])})" if self.messages else ""


def _collect_evidence(execution: run_v2.Execution, task: run_v2.Task | None) -> ExitEvidence:
    conditions = [*execution.conditions, *(task.conditions if task else ())]
    failed = [condition for condition in conditions if _enum_value(condition, "state") == State.CONDITION_FAILED]
    result = task.last_attempt_result if task else run_v2.TaskAttemptResult()
    status, code = run_v2.TaskAttemptResult.pb(result).status, result.exit_code
    execution_reasons = frozenset(_enum_value(condition, "execution_reason") for condition in conditions)
    messages = (*(condition.message for condition in failed), status.message)
    return ExitEvidence(
        cancelled=execution.cancelled_count > 0 or bool(execution_reasons & {Reason.CANCELLED, Reason.CANCELLING}),
        deleted="delete_time" in execution or Reason.DELETED in execution_reasons,
        reasons=frozenset(_enum_value(condition, "reason") for condition in failed),
        execution_reasons=execution_reasons,
        messages=tuple(message for message in messages if message.strip()),
        exit_code=code,
        signal=result.term_signal or (code - 128 if 128 < code <= 128 + max(Signals) else 0),
        status_code=status.code,
    )


def _completion_state(execution: run_v2.Execution) -> int:
    states = [_enum_value(condition, "state") for condition in execution.conditions if condition.type_ == COMPLETED]
    return states[0] if states else State.STATE_UNSPECIFIED


def _enum_value(condition: run_v2.Condition, name: str) -> int:
    """The field as a number. The wrapped message would warn about values that are newer than this library."""
    return int(getattr(run_v2.Condition.pb(condition), name))


# --- the rules -------------------------------------------------------------------------------------------------------


def _cancelled(evidence: ExitEvidence) -> ExitReason | None:
    if evidence.deleted:
        return _exit_reason("lost", "the execution was deleted in Cloud Run", RETRY_REQUEST_HINT)
    if evidence.cancelled:
        return _exit_reason("lost", "the execution was canceled in Cloud Run, not through this service", RETRY_REQUEST_HINT)
    return None


def _timed_out(evidence: ExitEvidence) -> ExitReason | None:
    if not evidence.matches(r"timeout was reached|maximum timeout") and evidence.status_code != grpc.StatusCode.DEADLINE_EXCEEDED.value[0]:
        return None
    hint = "raise TUNESMITH_CLOUD_RUN_TIME_LIMIT_S, or lower epochs or max_steps"
    return _exit_reason("timeout", f"the attempt exceeded its time limit before writing a result{evidence.message_suffix}", hint)


def _out_of_memory(evidence: ExitEvidence) -> ExitReason | None:
    """A SIGKILL that reaches this rule means out of memory: the rules above handle Cloud Run's kills after a cancel or a timeout."""
    if not evidence.matches(r"memory limit|out of memory|oom.?kill") and evidence.signal != SIGKILL:
        return None
    hint = "files count as memory there: use hardware with more memory, a smaller base model, or fewer exports"
    return _exit_reason("out_of_memory", f"the attempt used more memory than its Cloud Run job has{evidence.message_suffix}", hint)


def _image_unavailable(evidence: ExitEvidence) -> ExitReason | None:
    if evidence.reasons & {Common.CONTAINER_PERMISSION_DENIED} or evidence.matches(r"permission to read the image"):
        hint = "grant roles/artifactregistry.reader on the repository tunesmith to Cloud Run's service agent"
        return _exit_reason("launch_failed", f"Cloud Run may not pull the image{evidence.message_suffix}", hint)
    if evidence.reasons & {Common.CONTAINER_IMAGE_UNAUTHORIZED, Common.CONTAINER_IMAGE_AUTHORIZATION_CHECK_FAILED}:
        hint = "see the Binary Authorization policy of the project"
        return _exit_reason("launch_failed", f"a policy of the project forbids the image{evidence.message_suffix}", hint)
    missing_image = r"image .*not found|ImagePull|pull(ing)? .*image|image import failed|manifest unknown"
    if Common.CONTAINER_MISSING in evidence.reasons or evidence.matches(missing_image):
        return _exit_reason(
            "launch_failed", f"Cloud Run cannot pull the image{evidence.message_suffix}", "`make deploy` builds and pushes it"
        )
    return None


def _access_denied(evidence: ExitEvidence) -> ExitReason | None:
    causes = {
        Common.SECRETS_ACCESS_CHECK_FAILED: ("a secret of the job resource", "grant roles/secretmanager.secretAccessor to tunesmith-job"),
        Common.ENCRYPTION_KEY_PERMISSION_DENIED: ("its encryption key", "grant the key to Cloud Run's service agent"),
        Common.ENCRYPTION_KEY_CHECK_FAILED: ("its encryption key", "check that the key exists and is enabled"),
        Common.VPC_NETWORK_NOT_FOUND: ("its network", "see vpc_access of the job resource"),
    }
    for reason in sorted(evidence.reasons & causes.keys()):
        resource, hint = causes[Common(reason)]
        return _exit_reason("launch_failed", f"the Cloud Run job cannot use {resource}{evidence.message_suffix}", hint)
    return None


def _no_capacity(evidence: ExitEvidence) -> ExitReason | None:
    """Cloud Run accepted the attempt and then had no compute for it: not the job's fault, and worth another attempt."""
    exhausted = evidence.status_code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    not_started_in_time = Common.PROGRESS_DEADLINE_EXCEEDED in evidence.reasons
    if not (
        exhausted
        or not_started_in_time
        or evidence.matches(r"quota|capacity|resources? (is |are )?(exhausted|unavailable)|no available instance")
    ):
        return None
    hint = "ask for more of the quota, or use other hardware or another region"
    return _exit_reason("launch_failed", f"Cloud Run had no compute for the attempt{evidence.message_suffix}", hint, preempted=True)


def _preempted(evidence: ExitEvidence) -> ExitReason | None:
    """Cloud Run does not migrate GPU tasks for maintenance: it ends them with SIGTERM."""
    internal_error = Common.INTERNAL in evidence.reasons or Reason.JOB_STATUS_SERVICE_POLLING_ERROR in evidence.execution_reasons
    reported = evidence.matches(r"maintenance|preempt|evict|internal (system )?error|stopped unexpectedly")
    if not (internal_error or reported or evidence.signal == SIGTERM):
        return None
    return _exit_reason("preempted", f"Cloud Run preempted the attempt{evidence.message_suffix}", RETRY_HINT, preempted=True)


def _crashed(evidence: ExitEvidence) -> ExitReason | None:
    hint = "see its output in Cloud Logging"
    if evidence.signal:
        names = {signal.value: signal.name for signal in Signals}
        return _exit_reason("internal", f"the attempt crashed with {names.get(evidence.signal, f'signal {evidence.signal}')}", hint)
    if evidence.exit_code:
        return _exit_reason("internal", f"the attempt exited with code {evidence.exit_code} and left no result", hint)
    if Reason.NON_ZERO_EXIT_CODE in evidence.execution_reasons or evidence.matches(r"container exited with an error"):
        return _exit_reason("internal", f"the attempt failed and left no result{evidence.message_suffix}", hint)
    return None


def _platform_error(evidence: ExitEvidence) -> ExitReason | None:
    """Comes after `_crashed`: a container that fails by itself may report one of these codes as well."""
    codes = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED)
    if evidence.status_code not in {code.value[0] for code in codes}:
        return None
    return _exit_reason("preempted", f"Cloud Run lost the attempt{evidence.message_suffix}", RETRY_HINT, preempted=True)


def _unknown(evidence: ExitEvidence) -> ExitReason | None:
    if not evidence.messages:
        return None
    return _exit_reason("lost", f"the execution failed{evidence.message_suffix}", "see its output in Cloud Logging")


# The first rule that returns a reason wins. A SIGKILL counts as out of memory only after cancels and timeouts are excluded.
EXIT_RULES = (
    *(_cancelled, _timed_out, _out_of_memory, _image_unavailable, _access_denied),
    *(_no_capacity, _preempted, _crashed, _platform_error, _unknown),
)


def _exit_reason(code: FailureCode, message: str, hint: str, *, preempted: bool = False) -> ExitReason:
    return ExitReason(Failure(code=code, message=message, hint=hint), preempted=preempted)
