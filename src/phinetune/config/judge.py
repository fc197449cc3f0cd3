"""The entry of `evaluation.metrics` that asks another model which of two answers is the better one."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from phinetune.config.format_fields import fields_of
from phinetune.config.section import Section
from phinetune.metric_table import RESERVED

JUDGE = "judge"
FIELDS = ("question", "reference", "answer_a", "answer_b")  # of a prompt
ENDPOINT = "/chat/completions"
# What people write for a key's value. A key does not belong into a configuration.
KEY_NAMES = ("key", "api_key", "token", "authorization")


class JudgeMetric(Section):
    """A judge: an endpoint that speaks OpenAI's chat completions, and how it is asked."""

    name: str = Field(JUDGE, pattern=r"^[a-z][a-z0-9_]*$", description="its key in results.json")
    url: str | None = Field(
        None, description="where the endpoint is, such as http://127.0.0.1:8000/v1 (`base_url` is the same)"
    )
    model: str = Field(description="the judge's name there")
    prompt: str | None = Field(
        None,
        description="how to ask, with {question}, {answer_a}, {answer_b} and, if wanted, {reference}; how the verdict "
        "is to be written is added",
    )
    reference: bool = Field(True, description="show the judge the chat's own answer")
    key_env: str | None = Field(
        None, description="the environment variable that holds the key; without it none is sent"
    )
    key_file: str | None = Field(None, description="or the file that holds it")
    max_tokens: int | None = Field(512, ge=1, description="tokens that a verdict may have; null says nothing of it")
    temperature: float | None = Field(0.0, ge=0, description="null says nothing of it, as some endpoints want it")
    timeout: float = Field(60.0, gt=0, le=3600, description="seconds that an answer may take")
    retries: int = Field(
        3, ge=0, le=20, description="how often a request is sent again that failed for a passing reason"
    )
    parallel: int = Field(4, ge=1, le=64, description="requests at a time")

    @model_validator(mode="before")
    @classmethod
    def _one_address(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        tree = dict(value)
        wrong = [key for key in tree if str(key).lower() in KEY_NAMES]
        if wrong:
            raise ValueError(
                f"`{wrong[0]}`: a key does not belong into a configuration; name the environment variable that holds "
                "it in `key_env`, or a file in `key_file`"
            )
        if tree.get("url") is not None and tree.get("base_url") is not None:
            raise ValueError("`url` and `base_url` are the same; keep one of them")
        if "base_url" in tree:
            tree["url"] = tree.pop("base_url")
        if tree.get("url") is None:
            raise ValueError("name the endpoint in `url`, such as http://127.0.0.1:8000/v1")
        return tree

    @field_validator("name")
    @classmethod
    def _free(cls, value: str) -> str:
        if value in RESERVED:
            raise ValueError(f"`{value}` is the name of another number; choose another")
        return value

    @field_validator("url")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        parts = urlsplit(value or "")
        if parts.username or parts.password:
            raise ValueError("an address with a password in it; name the key in `key_env` or `key_file`")
        if parts.query or parts.fragment:
            raise ValueError("an address without `?` and `#` is wanted; name a key in `key_env` or `key_file`")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("an address such as http://127.0.0.1:8000/v1 or https://api.openai.com/v1 is wanted")
        return value

    @field_validator("prompt")
    @classmethod
    def _template(cls, value: str | None) -> str | None:
        if value is None:
            return None
        named = fields_of(value)
        strange = [field for field in named if field not in FIELDS]
        lacking = [field for field in ("answer_a", "answer_b") if field not in named]
        if strange or lacking:
            told = f"there is no {{{strange[0]}}}" if strange else f"{{{lacking[0]}}} is missing"
            raise ValueError(f"{told}; its fields are {', '.join(f'{{{field}}}' for field in FIELDS)}")
        return value

    @model_validator(mode="after")
    def _one_key(self) -> JudgeMetric:
        if self.key_env and self.key_file:
            raise ValueError("`key_env` and `key_file` both say where the key is; keep one of them")
        return self

    @property
    def endpoint(self) -> str:
        """The address that requests go to."""
        address = str(self.url).rstrip("/")
        return address if address.endswith(ENDPOINT) else address + ENDPOINT

    @property
    def host(self) -> str:
        return str(urlsplit(str(self.url)).hostname)

    @property
    def is_here(self) -> bool:
        """Whether the endpoint is on this machine."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def is_open(self) -> bool:
        """Whether what is sent can be read on its way."""
        return not self.is_here and str(self.url).startswith("http://")

    @property
    def shows_reference(self) -> bool:
        return self.reference and (self.prompt is None or "reference" in fields_of(self.prompt))


def is_judge(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of `evaluation.metrics` is a judge."""
    return bool({"url", "base_url"} & entry.keys()) or entry.get("name") == JUDGE
