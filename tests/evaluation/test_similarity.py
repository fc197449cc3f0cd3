"""Sentence similarity with a tiny encoder of random weights, by hand as transformers gives its states."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from phinetune.config.evaluation import EvaluationSection
from phinetune.errors import ModelError
from phinetune.evaluation.metrics import open_metrics
from phinetune.evaluation.similarity import Similarity

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "tent", "leaks", "it", "is", "dry", "where", "my"]


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    folder = tmp_path / "encoder"
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=8,
        )
    ).save_pretrained(folder)
    return folder


def by_hand(folder: Path, left: str, right: str, by_first: bool) -> float:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    vectors = []
    for text in (left, right):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=8)).last_hidden_state[0]
        vectors.append(states[0] if by_first else states.mean(0))
    return 100 * float(vectors[0] @ vectors[1] / (vectors[0].norm() * vectors[1].norm()))


@pytest.mark.parametrize("by_first", [False, True])
def test_it_is_the_cosine_of_the_pooled_states(encoder: Path, by_first: bool) -> None:
    (encoder / "1_Pooling").mkdir()
    modes = {"pooling_mode_cls_token": by_first, "pooling_mode_mean_tokens": not by_first}
    (encoder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **modes}))
    (metric,) = open_metrics(EvaluationSection(metrics=[{"name": "near", "similarity": str(encoder)}])).values()
    for pair in (("the tent leaks", "it is dry"), ("my tent", "where is my order the tent leaks it is dry")):
        assert metric(*pair, []) == pytest.approx(by_hand(encoder, *pair, by_first), abs=1e-3)
    assert metric("the tent", "the tent", []) == pytest.approx(100, abs=1e-3)
    assert metric("", "the tent", []) < 100
    assert metric("the tent", " ", []) is None


def test_what_is_no_encoder_or_pools_otherwise_is_refused(encoder: Path) -> None:
    with pytest.raises(ModelError, match="`near`: nowhere/at-all"):
        open_metrics(EvaluationSection(metrics=[{"name": "near", "similarity": "nowhere/at-all"}]))
    (encoder / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(ModelError, match=r"its vectors are made in a way that is not known here: .*Dense"):
        Similarity("near", str(encoder))
