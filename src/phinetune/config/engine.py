"""The section `engine`: how a training step is computed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from phinetune.config.section import Section


class EngineSection(Section):
    """How a training step is computed."""

    kind: Literal["fast", "plain"] = Field(
        "fast", description="fast: packed rows and fused operators; plain: transformers and PEFT as they are"
    )
    activation_memory: Literal["auto", "none", "all"] | Annotated[int, Field(ge=0)] = Field(
        "auto",
        description="what is recomputed in the backward to save memory: auto (as little as fits the free memory; "
        "on a processor the cheap parts of what is beyond 1 GiB, too), none, all layers, or the first N layers",
    )
    share_prefixes: bool = Field(True, description="compute a beginning that chats of a step share only once")
    compile: bool = Field(
        False, description="compile the element-wise operators with torch.compile where they have no native form"
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="what becomes of a step whose loss or gradients are not finite: stop (the run ends, earlier "
        "checkpoints are kept) or skip (the step changes nothing)",
    )
    nonfinite_limit: int = Field(10, ge=0, description="with on_nonfinite: skip, how many steps a run may skip")
