"""`phinetune merge` writes a checkpoint for plain transformers. It has the logits of base and adapter together."""

from __future__ import annotations

import io
import json
import os
import stat
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, Phi3ForCausalLM, PreTrainedTokenizerBase

import phinetune
from cli.cli_helpers import run
from exporting.export_helpers import TunedStarter
from exporting.gguf.gguf_helpers import chat_ids, greedy
from exporting.merge.merge_helpers import adapted, logits, open_plain, save_base
from helpers import SHARED, TINY, chat, tiny_config, write_jsonl
from phinetune.api import merge as api
from phinetune.api.train import train_config
from phinetune.checkpoints.load import read_config
from phinetune.checkpoints.opened import open_model
from phinetune.errors import ModelError
from phinetune.exporting.merge import merge as module
from phinetune.exporting.merge.merge import merge_run
from phinetune.run_folder import MARK

MERGED_FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merged.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    adapted(base, tmp_path / "adapter")
    return tmp_path / "adapter"


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# -- what is written -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True, "modules_to_save": ["lm_head", "norm"]}, {"use_dora": True}],
    ids=lambda options: ",".join(options) or "defaults",
)
def test_plain_transformers_says_what_base_and_adapter_say(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    model = adapted(base, tmp_path / "adapter", **options)
    merge_run(tmp_path / "adapter", tmp_path / "out")
    merged = open_plain(tmp_path / "out")
    assert merged.dtype == torch.float32
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(merged), logits(open_plain(base)), atol=1e-2)


def test_one_file_or_several_with_an_index(adapter: Path, tmp_path: Path) -> None:
    one = merge_run(adapter, tmp_path / "one")
    assert {file.name for file in one.path.iterdir()} == MERGED_FILES | {"model.safetensors"}
    many = merge_run(adapter, tmp_path / "many", shard_bytes=30_000)
    count = many.files
    assert count > 4
    shards = {f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)}
    assert {file.name for file in many.path.iterdir()} == MERGED_FILES | shards | {"model.safetensors.index.json"}
    index = json.loads((many.path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == one.size == many.size
    for shard in shards:
        with safe_open(many.path / shard, framework="pt") as file:
            assert set(file.keys()) == {name for name, place in index["weight_map"].items() if place == shard}
            assert file.metadata() == {"format": "pt"}
    for name, tensor in open_plain(one.path).state_dict().items():
        assert torch.equal(open_plain(many.path).state_dict()[name], tensor)


def test_earlier_shards_are_let_go_while_the_next_is_written(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, seen = module.save_file, []

    def save(shard: dict[str, Tensor], *arguments: Any, **options: Any) -> None:
        assert not any(one() is not None for one in seen)
        seen.extend(weakref.ref(tensor) for tensor in shard.values())
        honest(shard, *arguments, **options)

    monkeypatch.setattr(module, "save_file", save)
    merge_run(adapter, tmp_path / "out", shard_bytes=30_000)
    assert len(seen) == 15


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype(adapter: Path, tmp_path: Path, dtype: str) -> None:
    made = merge_run(adapter, tmp_path / "out", dtype=dtype)
    merged = Phi3ForCausalLM.from_pretrained(made.path, dtype="auto")
    assert merged.dtype == made.dtype == getattr(torch, dtype)
    tree = json.loads((made.path / "config.json").read_text())
    assert tree["dtype"] == tree["torch_dtype"] == dtype
    assert made.size * 2 == merge_run(adapter, tmp_path / "full").size


def test_files_are_as_readable_as_any_other(adapter: Path, tmp_path: Path) -> None:
    made = merge_run(adapter, tmp_path / "out")
    (tmp_path / "any").write_text("")
    usual = stat.S_IMODE(os.stat(tmp_path / "any").st_mode)
    assert {stat.S_IMODE(file.stat().st_mode) for file in made.path.iterdir()} == {usual}


def test_the_record_the_card_and_the_report_say_what_it_is(base: Path, adapter: Path, tmp_path: Path) -> None:
    made = merge_run(adapter, tmp_path / "out", dtype="bfloat16")
    record = json.loads((made.path / "merged.json").read_text())
    assert record["base"]["path"] == str(base)
    assert record["base_weights"] == "16bit"
    assert record["adapter"]["path"] == str(adapter)
    assert record["dtype"] == "bfloat16"
    card = (made.path / "README.md").read_text()
    assert "library_name: transformers" in card
    assert f"A Phi-3 in bfloat16: `{base}`, with the LoRA adapter `{adapter}` merged into it" in card
    assert "Not measured." in card
    assert made.report() == [
        f"Merged {adapter} into {base}: 8 of 15 tensors changed, products in float32, written as bfloat16",
        f"Wrote {made.path}: 0.1 MB of weights in one file, tokenizer, merged.json and a model card",
    ]


# -- configuration and tokenizer -------------------------------------------------------------------------------


def small_base(folder: Path, tree: dict[str, Any]) -> Path:
    """A one-layer base with the configuration of a hub's checkpoint but for its sizes."""
    heads = 4 if tree["num_attention_heads"] > tree["num_key_value_heads"] else 2
    sizes = {"num_attention_heads": heads, "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 300}
    width = tree["hidden_size"] // tree["num_attention_heads"]  # kept: LongRoPE has a factor for each pair of it
    sizes |= {"hidden_size": width * heads, "num_hidden_layers": 1}
    tree |= {**sizes, "bos_token_id": 1, "eos_token_id": 259, "pad_token_id": 259, "torch_dtype": "float32"}
    save_base(folder, **sizes, tie_word_embeddings=tree["tie_word_embeddings"])
    (folder / "config.json").write_text(json.dumps(tree))
    return folder


@pytest.mark.parametrize("name", ["phi-3-mini-4k-instruct", "phi-3.5-mini-instruct", "phi-4-mini-instruct", "su"])
def test_the_configuration_is_the_bases_for_old_clients_and_new(tmp_path: Path, name: str) -> None:
    folder = SHARED / "hub-configs"
    if not folder.is_dir():
        pytest.skip(f"the hub's configurations are not at {folder}")
    tree = json.loads((folder / f"{'phi-3.5-mini-instruct' if name == 'su' else name}.json").read_text())
    if name == "su":
        tree["rope_scaling"]["type"] = "su"
    base = small_base(tmp_path / "base", tree)
    (tmp_path / "by-hand").mkdir()
    for file in base.iterdir():
        os.link(file, tmp_path / "by-hand" / file.name)
    (tmp_path / "by-hand" / "config.json").unlink()
    read_config(base).save_pretrained(tmp_path / "by-hand")  # transformers by itself reads `su` otherwise
    model = adapted(tmp_path / "by-hand", tmp_path / "adapter")
    made = merge_run(tmp_path / "adapter", tmp_path / "twin")
    record = json.loads((tmp_path / "adapter" / "base.json").read_text())
    (tmp_path / "adapter" / "base.json").write_text(json.dumps({**record, "path": str(base)}))
    made = merge_run(tmp_path / "adapter", tmp_path / "out")

    written = json.loads((made.path / "config.json").read_text())
    for key in tree.keys() - {"auto_map", "torch_dtype", "transformers_version", "rope_scaling"}:
        assert written[key] == tree[key], key
    assert "auto_map" not in written
    assert written["architectures"] == ["Phi3ForCausalLM"]
    assert written["dtype"] == written["torch_dtype"] == "float32"
    _check_rope(written, tree)
    read = AutoConfig.from_pretrained(made.path)
    assert read.rope_parameters == read_config(base).rope_parameters
    twin = AutoConfig.from_pretrained(tmp_path / "twin")  # of a base that transformers 5 wrote
    assert {**twin.rope_parameters, "type": 0} == {**read.rope_parameters, "type": 0}
    _check_rope(json.loads((tmp_path / "twin" / "config.json").read_text()), tree)
    torch.testing.assert_close(logits(open_plain(made.path)), logits(model), rtol=1e-5, atol=1e-5)


def _check_rope(written: dict[str, Any], tree: dict[str, Any]) -> None:
    if tree["rope_scaling"]:
        wanted = {key: tree["rope_scaling"][key] for key in ("short_factor", "long_factor")}
        assert written["rope_scaling"] == {"type": "longrope", **wanted}  # all that transformers 4 takes
        assert written["rope_parameters"].items() >= {"rope_type": "longrope", **wanted}.items()
    else:
        assert written["rope_scaling"] is None
        assert written["rope_parameters"]["rope_type"] == "default"
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == tree["rope_theta"]
    share = tree.get("partial_rotary_factor", 1.0)
    assert written["partial_rotary_factor"] == written["rope_parameters"]["partial_rotary_factor"] == share


@pytest.mark.parametrize("own", [True, False], ids=["the base's", "another"])
def test_the_tokenizer_comes_along_with_its_template_and_stop_ids(
    base: Path, adapter: Path, tmp_path: Path, phi3_tokenizer: PreTrainedTokenizerBase, own: bool
) -> None:
    wanted = AutoTokenizer.from_pretrained(base) if own else phi3_tokenizer
    if not own:
        base = save_base(tmp_path / "base", vocab_size=32064)  # an embedding for every id of the other tokenizer
        adapted(base, adapter)
        phi3_tokenizer.save_pretrained(tmp_path / "tokenizer")
        (tmp_path / "tokenizer" / "tokenizer.model").write_bytes(b"sentencepiece")
        (adapter / "config.yaml").write_text(f"{MARK}model: {{path: {base}, tokenizer: {tmp_path / 'tokenizer'}}}\n")
    made = merge_run(adapter, tmp_path / "out")
    read = AutoTokenizer.from_pretrained(made.path)
    talk = [{"role": "user", "content": " Hi <|end|> there\n\n"}]
    texts = [one.apply_chat_template(talk, add_generation_prompt=True) for one in (read, wanted)]
    assert texts[0] == texts[1]
    stops = GenerationConfig.from_pretrained(made.path).eos_token_id
    assert {read.convert_ids_to_tokens(i) for i in stops} >= {"<|end|>", "<|endoftext|>"}
    copied = made.path / "tokenizer.model"
    assert not copied.exists() if own else copied.read_bytes() == b"sentencepiece"


# -- places ----------------------------------------------------------------------------------------------------


def test_a_merged_model_is_not_overwritten(adapter: Path, tmp_path: Path) -> None:
    made = merge_run(adapter, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in made.path.iterdir()}
    with pytest.raises(ModelError, match="already holds a merged model"):
        merge_run(adapter, tmp_path / "out")
    assert {file.name: file.read_bytes() for file in made.path.iterdir()} == before


@pytest.mark.parametrize("place", ["a file", "adapter", "a link to nowhere"])
def test_a_place_that_is_taken_is_refused(adapter: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "a file").write_text("mine")
    (tmp_path / "a link to nowhere").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="is there already; nothing is overwritten"):
        merge_run(adapter, tmp_path / place)
    assert (tmp_path / "a file").read_text() == "mine"


def test_an_empty_folder_is_filled(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert merge_run(adapter, tmp_path / "empty").path == tmp_path / "empty"


def test_nothing_is_left_of_a_merge_that_fails(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, calls = module.save_file, []

    def fail(*arguments: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        honest(*arguments, **options)

    monkeypatch.setattr(module, "save_file", fail)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError, match="No space"):
        merge_run(adapter, tmp_path / "out", shard_bytes=30_000)
    assert sorted(tmp_path.iterdir()) == before


# -- held-out losses -------------------------------------------------------------------------------------------


def test_losses_of_base_adapter_and_merged_model_side_by_side(tiny_run: Path, tmp_path: Path, console: Console) -> None:
    made = phinetune.merge(tiny_run, tmp_path / "out", dtype="float32", console=console, device="cpu")
    losses = json.loads((made.path / "merged.json").read_text())["held_out_loss"]
    assert list(losses) == ["base", "adapter", "merged"]
    assert losses["base"] - losses["adapter"] > 0.05
    assert losses["merged"] == pytest.approx(losses["adapter"], abs=5e-3)
    evaluated = json.loads((tiny_run / "results.json").read_text())["evaluation"]
    assert losses["base"] == pytest.approx(evaluated["base"]["loss"], abs=1e-6)
    assert losses["adapter"] == pytest.approx(evaluated["tuned"]["loss"], abs=1e-6)
    for words in ("Scoring 3 held-out chats", "base", "adapter", "merged", f"{losses['merged']:.4f}"):
        assert words in said(console)
    card = (made.path / "README.md").read_text()
    assert f"| adapter | {losses['adapter']:.4f} | base and adapter, as trained |" in card


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_merged_model_is_measured_as_it_was_written(
    tiny_run: Path, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    honest, dtypes = api.load_base, []

    def load(*arguments: Any, **options: Any) -> Any:
        loaded = honest(*arguments, **options)
        dtypes.append(loaded.model.dtype)
        return loaded

    monkeypatch.setattr(api, "load_base", load)
    phinetune.merge(tiny_run, tmp_path / "out", dtype=dtype, console=console, device="cpu")
    assert dtypes == [getattr(torch, dtype)]


def test_a_run_with_a_held_out_file(chats: Path, tmp_path: Path, console: Console) -> None:
    config = tiny_config(chats, tmp_path / "run", max_steps=1)
    config.data.eval = str(write_jsonl(tmp_path / "held.jsonl", [chat("a", "b"), chat("c", "d")]))
    config.evaluation.enabled = False
    train_config(config, Console(file=io.StringIO()))
    made = phinetune.merge(tmp_path / "run", tmp_path / "out", console=console, device="cpu")
    assert "Scoring 2 held-out chats" in said(console)
    assert set(made.record["held_out_loss"]) == {"base", "adapter", "merged"}
    (tmp_path / "held.jsonl").unlink()
    again = phinetune.merge(tmp_path / "run", tmp_path / "again", console=console, device="cpu")
    assert "Held-out loss not measured:" in said(console)
    assert "held.jsonl: no such file" in said(console)
    assert "held_out_loss" not in again.record


def test_losses_that_can_not_be_had_are_said_in_a_line(
    adapter: Path, tiny_run: Path, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    phinetune.merge(adapter, tmp_path / "a", console=console, device="cpu")
    assert "Held-out loss not measured: no held-out chats are recorded for this run" in said(console)
    monkeypatch.setattr(api, "free_bytes", lambda device: 1000)
    phinetune.merge(tiny_run, tmp_path / "b", console=console, device="cpu")
    assert "Held-out loss not measured: the models take about 0.0 GB" in said(console)
    length = len(said(console))
    phinetune.merge(tiny_run, tmp_path / "c", score=False, console=console)
    assert "Held-out" not in said(console)[length:]


def test_a_qlora_run_into_either_base(chats: Path, tmp_path: Path, console: Console) -> None:
    pytest.importorskip("bitsandbytes")
    config = tiny_config(chats, tmp_path / "run")
    config.model.quantization, config.model.dtype, config.model.device = "nf4", "float32", "cpu"
    config.evaluation.enabled = False
    train_config(config, Console(file=io.StringIO()))
    made = {
        base: phinetune.merge(tmp_path / "run", tmp_path / base, base=base, console=console, device="cpu")
        for base in ("16bit", "quantized")
    }
    unquantised, quantised = (one.record["held_out_loss"] for one in made.values())
    assert unquantised["base"] == pytest.approx(quantised["base"], abs=1e-6)
    assert quantised["merged"] == pytest.approx(quantised["adapter"], abs=1e-4)
    assert abs(unquantised["merged"] - unquantised["adapter"]) > 10 * abs(quantised["merged"] - quantised["adapter"])
    assert made["quantized"].record["base_weights"] == "nf4"
    assert "quantised to nf4 and back" in said(console)


# -- the command line ------------------------------------------------------------------------------------------


def test_the_command(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["merge", tiny_run, "--out", out, "--dtype", "float32", "--device", "cpu"]
    assert run(monkeypatch, *command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        f"Merged {tiny_run} into {TINY}: 8 of 15 tensors changed, products in float32, written as float32"
    )
    assert lines[1].startswith(f"Wrote {out}: ")
    assert any("perplexity" in line for line in lines)
    assert lines[-3:] == ["Next:", f"  phinetune chat {out}", f"  phinetune evaluate {out} --data FILE"]

    assert run(monkeypatch, *command) == 2
    assert capsys.readouterr().err == (
        f"error: {out}: already holds a merged model; nothing is overwritten, so name another folder\n"
    )
    assert run(monkeypatch, "merge", out, "--out", tmp_path / "twice") == 2
    assert capsys.readouterr().err == f"error: {out}: already merged: no adapter there\n"
    assert not (tmp_path / "twice").exists()
    assert run(monkeypatch, "merge", tiny_run, "--out", tmp_path / "q", "--base", "quantized") == 2
    assert "was not quantised in training" in capsys.readouterr().err

    # What comes next, on what was written.
    rows = write_jsonl(tmp_path / "held.jsonl", [chat("a", "b")])
    assert run(monkeypatch, "evaluate", out, "--data", rows, "--max-new-tokens", 3) == 0
    tuned = open_model(tiny_run, device="cpu", dtype="float32").model
    torch.testing.assert_close(logits(open_model(out, device="cpu", dtype="float32").model), logits(tuned))


# -- the starter -----------------------------------------------------------------------------------------------


@pytest.mark.starter
@pytest.mark.slow
def test_the_merged_starter_says_the_same_forty_tokens(tuned_starter: TunedStarter, tmp_path: Path) -> None:
    tuned, tokenizer, folder, chats = tuned_starter
    made = merge_run(folder, tmp_path / "out", dtype="float32")
    merged = open_plain(made.path)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    ids = chat_ids(tokenizer, chats[2])
    assert ids == chat_ids(AutoTokenizer.from_pretrained(made.path), chats[2])
    wanted = greedy(tuned, ids, 40)
    assert len(wanted) == 40
    assert greedy(merged, ids, 40) == wanted
    with tuned.disable_adapter():
        assert greedy(tuned, ids, 40) != wanted
