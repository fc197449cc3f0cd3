"""What other libraries say: PEFT's warning for every layer with a bias is one line of phinetune's in its place."""

from __future__ import annotations

import warnings

import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

from phinetune.logs import quiet_libraries


@pytest.mark.parametrize("quiet", [False, True])
def test_pefts_warning_for_a_bias_is_quiet(quiet: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if quiet:
            quiet_libraries()
        get_peft_model(nn.Sequential(nn.Linear(4, 4, bias=False)), LoraConfig(target_modules=["0"], lora_bias=True))
    assert any("lora_bias=True" in str(one.message) for one in caught) is not quiet
