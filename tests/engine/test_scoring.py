"""Scores equal torch's cross-entropy over full logits, whatever the batch and the chunk."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from phinetune.checkpoints.load import Loaded
from phinetune.engine import scoring
from phinetune.engine.scoring import Score, score_batch


def random_batch(rows: int, width: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 100 + width)
    ids = torch.randint(3, 259, (rows, width), generator=generator)
    lengths = torch.randint(3, width + 1, (rows,), generator=generator)
    mask = (torch.arange(width) < lengths[:, None]).long()
    labels = ids.masked_fill((mask == 0) | (torch.rand(rows, width, generator=generator) < 0.4), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize(("rows", "width"), [(1, 3), (3, 17), (5, 70)])
@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_equal_to_the_loss_over_all_logits(
    tiny: Loaded, rows: int, width: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "CHUNK", chunk)
    batch = random_batch(rows, width)
    with torch.no_grad():
        logits = tiny.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    wanted = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    score = score_batch(tiny.model, batch)
    assert score.tokens == int((labels != -100).sum())
    assert score.loss == pytest.approx(float(wanted), rel=1e-5)
    assert score.correct == int((logits.argmax(-1) == labels).sum())


def test_scores_add_up_row_by_row(tiny: Loaded) -> None:
    batch = random_batch(4, 20)
    rows = [score_batch(tiny.model, {k: v[i : i + 1] for k, v in batch.items()}) for i in range(4)]
    total, whole = sum(rows, Score()), score_batch(tiny.model, batch)
    assert (total.tokens, total.correct) == (whole.tokens, whole.correct)
    assert total.loss == pytest.approx(whole.loss, rel=1e-5)


def test_a_batch_without_labels_scores_nothing(tiny: Loaded) -> None:
    batch = random_batch(2, 5)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert score_batch(tiny.model, batch) == Score()


def test_perplexity_overflows_to_infinity() -> None:
    assert Score(nll=2.0, correct=1, tokens=2).perplexity == pytest.approx(math.e)
    assert Score(nll=1e6, correct=0, tokens=1).perplexity == math.inf
