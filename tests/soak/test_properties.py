"""What holds for every chat, every packed row, every adapter: properties over inputs that hypothesis draws.

`make test` tries a few of each, always the same; `make soak` tries thousands of new ones.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from chats.template_helpers import ENDS, NAMES, template_tokenizer
from engine.engine_helpers import Pair, assert_same, make_pair, one_by_one, packed, windowed
from engine.test_packing import assert_packs
from phinetune import lora
from phinetune.chats.encoder import ChatEncoder, make_encoder
from phinetune.chats.template import render, tokenize
from phinetune.engine.examples import IGNORED, Encoded, common_prefix
from phinetune.engine.packing import pack
from phinetune.engine.segments import SHORTEST_SHARED
from phinetune.errors import RowError
from phinetune.exporting.convert.adapter_files import read_loralib, read_peft, write_loralib, write_peft
from phinetune.exporting.convert.layers import Adapter, Splits
from phinetune.exporting.convert.split import to_fused, to_split
from phinetune.exporting.convert.to_loralib import to_loralib
from phinetune.exporting.convert.to_peft import to_peft

# -- trained spans ------------------------------------------------------------------------------------------------

# What templates and tokenizers treat in ways of their own, and any letters.
PIECES = [
    "",
    " ",
    "\n",
    "Fine.",
    " lead",
    "trail ",
    "<|end|>",
    "<|im_end|>",
    "<|user|>",
    "<|",
    "|>",
    "<think>",
    "ünï🙂",
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=8), max_size=5).map("".join)


@st.composite
def chats(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A chat of one to four exchanges, perhaps with a system message; some answers are not to be trained on."""
    turns: list[dict[str, Any]] = []
    if draw(st.booleans()):
        turns.append({"role": "system", "content": draw(TEXTS)})
    for _ in range(draw(st.integers(1, 4))):
        turns.append({"role": "user", "content": draw(TEXTS)})
        turns.append({"role": "assistant", "content": draw(TEXTS)} | ({"train": False} if draw(st.booleans()) else {}))
    return turns


@cache
def encoder(name: str, loss_on: str) -> ChatEncoder:
    return make_encoder(template_tokenizer(name), loss_on, "fold" if name == "phi-3-april-2024" else "keep")


def encoded(one: ChatEncoder, chat: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Encoded]:
    """The chat as it is rendered, and encoded; a chat that is refused with a sentence is not looked at further."""
    try:
        ready = one.prepare(chat)
        return ready, one.encode([ready])[0]
    except RowError:
        assume(False)
        raise


def span(one: ChatEncoder, chat: list[dict[str, Any]], i: int, ids: list[int]) -> range:
    """The trained span of turn `i` as encoder.py defines it, with all texts encoded in full."""
    header, turn = render(one.tokenizer, chat[:i], reply=True), render(one.tokenizer, chat[: i + 1])
    start, end = (common_prefix(tokens, ids) for tokens in tokenize(one.tokenizer, [header, turn]))
    return range(start, len(ids) if i + 1 == len(chat) else end)


@given(chats(), st.sampled_from(NAMES), st.sampled_from(["assistant", "last", "all"]))
def test_exactly_the_trained_turns_have_labels(chat: list[dict[str, Any]], name: str, loss_on: str) -> None:
    one = encoder(name, loss_on)
    ready, (ids, labels, *_) = encoded(one, chat)
    assert tokenize(one.tokenizer, [render(one.tokenizer, ready)]) == [ids]
    turns = [i for i, message in enumerate(ready) if message["role"] == "assistant"]
    left_out = [i for i in turns if ready[i].get("train") is False]
    wanted = set(range(len(ids))) if loss_on == "all" else set()
    for i in turns if loss_on != "last" else turns[-1:]:
        own = set(span(one, ready, i, ids))
        wanted = wanted - own if i in left_out else wanted | own
    assert labels == [token if i in wanted else IGNORED for i, token in enumerate(ids)]


@given(chats(), TEXTS, st.sampled_from(NAMES))
def test_what_a_user_writes_never_reaches_a_label(chat: list[dict[str, Any]], other: str, name: str) -> None:
    one = encoder(name, "assistant")
    changed = [{**message, "content": other} if message["role"] == "user" else message for message in chat]
    _, before = encoded(one, chat)
    _, after = encoded(one, changed)
    assert [i for i in before.labels if i != IGNORED] == [i for i in after.labels if i != IGNORED]


@given(chats(), st.sampled_from(NAMES))
def test_every_trained_answer_ends_with_its_end_token_once(chat: list[dict[str, Any]], name: str) -> None:
    one = encoder(name, "assistant")
    ready, (_, labels, *_) = encoded(one, chat)
    trained = sum(m["role"] == "assistant" and m.get("train") is not False for m in ready)
    assert labels.count(one.tokenizer.convert_tokens_to_ids(ENDS[name])) == trained


@given(chats(), st.sampled_from(NAMES), st.integers(4, 200))
def test_a_cut_chat_fits_and_keeps_its_last_answer_whole(chat: list[dict[str, Any]], name: str, most: int) -> None:
    one = encoder(name, "last")
    ready, whole = encoded(one, chat)
    fitted = one.fit(ready, most)
    if len(whole.input_ids) <= most:
        assert fitted is not None
        assert fitted[1] == whole
    if fitted is None:
        return
    assert len(fitted[1].input_ids) <= most
    assert [i for i in fitted[1].labels if i != IGNORED] == [i for i in whole.labels if i != IGNORED]


# -- packing and shared beginnings --------------------------------------------------------------------------------


@st.composite
def conversations(draw: st.DrawFn, longest: int = 60) -> list[Encoded]:
    """Conversations that begin as one of a few others do, or by themselves; equal ones, too."""
    rows: list[Encoded] = []
    for _ in range(draw(st.integers(1, 7))):
        begun: list[int] = []
        if rows and draw(st.booleans()):
            other = draw(st.sampled_from(rows)).input_ids
            begun = other[: draw(st.integers(0, len(other)))]
        own = draw(st.lists(st.integers(3, 9), min_size=0 if begun else 1, max_size=longest))
        ids = begun + own
        picked = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        rows.append(Encoded(ids, [token if on else IGNORED for token, on in zip(ids, picked, strict=True)]))
    return rows


@given(conversations(), st.booleans(), st.none() | st.integers(1, 80))
def test_a_packed_row_holds_each_prediction_as_often_as_the_rows(
    rows: list[Encoded], share: bool, rope_limit: int | None
) -> None:
    packed_row = pack(rows, share=share, rope_limit=rope_limit, owned=True)
    owners = packed_row.pop("owners").tolist()
    assert int(packed_row.pop("conversations")) == len(rows)
    assert_packs(rows, packed_row)
    labels = packed_row["labels"].tolist()
    counted = [[labels[place] for place, owner in owners if owner == i] for i in range(len(rows))]
    assert counted == [[label for label in row.labels[1:] if label != IGNORED] for row in rows]
    held = torch.bincount(torch.tensor([place for place, _ in owners], dtype=torch.int64), minlength=len(labels))
    assert held.tolist() == packed_row["weights"].tolist()


@cache
def models() -> Pair:
    return make_pair(windowed())


@given(conversations(longest=40))
@example([Encoded(list(range(3, 43)), list(range(3, 43)))] * 2)
def test_a_shared_beginning_gives_the_loss_and_gradients_of_the_rows_one_by_one(rows: list[Encoded]) -> None:
    assume(any(label != IGNORED for row in rows for label in row.labels[1:]))
    assert SHORTEST_SHARED < 40
    found, wanted = packed(models().fast, rows, share=True), one_by_one(models().plain, rows)
    assert_same(found, wanted, gradients=1e-3)


# -- converters -----------------------------------------------------------------------------------------------------


def matrix(draw: st.DrawFn, rows: int, columns: int, zeros: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    made = torch.randn(rows, columns, generator=generator)
    return made * (torch.rand(rows, columns, generator=generator) < 0.5) if zeros else made


@st.composite
def adapters(draw: st.DrawFn) -> tuple[dict[str, Adapter], dict[str, Splits]]:
    """Adapters of one or two fused layers and of a plain one, with ranks and alphas of their own, and the splits."""
    width, part = draw(st.integers(2, 9)), draw(st.integers(1, 5))
    splits = Splits((draw(st.integers(1, 6)), part, part), (True, True, True))
    found = {}
    for name, rows in {"m.0.qkv_proj": splits.out, "m.1.qkv_proj": splits.out, "m.0.down_proj": 7}.items():
        if name == "m.1.qkv_proj" and draw(st.booleans()):
            continue
        rank, alpha = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 3.5, 16]))
        a, b = matrix(draw, rank, width), matrix(draw, rows, rank, zeros=draw(st.booleans()))
        found[name] = Adapter(a, b, alpha / rank)
    return found, {"qkv_proj": splits}


def same_update(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@given(adapters())
def test_split_and_joined_again_an_adapter_has_the_same_update(
    given_: tuple[dict[str, Adapter], dict[str, Splits]],
) -> None:
    sources, fused = given_
    split = to_split(sources, fused)
    for name, layer in split.items():
        same_update(layer.adapter.update(), layer.wanted())
        assert name in sources or name.rpartition(".")[-1] in ("q_proj", "k_proj", "v_proj")
    joined = to_fused({name: layer.adapter for name, layer in split.items()}, fused)
    assert joined.keys() == sources.keys()
    for name, layer in joined.items():
        same_update(layer.adapter.update(), sources[name].update())
        assert layer.adapter.rank <= 3 * sources[name].rank


@given(adapters(), st.sampled_from([1.0, 4.0, 16.0]))
def test_to_loralib_and_back_through_files_an_adapter_has_the_same_update(
    given_: tuple[dict[str, Adapter], dict[str, Splits]], alpha: float
) -> None:
    sources, fused = given_
    made = to_loralib(sources, alpha, fused)
    with tempfile.TemporaryDirectory() as folder:
        write_loralib({name: layer.adapter for name, layer in made.items()}, Path(folder) / "lora.pt")
        pairs = read_loralib(Path(folder) / "lora.pt")
        for name, (a, b) in pairs.items():
            assert torch.equal(a, made[name].adapter.a)
            assert torch.equal(b, made[name].adapter.b)
        back = to_peft(pairs, alpha, fused, embedding=[], linear=list(pairs))
        write_peft({name: layer.adapter for name, layer in back.items()}, Path(folder), base=None)
        _, read = read_peft(Path(folder))
    assert read.keys() == sources.keys()
    for name, adapter in read.items():
        same_update(adapter.update(), sources[name].update())


# -- merging --------------------------------------------------------------------------------------------------------


@st.composite
def layers(draw: st.DrawFn) -> Any:
    """A layer of phinetune.lora with a random adapter."""
    width, dtype = draw(st.integers(1, 9)), draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    options: dict[str, Any] = {"r": draw(st.integers(1, 4)), "lora_alpha": draw(st.sampled_from([0.5, 1, 8]))}
    options |= {"use_rslora": draw(st.booleans()), "dtype": dtype}
    splits = draw(st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1, max_size=4))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    if any(on for _, on in splits):
        rows, on = ([pair[i] for pair in splits] for i in (0, 1))
        layer: Any = lora.MergedLinear(width, rows, enable_lora=on, **options)
    else:
        layer = lora.Linear(width, sum(rows for rows, _ in splits), fan_in_fan_out=draw(st.booleans()), **options)
    with torch.no_grad():
        layer.lora_A.normal_(), layer.lora_B.normal_()
    return layer


@given(layers(), st.lists(st.booleans(), max_size=12))
def test_a_merged_weight_is_the_sum_rounded_once_and_unmerging_is_exact(layer: Any, modes: list[bool]) -> None:
    before = layer.weight.detach().clone()
    exact = before.double() + layer.delta_weight().detach().double()
    saved = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for training in modes:
        layer.train(training)
        assert layer.merged is not training
        assert all(torch.equal(tensor, saved[name]) for name, tensor in layer.state_dict().items())
    layer.eval()
    step = {torch.float32: 2**-22, torch.bfloat16: 2**-8, torch.float16: 2**-10}[before.dtype]
    assert torch.all((layer.weight.double() - exact).abs() <= step * exact.abs().clamp(min=1e-2))
    assert torch.equal(layer.train().weight, before)


@given(layers())
def test_a_merged_layer_computes_what_the_adapter_does(layer: Any) -> None:
    x = torch.randn(3, layer.in_features, dtype=torch.float32)
    apart = layer.float().train()(x)
    together = layer.eval()(x)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.unloaded()(x), together, rtol=0, atol=0)
