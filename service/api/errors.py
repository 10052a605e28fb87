"""Every error in one shape: {"error": {"code", "message", "hint", "param", "errors": [{"message", "hint", "param"}]}}. Never a stack trace.

`errors` has every problem of the request that was found, the first of which is also the error itself.
"""

import errno
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from service.api.json_body import MalformedBody
from service.api.validation_errors import MAX_PROBLEMS, BodyError, Problem, describe_problems, is_unknown_trainer_type
from service.core.errors import TooManyRequests, TunesmithError, Unauthorized, Unavailable
from storage import NoSuchObject, StorageError, StoreFull

log = logging.getLogger(__name__)


class ErrorProblem(BaseModel):
    """One problem of a request."""

    message: str
    hint: str
    param: str | None


class ErrorBody(BaseModel):
    """What went wrong, for a program (`code`, `param`) and for a person (`message`, `hint`)."""

    code: str
    message: str
    hint: str
    param: str | None
    errors: list[ErrorProblem]  # every problem of the request, the first of which is repeated here


class ErrorResponse(BaseModel):
    """The body of every response that is not a success."""

    error: ErrorBody


def install(app: FastAPI) -> None:
    """Render every error of the app in our shape."""
    app.add_exception_handler(TunesmithError, _handle_tunesmith_error)  # type: ignore[arg-type]  # starlette types handlers by Exception
    app.add_exception_handler(StorageError, _handle_storage_error)  # type: ignore[arg-type]
    app.add_exception_handler(OSError, _handle_os_error)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _handle_validation_error)  # type: ignore[arg-type]
    app.add_exception_handler(MalformedBody, _handle_malformed_body)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _handle_http_exception)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _handle_unexpected_error)


def error_body(code: str, problems: Sequence[Problem]) -> ErrorResponse:
    """The body of an error with one or more problems, of which at most MAX_PROBLEMS are sent."""
    first = problems[0]
    shown = [ErrorProblem(message=each.message, hint=each.hint, param=each.param) for each in problems[:MAX_PROBLEMS]]
    return ErrorResponse(error=ErrorBody(code=code, message=first.message, hint=first.hint, param=first.param, errors=shown))


def error_response(
    status: int, code: str, message: str, hint: str = "", param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An error as a response."""
    return _render(status, code, [Problem(message, hint, param)], headers)


def _render(status: int, code: str, problems: Sequence[Problem], headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse(error_body(code, problems).model_dump(), status_code=status, headers=dict(headers) if headers else None)


def _handle_tunesmith_error(_request: Request, error: TunesmithError) -> JSONResponse:
    headers = {"Retry-After": str(error.retry_after_s)} if isinstance(error, Unavailable) else None
    if isinstance(error, Unauthorized):
        headers = {"WWW-Authenticate": "Bearer"}
    if isinstance(error, TooManyRequests):
        headers = dict(error.headers)
    problems = [Problem(each.message, each.hint, each.param) for each in error.problems]
    return _render(error.status, error.code, problems, headers)


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


def _handle_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
    problems = describe_problems(error.errors(), error.model if isinstance(error, BodyError) else _body_model(request))
    if is_unknown_trainer_type(error.errors()[0]):
        return _render(400, "unsupported", problems)
    return _render(422, "malformed", problems)


# Any: an annotation.
def _body_model(request: Request) -> Any:  # noqa: ANN401
    """What the route takes as its body; None if it takes none."""
    route = request.scope.get("route")
    field = route.body_field if isinstance(route, APIRoute) else None
    return field.field_info.annotation if field else None


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
