"""Writes what a request did into the audit log, after the request has been answered or refused."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from service.api.stream import run_in_thread
from service.core.access.audit import Action, AuditLog
from service.core.access.records import AuditEntry
from service.core.errors import TunesmithError, Unavailable
from service.core.principals import Principal
from service.tracing import current_trace
from storage.deadline import deadline

log = logging.getLogger(__name__)

Handler = Callable[[Request], Coroutine[Any, Any, Response]]
RESOURCE_PARAMETERS = (
    "processed_dataset_id",
    "job_id",
    "key_id",
)  # of paths and of answers, the most telling first: a dataset may have a job
MAX_PARSED_BYTES = 1 << 16
AUDIT_TIMEOUT_S = 0.45  # of one write; an entry may wait for another one first, beside the four seconds of its request


class AuditWriter:
    """Writes entries before their requests are answered: those that arrive while others are being written share the next write."""

    def __init__(self, audit_log: AuditLog) -> None:
        self.audit_log = audit_log
        self._waiting: list[tuple[AuditEntry, asyncio.Future[None]]] = []
        self._writing: asyncio.Task[None] | None = None

    async def write(self, entry: AuditEntry) -> None:
        """Returns when the entry is stored. Raises Unavailable."""
        stored = asyncio.get_running_loop().create_future()
        self._waiting.append((entry, stored))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_all())
        await stored

    async def _write_all(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            outcome: Exception | None = Unavailable("the audit log could not be written")
            try:
                with deadline(AUDIT_TIMEOUT_S):
                    await run_in_thread(self.audit_log.append, [entry for entry, _ in batch])
                outcome = None
            except (TunesmithError, ValueError) as error:
                outcome = error
            finally:
                for _, stored in batch:
                    if not stored.done():  # its request may have been canceled
                        stored.set_exception(outcome) if outcome else stored.set_result(None)


def record_in_audit_log(handle: Handler, action: str) -> Handler:
    """The same handler, which also writes an entry for every caller that was recognized, whether the request succeeded or not."""

    async def handle_and_record(request: Request) -> Response:
        try:
            response = await handle(request)
        except TunesmithError as error:
            await _record(request, action, error.status, error.code, None)
            raise
        except RequestValidationError:
            await _record(request, action, 422, "malformed", None)
            raise
        except HTTPException as error:  # a body that cannot be read
            await _record(request, action, error.status_code, "malformed", None)
            raise
        except Exception:
            await _record(request, action, 500, "internal", None)
            raise
        # A route says what it made where its answer names several things.
        created = getattr(request.state, "created_resource", None) or _find_created_resource(response)
        await _record(request, action, response.status_code, None, created)
        return response

    return handle_and_record


async def _record(request: Request, action: str, status: int, code: str | None, created: str | None) -> None:
    """A failure to write is logged with what would have been written: the request itself has been decided by then."""
    principal: Principal | None = getattr(request.state, "principal", None)
    if principal is None:
        return
    named = (request.path_params.get(name) for name in RESOURCE_PARAMETERS)
    resource = created or next((str(value) for value in named if value), None)
    entry = Action(
        name=action,
        resource=resource,
        status=status,
        code=code,
        address=request.client.host if request.client else None,
        request_id=trace.request_id if (trace := current_trace()) else None,
    )
    writer: AuditWriter = request.app.state.audit_writer
    try:
        await writer.write(writer.audit_log.make_entry(principal, entry))
    except (TunesmithError, ValueError) as error:
        details = {"action": action, "resource": resource, "status": status, "subject": principal.subject, "error": str(error)}
        log.error("audit entry could not be stored", extra=details)


def _find_created_resource(response: Response) -> str | None:
    """The id of what the request created, as its answer names it."""
    if response.status_code not in (201, 202) or len(response.body) > MAX_PARSED_BYTES:
        return None
    answer = orjson.loads(response.body)
    return next((str(answer[name]) for name in RESOURCE_PARAMETERS if answer.get(name)), None)
