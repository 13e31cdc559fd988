"""OpenAI's chat protocol: what a request may hold, and how answers and errors look. Knows neither Ray nor the model.

A field that this server does not support is an error with the field's name, never ignored, unless it asks for nothing.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import from_json

from artemis_vlm.errors import ArtemisError, SampleError

MAX_MESSAGES: Final = 256
MAX_IMAGES: Final = 8
#: Fields that are not supported, at the values that ask for nothing.
IDLE: Final[dict[str, Any]] = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logprobs": False,
    "top_logprobs": 0,
    "logit_bias": {},
    "stop": [],
    "store": False,
    "metadata": {},
    "modalities": ["text"],
    "service_tier": "auto",
    "response_format": {"type": "text"},
    "parallel_tool_calls": True,
}
_DATA_URI: Final = re.compile(r"data:image/(?:jpeg|jpg|png|webp|gif);base64,", re.IGNORECASE)


class ApiError(ArtemisError):
    """An error as the client sees it: HTTP status, OpenAI's type and code, the parameter at fault."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> dict[str, Any]:
        kinds = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        retry = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return retry | ({"WWW-Authenticate": 'Basic realm="A3"'} if self.status == 401 else {})


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, fields: Any) -> Any:
        """A field that is null is one that is not there, as clients send what nobody set."""
        return {name: value for name, value in fields.items() if value is not None} if isinstance(fields, dict) else fields


class ImageUrl(_Strict):
    url: str
    #: Accepted since clients send it; the checkpoint decides how large its images are.
    detail: Literal["auto", "low", "high"] = "auto"


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class Function(_Strict):
    name: str
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool | None = None


class Tool(_Strict):
    type: Literal["function"]
    function: Function


class CalledFunction(_Strict):
    name: str
    arguments: str


class ToolCall(_Strict):
    id: str
    type: Literal["function"]
    function: CalledFunction


Parts = list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Parts | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    #: Clients send their last answer back whole.
    refusal: None = None


class StreamOptions(_Strict):
    include_usage: bool = False


class ChatRequest(_Strict):
    model: str
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[Annotated[str, StringConstraints(min_length=1)]] | None = None
    n: Literal[1] | None = None
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["auto", "none"] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_idle(cls, fields: Any) -> Any:
        """Other values of these fields are refused, as fields that are not known."""
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if name not in IDLE or value != IDLE[name]}

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def thinking(self) -> bool | None:
        return None if self.reasoning_effort is None else self.reasoning_effort != "none"

    def image_urls(self) -> list[str]:
        """In order of appearance."""
        return [
            part.image_url.url
            for message in self.messages
            for part in (message.content if isinstance(message.content, list) else ())
            if isinstance(part, ImagePart)
        ]

    def plain_messages(self) -> list[dict[str, Any]]:
        """As `chat.encode_prompt` takes them, without image data."""
        return [_plain_message(m) for m in self.messages]

    def plain_tools(self) -> list[dict[str, Any]] | None:
        if self.tool_choice == "none" or not self.tools:
            return None
        return [t.model_dump(exclude_none=True) for t in self.tools]


def parse_chat(body: bytes) -> ChatRequest:
    """A request's body.

    Raises:
        ApiError: 400 with the sentence and the field at fault.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _validation_error(error) from error
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is not JSON") from error
    if request.stop is not None and not (request.stops and all(request.stops) and len(request.stops) <= 4):
        raise ApiError(400, "stop must be 1 to 4 strings that are not empty", "stop")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options needs stream to be true", "stream_options")
    _check_images(request)
    return request


def _check_images(request: ChatRequest) -> None:
    for index, message in enumerate(request.messages):
        param = f"messages[{index}].content"
        parts = message.content if isinstance(message.content, list) else []
        if message.role != "user" and any(isinstance(part, ImagePart) for part in parts):
            raise ApiError(400, f"a message of the role {message.role} holds an image; only user messages may", param)
        if message.content is None and not (message.role == "assistant" and message.tool_calls):
            raise ApiError(400, "a message has no content", param)
    urls = request.image_urls()
    if len(urls) > MAX_IMAGES:
        raise ApiError(400, f"the messages hold {len(urls)} images; the limit is {MAX_IMAGES}", "messages")
    if urls and request.plain_tools():
        raise ApiError(400, "tools are for requests without images", "tools")


def _validation_error(error: ValidationError) -> ApiError:
    """The first problem, in OpenAI's shape; never with the value, which may be an image."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    # Where a value may be of several kinds, the problem found deepest is that of the kind that was meant.
    first = max(problems, key=lambda problem: len(problem["loc"]))
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not JSON")
    param = "".join(f"[{s}]" if isinstance(s, int) else f".{s}" for s in _path(first["loc"])).lstrip(".")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"{param} is not supported by this server", param or None, "unsupported_parameter")
    return ApiError(400, f"{param or 'the body'}: {first['msg'][:200]}", param or None)


def _path(location: tuple[int | str, ...]) -> Iterator[int | str]:
    """The fields and indices of a location, without the kinds that pydantic tried on the way."""
    steps = iter(location)
    for step in steps:
        if step == "str":
            continue
        if isinstance(step, str) and step.startswith("list["):
            yield from (index for index in [next(steps, None)] if index is not None)
            if "tagged-union" in step:
                next(steps, None)
            continue
        yield step


def _plain_message(message: Message) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    if isinstance(message.content, str):
        plain["content"] = message.content
    elif message.content is not None:
        plain["content"] = [
            {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
            for part in message.content
        ]
    if message.reasoning_content:
        plain["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        plain["tool_calls"] = [_plain_call(c) for c in message.tool_calls]
    return plain


def _plain_call(call: ToolCall) -> dict[str, Any]:
    try:
        # As bodies are read, and unlike `json`: no deeper than the stages can follow, no half characters.
        arguments = from_json(call.function.arguments or "{}")
    except ValueError as error:
        raise ApiError(400, f"the arguments of a tool call are not JSON: {error}", "messages") from error
    return {"type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def image_of_data_uri(uri: str) -> bytes:
    """Raises SampleError on anything but base64 of an image type."""
    head = _DATA_URI.match(uri)
    if head is None:
        raise SampleError("the image's data URI must begin with data:image/jpeg;base64, or png, webp or gif")
    try:
        return base64.b64decode(uri[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise SampleError("the image's data URI is not valid base64") from error


# --- answers ---------------------------------------------------------------------------------------------------------

Channel = Literal["content", "reasoning", "tool_call"]
#: Markers that move the text from one channel to another.
_MARKERS: Final[dict[str, Channel]] = {
    "<think>": "reasoning",
    "</think>": "content",
    "<tool_call>": "tool_call",
    "</tool_call>": "content",
}
_MARKER: Final = re.compile("|".join(map(re.escape, _MARKERS)))


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of one channel; a tool call comes whole."""

    channel: Channel
    text: str


@dataclass(slots=True)
class AnswerParser:
    """An answer with its special tokens spelled out, to thoughts, content and tool calls, as it comes."""

    channel: Channel = "content"
    _held: str = ""
    _call: str = ""
    _fresh: bool = field(default=True)

    def feed(self, text: str, last: bool = False) -> Iterator[Piece]:
        """Pieces that are certain; a possible marker's beginning waits, until the last."""
        text = self._held + text
        self._held = ""
        while found := _MARKER.search(text):
            yield from self._emit(text[: found.start()])
            yield from self._move(_MARKERS[found[0]])
            text = text[found.end() :]
        keep = 0 if last else max(_overlap(text, marker) for marker in _MARKERS)
        self._held = text[len(text) - keep :]
        yield from self._emit(text[: len(text) - keep])
        if last and self._call.strip():  # cut off in the middle of a call: shown as it is
            yield Piece("content", f"<tool_call>{self._call}")
            self._call = ""

    def _emit(self, text: str) -> Iterator[Piece]:
        if self.channel == "tool_call":
            self._call += text
            return
        if self._fresh:  # the newlines that a template puts around its blocks
            text = text.lstrip("\n")
        if text:
            self._fresh = False
            yield Piece(self.channel, text)

    def _move(self, channel: Channel) -> Iterator[Piece]:
        if self.channel == "tool_call":
            call, self._call = self._call.strip(), ""
            yield Piece("tool_call", call) if _is_call(call) else Piece("content", f"<tool_call>{call}</tool_call>")
        self.channel, self._fresh = channel, True


def _overlap(text: str, marker: str) -> int:
    return next((n for n in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:n])), 0)


def _is_call(text: str) -> bool:
    try:
        call = from_json(text)
    except ValueError:
        return False
    return isinstance(call, dict) and isinstance(call.get("name"), str)


def tool_call(text: str, answer_id: str, index: int) -> dict[str, Any]:
    """A call as the decoder writes it, in OpenAI's shape."""
    call = from_json(text)
    arguments = json.dumps(call.get("arguments", {}), ensure_ascii=False)
    return {
        "id": f"call_{answer_id[-24:]}_{index}",
        "type": "function",
        "function": {"name": call["name"], "arguments": arguments},
    }


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int

    def to_dict(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens, "total_tokens": total}


@dataclass(slots=True)
class AnswerFormat:
    """One answer's JSON, whole or in chunks."""

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))
    calls: int = 0

    def whole(self, pieces: Sequence[Piece], finish_reason: str, usage: Usage) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": _join(pieces, "content"), "refusal": None}
        if reasoning := _join(pieces, "reasoning"):
            message["reasoning_content"] = reasoning
        calls = [tool_call(p.text, self.id, i) for i, p in enumerate(p for p in pieces if p.channel == "tool_call")]
        if calls:
            message["tool_calls"], finish_reason = calls, "tool_calls"
            message["content"] = message["content"] or None
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage.to_dict()}

    def first(self) -> str:
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, piece: Piece) -> str:
        if piece.channel == "tool_call":
            call = {"index": self.calls, **tool_call(piece.text, self.id, self.calls)}
            self.calls += 1
            return self._chunk({"tool_calls": [call]})
        return self._chunk({"content" if piece.channel == "content" else "reasoning_content": piece.text})

    def last(self, finish_reason: str) -> str:
        return self._chunk({}, "tool_calls" if self.calls else finish_reason)

    def usage(self, usage: Usage) -> str:
        return event({**self._head("chat.completion.chunk"), "choices": [], "usage": usage.to_dict()})

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event({**self._head("chat.completion.chunk"), "choices": [choice]})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def event(data: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


DONE: Final = "data: [DONE]\n\n"


def _join(pieces: Sequence[Piece], channel: Channel) -> str:
    return "".join(p.text for p in pieces if p.channel == channel)
