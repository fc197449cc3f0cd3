"""The registry of objectives: what it holds is in the help, and what it does not hold is refused."""

from __future__ import annotations

import pytest

from phinetune.config.objective import ObjectiveSection
from phinetune.config.run import describe_config
from phinetune.errors import ConfigError
from phinetune.training.objectives.registry import OBJECTIVES, make_objective


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_each_objective_is_named_in_the_help(kind: str) -> None:
    assert OBJECTIVES[kind].kind == kind
    assert f"{kind}, " in {key: text for key, _, text in describe_config()}["objective.kind"]
    assert isinstance(make_objective(ObjectiveSection(kind=kind)), OBJECTIVES[kind])


def test_an_unknown_one_is_refused_with_all_that_there_are() -> None:
    with pytest.raises(ConfigError) as caught:
        make_objective(ObjectiveSection(kind="stf"))
    there_are = "(there are: sft, dpo, orpo, simpo, kto)"
    assert str(caught.value) == f"objective.kind: there is no objective `stf`; did you mean `sft`? {there_are}"
