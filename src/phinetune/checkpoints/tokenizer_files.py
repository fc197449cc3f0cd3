"""Makes sure that a tokenizer can be used: its files are readable, its template renders, its ids fit the model."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from phinetune.chats.template_rendering import apply_template
from phinetune.checkpoints.small_files import read_json, what_to_do
from phinetune.engine.families import ModelConfig
from phinetune.errors import ModelError, told_as

SMALL_JSON = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TEMPLATE = "chat_template.jinja"
_QUESTION, _ANSWER = "zqxhello", "zqxyes"  # no template writes these words by itself


def check_tokenizer_files(folder: Path) -> None:
    """Make sure that the small files of a tokenizer can be read.

    transformers passes over some of them if they are damaged.

    Raises:
        ModelError: a file is damaged.
    """
    for name in SMALL_JSON:
        if (folder / name).exists():
            read_json(folder / name)
    template = folder / TEMPLATE
    if template.exists():
        try:
            template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{template}: not UTF-8 text ({error}); {what_to_do(template)}") from None


def check_template(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Make sure that a tokenizer's chat template renders a question and its answer.

    Args:
        source: what error messages call the tokenizer.

    Raises:
        ModelError: there is no template, it has a fault, or it leaves out what is said.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            f"{source}: its tokenizer has no chat template; give an instruct checkpoint's folder as model.tokenizer"
        )
    question = {"role": "user", "content": _QUESTION}
    chats = ([question], [question, {"role": "assistant", "content": _ANSWER}])
    remedy = f"mend {TEMPLATE}, or give an instruct checkpoint's folder as model.tokenizer"
    for chat in chats:
        with told_as(ModelError, f"{source}: its chat template can't be rendered ({remedy})"):
            text = apply_template(tokenizer, [chat], reply=len(chat) == 1)[0]
        lost = [message["role"] for message in chat if message["content"] not in text]
        if lost:
            raise ModelError(f"{source}: its chat template leaves out what the {lost[0]} says; {remedy}")


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: ModelConfig, source: str) -> None:
    """Make sure that the model has an embedding for every id of its tokenizer.

    Args:
        source: what error messages call the tokenizer.

    Raises:
        ModelError: the tokenizer's ids go beyond the model's vocabulary.
    """
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if highest < 0:
        raise ModelError(f"{source}: its tokenizer has no tokens; give the model's own tokenizer")
    if highest >= config.vocab_size:
        raise ModelError(
            f"{source}: its tokenizer has ids up to {highest} (`{token}`), and the model has embeddings for "
            f"{config.vocab_size} ids (vocab_size); give the model's own tokenizer, or resize the model's embedding"
        )
