"""Every argument of every layer: what makes no sense is refused with its name and value, and what does is taken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from phinetune import lora

ARGS: dict[str, tuple[Any, ...]] = {
    "Linear": (4, 6),
    "MergedLinear": (4, 6),
    "Embedding": (7, 4),
    "Conv1d": (2, 4, 3),
    "Conv2d": (2, 4, 3),
    "Conv3d": (2, 4, 3),
}
NAN, INF = float("nan"), float("inf")
BAD: list[tuple[str, Any]] = [
    *(("r", value) for value in (-1, 2.0, 1.5, "8", None, True, [4], NAN)),
    *(("lora_alpha", value) for value in ("16", None, NAN, INF, -INF, [1], True)),
    *(("lora_dropout", value) for value in (-0.1, 1, 1.0, 7, "0.1", None, NAN, True)),
    *((name, value) for name in ("merge_weights", "use_rslora") for value in ("False", None, 2, 0.5, [True])),
]


def made(name: str, **options: Any) -> Any:
    enable = {"enable_lora": [True, False]} if name == "MergedLinear" else {}
    return getattr(lora, name)(*ARGS[name], **{"r": 2, **enable, **options})


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [(name, *bad) for name in ARGS for bad in BAD if name != "Embedding" or bad[0] != "lora_dropout"],
    ids=str,
)
def test_what_makes_no_sense_is_refused(name: str, argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{argument} must ") as raised:
        made(name, **{argument: value})
    assert repr(value) in str(raised.value)


@pytest.mark.parametrize("name", ["Linear", "MergedLinear"])
@pytest.mark.parametrize("value", ["true", None, 2])
def test_the_layout_is_a_boolean(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"^fan_in_fan_out must be True or False"):
        made(name, fan_in_fan_out=value)


@pytest.mark.parametrize("value", ["qkv", ["q", "v"], True, None, {"q": True}, [0.5, 1.0], [2, 0]])
def test_switches_are_booleans(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^enable_lora must be a list of True and False"):
        made("MergedLinear", enable_lora=value)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("r", value) for value in (0, 1, 64, np.int64(3))),
        *(("lora_alpha", value) for value in (0, -1, 0.5, 10**6, np.float32(2))),
        *(("lora_dropout", value) for value in (0, 0.0, 0.99, np.float64(0.5))),
        *(("merge_weights", value) for value in (0, 1, False)),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["Linear", "MergedLinear", "Conv2d"])
def test_what_makes_sense_is_taken(name: str, argument: str, value: Any) -> None:
    """A rank above a layer's dimensions is of no more use than the smaller one, but it computes what it says."""
    layer = made(name, **{argument: value})
    assert argument == "lora_dropout" or getattr(layer, argument) == value
