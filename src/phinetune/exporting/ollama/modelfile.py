"""Writing a folder for `ollama create`: a GGUF, and a Modelfile with chat template, stop words and parameters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from phinetune.chats.template import tokenize
from phinetune.engine.generate import HARMLESS
from phinetune.errors import ModelError
from phinetune.exporting.checkpoint_source import Checkpoint
from phinetune.exporting.gguf.model import GgufFile, write_gguf
from phinetune.exporting.ollama.go_template import Turns, read_turns
from phinetune.exporting.output_paths import LONGEST_CONTEXT
from phinetune.files import staged_folder, write_text

MODELFILE = "Modelfile"
MARK = "# Written by phinetune."
WEIGHTS = "model.gguf"
SAMPLED = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}  # transformers' defaults
CUTOFFS = ("epsilon_cutoff", "eta_cutoff")  # they are about sampling alone
SAID_OTHERWISE = HARMLESS - {*CUTOFFS} | {"repetition_penalty"}  # written, or without effect on an answer
NEUTRAL = {  # what these keys hold where they change nothing
    **dict.fromkeys(("num_beams", "num_return_sequences", "length_penalty", "encoder_repetition_penalty"), 1),
    **dict.fromkeys(("num_beam_groups", "guidance_scale"), 1),
}


@dataclass(frozen=True)
class OllamaFolder:
    """A folder that was written: how many tensors its GGUF has, and what could not be written as the model has it."""

    tensors: int
    notes: list[str]


def write_ollama(source: Checkpoint, folder: Path, kind: str, name: str) -> OllamaFolder:
    """Write `source` as a folder for Ollama. The folder appears whole or not at all.

    Args:
        kind: the type of the GGUF's matrices, a key of `FILE_TYPES`.
        name: the model's name in the GGUF.

    Raises:
        ModelError: the model or its chat template can't be written.
    """
    turns = read_turns(source.tokenizer)
    with staged_folder(folder) as stage:
        gguf = write_gguf(source, stage / WEIGHTS, kind, name)
        text = modelfile(turns, source.tokenizer, source.generation_config, gguf)
        write_text(stage / MODELFILE, text)
    return OllamaFolder(gguf.tensors, [*gguf.notes, *not_written(source.tokenizer, source.generation_config)])


def is_own(folder: Path) -> bool:
    """Whether a folder holds an export for Ollama and nothing else."""
    if not {path.name for path in folder.iterdir()} <= {MODELFILE, WEIGHTS}:
        return False
    try:
        return (folder / MODELFILE).read_text(encoding="utf-8").startswith(MARK)
    except (OSError, UnicodeDecodeError):
        return False


def modelfile(turns: Turns, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig, gguf: GgufFile) -> str:
    """The text of the Modelfile.

    Raises:
        ModelError: a Modelfile can't hold the chat template.
    """
    # If the GGUF says that a text gets the start token, Ollama adds it, so the template must not.
    template = turns.in_go(with_start=not gguf.vocabulary.add_bos)
    if '"""' in template:
        raise ModelError(f'{tokenizer.name_or_path}: its chat template writes """, which a Modelfile can\'t hold')
    lines = [
        MARK,
        f"FROM ./{WEIGHTS}",
        f'TEMPLATE """{template}"""',
        *[f'PARAMETER stop "{word}"' for word in stop_words(turns, tokenizer, generation)],
        *[f"PARAMETER {key} {value}" for key, value in parameters(generation, gguf.context).items()],
    ]
    return "\n".join(lines) + "\n"


def stop_words(turns: Turns, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig) -> list[str]:
    """The tokens at which generation ends, then the special tokens that open a turn.

    A model that opens a turn has begun to speak for someone else, so it must stop there, too. Ids without a token are
    left out; `not_written` names them.
    """
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ids = stop_ids(generation)
    for header in [turns.reply, *(before for before, _ in turns.around.values())]:
        ids += [i for i in tokenize(tokenizer, [header])[0] if i in special]
    words = [_word(tokenizer, i, i in special) for i in dict.fromkeys(ids)]
    return [word for word in words if word]


def stop_ids(generation: GenerationConfig) -> list[int]:
    """The ids at which generation ends."""
    ends = generation.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or [])


def _word(tokenizer: PreTrainedTokenizerBase, token: int, special: bool) -> str | None:
    """The text of a token as it stands in an answer; None for an id without a token."""
    name = tokenizer.convert_ids_to_tokens(token) if token >= 0 else None
    if name is None or special:
        return None if name is None else str(name)
    return str(tokenizer.decode([token]))  # a vocabulary spells white space and letters beyond ASCII in its own way


def parameters(generation: GenerationConfig, context: int) -> dict[str, str]:
    """The parameters for the Modelfile. Without them, Ollama would use its own.

    Sampling is as in the model's generation config: greedy if it does not sample. What that leaves out is as in
    transformers.
    """
    penalty = generation.repetition_penalty or 1.0
    found: dict[str, Any] = {"num_ctx": min(context, LONGEST_CONTEXT), "repeat_penalty": penalty}
    if penalty != 1:
        found["repeat_last_n"] = -1  # transformers looks at all tokens, Ollama by itself at the last 64
    if generation.max_new_tokens:
        found["num_predict"] = generation.max_new_tokens
    if generation.do_sample:
        chosen = {key: getattr(generation, key, None) for key in (*SAMPLED, "min_p", "typical_p")}
        found |= {**SAMPLED, **{key: value for key, value in chosen.items() if value is not None}}
    else:
        found["temperature"] = 0
    return {key: f"{value:g}" if isinstance(value, float) else str(value) for key, value in found.items()}


def not_written(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig) -> list[str]:
    """What the generation config says and a Modelfile has no word for, in a note each."""
    settings = {key: value for key, value in generation.to_diff_dict().items() if key not in SAID_OTHERWISE}
    if not generation.do_sample:
        settings = {key: value for key, value in settings.items() if key not in CUTOFFS}
    lost = [key for key, value in settings.items() if value not in (None, False, 0, "", [], NEUTRAL.get(key))]
    notes = [f"a Modelfile has no word for {', '.join(lost)} of the generation config"] if lost else []
    unknown = [str(token) for token in stop_ids(generation) if _word(tokenizer, token, False) is None]
    return notes + ([f"eos_token_id {', '.join(unknown)} has no token, and can't be a stop word"] if unknown else [])
