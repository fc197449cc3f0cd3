"""The registry of objectives: the values of `objective.kind`."""

from __future__ import annotations

from pydantic import ValidationError

from phinetune.config.objective import ObjectiveSection
from phinetune.config.section import entry_sentence
from phinetune.errors import ConfigError, unknown_key
from phinetune.training.objectives.objective import Objective
from phinetune.training.objectives.sft import Sft

# By the value of `objective.kind`.
OBJECTIVES: dict[str, type[Objective]] = {"sft": Sft}


def make_objective(section: ObjectiveSection) -> Objective:
    """The objective that the section names, with its knobs validated.

    Raises:
        ConfigError: no objective of that kind, or a key or value that it does not take; all problems at once.
    """
    kind = OBJECTIVES.get(section.kind)
    if kind is None:
        sentence = unknown_key("objective.kind", section.kind, OBJECTIVES).replace("no key", "no objective")
        raise ConfigError(f"{sentence} (there are: {', '.join(OBJECTIVES)})")
    try:
        return kind(kind.Options.model_validate(section.options))
    except ValidationError as error:
        raise ConfigError([entry_sentence(kind.Options, "objective", one) for one in error.errors()]) from None
