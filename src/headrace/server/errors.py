"""Errors as API clients see them: {"error": {message, type, param, code}}."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

TYPE_OF_STATUS = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class ErrorInfo(BaseModel):
    """What went wrong; param is the field to change, code the HTTP status."""

    message: str
    type: str
    param: str | None = None
    code: int


class ErrorResponse(BaseModel):
    """The body of every response that isn't a 2xx."""

    error: ErrorInfo


class ApiError(Exception):
    """Stop handling this request and answer with `status`; param names the field at fault."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        # Messages may quote the caller's text, which JSON lets contain lone surrogates.
        self.message = message.encode("utf-8", "backslashreplace").decode()
        self.param = param and param.encode("utf-8", "backslashreplace").decode()

    def body(self) -> ErrorResponse:
        """Return the error in OpenAI's form."""
        kind = TYPE_OF_STATUS.get(self.status, "BadRequestError")
        info = ErrorInfo(message=self.message, type=kind, param=self.param, code=self.status)
        return ErrorResponse(error=info)

    def response(self) -> JSONResponse:
        """Return the error as a whole HTTP response."""
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else None
        return JSONResponse(self.body().model_dump(), self.status, headers)


def bad_request(message: str, param: str | None = None) -> ApiError:
    """Build the error for a caller's mistake in `param`."""
    return ApiError(400, message, param)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route for the OpenAPI document."""
    return {s: {"model": ErrorResponse, "description": TYPE_OF_STATUS[s]} for s in statuses}


def install_handlers(app: FastAPI) -> None:
    """Make every error of `app` leave in OpenAI's form."""

    async def on_api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return from_validation(error.errors()).response()

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        response = ApiError(error.status_code, str(error.detail)).response()
        response.headers.update(error.headers or {})
        return response

    async def on_bug(request: Request, error: Exception) -> Response:
        return ApiError(500, f"internal error: {type(error).__name__}").response()

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_bug)


def from_validation(errors: Sequence[Any]) -> ApiError:
    """Name the first field at fault and say all that is wrong with it."""
    param = field_path(errors[0]["loc"])
    same_field = [e for e in errors if field_path(e["loc"]) == param]
    reasons = dict.fromkeys(explain(e) for e in same_field)
    where = f"{param}: " if param else ""
    return bad_request(where + "; or ".join(reasons), param or None)


def explain(error: Any) -> str:
    """Say in words what pydantic found."""
    if error["type"] == "extra_forbidden":
        return "this field is unknown or not supported"
    if error["type"] == "json_invalid":
        return f"the body is not valid JSON: {error['ctx']['error']} at byte {error['loc'][-1]}"
    if isinstance(error["input"], bytes):  # FastAPI parses only what is called JSON
        return "the body was not read as JSON: send the header Content-Type: application/json"
    if error["type"] == "value_error":  # ours; pydantic would say "Value error, " before it
        return str(error["ctx"]["error"])
    return str(error["msg"])


def field_path(loc: Sequence[str | int]) -> str:
    """Turn ("body", "messages", 0, "user", "content", "str") into "messages.0.content".

    Pydantic mixes the names of a union's members into the path; a member of a union stands
    after a list index (a role) or at the end (a type), where a field of that name never does.
    """
    parts: list[str] = []
    previous: str | int | None = None
    for part in loc[1:]:
        is_role = isinstance(previous, int) and part in ROLES
        is_type = isinstance(part, str) and (part in TYPE_NAMES or "[" in part)
        if not is_role and not (is_type and parts):
            parts.append(str(part))
        previous = part
    return "" if parts and parts[0].isdigit() else ".".join(parts)


ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
TYPE_NAMES = frozenset({"str", "constrained-str", "int", "NamedToolChoice", "[key]"})
