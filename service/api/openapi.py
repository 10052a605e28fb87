"""The errors of each route in the OpenAPI document, and how its caller is identified."""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, FastAPI

from service.api.errors import ErrorResponse
from service.api.route import LimitedRoute, RouteLimits

DESCRIPTIONS = {
    400: "A value is not allowed, or this deployment does not support it.",
    401: "The token, key or link is missing or not valid, or has expired.",
    403: "The caller may not do this, or a page of another website sent the request.",
    404: "There is no such job, dataset or file.",
    409: "The state of the job or dataset does not allow this, or the Idempotency-Key was used with another body.",
    413: "The body is too large.",
    421: "The service does not answer for the host in the header Host.",
    422: "The request is malformed: a field is missing, unknown or of the wrong type.",
    429: "The caller sends too many requests, or has used up a quota. Retry-After says when to try again.",
    503: "A part behind the service does not answer. Retry-After says when to try again.",
}


BEARER_SCHEME = "bearer"
SECURITY_SCHEMES = {
    BEARER_SCHEME: {"type": "http", "scheme": "bearer", "description": "An API key, an identity token, or the token of the local service."}
}


def document_errors(app: FastAPI, routers: Sequence[APIRouter]) -> None:
    """Have the app's OpenAPI document list, for each route of its routers, the errors that it can answer with, all of the one shape."""
    generate = app.openapi

    def generate_with_errors() -> dict[str, Any]:  # Any: a JSON document
        if app.openapi_schema is None:
            _add_errors(generate(), _limits_by_operation(routers))  # generate() keeps the document that it returns
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = generate_with_errors


def _limits_by_operation(routers: Sequence[APIRouter]) -> dict[tuple[str, str], RouteLimits]:
    """The limits of each route, by its method and path."""
    routes = [route for router in routers for route in router.routes if isinstance(route, LimitedRoute)]
    return {(method, route.path_format): route.limits for route in routes for method in route.methods or ()}


def _add_errors(document: dict[str, Any], limits: dict[tuple[str, str], RouteLimits]) -> None:
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own shape, which this service never sends
        schemas.pop(name, None)
    body_schema = ErrorResponse.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= body_schema.pop("$defs") | {"ErrorResponse": body_schema}
    document["components"]["securitySchemes"] = SECURITY_SCHEMES
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            route_limits = limits[method.upper(), path]
            operation["security"] = [{BEARER_SCHEME: []}] if route_limits.access == "caller" else []
            responses = operation["responses"]
            responses.pop("422", None)
            for status in _error_statuses(method.upper(), path, operation, route_limits):
                responses.setdefault(str(status), {"description": DESCRIPTIONS[status], "content": content})


def _error_statuses(method: str, path: str, operation: dict[str, Any], limits: RouteLimits) -> list[int]:
    has_body, has_parameters = "requestBody" in operation, "parameters" in operation
    needs_caller = limits.access == "caller"
    possible = {
        400: has_body or has_parameters,
        401: needs_caller or limits.needs_token,
        403: True,
        404: "{" in path or has_body,  # a body names a dataset or a file in the object store
        409: method != "GET" if limits.can_conflict is None else limits.can_conflict,
        413: has_body,
        421: True,
        422: has_body or has_parameters,
        429: needs_caller,
        503: True,
    }
    return [status for status, can_happen in possible.items() if can_happen]
