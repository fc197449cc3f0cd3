"""onnxruntime-genai answers with an exported folder as transformers does with the model that was exported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from cli.cli_helpers import run
from exporting.export_helpers import CHATS, TEXTS, TunedStarter
from exporting.gguf.gguf_helpers import (
    SPLIT_SHAPES,
    chat_ids,
    greedy,
    hub_shape,
    random_adapter,
    random_model,
    split_model,
)
from exporting.onnx.onnx_helpers import Genai
from helpers import TINY
from phinetune.checkpoints.random_shapes import byte_tokenizer
from phinetune.errors import ModelError
from phinetune.exporting.merge.merge import merge_run
from phinetune.exporting.onnx import model as onnx
from phinetune.exporting.targets import export

pytest.importorskip("onnxruntime_genai")  # there is none for Python 3.10 that reads transformers 5's configurations

QUESTION = [{"role": "user", "content": "How many are 2 and 2?"}]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(Phi-3 mini's shape, narrow, with an adapter in float32, the adapter's folder, what it is exported to)."""
    place = tmp_path_factory.mktemp("onnx")
    model = random_model(hub_shape("phi-3-mini-4k-instruct", place / "m"), byte_tokenizer(300))
    tuned = random_adapter(model, place / "adapter", str(place / "m"), size=1.0)
    export(str(place / "adapter"), "onnx", kind="f32", out=place / "out")
    return tuned, place / "adapter", place / "out"


def without_end(model: Any, ids: list[int]) -> list[int]:
    """transformers' own next 40 tokens, without the one that ends the answer."""
    answer = greedy(model, ids, 40)
    return answer[:-1] if answer[-1] in model.generation_config.eos_token_id else answer


def test_an_adapter_in_onnxruntime_answers_as_in_peft(adapter: Any) -> None:
    tuned, _, folder = adapter
    ids = chat_ids(byte_tokenizer(300), QUESTION)
    genai = Genai(folder)
    assert genai.tokenize(genai.render(QUESTION)) == ids
    assert genai.answer(ids, 40) == without_end(tuned, ids)


def test_a_split_model_in_onnxruntime_answers_as_in_transformers(tmp_path: Path) -> None:
    """Llama 3.1's scaling, grouped queries, heads wider than a fourth of the width, one embedding."""
    model, tokenizer = split_model(SPLIT_SHAPES["llama 3"], tmp_path / "m")
    export(str(tmp_path / "m"), "onnx", kind="f32", out=tmp_path / "out")
    ids = chat_ids(tokenizer, QUESTION)
    assert Genai(tmp_path / "out").answer(ids, 40) == without_end(model, ids)


@pytest.mark.starter
@pytest.mark.slow
def test_a_tuned_starter_in_onnxruntime_answers_as_in_transformers(tuned_starter: TunedStarter, tmp_path: Path) -> None:
    tuned, tokenizer, folder, chats = tuned_starter
    export(str(folder), "onnx", kind="f32", out=tmp_path / "out")
    ids = chat_ids(tokenizer, chats[3])
    genai = Genai(tmp_path / "out")
    assert genai.tokenize(genai.render(chats[3])) == ids
    answer = genai.answer(ids, 40)
    assert len(answer) == 40
    assert answer == greedy(tuned, ids, 40)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("phi-3-mini-4k-instruct", {}),
        ("phi-3-mini-4k-instruct", {"sliding_window": 9}),
        ("phi-3.5-mini-instruct", {}),
        ("phi-4-mini-instruct", {}),
        ("phi-3.5-mini-instruct", {"original_max_position_embeddings": 16, "max_position_embeddings": 512}),
    ],
    ids=["phi-3 mini", "short window", "phi-3.5 mini", "phi-4 mini", "long factors"],
)
def test_a_hub_shape_in_onnxruntime_answers_as_in_transformers(
    tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    tokenizer: PreTrainedTokenizerBase = byte_tokenizer(300)
    model = random_model(hub_shape(name, tmp_path / "m", **changes), tokenizer)
    ids = chat_ids(tokenizer, QUESTION)
    export(str(tmp_path / "m"), "onnx", kind="f32", out=tmp_path / "out")
    assert Genai(tmp_path / "out").answer(ids, 40) == without_end(model, ids)


def test_chats_in_phi3s_own_vocabulary_have_the_ids_of_transformers(
    phi3_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = hub_shape("phi-3-mini-4k-instruct", tmp_path / "m", vocab_size=32064)
    random_model(folder, phi3_tokenizer)
    export(str(folder), "onnx", kind="f32", out=tmp_path / "out")
    genai = Genai(tmp_path / "out")
    for text in TEXTS:
        assert genai.tokenize(text) == phi3_tokenizer(text)["input_ids"], text
    for chat in CHATS:
        assert genai.render(chat) == phi3_tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True
        )
        assert genai.tokenize(genai.render(chat)) == chat_ids(phi3_tokenizer, chat), chat


def test_every_stop_id_is_in_the_configuration(adapter: Any) -> None:
    tuned, _, folder = adapter
    stops = json.loads((folder / "genai_config.json").read_text())["model"]["eos_token_id"]
    assert stops == tuned.generation_config.eos_token_id


def test_int4_is_smaller_and_runs(tmp_path: Path) -> None:
    folder = hub_shape("phi-3-mini-4k-instruct", tmp_path / "m", intermediate_size=512)
    random_model(folder, byte_tokenizer(300))
    sizes = {}
    for kind in ("f32", "int4"):
        sizes[kind] = export(str(folder), "onnx", kind=kind, out=tmp_path / kind).size
    assert sizes["int4"] < sizes["f32"] / 2
    assert len(Genai(tmp_path / "int4").answer([5, 6, 7], 8)) <= 8


def test_the_command_says_what_it_wrote_and_what_it_names_runs(
    adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "export", adapter[1], "--to", "onnx") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("Wrote adapter-onnx-int4: a folder for onnxruntime-genai, int4, ")
    assert out[1:] == ["Run it with:", "  python adapter-onnx-int4/chat.py"]
    names = {path.name for path in Path("adapter-onnx-int4").iterdir()}
    assert {"model.onnx", "genai_config.json", "chat.py", "tokenizer.json"} <= names <= onnx.FILES
    command = [sys.executable, *out[2].split()[1:]]
    done = subprocess.run(command, input="Hi\nAnd now?\n", capture_output=True, text=True, env={"PATH": ""})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("you> ") == 3

    assert run(monkeypatch, "export", adapter[1], "--to", "onnx") == 2
    assert "is there already; name another place" in capsys.readouterr().err
    (tmp_path / "adapter-onnx-int4" / "mine.txt").touch()
    assert run(monkeypatch, "export", adapter[1], "--to", "onnx", "--overwrite") == 2
    assert "holds files that do not come from an export" in capsys.readouterr().err


def refused(tmp_path: Path, run: Path | str, **options: Any) -> str:
    """The sentence with which an export is refused; nothing may be left behind."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ModelError) as caught:
        export(str(run), "onnx", out=tmp_path / "out", **options)
    assert sorted(tmp_path.iterdir()) == before
    return str(caught.value)


def test_a_model_in_memory_is_refused(tmp_path: Path) -> None:
    assert "is made in memory" in refused(tmp_path, TINY)


def test_heads_that_onnxruntime_does_not_take_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    merge_run(tiny_run, tmp_path / "m")
    assert "8 dimensions per head; onnxruntime takes only multiples of 16" in refused(tmp_path, tmp_path / "m")


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    folder = hub_shape("phi-3-mini-4k-instruct", tmp_path / "m")
    random_model(folder, byte_tokenizer(300))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert refused(tmp_path, folder)


def test_an_unknown_type_is_refused(adapter: Any, tmp_path: Path) -> None:
    words = "--type must be one of int4, f32 for --to onnx, not q8_0"
    assert words in refused(tmp_path, adapter[1], kind="q8_0")


def test_a_missing_package_is_named(adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "find_spec", lambda name: None if name == "onnx_ir" else name)
    assert "needs onnx_ir; pip install 'phinetune[onnx]'" in refused(tmp_path, adapter[1])
