"""The memory that a plan predicts, part by part, against the bytes that torch holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from helpers import nf4_checkpoint
from phinetune.checkpoints.load import load_base
from phinetune.checkpoints.prequantized import held_as
from phinetune.checkpoints.tokenizer import open_config
from phinetune.config.model import ModelSection
from phinetune.engine.activation_memory import SLACK, LayerSizes, Level
from phinetune.engine.attention_plan import Groups, grouped_run
from phinetune.engine.examples import Encoded
from phinetune.engine.kernels import attention_trees
from phinetune.engine.kernels.cross_entropy import linear_cross_entropy
from phinetune.engine.lora_layers import use_fused_layers
from phinetune.engine.packing import pack
from phinetune.engine.segments import read_segments
from phinetune.planning import memory as planning_memory
from phinetune.planning.memory import MicroBatch, optimizer_bytes, predict
from phinetune.planning.probe import two_layers
from phinetune.planning.sizes import Sizes, count_sizes
from phinetune.training.settings import make_lora_config, read_settings

SHAPES = [
    "random:{layers: 3, hidden_size: 64, intermediate_size: 128, heads: 4, kv_heads: 2, vocab: 320}",
    "random:{layers: 2, hidden_size: 128, intermediate_size: 192, heads: 4, vocab: 500, tie_word_embeddings: true}",
]
LORA = {"r": 8, "target_modules": "all-linear"}
SETTINGS = read_settings(LORA, {})


def held(section: ModelSection) -> tuple[Any, Sizes]:
    """A model with its adapter, and the sizes counted without it."""
    loaded = load_base(section)
    lora = use_fused_layers(make_lora_config(SETTINGS, loaded.model), loaded.model)
    sizes = count_sizes(open_config(section), section.quantization, SETTINGS, loaded.model.dtype)
    return get_peft_model(loaded.model, lora), sizes


def tensor_bytes(tensors: Any) -> int:
    """Bytes of tensors, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def base_bytes(model: Any) -> int:
    found = [p for p in model.parameters() if not p.requires_grad]
    for weight in list(found):
        state = getattr(weight, "quant_state", None)
        if state is not None:
            found += [state.absmax, state.code]
            found += [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
        if getattr(weight, "SCB", None) is not None:
            found.append(weight.SCB)
    return tensor_bytes(found)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_and_adapter_are_counted_to_the_byte(shape: str, dtype: str) -> None:
    model, sizes = held(ModelSection(path=shape, dtype=dtype))  # type: ignore[arg-type]
    assert sizes.weights == base_bytes(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sizes.trainable == sum(p.numel() for p in trained)
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    assert sizes.expanded == 0


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_weights_are_counted_to_a_thousandth(kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    shape = "random:{layers: 2, hidden_size: 256, intermediate_size: 512, heads: 4, kv_heads: 2, vocab: 320}"
    model, sizes = held(ModelSection(path=shape, dtype="bfloat16", quantization=kind))  # type: ignore[arg-type]
    assert sizes.weights == pytest.approx(base_bytes(model), rel=1e-3)
    assert sizes.expanded == 2 * 256 * 1024  # gate_up_proj


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adamw_torch", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("adagrad", torch.optim.Adagrad)],
    ids=["adamw_torch", "sgd", "adagrad"],
)
def test_a_step_of_the_optimizer_keeps_what_is_counted(name: str, kind: Callable[..., torch.optim.Optimizer]) -> None:
    weight = torch.nn.Parameter(torch.ones(64, 64))
    weight.grad = torch.ones(64, 64)
    optimizer = kind([weight], lr=0.1)
    optimizer.step()
    state = [tensor for tensor in optimizer.state[weight].values() if tensor is not None and tensor.numel() > 1]
    assert optimizer_bytes(name) * weight.numel() == tensor_bytes(state)


def watched(work: Callable[[], Any]) -> tuple[Any, int, int]:
    """What `work` gives, the bytes that torch still holds for it afterwards, and the most that it held meanwhile."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        made = work()
    now = most = 0
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return made, now, most


@pytest.mark.parametrize("level", list(Level))
def test_the_layers_keep_what_is_counted(level: Level) -> None:
    model, sizes = held(ModelSection(path=SHAPES[0], dtype="float32"))
    decoder = model.get_base_model().model
    decoder.activation_levels = lambda tokens: [level] * len(decoder.layers)
    model.train()
    rows = [Encoded(list(range(3, 203)), list(range(3, 203))) for _ in range(4)]
    batch = pack(rows)
    out, live, _ = watched(lambda: model(**batch))
    assert out.nll.requires_grad
    tokens = 800
    kept = LayerSizes.of(sizes.config, dropout=False).kept(level) * len(decoder.layers) * tokens * 4
    head = 796 * 64 * 4 * 2  # at the labels: what the last norm takes, and the gradient of what it gives
    assert live == pytest.approx(kept + head + row_bytes(batch, decoder), rel=0.1)


def row_bytes(batch: dict[str, torch.Tensor], decoder: Any) -> int:
    """What a packed row's rotation and its plan of attention hold, for all layers together."""
    like, heads, held = decoder.embed_tokens.weight, decoder.layers[0].self_attn.heads, list[torch.Tensor]()
    if not attention_trees.takes(like):  # the native kernels read the batch's own table of segments
        groups = grouped_run(read_segments(batch["segments"]), heads, like.device).groups
        assert isinstance(groups, Groups)
        held += [groups.out, groups.qkv]
        for group in groups.members:
            held += [value for value in vars(group).values() if isinstance(value, torch.Tensor)]
    return tensor_bytes(held) + 2 * batch["position_ids"].numel() * heads.size // 2 * like.element_size()


def test_the_loss_holds_a_chunk_of_logits_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phinetune.engine.kernels.cross_entropy.CHUNK_ELEMENTS", 1 << 16)
    hidden = torch.randn(700, 64, requires_grad=True)
    weight = torch.randn(320, 64)
    labels, weights = torch.randint(0, 320, (700,)), torch.ones(700)
    _, _, most = watched(lambda: linear_cross_entropy(hidden, weight, labels, weights))
    sizes = Sizes(open_config(ModelSection(path=SHAPES[0])), 0, 0, 0, 0, 4)
    parts, _ = predict(sizes, MicroBatch(700, 700), "none", False, "sgd", 1 << 40)
    already = 700 * 64 * 4  # the hidden states that the loss is given
    assert parts.logits - already == pytest.approx(most, rel=0.1)


def test_the_peak_has_logits_or_a_layer_at_work() -> None:
    sizes = Sizes(open_config(ModelSection(path=SHAPES[0])), 1000, 50, 10, 1010, 2)
    parts, levels = predict(sizes, MicroBatch(100, 40), "all", False, "adamw_torch", 1 << 40)
    assert levels == [Level.LAYER] * 3
    assert (parts.weights, parts.adapter, parts.optimizer) == (1000, 10 * (4 + 4 + 2), 80)
    assert parts.activations == pytest.approx(SLACK * 3 * 64 * 100 * 2, abs=1)
    whole = parts.weights + parts.adapter + parts.optimizer + parts.activations
    assert parts.total == whole + max(parts.layer, parts.logits) == parts.to_dict()["total"]
    assert planning_memory.Parts(1, 2, 3, 4, 5, 6).total == 16


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "bits", [{}, {"bnb_4bit_use_double_quant": False}, {"llm_int8_skip_modules": ["lm_head", "mlp.up_proj"]}]
)
def test_a_checkpoint_in_nf4_is_counted_as_its_files_are(bits: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    section = ModelSection(path=str(nf4_checkpoint(tmp_path / "base", "llama", **bits)), dtype="float32")
    shape = open_config(section)
    sizes = count_sizes(shape, held_as(section, shape), SETTINGS, torch.float32)
    assert sizes.weights == pytest.approx(base_bytes(load_base(section).model.requires_grad_(False)), rel=1e-3)
    assert sizes.expanded == 4 * 64 * 96
    assert two_layers(section, shape).quantization == "nf4"  # its time is measured so, too
