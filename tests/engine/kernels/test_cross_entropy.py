"""The fused head gives the loss, and each label's log-probability, of all logits; in chunks of any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from phinetune.engine.kernels.cross_entropy import linear_cross_entropy, linear_label_numbers, linear_log_probs

LABELS, WIDTH, VOCABULARY = 7, 5, 11
each_chunk = pytest.mark.parametrize("rows", [1, 3, LABELS, 100])


def draw(dtype: torch.dtype = torch.float32, count: int = LABELS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, the head, labels and how often each of them counts."""
    generator = torch.Generator().manual_seed(count)
    hidden = torch.randn(count, WIDTH, generator=generator).to(dtype)
    head = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype)
    labels = torch.randint(VOCABULARY, (count,), generator=generator)
    labels[::2] = (hidden[::2] @ head.t()).argmax(-1)  # some are right
    weights = torch.randint(1, 5, (count,), generator=generator).float()
    return hidden.requires_grad_(), head.requires_grad_(), labels, weights


def reference(hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    logits = (hidden @ head.t()).float()
    nll = F.cross_entropy(logits, labels, reduction="none")
    return (nll * weights).sum(), ((logits.argmax(-1) == labels) * weights).sum()


def in_chunks_of(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phinetune.engine.kernels.cross_entropy.CHUNK_ELEMENTS", rows * VOCABULARY)


@each_chunk
def test_loss_count_and_gradients_are_those_of_all_logits(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks_of(rows, monkeypatch)
    hidden, head, labels, weights = draw()
    found, correct = linear_cross_entropy(hidden, head, labels, weights)
    wanted, right = reference(hidden, head, labels, weights)
    torch.testing.assert_close(found, wanted)
    assert correct == right
    assert 0 < correct < weights.sum()
    assert found.dtype == correct.dtype == torch.float32
    assert found.shape == correct.shape == ()
    ours, theirs = (torch.autograd.grad(loss, (hidden, head)) for loss in (found, wanted))
    torch.testing.assert_close(ours, theirs)


@each_chunk
@pytest.mark.parametrize("trained", [(True, False), (False, True)], ids=["hidden", "head"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(
    rows: int, trained: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_chunks_of(rows, monkeypatch)
    *states, labels, weights = draw()
    for state, trains in zip(states, trained, strict=True):
        state.requires_grad_(trains)
    leaves = [state for state in states if state.requires_grad]
    found, wanted = linear_cross_entropy(*states, labels, weights)[0], reference(*states, labels, weights)[0]
    torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(wanted, leaves))


def test_whole_weights_are_repeated_labels() -> None:
    hidden, head, labels, weights = draw()
    often = weights.long()
    once = linear_cross_entropy(hidden, head, labels, weights)
    again = linear_cross_entropy(
        hidden.repeat_interleave(often, 0), head, labels.repeat_interleave(often), torch.ones(int(often.sum()))
    )
    torch.testing.assert_close(once, again)
    ours, theirs = (torch.autograd.grad(loss, (hidden, head)) for loss, _ in (once, again))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("scale", [0.0, 0.125, -3.0])
def test_the_incoming_gradient_scales_all(scale: float) -> None:
    hidden, head, labels, weights = draw()
    nll, _ = linear_cross_entropy(hidden, head, labels, weights)
    unscaled = torch.autograd.grad(nll, (hidden, head), retain_graph=True)
    scaled = torch.autograd.grad(nll * scale, (hidden, head))
    torch.testing.assert_close(scaled, tuple(grad * scale for grad in unscaled))


def test_a_backward_can_be_repeated() -> None:
    hidden, head, labels, weights = draw()
    nll, _ = linear_cross_entropy(hidden, head, labels, weights)
    first = torch.autograd.grad(2 * nll, (hidden, head), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(2 * nll, (hidden, head)), first, rtol=0, atol=0)


def test_bfloat16_is_near_and_its_gradients_are_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks_of(3, monkeypatch)
    hidden, head, labels, weights = draw(torch.bfloat16)
    found, _ = linear_cross_entropy(hidden, head, labels, weights)
    exact = [state.detach().double().requires_grad_() for state in (hidden, head)]
    wanted, _ = reference(*exact, labels, weights)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(wanted.item(), rel=0.01)
    ours = torch.autograd.grad(found, (hidden, head))
    for a, b in zip(ours, torch.autograd.grad(wanted, exact), strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() < 0.02 * b.norm()


def test_without_labels_the_loss_is_zero_and_so_are_the_gradients() -> None:
    hidden, head, labels, weights = draw(count=0)
    nll, correct = linear_cross_entropy(hidden, head, labels, weights)
    nll.backward()
    assert (nll.item(), correct.item()) == (0.0, 0.0)
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, WIDTH)
    assert head.grad is not None
    assert not head.grad.any()


def test_without_gradients_the_numbers_are_the_same() -> None:
    hidden, head, labels, weights = draw()
    with torch.no_grad():
        quiet = linear_cross_entropy(hidden, head, labels, weights)
    assert torch.equal(torch.stack(quiet), torch.stack(linear_cross_entropy(hidden, head, labels, weights)))
    assert not quiet[0].requires_grad


def test_the_count_has_no_gradient() -> None:
    _, correct = linear_cross_entropy(*draw())
    assert not correct.requires_grad


# -- a number a label ---------------------------------------------------------------------------------------------


@each_chunk
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)], ids=["both", "hidden", "head"])
def test_log_probabilities_and_their_gradients_are_those_of_all_logits(
    rows: int, trained: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is made of them: here every label pulls with another weight, some of them backwards."""
    in_chunks_of(rows, monkeypatch)
    *states, labels, weights = draw()
    for state, trains in zip(states, trained, strict=True):
        state.requires_grad_(trains)
    hidden, head = states
    found, first = linear_log_probs(hidden, head, labels)
    logits = (hidden @ head.t()).float()
    wanted = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(found, wanted)
    assert torch.equal(first, (logits.argmax(-1) == labels).float())
    assert found.dtype == first.dtype == torch.float32
    assert not first.requires_grad
    pulls, leaves = weights - 2.5, [state for state in states if state.requires_grad]
    ours, theirs = (torch.autograd.grad((found_ * pulls).sigmoid().sum(), leaves) for found_ in (found, wanted))
    torch.testing.assert_close(ours, theirs)


def test_the_sum_of_log_probabilities_is_the_loss() -> None:
    hidden, head, labels, weights = draw()
    nll, correct = linear_cross_entropy(hidden, head, labels, weights)
    log_probs, first = linear_log_probs(hidden, head, labels)
    torch.testing.assert_close(-(log_probs * weights).sum(), nll)
    assert (first * weights).sum() == correct
    ours = torch.autograd.grad(-(log_probs * weights).sum(), (hidden, head))
    torch.testing.assert_close(ours, torch.autograd.grad(nll, (hidden, head)))


@pytest.mark.parametrize("head_trains", [False, True])
def test_bfloat16_log_probabilities_are_near_and_their_gradients_are_bfloat16(
    head_trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_chunks_of(3, monkeypatch)
    hidden, head, labels, weights = draw(torch.bfloat16)
    head.requires_grad_(head_trains)
    exact = [state.detach().double().requires_grad_() for state in (hidden, head)]
    wanted = (exact[0] @ exact[1].t()).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    found, _ = linear_log_probs(hidden, head, labels)
    torch.testing.assert_close(found.double(), wanted, rtol=0.02, atol=0.02)
    leaves = (hidden, head)[: 1 + head_trains]
    ours = torch.autograd.grad((found * weights).sum(), leaves)
    for a, b in zip(ours, torch.autograd.grad((wanted * weights).sum(), exact[: len(leaves)]), strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() < 0.02 * b.norm()


def test_no_labels_have_no_log_probabilities() -> None:
    hidden, head, labels, _ = draw(count=0)
    found, first = linear_log_probs(hidden, head, labels)
    assert found.shape == first.shape == (0,)
    found.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, WIDTH)


@each_chunk
@pytest.mark.parametrize("head_trains", [False, True])
def test_how_logits_are_spread_is_seen_in_the_same_pass(
    rows: int, head_trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Far from zero too, where a sum of exponentials would overflow."""
    in_chunks_of(rows, monkeypatch)
    hidden, head, labels, _ = draw()
    head.requires_grad_(head_trains)
    with torch.no_grad():
        hidden[0] *= 100
    numbers = linear_label_numbers(hidden, head, labels)
    logits = (hidden @ head.t()).detach().double()
    torch.testing.assert_close(numbers[2], torch.distributions.Categorical(logits=logits).entropy().float())
    torch.testing.assert_close(numbers[3], logits.mean(-1).float())
    assert not any(one.requires_grad for one in numbers[1:])
    plain = linear_log_probs(hidden, head, labels)
    assert all(torch.equal(a, b) for a, b in zip(numbers[:2], plain, strict=True))
    leaves = (hidden, head)[: 1 + head_trains]
    ours, theirs = (torch.autograd.grad(one[0].sum(), leaves) for one in (numbers, plain))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# -- what a step keeps and makes ----------------------------------------------------------------------------------


class MadeShapes(TorchDispatchMode):
    """Notes the shape of every tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = set[tuple[int, ...]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(t.shape) for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)}
        return out


@pytest.mark.parametrize("head_trains", [False, True])
def test_nothing_of_labels_times_vocabulary_is_kept(head_trains: bool) -> None:
    hidden, head, labels, weights = draw()
    nll, _ = linear_cross_entropy(hidden, head.requires_grad_(head_trains), labels, weights)
    assert nll.grad_fn is not None
    kept = [tuple(t.shape) for t in nll.grad_fn.saved_tensors if t is not None]
    assert kept == [(LABELS, WIDTH)] + [(VOCABULARY, WIDTH)] * head_trains
    assert not any(isinstance(value, Tensor) for value in vars(nll.grad_fn).values())
    log_probs, _ = linear_log_probs(hidden, head, labels)
    assert log_probs.grad_fn is not None
    kept = [tuple(t.shape) for t in log_probs.grad_fn.saved_tensors]
    assert kept == ([(LABELS, WIDTH), (VOCABULARY, WIDTH), (LABELS,)] if head_trains else [(LABELS, WIDTH)])


def test_logits_are_made_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks_of(2, monkeypatch)
    hidden, head, labels, weights = draw()
    with MadeShapes() as mode:
        linear_cross_entropy(hidden, head, labels, weights)[0].backward()
        linear_label_numbers(hidden, head, labels)[0].sum().backward()
    # The head is seen as (width, vocabulary).
    assert {shape[0] for shape in mode.shapes if shape[1:] == (VOCABULARY,)} <= {1, 2, WIDTH}
