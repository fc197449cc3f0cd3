"""What a client may ask of a new fine-tuning job: the parameters of OpenAI's API, checked."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

SUFFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LARGEST_SEED = 2**31 - 1

METHODS = ("supervised", "dpo", "reinforcement")

Auto = Literal["auto"]
Epochs = Auto | Annotated[int, Field(ge=1, le=50)]
Batch = Auto | Annotated[int, Field(ge=1, le=256)]
Multiplier = Auto | Annotated[float, Field(gt=0, le=100)]


class Parameters(BaseModel):
    """Parameters of a request. An unknown one is refused, as OpenAI's API refuses it."""

    model_config = ConfigDict(extra="forbid")


class Hyperparameters(Parameters):
    """How long, in how large steps and how fast a job learns.

    `learning_rate_multiplier` is a factor of the rate that phinetune's rule gives for the model, the number of steps
    and the method (docs/choices.md); `auto` is 1.
    """

    n_epochs: Epochs | None = None
    batch_size: Batch | None = None
    learning_rate_multiplier: Multiplier | None = None


class DpoHyperparameters(Hyperparameters):
    """The same, and how much the tuned model is held to the one it began as."""

    beta: Auto | Annotated[float, Field(gt=0, le=2)] | None = None


class Supervised(Parameters):
    hyperparameters: Hyperparameters | None = None


class Dpo(Parameters):
    hyperparameters: DpoHyperparameters | None = None


class Method(Parameters):
    """The method. Reinforcement is refused in `JobRequest`, with a sentence."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_method(self) -> Method:
        others = [name for name in METHODS if name != self.type and getattr(self, name) is not None]
        if others:
            raise ValueError(f"`{others[0]}` does not go with the type `{self.type}`")
        return self


class Wandb(Parameters):
    project: Annotated[str, Field(min_length=1, max_length=128)]
    name: Annotated[str, Field(max_length=128)] | None = None
    entity: Annotated[str, Field(max_length=128)] | None = None
    tags: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=32)] | None = None


class Integration(Parameters):
    type: Literal["wandb"]
    wandb: Wandb

    @field_validator("type")
    @classmethod
    def _installed(cls, value: str) -> str:
        if find_spec("wandb") is None:
            raise ValueError("Weights & Biases is not installed on this server (`pip install wandb` there)")
        return value


Key = Annotated[str, Field(min_length=1, max_length=64)]
Metadata = Annotated[dict[Key, Annotated[str, Field(max_length=512)]], Field(max_length=16)]


class JobRequest(Parameters):
    """The body of a request for a new job."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    training_file: Annotated[str, Field(min_length=1, max_length=128)]
    validation_file: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = Field(None, description="the older form of method.supervised")
    suffix: Annotated[str, Field(max_length=64)] | None = None
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] | None = None
    metadata: Metadata | None = None
    integrations: Annotated[list[Integration], Field(max_length=1)] | None = None

    @field_validator("suffix")
    @classmethod
    def _suffix(cls, value: str | None) -> str | None:
        if value and not SUFFIX.fullmatch(value):
            raise ValueError(
                "a suffix has up to 64 letters, digits, `.`, `_` and `-`, and begins with one of the first"
            )
        return value

    @model_validator(mode="after")
    def _one_place(self) -> JobRequest:
        if self.hyperparameters and self.method and self.method.type != "supervised":
            raise ValueError("`hyperparameters` is the older form of `method.supervised`; give one of them")
        if self.hyperparameters and self.method and self.method.supervised and self.method.supervised.hyperparameters:
            raise ValueError("`hyperparameters` is the older form of `method.supervised`; give one of them")
        return self

    @property
    def kind(self) -> str:
        """`supervised`, `dpo` or `reinforcement`."""
        return self.method.type if self.method else "supervised"

    @property
    def wanted(self) -> Hyperparameters:
        """The hyperparameters, wherever they stand."""
        given: Hyperparameters | None = self.hyperparameters
        if self.method and self.method.type == "dpo":
            return (self.method.dpo and self.method.dpo.hyperparameters) or DpoHyperparameters()
        if self.method and self.method.supervised and self.method.supervised.hyperparameters:
            given = self.method.supervised.hyperparameters
        return given or Hyperparameters()
