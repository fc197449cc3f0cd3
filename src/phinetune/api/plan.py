"""`plan`: what a run will take, before it begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phinetune.api.before import look_at_rows, look_at_settings
from phinetune.api.sections import DataValue, SectionValue, holds_data, make_sections
from phinetune.config.run import RunConfig
from phinetune.logs import quiet_libraries
from phinetune.planning.plan import Plan, plan_prepared
from phinetune.training.prepare import prepare_run, settle


@holds_data
def plan(
    model: SectionValue = None,
    data: DataValue = None,
    peft_config: Mapping[str, Any] | None = None,
    training_config: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    *,
    objective: SectionValue = None,
    engine: SectionValue = None,
    probe: bool = True,
) -> Plan:
    """Say what a run will take of memory, time and disk, and what would fit if it does not.

    Args:
        model, data, peft_config, training_config, evaluation, objective, engine: see `train`.
        probe: measure a layer of the model on this machine, for the time.

    Raises:
        PhinetuneError: what the run itself would stop at before it trains.
    """
    config = make_sections(
        model=model,
        data=data,
        peft_config=peft_config,
        training_config=training_config,
        evaluation=evaluation,
        objective=objective,
        engine=engine,
    )
    return plan_config(config, probe=probe)


def plan_config(config: RunConfig, *, probe: bool = True) -> Plan:
    """`plan` for a validated configuration."""
    quiet_libraries()
    settled = settle(config)
    metrics = look_at_settings(settled)
    prepared = prepare_run(settled)
    look_at_rows(prepared, metrics)
    return plan_prepared(prepared, probe=probe)
