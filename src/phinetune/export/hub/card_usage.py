"""How a card says a model is used: transformers (with PEFT for an adapter), phinetune, llama.cpp, Ollama."""

from __future__ import annotations

import re
from pathlib import Path

from phinetune.export.output_paths import LONGEST_CONTEXT, quoted

ANSWER = """
chat = [{"role": "user", "content": "Hello"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


def adapter_usage(base_id: str | None, base: str, repo: str | None, folder: Path) -> str:
    """For an adapter.

    Args:
        base_id: the base's id on the hub, None where it is not there.
        base: the base as `phinetune` takes it.
        repo: the repository that holds the adapter; None for one that lies in `folder` alone.
    """
    here = Path(repo.rsplit("/", 1)[-1]) if repo else folder
    fetch = [f"hf download {repo} --local-dir {here}"] if repo else []
    chat = shell([*fetch, f"phinetune chat {quoted(here)}"])
    return "\n\n".join(
        [
            f"With phinetune:\n\n{chat}",
            f"With transformers and PEFT:\n\n{_peft(base_id, base, repo or str(folder), bool(repo))}",
            _programs(str(here), here.name),
        ]
    )


def _peft(base_id: str | None, base: str, place: str, elsewhere: bool) -> str:
    if base_id or not elsewhere:  # what PEFT finds by the adapter's own record
        return python(
            "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer\n\n"
            f'model = AutoPeftModelForCausalLM.from_pretrained("{place}", dtype="auto")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{place}")'
        )
    return python(
        "from peft import PeftModel\nfrom phinetune import load\n\n"
        f'base, tokenizer = load("{base}")  # it is not on the hub\n'
        f'model = PeftModel.from_pretrained(base, "{place}")'
    )


def merged_usage(repo: str | None, name: str) -> str:
    """For a merged model, in the repository `repo` or in a folder called `name`."""
    code = python(
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{repo or "."}", dtype="auto")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{repo or "."}")'
    )
    where = "With transformers:" if repo else "With transformers, in this folder:"
    return "\n\n".join([f"{where}\n\n{code}", _programs(repo or name, repo.rsplit("/", 1)[-1] if repo else name)])


def _programs(run: str, name: str) -> str:
    """llama.cpp and Ollama: what `phinetune export` writes of `run` is called after `name`."""
    called = model_name(name)
    file, folder = quoted(f"{name}-q8_0.gguf"), quoted(f"{name}-ollama")
    llama = [f"phinetune export {quoted(run)} --to gguf --type q8_0", llama_cli(file, LONGEST_CONTEXT)]
    ollama = [
        f"phinetune export {quoted(run)} --to ollama",
        f"ollama create {called} -f {folder}/Modelfile",
        f"ollama run {called}",
    ]
    return f"With llama.cpp:\n\n{shell(llama)}\n\nWith Ollama:\n\n{shell(ollama)}"


def llama_cli(file: str, context: int, lora: str | None = None) -> str:
    """A greedy chat in llama.cpp, by files as a shell takes them."""
    return f"llama-cli -m {file}{f' --lora {lora}' if lora else ''} -c {context} --temp 0"


def model_name(name: str) -> str:
    """A name that Ollama takes."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._") or "model"


def shell(lines: list[str]) -> str:
    """Commands as Markdown."""
    return "```sh\n" + "\n".join(lines) + "\n```"


def python(loading: str) -> str:
    """Python that loads `model` and `tokenizer`, with an answer after it, as Markdown."""
    return f"```python\n{loading}\n{ANSWER}\n```"
