"""HTTP bodies into generations. What is wrong with a request is said in one sentence."""

from __future__ import annotations

import base64
import binascii
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jobs.serving import multipart
from jobs.serving.generation import Sampling

DEFAULT_TOKENS = 64
"""``max_tokens`` of those who give none, if the context has room for so many."""


class RequestError(Exception):
    """A request that cannot be answered; ``status`` is the HTTP status."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


Text = Annotated[str, Field(min_length=1)]


class _Sampled(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stream: bool = False
    model: str | None = None

    def sampling(self) -> Sampling:
        """The seed is drawn here where none is given, so that the answer can be continued elsewhere."""
        seed = secrets.randbelow(1 << 32) if self.seed is None else self.seed
        return Sampling(self.temperature, self.top_p, seed)


class CompletionRequest(_Sampled):
    """As in OpenAI's completions; greedy by default."""

    prompt: Text
    stop: Text | Annotated[tuple[Text, ...], Field(max_length=8)] = ()

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else self.stop


class CaptionRequest(_Sampled):
    """``image`` and ``audio`` are files' contents."""

    image: bytes
    language: Text | None = None
    audio: bytes | None = None


@dataclass(frozen=True, slots=True)
class Body:
    """A request's body with the type that its header gives."""

    content_type: str
    content: bytes

    @property
    def kind(self) -> str:
        return self.content_type.partition(";")[0].strip().lower()


def read_completion(body: Body) -> CompletionRequest:
    """Raises RequestError."""
    return _validated(CompletionRequest, _json(body, "application/json"), strict=True)


def read_caption(body: Body) -> CaptionRequest:
    """From JSON with base64, a form with files, or an image alone. Raises RequestError."""
    if body.kind == "multipart/form-data":
        try:
            parts = multipart.parse(body.content_type, body.content)
        except ValueError as error:
            raise RequestError(400, str(error)) from None
        values: dict[str, Any] = {}
        for part in parts:
            if part.name in values:
                raise RequestError(400, f"the form has more than one field {part.name}: send one")
            is_file = part.name in ("image", "audio")
            values[part.name] = part.content if is_file else part.content.decode("utf-8", errors="replace")
        if not values.get("audio", b"-"):
            del values["audio"]  # a browser sends an empty file for a field that was left alone
        if not values.get("language", "-"):
            del values["language"]
    elif body.kind.startswith("image/"):
        values = {"image": body.content}
    else:
        values = dict(_json(body, "application/json, multipart/form-data or image/*"))
        for name in ("image", "audio"):
            if name in values:
                values[name] = _decoded(name, values[name])
    if not values.get("image"):
        raise RequestError(400, "there is no image: send one as a file, or as base64 in the field image")
    return _validated(CaptionRequest, values, strict=body.kind == "application/json")


def _json(body: Body, wanted: str) -> Mapping[str, Any]:
    if body.kind != "application/json":
        raise RequestError(415, f"the Content-Type is {body.kind or 'missing'}: send {wanted}")
    try:
        value = json.loads(body.content)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the body is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise RequestError(400, "the body is no JSON object: send fields and their values in braces")
    return value


def _decoded(name: str, value: object) -> bytes | None:
    if value is None and name == "audio":
        return None
    if not isinstance(value, str):
        raise RequestError(400, f"{name} must be a string: the file's content as base64")
    if value.lower().startswith("data:"):
        value = value.partition(",")[2]
    elif "://" in value[:16]:
        raise RequestError(400, f"{name} is an address, and none is fetched: send the content as base64")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(400, f"{name} is no base64") from None


Schema = TypeVar("Schema", bound=BaseModel)


def _validated(schema: type[Schema], values: Mapping[str, Any], *, strict: bool) -> Schema:
    unknown = sorted(set(values) - set(schema.model_fields))
    if unknown:
        known = ", ".join(schema.model_fields)
        raise RequestError(400, f"the field {unknown[0]} is not known: choose from {known}")
    try:
        # JSON has lists where Python has tuples
        fitting = {key: tuple(each) if isinstance(each, list) else each for key, each in values.items()}
        return schema.model_validate(fitting, strict=strict)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else "the request"
        if first["type"] == "missing":
            raise RequestError(400, f"the field {name} is missing") from None
        reason = first["msg"][:1].lower() + first["msg"][1:]
        raise RequestError(400, f"{name} is not as it should be: {reason}") from None
