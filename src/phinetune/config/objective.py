"""The section `objective`: what a run trains for."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Field

from phinetune.config.section import Section


class ObjectiveSection(Section):
    """The kind of objective, and its own knobs beside `kind`. The objective validates these."""

    model_config = ConfigDict(extra="allow", validate_assignment=True)

    kind: str = Field(
        "sft",
        description="what a run trains for: sft, supervised fine-tuning on the answers of chats; dpo, orpo, simpo, "
        "a chosen answer against a rejected one each; kto, answers judged good or not. Each has knobs of its own "
        "beside `kind`, with TRL's names (beta, loss_type, …)",
    )

    @property
    def options(self) -> dict[str, Any]:
        """The keys that are given beside `kind`."""
        return dict(self.model_extra or {})
