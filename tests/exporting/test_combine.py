"""Several adapters become one, as PEFT combines them on the loaded base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from cli.cli_helpers import run
from exporting.merge.merge_helpers import adapted, logits, open_plain, save_base
from phinetune.checkpoints.adapters import read_base
from phinetune.checkpoints.opened import open_model
from phinetune.errors import ModelError
from phinetune.exporting.combine import combine, parse_parts


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and two adapters of unlike ranks, scales and layers."""
    folder = tmp_path_factory.mktemp("combine")
    save_base(folder / "base")
    adapted(folder / "base", folder / "a", target_modules=["qkv_proj", "down_proj"], use_rslora=True)
    adapted(
        folder / "base",
        folder / "b",
        target_modules=["o_proj", "qkv_proj"],
        r=2,
        rank_pattern={"o_proj": 3},
        alpha_pattern={"o_proj": 5},
    )
    adapted(folder / "base", folder / "c", target_modules=["qkv_proj", "down_proj"])
    file = folder / "c" / "adapter_model.safetensors"  # other numbers than those of `a`
    save_file({name: tensor.flip(0).contiguous() for name, tensor in load_file(file).items()}, file)
    return folder


def by_peft(place: Path, names: str, weights: list[float], method: str, **options: Any) -> PeftModel:
    """PEFT's own, on the whole base."""
    model = PeftModel.from_pretrained(open_plain(place / "base"), str(place / names[0]), adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(str(place / name), name)
    model.add_weighted_adapter(list(names), weights, "made", combination_type=method, **options)
    model.set_adapter("made")
    return model.eval()


def ours(place: Path, names: str, weights: list[float], out: Path, method: str, **options: Any) -> Any:
    made = combine([(place / n, w) for n, w in zip(names, weights, strict=True)], out, method=method, **options)
    return made, open_model(out, dtype="float32", device="cpu").model


@pytest.mark.parametrize(
    ("names", "method", "options"),
    [
        ("bc", "cat", {}),
        ("bc", "svd", {}),
        ("ca", "linear", {}),
        ("ca", "ties", {"density": 0.5}),
        ("cb", "ties_svd", {"density": 0.5}),
    ],
)
def test_an_adapter_is_combined_as_peft_does_it(
    place: Path, tmp_path: Path, names: str, method: str, options: dict[str, Any]
) -> None:
    weights = [0.7, -0.4]
    made, model = ours(place, names, weights, tmp_path / "out", method, **options)
    torch.testing.assert_close(logits(model), logits(by_peft(place, names, weights, method, **options)))
    theirs = PeftModel.from_pretrained(open_plain(place / "base"), str(tmp_path / "out")).eval()
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-5)
    assert (made.off <= 1e-5) is (method == "cat")


def test_with_cat_the_update_is_the_weighted_sum_where_scales_are_by_the_root_of_the_rank(
    place: Path, tmp_path: Path
) -> None:
    """PEFT itself keeps `use_rslora` of the first adapter and scales the sum once more."""
    made, model = ours(place, "ab", [0.5, 2.0], tmp_path / "out", "cat")
    assert made.off <= 1e-5
    assert (made.rank, made.layers) == (4 + 3, 6)
    base = read_base(tmp_path / "out")
    assert base == read_base(place / "a")
    tree = json.loads((tmp_path / "out" / "base.json").read_text())["combined_from"]
    assert [part["weight"] for part in tree["parts"]] == [0.5, 2.0]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "base.json")
    }
    assert not model.peft_config["default"].use_rslora


def test_the_command_says_what_it_wrote_and_what_comes_next(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "combine", f"{place / 'a'}=0.5", f"{place / 'b'}=0.5", "--out", tmp_path / "o") == 0
    text = capsys.readouterr().out.replace("\n", " ")
    assert "Combined by cat: 6 layers of rank 7" in text
    assert "phinetune evaluate" in text
    assert run(monkeypatch, "combine", f"{place / 'a'}=0.5", f"{place / 'b'}=0.5", "--out", tmp_path / "o") == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        ("ab", {"method": "mean"}, "--method must be one of cat, svd"),
        ("ab", {"rank": 3}, "--rank is a number above 0 for svd and ties_svd"),
        ("ab", {"method": "ties"}, "--density, above 0 and at most 1, is for ties"),
        ("ab", {"density": 0.5}, "--density, above 0"),
        ("ab", {"method": "linear"}, "must have the same r value"),
        ("ax", {}, "no adapter there"),
        ("ad", {}, "the adapters belong to different bases"),
        ("ae", {}, "`use_dora` is set"),
    ],
)
def test_what_can_not_be_combined_is_refused(
    place: Path, tmp_path: Path, names: str, options: dict[str, Any], words: str
) -> None:
    if "d" in names:
        adapted(save_base(tmp_path / "other", vocab_size=310), tmp_path / "d", target_modules=["qkv_proj"])
    if "e" in names:
        adapted(place / "base", tmp_path / "e", target_modules=["qkv_proj"], use_dora=True)
    places = [place / name if (place / name).exists() else tmp_path / name for name in names]
    with pytest.raises(ModelError, match=words):
        combine([(one, 0.5) for one in places], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_each_part_has_a_weight() -> None:
    assert parse_parts(["runs/a=0.7", "b=c=-1"]) == [("runs/a", 0.7), ("b=c", -1.0)]
    for texts in (["runs/a", "runs/b=1"], ["a=x", "b=1"], ["a=0", "b=1"], ["a=nan", "b=1"], ["a=1"]):
        with pytest.raises(ModelError, match="RUN=WEIGHT"):
            parse_parts(texts)
