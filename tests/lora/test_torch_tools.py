"""torch.compile, torch.export, FSDP and a bare import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from lora.lora_helpers import (
    EMBEDDINGS,
    IDS,
    LINEARS,
    MERGED_LINEARS,
    ONE_OF_EACH,
    Block,
    Kind,
    assert_all_close,
    assert_close,
    gradients,
)
from phinetune import lora


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("kind", [*LINEARS, *MERGED_LINEARS, EMBEDDINGS[0]], ids=str)
def test_the_compiled_layer_is_whole_and_equal(kind: Kind) -> None:
    """The backend traces forward and backward as inductor does, and leaves out its C++ compiler."""
    layer = kind.ours()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = gradients(compiled, kind.input())
    assert_all_close({n.removeprefix("_orig_mod."): t for n, t in found.items()}, gradients(layer, kind.input()))


def test_compiled_dropout_trains() -> None:
    layer = LINEARS[0].ours(lora_dropout=0.5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = gradients(compiled, LINEARS[0].input())
    assert found["_orig_mod.lora_A"].any()
    torch.testing.assert_close(compiled.eval()(LINEARS[0].input()), layer(LINEARS[0].input()))


def test_a_compiled_layer_follows_eval_and_train() -> None:
    layer, x = LINEARS[0].ours(), LINEARS[0].input()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = layer(x)
    torch.testing.assert_close(compiled.eval()(x), expected)
    assert layer.merged
    torch.testing.assert_close(compiled.train()(x), expected)
    assert not layer.merged
    torch.testing.assert_close(compiled.eval()(x), expected)
    assert layer.merged


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", ONE_OF_EACH, ids=str)
def test_layers_export(kind: Kind, merged: bool) -> None:
    layer, x = kind.ours(merge_weights=merged).eval(), kind.input()
    assert layer.merged is merged
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP is switching")
@pytest.mark.usefixtures("one_process")
def test_fsdp_gives_the_gradients_of_the_model_without_it() -> None:
    unsharded, model = Block(lora), Block(lora)
    lora.mark_only_lora_as_trainable(model)
    lora.mark_only_lora_as_trainable(unsharded)
    sharded: Any = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    for module in (sharded, unsharded):
        module(IDS).square().sum().backward()
    expected = {n: p.grad for n, p in unsharded.named_parameters() if p.requires_grad}
    found = {n.removeprefix("_fsdp_wrapped_module."): p.grad for n, p in sharded.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad is not None, name
        torch.testing.assert_close(found[name].view(grad.shape), grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.filterwarnings("ignore:FSDP is switching")
@pytest.mark.usefixtures("one_process")
def test_under_fsdp_evaluation_leaves_the_weights_apart() -> None:
    """FSDP manages the storage. A merged weight there would overwrite the weight that the layer keeps."""
    model = Block(lora)
    expected = model(IDS)
    sharded: Any = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    assert_close(sharded.eval()(IDS), expected)
    assert_close(sharded.train()(IDS), expected)
    with pytest.raises(ValueError, match="FSDP manages the weight"):
        model.out.merge()


@pytest.mark.filterwarnings("ignore:FSDP is switching")
@pytest.mark.usefixtures("one_process")
def test_a_merged_model_that_fsdp_wraps_keeps_its_weights() -> None:
    model = Block(lora)
    expected = model(IDS)
    sharded: Any = FullyShardedDataParallel(model.eval(), use_orig_params=True, device_id=torch.device("cpu"))
    for training in (False, True, False):
        assert_close(sharded.train(training)(IDS), expected)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.usefixtures("one_process")
def test_a_merged_model_that_the_second_fsdp_wraps_keeps_its_weights() -> None:
    model = Block(lora)
    expected = model(IDS)
    fully_shard(model.eval(), mesh=init_device_mesh("cpu", (1,)))
    for training in (False, True, False):
        assert_close(model.train(training)(IDS), expected, 1e-5)


@pytest.mark.parametrize("kind", ONE_OF_EACH, ids=str)
def test_a_merged_layers_copy_in_data_parallel_computes_from_its_own_parameters(kind: Kind) -> None:
    """`replicate` gives each copy the parameters of its device as plain attributes; the sum lies on the first."""
    layer, other = kind.ours().eval(), kind.ours()
    copy: Any = layer._replicate_for_data_parallel()
    for name, parameter in other.named_parameters():
        setattr(copy, name, parameter.detach() * 2)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
        torch.testing.assert_close(copy(kind.input()), other(kind.input()))
        assert layer.merged


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.usefixtures("one_process")
def test_under_the_second_fsdp_evaluation_computes_the_same() -> None:
    model = Block(lora)
    expected = model(IDS)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    for mode in ("evaluation", "training", "evaluation again"):
        model.train(mode == "training")
        assert_close(model(IDS), expected, 1e-5, mode)
        model(IDS).sum().backward()


def test_importing_the_layers_imports_torch_alone() -> None:
    heavy = ("transformers", "peft", "pydantic", "trl", "datasets", "accelerate", "safetensors", "typer", "loralib")
    code = f"import sys, phinetune.lora; print([n for n in {heavy} if n in sys.modules], 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[] True"
