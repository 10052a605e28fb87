"""Every error in one shape: {"error": {"code", "message", "hint", "param"}}. Never a stack trace."""

import errno
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from schema.training import TRAINER_TYPES
from schema.training.llm_graders import GRADER_TYPES
from service.api.json_body import MalformedBody
from service.core.errors import TooManyRequests, TunesmithError, Unauthorized, Unavailable
from storage import NoSuchObject, StorageError, StoreFull

log = logging.getLogger(__name__)

UNION_BRANCH = re.compile(r"(?:literal|list|function-[a-z-]+)\[.*\]")  # pydantic's name for one of several forms of a field


class ErrorBody(BaseModel):
    """What went wrong, for a program (`code`, `param`) and for a person (`message`, `hint`)."""

    code: str
    message: str
    hint: str = ""
    param: str | None = None


class ErrorResponse(BaseModel):
    """The body of every response that is not a success."""

    error: ErrorBody


def as_request_validation_error(error: ValidationError) -> RequestValidationError:
    """The validation error of a body that the service assembled, in the form that FastAPI raises for a body that a caller sent."""
    return RequestValidationError([{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()])


def install(app: FastAPI) -> None:
    """Render every error of the app in our shape."""
    app.add_exception_handler(TunesmithError, _handle_tunesmith_error)  # type: ignore[arg-type]  # starlette types handlers by Exception
    app.add_exception_handler(StorageError, _handle_storage_error)  # type: ignore[arg-type]
    app.add_exception_handler(OSError, _handle_os_error)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _handle_validation_error)  # type: ignore[arg-type]
    app.add_exception_handler(MalformedBody, _handle_malformed_body)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _handle_http_exception)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _handle_unexpected_error)


def error_response(
    status: int, code: str, message: str, hint: str = "", param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An error as a response."""
    body = ErrorResponse(error=ErrorBody(code=code, message=message, hint=hint, param=param))
    return JSONResponse(body.model_dump(), status_code=status, headers=dict(headers) if headers else None)


def _handle_tunesmith_error(_request: Request, error: TunesmithError) -> JSONResponse:
    headers = {"Retry-After": str(error.retry_after_s)} if isinstance(error, Unavailable) else None
    if isinstance(error, Unauthorized):
        headers = {"WWW-Authenticate": "Bearer"}
    if isinstance(error, TooManyRequests):
        headers = dict(error.headers)
    return error_response(error.status, error.code, error.message, error.hint, error.param, headers)


def _handle_storage_error(_request: Request, error: StorageError) -> JSONResponse:
    if isinstance(error, NoSuchObject):
        return error_response(404, "not_found", "the file no longer exists")
    log.error("object store failed", extra={"error": str(error)})
    if isinstance(error, StoreFull):
        return _storage_full_response()
    return error_response(503, "unavailable", "the object store does not respond; try again", headers={"Retry-After": "2"})


def _handle_os_error(request: Request, error: OSError) -> JSONResponse:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return _storage_full_response()
    return _handle_unexpected_error(request, error)


def _storage_full_response() -> JSONResponse:
    return error_response(
        507, "storage_full", "the disk is full", "free some space where the service keeps its files", headers={"Retry-After": "30"}
    )


def _handle_validation_error(_request: Request, error: RequestValidationError) -> JSONResponse:
    problems = error.errors()
    first = problems[0]
    param = _param(first)
    if param == "training_config" and first["type"] == "union_tag_invalid":
        message = f"trainer_type {first['ctx']['tag']!r} is not available in this deployment; it supports: {', '.join(TRAINER_TYPES)}"
        return error_response(400, "unsupported", message, "GET /capabilities lists what this deployment supports", f"{param}.trainer_type")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    message = f"{param}: {_message(first)}" if param else _message(first)
    return error_response(422, "malformed", message + more, _hint(first), param)


def _handle_malformed_body(_request: Request, error: MalformedBody) -> JSONResponse:
    message = f"{error.param}: {error.detail}" if error.param else error.detail
    return error_response(422, "malformed", _printable(message), param=_printable(error.param) if error.param else None)


def _printable(text: str) -> str:
    """Text of a caller that may hold half a surrogate pair, which no response can be encoded with."""
    return text.encode(errors="backslashreplace").decode()


def _handle_http_exception(_request: Request, error: HTTPException) -> JSONResponse:
    codes = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}
    message = "there is no such path" if error.status_code == 404 and error.detail == "Not Found" else str(error.detail)
    return error_response(
        error.status_code, codes.get(error.status_code, "invalid_request"), message, "GET /docs lists the API", headers=error.headers
    )


def _handle_unexpected_error(request: Request, error: Exception) -> JSONResponse:
    log.error("request failed", exc_info=error, extra={"method": request.method, "path": request.url.path})
    return error_response(500, "internal", "the service failed unexpectedly; see its log")


# Any: pydantic describes its errors as loose dicts.
def _param(problem: Mapping[str, Any]) -> str | None:
    conflicting = problem.get("ctx", {}).get("field") if problem["type"] == "fields_conflict" else None
    location = _strip_union_tags(problem["loc"])
    path = [str(step) for step in location[1:] if not (isinstance(step, int) and problem["type"] == "json_invalid")]
    return ".".join([*path, conflicting] if conflicting else path) or None


def _strip_union_tags(path: Sequence[str | int]) -> list[str | int]:
    """The path as it was sent, without the union member that pydantic adds to it."""
    kept: list[str | int] = []
    for index, step in enumerate(path):
        is_trainer_type = index > 0 and path[index - 1] == "training_config" and step in TRAINER_TYPES
        is_grader_type = index > 1 and path[index - 2] == "reward_config" and isinstance(path[index - 1], int) and step in GRADER_TYPES
        if not (is_trainer_type or is_grader_type or UNION_BRANCH.fullmatch(str(step))):
            kept.append(step)
    return kept


def _message(problem: Mapping[str, Any]) -> str:
    match problem["type"]:
        case "extra_forbidden":
            return "is not a field of this request"
        case "missing" | "too_short" if problem["loc"][-1] == "reward_config":
            return f"trainer_type 'grpo' needs graders; give at least one, of type {', '.join(GRADER_TYPES)}"
        case "missing":
            return "is missing"
        case "union_tag_not_found" if "reward_config" in problem["loc"]:
            return f"a grader needs a type, one of {', '.join(GRADER_TYPES)}"
        case "union_tag_invalid" if "reward_config" in problem["loc"]:
            return f"there is no grader of type {problem['ctx']['tag']!r}; known: {', '.join(GRADER_TYPES)}"
        case "model_attributes_type" | "dict_type" if len(problem["loc"]) == 1:
            return "the body is not a JSON object; send one, with Content-Type: application/json"
        case "json_invalid":
            return f"the body is not JSON: {problem.get('ctx', {}).get('error', '')}".rstrip(": ")
        case _:
            message: str = problem["msg"]
            return message[:1].lower() + message[1:]


def _hint(problem: Mapping[str, Any]) -> str:
    return "check the spelling; GET /docs lists the fields" if problem["type"] == "extra_forbidden" else ""
