"""Writing a folder for `ollama create`: a GGUF, and a Modelfile with chat template, stop words and parameters."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase

from phinetune.chats.template import tokenize
from phinetune.errors import ModelError
from phinetune.exporting.checkpoint_source import Checkpoint
from phinetune.exporting.gguf.model import GgufFile, write_gguf
from phinetune.exporting.ollama.go_template import Turns, read_turns
from phinetune.exporting.output_paths import LONGEST_CONTEXT
from phinetune.files import staged_folder, write_text

MODELFILE = "Modelfile"
MARK = "# Written by phinetune."
WEIGHTS = "model.gguf"


def write_ollama(source: Checkpoint, folder: Path, kind: str, name: str) -> GgufFile:
    """Write `source` as a folder for Ollama. The folder appears whole or not at all.

    Args:
        kind: the type of the GGUF's matrices: f32, f16, bf16 or q8_0.
        name: the model's name in the GGUF.

    Raises:
        ModelError: the model or its chat template can't be written.
    """
    turns = read_turns(source.tokenizer)
    with staged_folder(folder) as stage:
        gguf = write_gguf(source, stage / WEIGHTS, kind, name)
        text = modelfile(turns, source.tokenizer, source.generation_config, gguf)
        write_text(stage / MODELFILE, text)
    return gguf


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

    A model that opens a turn has begun to speak for someone else, so it must stop there, too.
    """
    ends = generation.eos_token_id or []
    ids = [ends] if isinstance(ends, int) else list(ends)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for header in [turns.reply, *(before for before, _ in turns.around.values())]:
        ids += [i for i in tokenize(tokenizer, [header])[0] if i in special]
    return [str(word) for word in tokenizer.convert_ids_to_tokens(list(dict.fromkeys(ids)))]


def parameters(generation: GenerationConfig, context: int) -> dict[str, str]:
    """The parameters for the Modelfile. Without them, Ollama would use its own.

    Sampling is as in the model's generation config: greedy if it does not sample.
    """
    found = {"num_ctx": str(min(context, LONGEST_CONTEXT)), "repeat_penalty": "1"}
    if not generation.do_sample:
        return {**found, "temperature": "0"}
    chosen = {key: getattr(generation, key, None) for key in ("temperature", "top_p", "top_k")}
    return found | {key: f"{value:g}" for key, value in chosen.items() if value is not None}
