"""The part of a card that shows how to use the model: in transformers (and PEFT), phinetune, llama.cpp and Ollama."""

from __future__ import annotations

import json
import re
from pathlib import Path

from phinetune.exporting.hub.markdown import fenced
from phinetune.exporting.output_paths import LONGEST_CONTEXT, quoted

ANSWER = """
chat = [{"role": "user", "content": "Hello"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


def adapter_usage(base_id: str | None, base: str, repo: str | None, folder: Path) -> str:
    """How to use an adapter, as Markdown.

    Args:
        base_id: the base's id on the hub; None if it is not there.
        base: the base as phinetune names it.
        repo: the repository that holds the adapter; None if only `folder` holds it.
        folder: the adapter's folder on this machine.
    """
    local = Path(repo.rsplit("/", 1)[-1]) if repo else folder
    fetch = [f"hf download {repo} --local-dir {quoted(local)}"] if repo else []
    chat = shell([*fetch, f"phinetune chat {quoted(local)}"])
    return "\n\n".join(
        [
            f"With phinetune:\n\n{chat}",
            f"With transformers and PEFT:\n\n{_peft(base_id, base, repo or str(folder), bool(repo))}",
            _programs(str(local), local.name),
        ]
    )


def _peft(base_id: str | None, base: str, place: str, on_hub: bool) -> str:
    if base_id or not on_hub:  # PEFT finds the base by the adapter's own record
        return python(
            "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
            f'model = AutoPeftModelForCausalLM.from_pretrained({json.dumps(place)}, dtype="auto")\n'
            f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(place)})"
        )
    return python(
        "from peft import PeftModel\nfrom phinetune import load\n\n"
        f"base, tokenizer = load({json.dumps(base)})  # it is not on the hub\n"
        f"model = PeftModel.from_pretrained(base, {json.dumps(place)})"
    )


def merged_usage(repo: str | None, name: str) -> str:
    """How to use a merged model, as Markdown. It is in the repository `repo`, or else in a folder called `name`."""
    code = python(
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained({json.dumps(repo or ".")}, dtype="auto")\n'
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(repo or '.')})"
    )
    where = "With transformers:" if repo else "With transformers, in this folder:"
    return "\n\n".join([f"{where}\n\n{code}", _programs(repo or name, repo.rsplit("/", 1)[-1] if repo else name)])


def _programs(run: str, name: str) -> str:
    """How to use `run` in llama.cpp and Ollama. `phinetune export` calls the files after `name`."""
    model = model_name(name)
    file, folder = quoted(f"{name}-q8_0.gguf"), quoted(f"{name}-ollama")
    llama = [f"phinetune export {quoted(run)} --to gguf --type q8_0", llama_cli(file, LONGEST_CONTEXT)]
    ollama = [
        f"phinetune export {quoted(run)} --to ollama",
        f"ollama create {model} -f {folder}/Modelfile",
        f"ollama run {model}",
    ]
    return f"With llama.cpp:\n\n{shell(llama)}\n\nWith Ollama:\n\n{shell(ollama)}"


def llama_cli(file: str, context: int, lora: str | None = None) -> str:
    """The command for a greedy chat in llama.cpp. The files are already quoted for a shell."""
    return f"llama-cli -m {file}{f' --lora {lora}' if lora else ''} -c {context} --temp 0"


def model_name(name: str) -> str:
    """A name that Ollama accepts, made of `name`."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._") or "model"


def shell(lines: list[str]) -> str:
    """Commands for a shell, as Markdown."""
    return fenced("sh", "\n".join(lines))


def python(loading: str) -> str:
    """Code that loads `model` and `tokenizer`, followed by code that answers a chat, as Markdown."""
    return fenced("python", f"{loading}\n{ANSWER}")
