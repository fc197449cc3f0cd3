"""Which token is taken of logits that a test writes by hand."""

from __future__ import annotations

import pytest
import torch

from phinetune.engine.continuous.choosing import Chooser
from phinetune.engine.continuous.requests import Request


@pytest.mark.parametrize("temperature", [1e-300, 1e-310, 5e-324])
@pytest.mark.parametrize("top_p", [0.0, 0.5, 1.0])
def test_a_temperature_by_which_quotients_overflow_takes_the_likeliest(temperature: float, top_p: float) -> None:
    logits = torch.tensor([3.0, -torch.inf, 7.25, 7.0, -100.0])
    for sign in (1, -1):
        chooser = Chooser(Request([1], 3, temperature=temperature, top_p=top_p, seed=1))
        assert [chooser.choose(logits + sign * 20).id for _ in range(3)] == [2, 2, 2]
