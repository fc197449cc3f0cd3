"""Rotation in place is transformers', whole or partial, and can be undone by its transpose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding, apply_rotary_pos_emb

from phinetune.engine.kernels.rotary import rotate_, tables

TOKENS, HEADS, SIZE = 7, 3, 8
each_width = pytest.mark.parametrize("rotated", [2, 6, 8])


def draw(rotated: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    angles = torch.randn(TOKENS, rotated // 2, dtype=torch.float64)
    states = torch.randn(TOKENS, HEADS, SIZE, dtype=torch.float64)
    return states.to(dtype), (1.3 * angles.cos()).to(dtype), (1.3 * angles.sin()).to(dtype)


def by_transformers(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (torch.cat([part, part], dim=-1)[None] for part in (cos, sin))
    q, _ = apply_rotary_pos_emb(states.transpose(0, 1)[None], states.transpose(0, 1)[None], cos, sin)
    return q[0].transpose(0, 1)


@each_width
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str
)
def test_equal_to_transformers(rotated: int, dtype: torch.dtype, tolerance: float) -> None:
    states, cos, sin = draw(rotated, dtype)
    wanted = by_transformers(states, cos, sin)
    torch.testing.assert_close(rotate_(states.clone(), cos, sin), wanted, rtol=tolerance, atol=tolerance)


@each_width
def test_it_happens_in_place_and_leaves_the_rest_alone(rotated: int) -> None:
    states, cos, sin = draw(rotated)
    before = states.clone()
    found = rotate_(states, cos, sin)
    assert found.data_ptr() == states.data_ptr()
    assert torch.equal(found, states)
    assert not torch.equal(states[..., :rotated], before[..., :rotated])
    assert torch.equal(states[..., rotated:], before[..., rotated:])


def test_a_view_into_a_wider_tensor_is_rotated_there() -> None:
    states, cos, sin = draw(SIZE)
    wide = torch.cat([states, states], dim=1)
    rotate_(wide[:, :HEADS], cos, sin)
    torch.testing.assert_close(wide[:, :HEADS], by_transformers(states, cos, sin))
    assert torch.equal(wide[:, HEADS:], states)


def test_float32_tables_serve_other_states() -> None:
    states, cos, sin = draw(SIZE, torch.bfloat16)
    found = rotate_(states.clone(), cos.float(), sin.float())
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, rotate_(states.clone(), cos, sin))


@each_width
def test_back_is_the_transpose(rotated: int) -> None:
    _, cos, sin = draw(rotated)
    # What the rotation makes of each unit vector is a column of its matrix.
    units = torch.eye(SIZE, dtype=torch.float64).expand(TOKENS, SIZE, SIZE)
    there = rotate_(units.clone(), cos, sin)
    back = rotate_(units.clone(), cos, sin, back=True)
    assert torch.equal(back, there.mT)


def test_back_undoes_a_rotation_that_does_not_scale() -> None:
    states, cos, sin = draw(SIZE)
    found = rotate_(rotate_(states.clone(), cos / 1.3, sin / 1.3), cos / 1.3, sin / 1.3, back=True)
    torch.testing.assert_close(found, states)


@pytest.mark.parametrize("partial", [1.0, 0.5])
def test_tables_are_transformers_tables(partial: float) -> None:
    config = Phi3Config(
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=8,
        num_hidden_layers=1,
        vocab_size=8,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": partial},
    )
    theirs = Phi3RotaryEmbedding(config)
    positions = torch.tensor([0, 1, 2, 3, 1, 900])
    cos, sin = tables(theirs.inv_freq, positions, theirs.attention_scaling)
    wanted = theirs(torch.zeros(1), positions[None])
    half = int(16 * partial) // 2
    assert cos.shape == sin.shape == (6, half)
    torch.testing.assert_close((cos, sin), (wanted[0][0, :, :half], wanted[1][0, :, :half]), rtol=0, atol=1e-6)


def test_tables_are_scaled() -> None:
    cos, sin = tables(torch.tensor([0.5, 0.25]), torch.tensor([0, 4]), 3.0)
    torch.testing.assert_close(cos, 3 * torch.tensor([[0.0, 0.0], [2.0, 1.0]]).cos())
    torch.testing.assert_close(sin, 3 * torch.tensor([[0.0, 0.0], [2.0, 1.0]]).sin())


@each_width
def test_tokens_are_rotated_a_part_at_a_time(rotated: int, monkeypatch: pytest.MonkeyPatch) -> None:
    states, cos, sin = draw(rotated)
    wanted = rotate_(states.clone(), cos, sin)
    monkeypatch.setattr("phinetune.engine.kernels.chunks.MAX_ELEMENTS", 2 * HEADS * SIZE)
    assert torch.equal(rotate_(states.clone(), cos, sin), wanted)
