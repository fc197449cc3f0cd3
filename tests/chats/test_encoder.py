"""Ids and labels: the mask is TRL's where TRL has one, and right where it has none."""

from __future__ import annotations

from typing import Any

import pytest

from phinetune.chats.encoder import ChatEncoder, ends_a_turn, make_encoder
from phinetune.checkpoints.load import load_base
from phinetune.checkpoints.random_shapes import byte_tokenizer
from phinetune.config.model import ModelSection
from phinetune.data.read.messages import RowError
from phinetune.engine.examples import common_prefix

USER = {"role": "user", "content": "How are you?"}
FINE = {"role": "assistant", "content": "Fine."}
AGAIN = {"role": "user", "content": "Really?"}
YES = {"role": "assistant", "content": "Yes!"}
SYSTEM = {"role": "system", "content": "Be brief."}

# Content that special tokens or merges could eat at its edges.
ODD = ["Fine.", " leading space", "\n\nleading lines", "trailing  \n", "", "<b>&amp; ünï¢ode 🙂", "1234567", "a\r\nb\t"]


@pytest.fixture(params=["bytes", "phi3", "starter"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "bytes":
        return byte_tokenizer(300)
    if request.param == "phi3":
        return request.getfixturevalue("phi3_tokenizer")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(request.getfixturevalue("starter_folder"))


def trained_text(encoder: ChatEncoder, chat: list[dict[str, str]]) -> list[str]:
    """The trained spans, decoded."""
    row = encoder.encode([chat])[0]
    spans: list[list[int]] = []
    for i, label in enumerate(row.labels):
        if label == -100:
            continue
        assert label == row.input_ids[i]
        if i and row.labels[i - 1] != -100:
            spans[-1].append(label)
        else:
            spans.append([label])
    return [encoder.tokenizer.decode(span) for span in spans]


@pytest.mark.parametrize("answer", ODD)
@pytest.mark.parametrize("question", ["How are you?", "  spaces \n"])
def test_a_single_turn_has_the_mask_of_trl(tokenizer: Any, question: str, answer: str) -> None:
    prompt = [{"role": "user", "content": question}]
    completion = [{"role": "assistant", "content": answer}]
    # As TRL's SFTTrainer tokenises prompt and completion (trl 1.16, sft_trainer.py, tokenize_fn).
    prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(prompt + completion, return_dict=False)
    shared = common_prefix(prompt_ids, whole)
    row = make_encoder(tokenizer).encode([prompt + completion])[0]
    assert row.input_ids == whole
    assert row.labels == [-100] * shared + whole[shared:]


def test_every_assistant_turn_is_trained_with_its_end(tokenizer: Any) -> None:
    encoder = make_encoder(tokenizer)
    spans = trained_text(encoder, [SYSTEM, USER, FINE, AGAIN, YES])
    assert len(spans) == 2
    assert spans[0].startswith("Fine.")
    assert spans[1].startswith("Yes!")
    ends = {tokenizer.decode([i]) for i in encoder.end_of_turn}
    assert all(any(end in span for end in ends) for span in spans)
    headers = ("<|user|>", "<|assistant|>", "<|im_start|>")
    assert not any(header in span for span in spans for header in headers)


def test_the_last_turn_keeps_what_the_template_puts_at_the_end(phi3_tokenizer: Any) -> None:
    spans = trained_text(make_encoder(phi3_tokenizer), [USER, FINE, AGAIN, YES])
    assert spans == ["Fine.<|end|>", "Yes!<|end|><|endoftext|>"]


def test_loss_on_last_and_on_all(tokenizer: Any) -> None:
    chat = [USER, FINE, AGAIN, YES]
    spans = trained_text(make_encoder(tokenizer, "last"), chat)
    assert len(spans) == 1
    assert spans[0].startswith("Yes!")
    row = make_encoder(tokenizer, "all").encode([chat])[0]
    assert row.labels == row.input_ids


def test_a_user_turn_at_the_end_is_not_trained(tokenizer: Any) -> None:
    spans = trained_text(make_encoder(tokenizer), [USER, FINE, AGAIN])
    assert len(spans) == 1
    assert "Really" not in spans[0]


def test_chats_encoded_together_are_as_alone(tokenizer: Any) -> None:
    encoder = make_encoder(tokenizer)
    several = [[USER, FINE], [SYSTEM, USER, FINE, AGAIN, YES], [USER, YES]]
    assert encoder.encode(several) == [encoder.encode([chat])[0] for chat in several]


def without_system(tokenizer: Any) -> Any:
    """Phi-3's first template: it skips system messages without a word."""
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>\n' + m['content'] + '<|end|>\n"
        "<|assistant|>\n' }}{% elif m['role'] == 'assistant' %}{{ m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    )
    return tokenizer


def test_a_template_that_drops_system_messages_is_found_out() -> None:
    tokenizer = without_system(byte_tokenizer(300))
    with pytest.raises(RowError, match="drops system messages in silence"):
        make_encoder(tokenizer).prepare([SYSTEM, USER, FINE])
    assert make_encoder(tokenizer, system="drop").prepare([SYSTEM, USER, FINE]) == [USER, FINE]
    folded = make_encoder(tokenizer, system="fold").prepare([SYSTEM, USER, FINE])
    assert folded[0] == {"role": "user", "content": "Be brief.\n\nHow are you?"}


def test_a_template_without_reply_header_still_trains_the_answer_alone() -> None:
    encoder = make_encoder(without_system(byte_tokenizer(300)))
    assert trained_text(encoder, [USER, FINE, AGAIN, YES]) == ["Fine.<|end|>", "Yes!<|end|>"]


def test_tool_messages_that_the_template_drops_are_refused() -> None:
    with pytest.raises(RowError, match="drops tool messages"):
        make_encoder(byte_tokenizer(300)).prepare([USER, {"role": "tool", "content": "22"}, FINE])


def test_a_system_message_in_the_middle_is_refused() -> None:
    with pytest.raises(RowError, match="system message stands after the first turn"):
        make_encoder(byte_tokenizer(300)).prepare([USER, SYSTEM, FINE])


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = byte_tokenizer(300)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if not loop.last or add_generation_prompt %}{{ '<|user|>' }}{% else %}"
        "{{ '<|system|>' }}{% endif %}{{ m['content'] }}{% endfor %}{{ messages | length }}"
    )
    with pytest.raises(RowError, match="renders the turns before an answer in another way"):
        make_encoder(tokenizer).encode([[USER, FINE]])


def test_cutting_drops_the_oldest_turns_and_keeps_system_and_answers(tokenizer: Any) -> None:
    encoder = make_encoder(tokenizer)
    chat = [SYSTEM, USER, FINE, AGAIN, YES]
    whole = len(encoder.encode([chat])[0].input_ids)
    _, row = encoder.fit(chat, whole - 1) or ([], None)
    assert row == encoder.encode([[SYSTEM, AGAIN, YES]])[0]


def test_cutting_shortens_the_longest_prompt_before_it_gives_up(tokenizer: Any) -> None:
    encoder = make_encoder(tokenizer)
    chat = [{"role": "user", "content": "word " * 200 + "end"}, FINE]
    _, row = encoder.fit(chat, 60) or ([], None)
    assert row is not None
    assert len(row.input_ids) <= 60
    answer = encoder.encode([[USER, FINE]])[0]
    assert [i for i in row.labels if i != -100] == [i for i in answer.labels if i != -100]
    assert encoder.fit([USER, {"role": "assistant", "content": "long answer " * 60}], 60) is None


def test_no_more_is_cut_than_needed(tokenizer: Any) -> None:
    encoder = make_encoder(tokenizer)
    chat = [SYSTEM, *[turn for i in range(12) for turn in ({**USER, "content": f"{i} " * (i + 3)}, FINE)]]
    whole = len(encoder.encode([chat])[0].input_ids)
    for max_length in range(60, whole + 5, 7):
        made, at = encoder.fit(chat, max_length), f"max_length {max_length}"
        assert made is not None, at
        left, row = made
        assert len(row.input_ids) <= max_length, at
        assert row == encoder.encode([left])[0], at
        gone = len(chat) - len(left)
        if len(left) > 3:  # of the last exchange the question may be cut
            assert left == [SYSTEM, *chat[1 + gone :]], at
        if gone:
            assert len(encoder.encode([[SYSTEM, *chat[1 + gone - 2 :]]])[0].input_ids) > max_length, at


def test_end_of_turn_is_noticed_in_labels() -> None:
    encoder = make_encoder(byte_tokenizer(300))
    row = encoder.encode([[USER, FINE]])[0]
    assert ends_a_turn(encoder, [row])
    masked = row._replace(labels=[-100 if i in encoder.end_of_turn else i for i in row.labels])
    assert not ends_a_turn(encoder, [masked])


def test_a_loaded_model_stops_where_its_template_ends_a_turn() -> None:
    loaded = load_base(ModelSection(path="random:{layers: 1, hidden_size: 8, intermediate_size: 8, heads: 2}"))
    assert set(make_encoder(loaded.tokenizer).end_of_turn) <= set(loaded.model.generation_config.eos_token_id)
    assert loaded.model.generation_config.eos_token_id == [32000, 32001, 32007]


# As templates of reasoning models do: an answer's reasoning stands in the last turn alone.
FORGETFUL = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>' + (m.reasoning_content or '') + '</think>' }}{% endif %}"
    "{{ m.content + '<|end|>' }}{% endfor %}{{ '<|assistant|>' if add_generation_prompt }}"
)


def test_an_answer_that_is_rendered_in_another_way_later_is_refused() -> None:
    """Its span could not be found, so it would never be trained on."""
    tokenizer = byte_tokenizer(300)
    tokenizer.chat_template = FORGETFUL
    chat = [USER, FINE, AGAIN, YES]
    with pytest.raises(RowError, match="in another way once a turn follows it"):
        make_encoder(tokenizer).encode([chat])
    assert trained_text(make_encoder(tokenizer, "last"), chat) == ["<think></think>Yes!<|end|>"]


def test_reasoning_is_trained_on_where_the_template_reads_it() -> None:
    tokenizer = byte_tokenizer(300)
    tokenizer.chat_template = FORGETFUL
    encoder = make_encoder(tokenizer)
    assert encoder.reads("assistant", "reasoning_content")
    assert not encoder.reads("assistant", "thoughts")
    chat = encoder.prepare([USER, {**FINE, "reasoning_content": "Hm."}])
    assert trained_text(encoder, chat) == ["<think>Hm.</think>Fine.<|end|>"]
