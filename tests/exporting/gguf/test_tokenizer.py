"""A tokenizer in llama.cpp gives the ids that it gives in transformers: for single texts and for whole chats."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from exporting.export_helpers import CHATS, TEXTS
from exporting.gguf.gguf_helpers import Llama, chat_ids, hub_shape, keys_of, random_model
from helpers import SHARED, TINY
from phinetune.checkpoints.random_shapes import CHAT_TEMPLATE, byte_tokenizer
from phinetune.errors import ModelError
from phinetune.exporting.checkpoint_source import open_checkpoint
from phinetune.exporting.gguf.model import general_name
from phinetune.exporting.gguf.tokenizer import CL100K, O200K, QWEN2, UNCOMPOSED, read_vocabulary
from phinetune.exporting.targets import export


def has_marks(text: str) -> bool:
    """Whether there are combining marks in it."""
    return any(unicodedata.category(letter).startswith("M") for letter in text)


def check_texts_and_chats(server: Llama, tokenizer: PreTrainedTokenizerBase, marks: bool = True) -> None:
    for text in TEXTS:
        if marks or not has_marks(text):
            assert server.tokenize(text) == tokenizer(text)["input_ids"], text
    for chat in CHATS:
        if not marks and has_marks(chat[0]["content"]):
            continue
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert server.render(chat) == rendered
        assert server.tokenize(server.render(chat)) == chat_ids(tokenizer, chat), chat


# -- Phi-3's own -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def phi3_file(_phi3_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF of a small model with the real Phi-3 vocabulary."""
    folder = hub_shape("phi-3-mini-4k-instruct", tmp_path_factory.mktemp("phi3") / "mine", vocab_size=32064)
    random_model(folder, _phi3_tokenizer)
    export(str(folder), "gguf", out=folder.parent / "phi3.gguf")
    return folder.parent / "phi3.gguf"


@pytest.fixture(scope="module")
def phi3_server(phi3_file: Path) -> Llama:
    return Llama(phi3_file)


def test_phi3s_scores_and_kinds_are_sentencepieces(phi3_file: Path) -> None:
    """Compared with the scores in llama.cpp's models/ggml-vocab-phi-3.gguf, which come from tokenizer.model."""
    keys = keys_of(phi3_file)
    tokens, scores, types = (keys[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    assert [len(part) for part in (tokens, scores, types)] == [32064] * 3
    spaces = [i for i, token in enumerate(tokens) if token.strip("▁") == ""]
    assert spaces[:3] == [259, 268, 308]
    assert {scores[i] for i in spaces} == {-1e9}
    assert all(scores[i] == 259 - i for i in range(259, 32000) if i not in spaces)
    assert scores[:3] == [-1000.0] * 3
    assert set(scores[3:259]) == {0.0}
    assert set(scores[32000:32011]) == {-1000.0}
    assert (tokens[32011], scores[32011], types[32011]) == ("[PAD32011]", -10000.0, gguf.TokenType.UNUSED)
    assert types[:3] == [gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED]
    assert set(types[3:259]) == {gguf.TokenType.BYTE}
    assert set(types[259:32000]) == {gguf.TokenType.NORMAL}
    assert set(types[32000:32011]) == {gguf.TokenType.CONTROL}
    special = {"bos": 1, "eos": 32000, "eot": 32007, "unknown": 0, "padding": 32000}
    assert {name: keys[f"tokenizer.ggml.{name}_token_id"] for name in special} == special
    assert "tokenizer.ggml.add_space_prefix" not in keys
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert keys["general.name"] == "mine (phi-3)"


def test_phi3_in_llama_cpp_passes_its_vectors_and_gives_transformers_ids(
    phi3_server: Llama, phi3_tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = SHARED / "phi3-tokenizer"
    texts = (folder / "vectors.inp").read_text().split("\n__ggml_vocab_test__\n")
    wanted = [[int(i) for i in line.split()] for line in (folder / "vectors.out").read_text().split("\n")]
    assert len(texts) == 47
    for text, ids in zip(texts, wanted, strict=False):
        assert phi3_server.tokenize(text, special=False) == ids, text
    check_texts_and_chats(phi3_server, phi3_tokenizer)


def test_without_phi_3_in_its_name_llama_cpp_does_not_strip_white_space(
    phi3_file: Path, phi3_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The trap that `general_name` is for: the same file under the name that llama.cpp's converter would give it."""
    data = phi3_file.read_bytes()
    assert data.count(b"mine (phi-3)") == 1
    (tmp_path / "renamed.gguf").write_bytes(data.replace(b"mine (phi-3)", b"mine (phi 3)"))
    chat = CHATS[0]
    server = Llama(tmp_path / "renamed.gguf")
    assert server.tokenize(server.render(chat)) != chat_ids(phi3_tokenizer, chat)


@pytest.mark.parametrize("end", [32000, 32007])
def test_llama_cpp_stops_at_every_id_that_ends_a_turn(phi3_server: Llama, end: int) -> None:
    assert phi3_server.greedy([1, 15043], 5, logit_bias=[[end, 1000]]) == [end]


def test_llama_cpp_goes_on_after_another_special_token(phi3_server: Llama) -> None:
    assert len(phi3_server.greedy([1, 15043], 5, logit_bias=[[32006, 1000]])) == 5


def test_stops_that_llama_cpp_does_not_know_are_told_it_or_noted(phi3_tokenizer: PreTrainedTokenizerBase) -> None:
    """Phi-3's generation config stops at <|assistant|> as well, which llama.cpp does not know for an end."""
    generation = GenerationConfig(eos_token_id=[32000, 32001, 32007])
    vocabulary = read_vocabulary(phi3_tokenizer, generation, 32064)
    assert (vocabulary.special["eot"], vocabulary.special["eom"]) == (32007, 32001)
    assert not vocabulary.notes
    generation = GenerationConfig(eos_token_id=[32001, 32006, 32010])
    notes = read_vocabulary(phi3_tokenizer, generation, 32064).notes
    assert notes == ["llama.cpp does not stop at <|system|>, <|user|> by itself: give it --reverse-prompt for these"]


def test_a_tokenizer_that_puts_a_space_before_the_first_text_alone(
    phi3_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """So transformers 5 loads Phi-3's files as a LlamaTokenizer; chats start with a special token, so it puts none."""
    source = hub_shape("phi-3-mini-4k-instruct", tmp_path / "m", vocab_size=32064)
    random_model(source, phi3_tokenizer)
    file = source / "tokenizer.json"
    tree = json.loads(file.read_text())
    tree["normalizer"] = None
    tree["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    file.write_text(json.dumps(tree))
    export(str(source), "gguf", out=tmp_path / "a.gguf")
    tokenizer = AutoTokenizer.from_pretrained(source)
    server = Llama(tmp_path / "a.gguf")
    assert keys_of(tmp_path / "a.gguf")["tokenizer.ggml.add_space_prefix"] is False
    for chat in CHATS:
        assert server.tokenize(server.render(chat)) == chat_ids(tokenizer, chat)
    assert chat_ids(tokenizer, CHATS[0]) != chat_ids(phi3_tokenizer, CHATS[0])


# -- the starter's, and bytes ----------------------------------------------------------------------------------


@pytest.mark.starter
def test_the_starter_in_llama_cpp_gives_transformers_ids(starter_folder: Path, tmp_path: Path) -> None:
    export("starter", "gguf", kind="q8_0", out=tmp_path / "a.gguf")
    check_texts_and_chats(Llama(tmp_path / "a.gguf"), AutoTokenizer.from_pretrained(starter_folder))
    keys = keys_of(tmp_path / "a.gguf")
    own = gguf.SpecialVocab(starter_folder, load_merges=True)  # what llama.cpp's converter takes
    assert keys["tokenizer.ggml.merges"] == own.merges
    assert keys["tokenizer.chat_template"] == own.chat_template
    names = {"unk": "unknown", "pad": "padding"}
    assert {keys[f"tokenizer.ggml.{names.get(part, part)}_token_id"] for part in own.special_token_ids} == set(
        own.special_token_ids.values()
    )


def test_bytes_in_llama_cpp_give_transformers_ids(tmp_path: Path) -> None:
    export(TINY, "gguf", out=tmp_path / "a.gguf")
    check_texts_and_chats(Llama(tmp_path / "a.gguf"), byte_tokenizer(300))


# -- other splittings ------------------------------------------------------------------------------------------


def trained(splitting: pre_tokenizers.PreTokenizer, strip: bool = False) -> PreTrainedTokenizerFast:
    """A BPE tokenizer that was trained on `TEXTS`, repeated, with Phi-3's chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = splitting, decoders.ByteLevel()
    names = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        special_tokens=[AddedToken(name, rstrip=strip, special=True, normalized=False) for name in names],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator([" ".join(TEXTS), *TEXTS, "   ".join(TEXTS)] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=names[0], pad_token=names[0], chat_template=CHAT_TEMPLATE
    )


def split(regex: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


SPLITTINGS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "dbrx": split(CL100K),
    "gpt-4o": split(O200K),
    "qwen2": split(QWEN2),
}


@pytest.mark.parametrize("name", SPLITTINGS)
def test_each_splitting_in_llama_cpp_gives_transformers_ids(tmp_path: Path, name: str) -> None:
    tokenizer = trained(SPLITTINGS[name])
    folder = hub_shape("phi-4-mini-instruct", tmp_path / "phi3-mine", vocab_size=640)
    random_model(folder, tokenizer)
    export(str(folder), "gguf", out=tmp_path / "a.gguf")
    keys = keys_of(tmp_path / "a.gguf")
    assert keys["tokenizer.ggml.pre"] == name
    # With this vocabulary llama.cpp could not load a file whose name holds phi3.
    assert keys["general.name"] == "Phi 3-mine"
    notes = read_vocabulary(tokenizer, GenerationConfig(), 640).notes
    assert any("combining marks" in note for note in notes) is (name == "gpt-4o")
    check_texts_and_chats(Llama(tmp_path / "a.gguf"), tokenizer, marks=name != "gpt-4o")


def test_llama_3s_words_that_are_tokens_are_never_split(tmp_path: Path) -> None:
    """`ignore_merges`: here the last token can't be reached by merges any more."""
    tree = json.loads(trained(SPLITTINGS["dbrx"]).backend_tokenizer.to_str())
    tree["model"] |= {"ignore_merges": True, "merges": tree["model"]["merges"][:-40]}
    core = Tokenizer.from_str(json.dumps(tree))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    folder = hub_shape("phi-4-mini-instruct", tmp_path / "m", vocab_size=640)
    random_model(folder, tokenizer)
    export(str(folder), "gguf", out=tmp_path / "a.gguf")
    assert keys_of(tmp_path / "a.gguf")["tokenizer.ggml.pre"] == "llama-bpe"
    check_texts_and_chats(Llama(tmp_path / "a.gguf"), tokenizer)


def test_composed_letters_are_noted() -> None:
    """Qwen2's tokenizer composes letters first. llama.cpp does not, and few texts have uncomposed ones."""
    qwen2 = rebuilt(trained(SPLITTINGS["qwen2"]), normalizer=normalizers.NFC())
    assert UNCOMPOSED in read_vocabulary(qwen2, GenerationConfig(), 640).notes


def test_the_splittings_differ_on_these_texts() -> None:
    ids = {name: [pre.pre_tokenize_str(text) for text in TEXTS] for name, pre in SPLITTINGS.items()}
    assert all(ids[a] != ids[b] for a in ids for b in ids if a < b)


def test_white_space_that_llama_cpp_would_treat_otherwise_is_noted() -> None:
    """It strips behind special tokens only where the vocabulary has Phi-3's <s>, </s> and <unk>."""
    vocabulary = read_vocabulary(trained(SPLITTINGS["gpt-2"], strip=True), GenerationConfig(), 640)
    assert not vocabulary.strips
    assert "white space after <|endoftext|>, <|system|>" in vocabulary.notes[0]
    assert general_name("Phi-3.5-mine", vocabulary) == "Phi 3.5-mine"


# -- refused ---------------------------------------------------------------------------------------------------


def rebuilt(tokenizer: PreTrainedTokenizerBase, **parts: Any) -> PreTrainedTokenizerFast:
    """The same tokenizer with parts of its core replaced."""
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    for part, value in parts.items():
        setattr(core, part, value)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", chat_template=CHAT_TEMPLATE)


def refused(tokenizer: PreTrainedTokenizerBase, size: int = 640) -> str:
    with pytest.raises(ModelError) as caught:
        read_vocabulary(tokenizer, GenerationConfig(), size)
    return str(caught.value)


NO_SPLITTING = "llama.cpp has no splitting of text like this tokenizer's"


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"pre_tokenizer": pre_tokenizers.Whitespace()}, NO_SPLITTING),
        ({"pre_tokenizer": split(r"\p{L}+")}, NO_SPLITTING),
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, NO_SPLITTING),
        ({"normalizer": normalizers.NFKC()}, "its normalizer (NFKC)"),
    ],
    ids=["white space", "another expression", "prefix space", "normalizer"],
)
def test_a_tokenizer_that_llama_cpp_has_no_form_for_is_refused(parts: dict[str, Any], words: str) -> None:
    assert words in refused(rebuilt(trained(SPLITTINGS["gpt-2"]), **parts))


def test_more_tokens_than_the_embedding_has_rows_are_refused() -> None:
    assert "tokens up to id" in refused(trained(SPLITTINGS["gpt-2"]), 300)


def test_another_kind_of_tokenizer_is_refused() -> None:
    pieces = Tokenizer(models.Unigram([("a", -1.0), ("<|endoftext|>", -2.0)]))
    unigram = PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="<|endoftext|>", chat_template=CHAT_TEMPLATE)
    assert "a Unigram tokenizer" in refused(unigram)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda merges: [merges[1], merges[0], *merges[2:]], "not in the order of its tokens"),
        (lambda merges: merges[:100] + merges[101:], "1 pairs that make a token are not merges"),
    ],
    ids=["order", "missing"],
)
def test_merges_that_scores_can_not_follow_are_refused(
    phi3_tokenizer: PreTrainedTokenizerBase, change: Callable[[list[Any]], list[Any]], words: str
) -> None:
    tree = json.loads(phi3_tokenizer.backend_tokenizer.to_str())
    tree["model"]["merges"] = change(tree["model"]["merges"])
    changed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(tree)),
        eos_token="<|endoftext|>",
        chat_template=phi3_tokenizer.chat_template,
    )
    assert words in refused(changed, 32064)


def test_the_tokenizer_of_a_checkpoint_is_the_one_that_it_is_trained_with(tmp_path: Path, tiny_run: Path) -> None:
    assert open_checkpoint(str(tiny_run)).tokenizer.get_vocab() == byte_tokenizer(300).get_vocab()
