"""`training_config.fsdp`: each word and key is used, refused or named as without effect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phinetune.errors import ConfigError
from phinetune.training.settings import read_settings
from phinetune.training.spread import take_spread


def taken(environment: dict[str, str] | None = None, **training: Any) -> tuple[bool, list[str], list[str]]:
    problems: list[str] = []
    notes: list[str] = []
    return take_spread(training, problems, notes, {} if environment is None else environment), problems, notes


@pytest.mark.parametrize("value", [True, "full_shard", "full_shard auto_wrap", ["full_shard", "auto_wrap"]])
def test_every_way_to_ask_for_it_is_taken(value: Any) -> None:
    assert taken(fsdp=value) == (True, [], [])
    assert read_settings({}, {"fsdp": value}).spread


@pytest.mark.parametrize("value", [None, False, "", []])
def test_without_it_nothing_is_spread(value: Any) -> None:
    assert taken(fsdp=value) == (False, [], [])


def test_a_configuration_may_lie_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "fsdp.json"
    file.write_text(json.dumps({"fsdp_reshard_after_forward": False, "fsdp_version": 2}))
    spread, (problem,), _ = taken(fsdp=True, fsdp_config=str(file))
    assert spread
    assert "reshard_after_forward: False: a layer's gathered weights are dropped" in problem
    assert taken(fsdp=True, fsdp_config={"reshard_after_forward": "true", "version": "2"}) == (True, [], [])


def test_what_is_not_done_is_refused_all_at_once() -> None:
    given = {"cpu_offload": True, "version": 1, "xla": True, "shards": 3, "reshard_after_forward": "some"}
    _, problems, _ = taken(fsdp="full_shard offload hybrid_shard whole", fsdp_config=given)
    for part in (
        "fsdp: `whole` is none of",
        "fsdp: offload: weights are not moved",
        "fsdp: hybrid_shard: each layer is spread over all",
        "fsdp_config: cpu_offload: ",
        "fsdp_config: version: 1: FSDP2 alone",
        "fsdp_config: xla: ",
        "there is no key `shards` (there are activation_checkpointing, ",
        "reshard_after_forward: some: a layer's gathered",
    ):
        assert sum(part in problem for problem in problems) == 1, part
    assert len(problems) == 8
    assert "FileNotFound" not in str(taken(fsdp=True, fsdp_config="/no/such.json")[1])
    assert "/no/such.json" in str(taken(fsdp=True, fsdp_config="/no/such.json")[1])


def test_what_has_no_effect_is_named() -> None:
    given = {"activation_checkpointing": True, "limit_all_gathers": False, "state_dict_type": "SHARDED_STATE_DICT"}
    _, problems, notes = taken(fsdp=True, fsdp_config=given)
    assert not problems
    assert [note.split("`")[1] for note in notes] == ["activation_checkpointing", "state_dict_type"]


def test_an_accelerate_configuration_asks_for_the_same() -> None:
    environment = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    spread, problems, notes = taken(environment)
    assert (spread, problems) == (True, [])
    assert notes == ["FSDP as the configuration of `accelerate launch` asks for it"]
    assert "ACCELERATE_USE_FSDP" not in environment  # or Accelerate would shard once more
    assert "FSDP2 alone" in str(taken({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"})[1])


def test_problems_come_with_the_others_of_the_configuration() -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings({}, {"fsdp": "offload", "learning_rte": 1})
    assert len(caught.value.problems) == 2
