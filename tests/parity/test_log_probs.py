"""Log-probabilities of each conversation in a packed row are plain transformers' and PEFT's, gradients included."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Phi3Config

from engine.engine_helpers import LIMIT, SHAPES, distance, make_pair, make_rows, trained_gradients, with_prompt
from phinetune.engine.examples import IGNORED, Encoded
from phinetune.engine.packed_model import rope_limit
from phinetune.engine.packing import pack

Shape = Callable[..., Phi3Config]

pytestmark = pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True")
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
LENGTHS = (5, 33, 70, LIMIT, 2, 64, 31)


def preferred(log_probs: Tensor) -> Tensor:
    """Something that is no sum, as a preference loss is none: neighbours are set against each other."""
    return F.logsigmoid(0.3 * (log_probs[1:] - log_probs[:-1])).sum()


def one_by_one(model: torch.nn.Module, rows: Sequence[Encoded]) -> tuple[Tensor, list[int]]:
    """Summed log-probabilities of each conversation, shape (conversations), and its first choices."""
    sums, right = [], []
    for row in rows:
        labels = torch.tensor(row.labels[1:])
        logits = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0, :-1].float()
        sums.append(-F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
        right.append(int((logits.argmax(-1) == labels).sum()))
    return torch.stack(sums), right


def branching(seed: int = 0) -> list[Encoded]:
    """Conversations that begin alike, some of them with labels in what they share; one is there twice."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(3, 300, (count,), generator=generator).tolist()

    system, question = draw(40), draw(20)
    rows = [system + draw(9), system + question + draw(14), system + question + draw(3), draw(30)]
    made = [Encoded(ids, with_prompt(ids)) for ids in rows]
    return [*made, made[1], Encoded(rows[2], [*rows[2][:50], *[IGNORED] * (len(rows[2]) - 50)])]


@pytest.mark.parametrize("share", [False, True], ids=["apart", "shared"])
@pytest.mark.parametrize("rows", [make_rows(LENGTHS), branching()], ids=["unlike", "alike"])
@shapes
def test_they_are_those_of_the_conversations_one_by_one(shape: Shape, rows: list[Encoded], share: bool) -> None:
    pair = make_pair(shape())
    wanted, right = one_by_one(pair.plain, rows)
    preferred(wanted).backward()
    packed = pack(rows, share=share, rope_limit=rope_limit(pair.plain.config), owned=True)
    found = pair.fast(**packed)
    preferred(found.log_probs).backward()
    torch.testing.assert_close(found.log_probs, wanted, rtol=1e-5, atol=1e-4)
    assert found.correct.tolist() == right
    assert found.count.tolist() == [sum(label != IGNORED for label in row.labels[1:]) for row in rows]
    ours, theirs = trained_gradients(pair.fast), trained_gradients(pair.plain)
    assert ours.keys() == theirs.keys()
    assert {
        name: distance(grad, theirs[name]) for name, grad in ours.items() if distance(grad, theirs[name]) > 1e-4
    } == {}


def test_sharing_spares_labels_and_gives_each_owner_its_own() -> None:
    rows = branching()
    shared, apart = (pack(rows, share=share, owned=True) for share in (True, False))
    assert len(shared["labels"]) < len(apart["labels"])
    assert len(shared["owners"]) == len(apart["owners"]) == len(apart["labels"])
    assert int(shared["conversations"]) == len(rows)
    place, owner = shared["owners"].unbind(1)
    for i, row in enumerate(rows):
        assert shared["labels"][place[owner == i]].tolist() == [label for label in row.labels[1:] if label != IGNORED]
    counts = torch.bincount(place, minlength=len(shared["labels"]))
    assert counts.float().tolist() == shared["weights"].tolist()
