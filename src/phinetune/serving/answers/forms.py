"""The bodies of requests for answers, as OpenAI's API has them, and what becomes of parameters that do nothing here.

A parameter that the API does not have is refused, as OpenAI refuses it. One that asks for what is not there is refused,
too. One that changes no answer (`user`, `service_tier`, …) is ignored, and a line in the log says so.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from phinetune.serving.errors import ApiError, unknown_parameter
from phinetune.serving.job_request import Metadata, Parameters

logger = logging.getLogger(__name__)

IGNORED = "parameter %s: ignored, it changes no answer here"
MOST_CHOICES = 32
TOKEN_ID = re.compile("[0-9]{1,9}")  # of any vocabulary; Python itself refuses to read thousands of digits
Number = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]


class StreamOptions(Parameters):
    """What a stream holds besides the answer."""

    include_usage: bool | None = False
    include_obfuscation: bool | None = None


class Asked(BaseModel):
    """What all requests for answers have in common."""

    model_config = ConfigDict(extra="allow")

    # Parameters that change no answer, and those that ask for what is not there unless they have one of these values.
    ignored: ClassVar[tuple[str, ...]] = ()
    refused: ClassVar[dict[str, tuple[Any, ...]]] = {}

    model: Annotated[str, Field(min_length=1, max_length=512)]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None

    def check(self) -> None:
        """Refuse or ignore what is not used.

        Raises:
            ApiError: a parameter that does not exist, or asks for what is not there.
        """
        for name, value in (self.model_extra or {}).items():
            if name in self.refused:
                if value is not None and value not in self.refused[name]:
                    raise ApiError(
                        400, f"'{name}' is not there on this server.", code="unsupported_parameter", param=name
                    )
            elif name not in self.ignored:
                raise unknown_parameter(name)
            elif value is not None:
                logger.info(IGNORED, name)
        for name in self.idle():
            logger.info(IGNORED, name)
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "'stream_options' is for 'stream': true.", param="stream_options")

    def idle(self) -> Iterator[str]:
        """The places of parameters within others that were given and change no answer."""
        if self.stream_options and self.stream_options.include_obfuscation:
            yield "stream_options.include_obfuscation"


def _idle_of_schema(form: JsonSchema | TextFormat, place: str) -> Iterator[str]:
    """What of a schema's parameters changes no answer: an answer is kept to the schema whatever `strict` is."""
    if form.description is not None:
        yield f"{place}.description"
    if form.strict is False:
        yield f"{place}.strict"


class Sampled(Asked):
    """What chat completions and completions have in common."""

    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = 1
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    presence_penalty: Number | None = 0
    frequency_penalty: Number | None = 0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None

    @property
    def stops(self) -> list[str]:
        """The texts at which an answer ends.

        Raises:
            ApiError: more than the API takes, or an empty one.
        """
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > 4 or any(not stop for stop in stops):
            raise ApiError(400, "'stop' takes up to 4 texts that are not empty.", code="invalid_value", param="stop")
        return stops

    def bias(self, vocabulary: int) -> dict[int, float]:
        """`logit_bias` by token id.

        Raises:
            ApiError: a key is no token id of the model.
        """
        given = self.logit_bias or {}
        bad = [key for key in given if not (TOKEN_ID.fullmatch(key) and int(key) < vocabulary)]
        if bad:
            raise ApiError(400, f"'{bad[0][:40]}' is no token id.", code="invalid_value", param="logit_bias")
        return {int(key): value for key, value in given.items()}


class JsonSchema(Parameters):
    """A schema that an answer has to keep to."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Parameters):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatAsked(Sampled):
    """A request for a chat completion."""

    ignored = (
        *("user", "service_tier", "reasoning_effort", "verbosity"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier"),
    )
    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        "audio": (),
        "modalities": (["text"],),
        "prediction": (),
        "web_search_options": (),
        "moderation": (),
        "functions": ([],),
        "function_call": ("none",),
    }

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    response_format: ResponseFormat | None = None
    store: bool | None = False
    metadata: Metadata | None = None

    def check(self) -> None:
        super().check()
        if self.metadata and not self.store:
            logger.info("parameter metadata: ignored, since the answer is not kept ('store')")
        form = self.response_format
        if form and form.json_schema and form.type != "json_schema":
            raise unknown_parameter("response_format.json_schema")

    def idle(self) -> Iterator[str]:
        yield from super().idle()
        if self.response_format and self.response_format.json_schema:
            yield from _idle_of_schema(self.response_format.json_schema, "response_format.json_schema")


class CompletionAsked(Sampled):
    """A request for a completion."""

    ignored = ("user",)
    refused: ClassVar[dict[str, tuple[Any, ...]]] = {"suffix": ("",)}

    prompt: str | list[str] | list[int] | list[list[int]] = "<|endoftext|>"
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


class TextFormat(Parameters):
    """The form of a response's text; `json_schema` has the schema beside its type here."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Parameters):
    """How a response's text is to be."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ResponseAsked(Asked):
    """A request for a response."""

    ignored = (
        *("user", "service_tier", "parallel_tool_calls", "reasoning", "max_tool_calls", "tool_choice"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier", "truncation"),
    )
    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        "background": (False,),
        "background_options": (),
        "conversation": (),
        "context_management": ([],),
        "include": ([],),
        "image": (),
        "moderation": (),
        "prompt": (),
        "access_programs": (),
        "tools": ([],),
        "top_logprobs": (0,),
    }

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    previous_response_id: str | None = None
    store: bool | None = True
    metadata: Metadata | None = None
    text: TextOptions | None = None

    def check(self) -> None:
        super().check()
        form = self.text.format if self.text else None
        if form and form.type != "json_schema":
            for key in form.model_dump(by_alias=True, exclude={"type"}, exclude_none=True):
                raise unknown_parameter(f"text.format.{key}")

    def idle(self) -> Iterator[str]:
        yield from super().idle()
        if self.text and self.text.verbosity is not None:
            yield "text.verbosity"
        if self.text and self.text.format:
            yield from _idle_of_schema(self.text.format, "text.format")
