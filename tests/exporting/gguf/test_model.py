"""A GGUF holds what llama.cpp's own converter would write, and llama.cpp answers with it as transformers does."""

from __future__ import annotations

import json
import math
import weakref
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Phi3ForCausalLM, PreTrainedTokenizerBase

from cli.cli_helpers import run
from exporting.export_helpers import TunedStarter
from exporting.gguf.gguf_helpers import SHAPES, chat_ids, greedy, hub_shape, keys_of, llama, random_model, tensors_of
from helpers import TINY
from phinetune.api.talk import load
from phinetune.checkpoints.random_shapes import byte_tokenizer
from phinetune.errors import ModelError
from phinetune.exporting.checkpoint_source import open_checkpoint, short_name
from phinetune.exporting.gguf.model import write_gguf
from phinetune.exporting.merge.merge import merge_run
from phinetune.exporting.targets import export

LETTER = 3 + ord("a")  # its id in the byte tokenizer
QUESTION = [{"role": "user", "content": "How many are 2 and 2?"}]
# llama.cpp's names, from its table for the architecture phi3.
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"} | {
    f"model.layers.{i}.{theirs}": f"blk.{i}.{ours}" for i in (0, 1) for theirs, ours in LAYER.items()
}


@pytest.fixture(scope="module")
def bytes_() -> PreTrainedTokenizerBase:
    return byte_tokenizer(300)


# -- what is written -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_every_tensor_is_the_models_in_ggufs_own_rounding(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "tiny.gguf"
    export(TINY, "gguf", kind=kind, out=file)
    state = load(TINY, dtype="float32", device="cpu")[0].state_dict()
    found = tensors_of(file)
    assert found.keys() == {f"{name}.weight" for name in NAMES.values()}
    for theirs, ours in NAMES.items():
        numbers = state[f"{theirs}.weight"].numpy()
        type_ = gguf.GGMLQuantizationType[kind.upper() if numbers.ndim > 1 else "F32"]
        tensor = found[f"{ours}.weight"]
        assert tensor.tensor_type == type_, ours
        assert list(tensor.shape) == list(reversed(numbers.shape)), ours
        assert tensor.data.tobytes() == gguf.quantize(numbers, type_).tobytes(), ours


def test_rows_that_do_not_fill_a_block_are_float16_as_the_converter_has_them(tmp_path: Path) -> None:
    shape = "random:{layers: 1, hidden_size: 32, intermediate_size: 40, heads: 4, vocab: 300}"
    export(shape, "gguf", kind="q8_0", out=tmp_path / "a.gguf")
    types = {name: tensor.tensor_type.name for name, tensor in tensors_of(tmp_path / "a.gguf").items()}
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.ffn_up.weight"] == "Q8_0"


@pytest.mark.parametrize("name", SHAPES)
def test_a_hub_shape_has_every_key_and_factor(tmp_path: Path, name: str, bytes_: PreTrainedTokenizerBase) -> None:
    folder = hub_shape(name, tmp_path / name)
    random_model(folder, bytes_)
    file = tmp_path / "a.gguf"
    export(str(folder), "gguf", kind="f32", out=file)
    tree, keys, tensors = json.loads((folder / "config.json").read_text()), keys_of(file), tensors_of(file)
    width, heads = tree["hidden_size"], tree["num_attention_heads"]
    rotary = int(tree.get("partial_rotary_factor", 1.0) * width) // heads
    longrope = tree["rope_scaling"] is not None
    expected = {
        "general.architecture": "phi3",
        "general.type": "model",
        "general.file_type": 0,
        "general.quantization_version": 2,
        "phi3.context_length": tree["max_position_embeddings"],
        "phi3.rope.scaling.original_context_length": 4096,
        "phi3.embedding_length": width,
        "phi3.feed_forward_length": 160,
        "phi3.block_count": 2,
        "phi3.attention.head_count": heads,
        "phi3.attention.head_count_kv": tree["num_key_value_heads"],
        "phi3.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "phi3.attention.sliding_window": tree["sliding_window"],
        "phi3.rope.dimension_count": rotary,
        "phi3.rope.freq_base": 10000.0,
    }
    if longrope:  # as llama.cpp shows it for Microsoft's Phi-3.5 and Phi-4 mini
        expected["phi3.rope.scaling.attn_factor"] = pytest.approx(1.190238, abs=5e-7)
    assert {key: value for key, value in keys.items() if key.startswith("phi3.")} == {
        key: value for key, value in expected.items() if key.startswith("phi3.")
    }
    assert all(keys[key] == value for key, value in expected.items())
    factors = {"rope_factors_long.weight": "long_factor", "rope_factors_short.weight": "short_factor"}
    assert factors.keys() <= tensors.keys() if longrope else not factors.keys() & tensors.keys()
    for ours, theirs in factors.items() if longrope else ():
        assert tensors[ours].data.tobytes() == np.array(tree["rope_scaling"][theirs], np.float32).tobytes()
        assert len(tensors[ours].data) == rotary // 2 == 48
    assert ("output.weight" in tensors) is not tree["tie_word_embeddings"]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [({"attention_factor": 1.5}, 1.5), ({"factor": 8.0}, math.sqrt(1 + math.log(8, 4096)))],
    ids=["own", "formula"],
)
def test_an_own_attention_factor_is_kept(
    tmp_path: Path, bytes_: PreTrainedTokenizerBase, given: dict[str, float], wanted: float
) -> None:
    folder = hub_shape("phi-3.5-mini-instruct", tmp_path / "m")
    random_model(folder, bytes_)
    tree = json.loads((folder / "config.json").read_text())
    tree["rope_scaling"] = {**tree["rope_scaling"], **given}
    (folder / "config.json").write_text(json.dumps(tree))
    export(str(folder), "gguf", out=tmp_path / "a.gguf")
    assert keys_of(tmp_path / "a.gguf")["phi3.rope.scaling.attn_factor"] == pytest.approx(wanted)


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    source = open_checkpoint(TINY)
    honest, alive = source.tensor, []

    def watched(name: str) -> torch.Tensor:
        assert all(one() is None for one in alive), name
        array = honest(name).numpy().copy()  # torch keeps it for as long as it uses its memory
        alive.append(weakref.ref(array))
        return torch.from_numpy(array)

    source.tensor = watched  # type: ignore[method-assign]
    write_gguf(source, tmp_path / "a.gguf", "f32", "a")  # whose arrays are the tensors' memory
    assert len(alive) == len(source.names())


# -- llama.cpp answers as transformers does --------------------------------------------------------------------


def test_a_tiny_run_in_llama_cpp_answers_as_in_transformers(tiny_run: Path, tmp_path: Path) -> None:
    model, tokenizer = load(tiny_run, dtype="float32", device="cpu")
    export(str(tiny_run), "gguf", kind="f32", out=tmp_path / "tiny.gguf")
    ids = chat_ids(tokenizer, QUESTION)
    with llama(tmp_path / "tiny.gguf") as server:
        assert server.tokenize(server.render(QUESTION)) == ids
        assert server.greedy(ids, 40) == greedy(model, ids, 40)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("phi-3-mini-4k-instruct", {}),
        ("phi-3.5-mini-instruct", {}),
        ("phi-4-mini-instruct", {}),
        # The long factors: transformers takes them since the prompt is longer than the original context.
        ("phi-3.5-mini-instruct", {"original_max_position_embeddings": 16, "max_position_embeddings": 512}),
        ("phi-4-mini-instruct", {"original_max_position_embeddings": 16, "max_position_embeddings": 512}),
    ],
)
def test_a_hub_shape_in_llama_cpp_answers_as_in_transformers(
    tmp_path: Path, name: str, changes: dict[str, Any], bytes_: PreTrainedTokenizerBase
) -> None:
    folder = hub_shape(name, tmp_path / "m", **changes)
    model = random_model(folder, bytes_)
    ids = chat_ids(bytes_, QUESTION)
    assert len(ids) > 16
    export(str(folder), "gguf", kind="f32", out=tmp_path / "a.gguf")
    with llama(tmp_path / "a.gguf") as server:
        ours = server.log_probabilities(ids, LETTER)
        theirs = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1).tolist()
        assert max(abs(ours[i] - theirs[i]) for i in ours) < 1e-3
        assert server.greedy(ids, 40) == greedy(model, ids, 40)


@pytest.mark.starter
@pytest.mark.slow
def test_a_tuned_starter_in_llama_cpp_answers_as_in_transformers(tuned_starter: TunedStarter, tmp_path: Path) -> None:
    tuned, tokenizer, folder, chats = tuned_starter
    export(str(folder), "gguf", kind="f32", out=tmp_path / "a.gguf")
    ids = chat_ids(tokenizer, chats[0])
    with llama(tmp_path / "a.gguf") as server:
        assert server.tokenize(server.render(chats[0])) == ids
        answer = server.greedy(ids, 40)
    assert len(answer) == 40
    assert answer == greedy(tuned, ids, 40)
    with tuned.disable_adapter():
        assert answer != greedy(tuned, ids, 40)


@pytest.mark.starter
@pytest.mark.slow
def test_q8_0_keeps_the_top_tokens_log_probability(tuned_starter: TunedStarter, tmp_path: Path) -> None:
    """llama.cpp rounds activations to 8 bits, too, which moves logits by some tenths where an answer is unsure.

    That moves log p by (1 - p) times as much, in either direction.
    """
    tuned, tokenizer, folder, chats = tuned_starter
    export(str(folder), "gguf", kind="q8_0", out=tmp_path / "a.gguf")
    moved = []
    with llama(tmp_path / "a.gguf") as server:
        for chat in chats:
            ids = chat_ids(tokenizer, chat)
            with torch.no_grad():
                theirs = torch.log_softmax(tuned(input_ids=torch.tensor([ids])).logits[0, -1], -1)
            top = int(theirs.argmax())
            log_p = float(theirs[top])
            moved.append(server.log_probabilities(ids)[top] - log_p)
            assert abs(moved[-1]) < 0.4 * -math.expm1(log_p), chat
    assert sum(map(abs, moved)) / len(moved) < 0.02


# -- refused, and staged ---------------------------------------------------------------------------------------


def refused(tmp_path: Path, run: str, to: str = "gguf", **options: Any) -> str:
    """The sentences with which an export is refused; nothing may be left behind."""
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(ModelError) as caught:
        export(run, to, **{"out": tmp_path / "refused.gguf", **options})
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    return str(caught.value)


def test_what_is_there_is_replaced_only_when_asked(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_text("mine")
    assert "a.gguf: is there already" in refused(tmp_path, TINY, out=file)
    assert file.read_text() == "mine"
    export(TINY, "gguf", out=file, overwrite=True)
    assert file.read_bytes()[:4] == b"GGUF"
    (tmp_path / "folder").mkdir()
    assert "is a folder" in refused(tmp_path, TINY, out=tmp_path / "folder", overwrite=True)


@pytest.mark.parametrize(
    ("to", "options", "words"),
    [
        ("tflite", {}, "--to must be one of gguf, gguf-lora, ollama"),
        (
            "gguf",
            {"kind": "int4"},
            "--type must be one of f16, f32, bf16, q8_0, q6_k, q5_k_m, q4_k_m, q4_0 for --to gguf, not int4",
        ),
    ],
    ids=["target", "type"],
)
def test_an_unknown_target_or_type_is_refused(tmp_path: Path, to: str, options: dict[str, Any], words: str) -> None:
    assert words in refused(tmp_path, TINY, to, **options)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path, str(tmp_path / "none"))


def test_a_model_that_llama_cpp_has_no_form_for_is_refused(tmp_path: Path, bytes_: PreTrainedTokenizerBase) -> None:
    folder = hub_shape("phi-3-mini-4k-instruct", tmp_path / "m", head_dim=64, hidden_act="gelu")
    random_model(folder, bytes_)
    text = refused(tmp_path, str(folder))
    assert "hidden_act is gelu, and llama.cpp's Phi-3 has only silu" in text
    assert "head_dim is 64, and llama.cpp's Phi-3 divides" in text
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": 280}))
    assert "shape (300, 128) does not match" in refused(tmp_path, str(folder))


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        (float("nan"), "f32", "layers.1.mlp.down_proj.weight: the weights of"),
        (1e6, "f16", "blk.1.ffn_down.weight: it holds values that are too large for float16"),
        (1e6, "bf16", None),
    ],
    ids=["not finite", "too large for f16", "not too large for bf16"],
)
def test_a_value_that_the_file_can_not_hold_is_refused_and_leaves_nothing(
    tmp_path: Path, bytes_: PreTrainedTokenizerBase, value: float, kind: str, words: str | None
) -> None:
    folder = hub_shape("phi-3-mini-4k-instruct", tmp_path / "m")
    random_model(folder, bytes_)
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.down_proj.weight"][3, 3] = value
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    if words:
        assert words in refused(tmp_path, str(folder), kind=kind)
    else:
        export(str(folder), "gguf", kind=kind, out=tmp_path / "a.gguf")


# -- which checkpoint is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("held", ["embed", "head", "both", "unlike"])
def test_tied_embeddings_are_found_in_whatever_the_files_hold(
    tmp_path: Path, held: str, bytes_: PreTrainedTokenizerBase
) -> None:
    folder = hub_shape("phi-4-mini-instruct", tmp_path / "m")
    random_model(folder, bytes_)
    state = load_file(folder / "model.safetensors")
    embed = state.pop("model.embed_tokens.weight")
    if held != "head":
        state["model.embed_tokens.weight"] = embed
    if held != "embed":
        state["lm_head.weight"] = embed + (held == "unlike")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    export(str(folder), "gguf", kind="f32", out=tmp_path / "a.gguf")
    tensors = tensors_of(tmp_path / "a.gguf")
    assert ("output.weight" in tensors) is (held == "unlike")
    assert tensors["token_embd.weight"].data.tobytes() == embed.numpy().tobytes()
    theirs = Phi3ForCausalLM.from_pretrained(folder)
    assert torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight) is (held != "unlike")


def test_a_run_and_what_it_is_merged_into_are_the_same_file(tiny_run: Path, tmp_path: Path) -> None:
    merge_run(tiny_run, tmp_path / "merged", dtype="float32")
    export(str(tiny_run), "gguf", kind="q8_0", out=tmp_path / "run.gguf")
    export(str(tmp_path / "merged"), "gguf", kind="q8_0", out=tmp_path / "merged.gguf")
    ours, theirs = tensors_of(tmp_path / "run.gguf"), tensors_of(tmp_path / "merged.gguf")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].data.tobytes() == theirs[name].data.tobytes() for name in ours)
    keys, merged_keys = keys_of(tmp_path / "run.gguf"), keys_of(tmp_path / "merged.gguf")
    assert {key for key in keys if keys[key] != merged_keys.get(key)} == {"general.name"}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("{run}", "tiny"),
        ("{run}/checkpoint-4", "tiny-checkpoint-4"),
        (TINY, "random"),
        ("microsoft/Phi-3-mini-4k-instruct", "Phi-3-mini-4k-instruct"),
    ],
    ids=["run", "checkpoint", "random", "hub"],
)
def test_files_are_named_after_what_is_exported(tiny_run: Path, path: str, name: str) -> None:
    assert short_name(path.replace("{run}", str(tiny_run))) == name


# -- the command line ------------------------------------------------------------------------------------------


def test_the_command_says_what_it_wrote_and_what_runs_it(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "export", tiny_run, "--to", "gguf", "--type", "q8_0") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("Wrote tiny-q8_0.gguf: a GGUF of 15 tensors, q8_0, ")
    assert out[-2:] == ["Run it with:", "  llama-cli -m tiny-q8_0.gguf -c 4096 --temp 0"]
    assert (tmp_path / "tiny-q8_0.gguf").stat().st_mode & 0o777 == 0o666 & ~_umask(tmp_path)
    assert run(monkeypatch, "export", tiny_run, "--to", "gguf", "--type", "q8_0") == 2
    assert capsys.readouterr().err.startswith("error: tiny-q8_0.gguf: is there already")
    assert run(monkeypatch, "export", tiny_run, "--to", "gguf", "--type", "q8_0", "--overwrite") == 0
    assert run(monkeypatch, "export", tiny_run / "checkpoint-4", "--to", "gguf", "--out", "a/b.gguf") == 0
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.gguf"]


def _umask(folder: Path) -> int:
    """As a file made here shows it."""
    (folder / "any").touch()
    return 0o666 & ~((folder / "any").stat().st_mode & 0o777)
