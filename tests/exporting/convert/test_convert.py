"""PEFT to loralib and back: outputs in the live libraries are the same before and after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import phinetune.lora as lora
from cli.cli_helpers import run
from exporting.convert.convert_helpers import (
    IDS,
    PHI3_QKV,
    Attention,
    adapted_net,
    close,
    into,
    live_phi3,
    output,
    peft_net,
    randomise,
    save,
    unadapted_net,
)
from helpers import TINY
from phinetune.checkpoints.load import load_base
from phinetune.config.model import ModelSection
from phinetune.exporting.convert.convert import convert

LIBRARIES = pytest.mark.parametrize("library", [loralib, lora], ids=["loralib", "phinetune.lora"])


# -- PEFT to loralib -------------------------------------------------------------------------------------------


@LIBRARIES
@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"alpha_pattern": {"up": 20}, "rank_pattern": {"block.qkv_proj": 2, "emb": 3}}],
    ids=["defaults", "rslora", "patterns"],
)
def test_peft_to_loralib(tmp_path: Path, library: Any, options: dict[str, Any]) -> None:
    want, folder = peft_net(tmp_path / "peft", target_modules=["emb", "qkv_proj", "up", "head"], **options)
    done = convert(folder, tmp_path / "lora.pt", "loralib")
    ranks = {"qkv_proj": 2, "emb": 3} if "rank_pattern" in options else {}
    net = adapted_net(
        emb=lambda: library.Embedding(11, 6, r=ranks.get("emb", 4), lora_alpha=6),
        qkv_proj=lambda: library.Linear(6, 12, r=ranks.get("qkv_proj", 4), lora_alpha=6),
        up=lambda: library.Linear(12, 10, r=4, lora_alpha=6),
        head=lambda: library.Linear(10, 3, r=4, lora_alpha=6),
    )
    close(output(into(net, tmp_path / "lora.pt")), want)
    assert not torch.allclose(want, output(unadapted_net()), atol=1e-2)
    assert done.kinds == {"Embedding": 1, "Linear": 3}
    assert done.difference < 1e-6
    assert f"  lora.Embedding(11, 6, r={ranks.get('emb', 4)}, lora_alpha=6)  # emb (1)" in done.next_steps


@LIBRARIES
def test_one_peft_adapter_over_a_fused_layer_becomes_three_that_share_a(tmp_path: Path, library: Any) -> None:
    want, folder = peft_net(tmp_path / "peft", target_modules=["qkv_proj"])
    done = convert(folder, tmp_path / "lora.pt", "loralib", merged=["qkv_proj=4,4,4"])
    made = torch.load(tmp_path / "lora.pt", weights_only=True)
    assert {name: tuple(t.shape) for name, t in made.items()} == {
        "block.qkv_proj.lora_A": (12, 6),
        "block.qkv_proj.lora_B": (12, 4),
    }
    on = [True, True, True]
    net = adapted_net(qkv_proj=lambda: library.MergedLinear(6, 12, r=4, lora_alpha=6, enable_lora=on))
    close(output(into(net, tmp_path / "lora.pt")), want)
    assert done.next_steps[1].startswith(
        "  lora.MergedLinear(6, 12, r=4, lora_alpha=6, enable_lora=[True, True, True])"
    )


def test_a_live_phi3_with_unlike_splits_there_and_back(tmp_path: Path) -> None:
    targets = ["qkv_proj", "gate_up_proj", "o_proj", "down_proj"]
    want, folder = live_phi3(tmp_path / "peft", targets)
    fused = [PHI3_QKV, "gate_up_proj=64,64"]
    done = convert(folder, tmp_path / "lora.pt", "loralib", merged=fused)
    assert done.kinds == {"Linear": 4, "MergedLinear": 4}
    assert "  (splits of different sizes need phinetune.lora: loralib has only equal splits)" in done.next_steps

    model = load_base(ModelSection(path=TINY)).model
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8}
    lora.apply(model, ["qkv_proj"], enable_lora=[True] * 3, splits=[32, 16, 16], **options)
    lora.apply(model, ["gate_up_proj"], enable_lora=[True] * 2, **options)
    lora.apply(model, ["o_proj", "down_proj"], **options)
    close(output(into(model, tmp_path / "lora.pt"), IDS), want)

    convert(tmp_path / "lora.pt", tmp_path / "back", "peft", lora_alpha=8, merged=fused, base="some/base")
    back = PeftModel.from_pretrained(load_base(ModelSection(path=TINY)).model, str(tmp_path / "back")).eval()
    close(output(back, IDS), want)
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["rank_pattern"] == {"qkv_proj": 12, "gate_up_proj": 8}
    assert config["alpha_pattern"] == {"qkv_proj": 24, "gate_up_proj": 16}


@pytest.mark.parametrize("parts", [["q_proj", "k_proj", "v_proj"], ["q_proj", "v_proj"]], ids=",".join)
def test_split_peft_adapters_become_one_merged_linear(tmp_path: Path, parts: list[str]) -> None:
    torch.manual_seed(0)
    split, x = Attention(), torch.randn(2, 3, 6)
    weights = [getattr(split.attn, name) for name in ("q_proj", "k_proj", "v_proj")]
    fused = nn.Linear(6, 8)
    fused.load_state_dict(
        {kind: torch.cat([getattr(part, kind) for part in weights]).detach() for kind in ("weight", "bias")}
    )
    # v's own alpha must go into its rows of B.
    config = LoraConfig(r=2, lora_alpha=4, target_modules=parts, alpha_pattern={"v_proj": 7})
    model = get_peft_model(split, config).eval()
    randomise(model)
    model.save_pretrained(str(tmp_path / "peft"))
    done = convert(tmp_path / "peft", tmp_path / "lora.pt", "loralib", merged=["qkv_proj=4,2,2"])
    on = ["q_proj" in parts, "k_proj" in parts, "v_proj" in parts]
    assert f"lora.MergedLinear(6, [4, 2, 2], r=2, lora_alpha=4, enable_lora={on})" in done.next_steps[1]
    layer = lora.MergedLinear.from_base(fused, r=2, lora_alpha=4, enable_lora=on, splits=[4, 2, 2])
    with torch.no_grad():
        close(into(Attention(layer), tmp_path / "lora.pt")(x), model(x))


def test_a_dtype_that_would_round_is_widened_and_one_that_would_not_is_kept(tmp_path: Path) -> None:
    _, folder = peft_net(tmp_path / "peft", target_modules=["up", "head"], alpha_pattern={"up": 24, "head": 7})
    weights = folder / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(weights).items()}, weights)
    convert(folder, tmp_path / "lora.pt", "loralib")
    made = torch.load(tmp_path / "lora.pt", weights_only=True)
    assert made["block.up.lora_B"].dtype == torch.bfloat16
    assert made["head.lora_B"].dtype == torch.float32


def test_another_alpha_for_the_file(tmp_path: Path) -> None:
    want, folder = peft_net(tmp_path / "peft", target_modules=["up"])
    done = convert(folder, tmp_path / "lora.pt", "loralib", lora_alpha=16)
    assert "lora_alpha=16" in done.next_steps[1]
    net = adapted_net(up=lambda: loralib.Linear(12, 10, r=4, lora_alpha=16))
    close(output(into(net, tmp_path / "lora.pt")), want)


# -- loralib to PEFT -------------------------------------------------------------------------------------------


@LIBRARIES
@pytest.mark.parametrize(
    "on", [[True, True, True], [True, False, True], [False, True, False]], ids=["q,k,v", "q,v", "k"]
)
def test_loralib_to_peft(tmp_path: Path, library: Any, on: list[bool]) -> None:
    net = adapted_net(
        emb=lambda: library.Embedding(11, 6, r=2, lora_alpha=5),
        qkv_proj=lambda: library.MergedLinear(6, 12, r=3, lora_alpha=5, enable_lora=on),
        up=lambda: library.Linear(12, 10, r=2, lora_alpha=5),
    )
    file = save(net, tmp_path / "lora.pt")
    rows = ",".join("4" if one else "-4" for one in on)
    done = convert(file, tmp_path / "peft", "peft", lora_alpha=5, merged=[f"qkv_proj={rows}"], embedding=["emb"])
    assert done.kinds == {"Embedding": 1, "MergedLinear": 1, "Linear": 1}
    assert done.next_steps[-1] == f'  model = PeftModel.from_pretrained(base_model, "{tmp_path / "peft"}")'
    assert sorted(p.name for p in (tmp_path / "peft").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    back = PeftModel.from_pretrained(unadapted_net(), str(tmp_path / "peft")).eval()
    close(output(back), output(net.eval()))

    # And back again: each split gets its own A and B, to the bit.
    convert(tmp_path / "peft", tmp_path / "again.pt", "loralib", lora_alpha=5, merged=[f"qkv_proj={rows}"])
    before, after = (torch.load(f, weights_only=True) for f in (file, tmp_path / "again.pt"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_layers_of_one_name_and_unlike_ranks_get_patterns_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Sequential(lora.Linear(4, 4, r=2, lora_alpha=3)),
        lora.Linear(4, 4, r=4, lora_alpha=3),
        nn.Sequential(lora.Linear(4, 4, r=4, lora_alpha=3)),
    )
    randomise(net)
    file = save(net, tmp_path / "lora.pt")
    convert(file, tmp_path / "peft", "peft", lora_alpha=3)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (4, {r"^0\.0": 2}, {})
    unadapted = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    unadapted.load_state_dict({name: tensor for name, tensor in net.state_dict().items() if "lora_" not in name})
    x = torch.randn(5, 4)
    with torch.no_grad():
        close(PeftModel.from_pretrained(unadapted, str(tmp_path / "peft")).eval()(x), net(x))


def test_the_form_of_loralibs_own_examples(tmp_path: Path) -> None:
    net = adapted_net(up=lambda: loralib.Linear(12, 10, r=2, lora_alpha=4))
    # Parameters that require a gradient are as good as tensors.
    tensors = {name: parameter for name, parameter in net.named_parameters() if "lora_" in name}
    torch.save({"model_state_dict": tensors}, tmp_path / "lora.pt")
    (tmp_path / "peft").mkdir()  # an empty folder is no obstacle
    convert(tmp_path / "lora.pt", tmp_path / "peft", "peft", lora_alpha=4)
    close(output(PeftModel.from_pretrained(unadapted_net(), str(tmp_path / "peft")).eval()), output(net.eval()))


# -- the command line ------------------------------------------------------------------------------------------


def test_the_command_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    want, folder = live_phi3(tmp_path / "peft", ["qkv_proj", "o_proj"])
    file, back = tmp_path / "lora.pt", tmp_path / "back"
    assert run(monkeypatch, "convert", folder, file, "--to", "loralib", "--merged", PHI3_QKV) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "Converted 2 Linear, 2 MergedLinear"
    assert out[2] == f"Wrote {file}"
    assert (
        "  lora.MergedLinear(32, [32, 16, 16], r=4, lora_alpha=8, enable_lora=[True, True, True])  # qkv_proj (2)"
        in out
    )
    assert out[-1] == f'  model.load_state_dict(torch.load("{file}", weights_only=True), strict=False)'

    assert run(monkeypatch, "convert", file, back, "--to", "peft", "--merged", PHI3_QKV) == 2
    assert "with --lora-alpha" in capsys.readouterr().err
    arguments = ["convert", file, back, "--to", "peft", "--merged", PHI3_QKV, "--lora-alpha", 8]
    assert run(monkeypatch, *arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f'  model = PeftModel.from_pretrained(base_model, "{back}")'
    model = PeftModel.from_pretrained(load_base(ModelSection(path=TINY)).model, str(back)).eval()
    close(output(model, IDS), want)
    assert run(monkeypatch, *arguments) == 2
    assert (
        capsys.readouterr().err == f"error: {back}: is there already; nothing is overwritten, so name another place\n"
    )
