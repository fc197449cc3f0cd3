"""The registry of objectives: the values of `objective.kind`."""

from __future__ import annotations

from pydantic import ValidationError

from phinetune.config.objective import ObjectiveSection
from phinetune.config.section import entry_sentence
from phinetune.errors import ConfigError, unknown_key
from phinetune.training.objectives.dpo import Dpo
from phinetune.training.objectives.kto import Kto
from phinetune.training.objectives.objective import Objective
from phinetune.training.objectives.orpo import Orpo
from phinetune.training.objectives.sft import Sft
from phinetune.training.objectives.simpo import Simpo

# By the value of `objective.kind`.
OBJECTIVES: dict[str, type[Objective]] = {"sft": Sft, "dpo": Dpo, "orpo": Orpo, "simpo": Simpo, "kto": Kto}


def make_objective(section: ObjectiveSection) -> Objective:
    """The objective that the section names, with its knobs validated.

    Raises:
        ConfigError: no objective of that kind, or a key or value that it does not take; all problems at once.
    """
    kind = objective_kind(section)
    try:
        return kind(kind.Options.model_validate(section.options))
    except ValidationError as error:
        raise ConfigError([entry_sentence(kind.Options, "objective", one) for one in error.errors()]) from None


def objective_kind(section: ObjectiveSection) -> type[Objective]:
    """The class of the objective that the section names.

    Raises:
        ConfigError: there is none of that kind.
    """
    kind = OBJECTIVES.get(section.kind)
    if kind is None:
        sentence = unknown_key("objective.kind", section.kind, OBJECTIVES).replace("no key", "no objective")
        raise ConfigError(f"{sentence} (there are: {', '.join(OBJECTIVES)})")
    return kind
