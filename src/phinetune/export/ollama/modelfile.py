"""A folder that `ollama create` takes: the model as GGUF and a Modelfile with template, stop words and parameters."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase

from phinetune.chat.template import tokenize
from phinetune.errors import ModelError
from phinetune.export.gguf.model import Written, write_gguf
from phinetune.export.ollama.go_template import Turns, read_turns
from phinetune.export.output_paths import LONGEST_CONTEXT
from phinetune.export.source import Checkpoint
from phinetune.files import staged_folder, write_text

MODELFILE = "Modelfile"
MARK = "# Written by phinetune."
WEIGHTS = "model.gguf"


def write_ollama(source: Checkpoint, folder: Path, kind: str, name: str) -> Written:
    """Write `source` as a folder for Ollama, which appears whole or not at all.

    Args:
        kind: the type of the GGUF's matrices: f32, f16, bf16 or q8_0.
        name: what the GGUF calls the model.

    Raises:
        ModelError: the model or its chat template can't be written.
    """
    turns = read_turns(source.tokenizer)
    with staged_folder(folder) as stage:
        written = write_gguf(source, stage / WEIGHTS, kind, name)
        text = modelfile(turns, source.tokenizer, source.generation_config, written)
        write_text(stage / MODELFILE, text)
    return written


def is_own(folder: Path) -> bool:
    """Whether a folder holds such an export and nothing else."""
    if not {path.name for path in folder.iterdir()} <= {MODELFILE, WEIGHTS}:
        return False
    try:
        return (folder / MODELFILE).read_text(encoding="utf-8").startswith(MARK)
    except (OSError, UnicodeDecodeError):
        return False


def modelfile(turns: Turns, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig, written: Written) -> str:
    """The Modelfile's text."""
    # Where the GGUF says that a text gets the start token, Ollama puts it there, and the template must not.
    template = turns.in_go(with_start=not written.vocabulary.add_bos)
    if '"""' in template:
        raise ModelError(f'{tokenizer.name_or_path}: its chat template writes """, which a Modelfile has no form for')
    lines = [
        MARK,
        f"FROM ./{WEIGHTS}",
        f'TEMPLATE """{template}"""',
        *[f'PARAMETER stop "{word}"' for word in stop_words(turns, tokenizer, generation)],
        *[f"PARAMETER {key} {value}" for key, value in parameters(generation, written.context).items()],
    ]
    return "\n".join(lines) + "\n"


def stop_words(turns: Turns, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig) -> list[str]:
    """The tokens at which generation ends, then the special tokens that open a turn: a model that writes one of these
    has begun to speak for another."""
    ends = generation.eos_token_id or []
    ids = [ends] if isinstance(ends, int) else list(ends)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for header in [turns.reply, *(before for before, _ in turns.around.values())]:
        ids += [i for i in tokenize(tokenizer, [header])[0] if i in special]
    return [str(word) for word in tokenizer.convert_ids_to_tokens(list(dict.fromkeys(ids)))]


def parameters(generation: GenerationConfig, context: int) -> dict[str, str]:
    """Sampling as the model's generation config has it (greedy, if it does not sample) instead of Ollama's own."""
    found = {"num_ctx": str(min(context, LONGEST_CONTEXT)), "repeat_penalty": "1"}
    if not generation.do_sample:
        return {**found, "temperature": "0"}
    chosen = {key: getattr(generation, key, None) for key in ("temperature", "top_p", "top_k")}
    return found | {key: f"{value:g}" for key, value in chosen.items() if value is not None}
