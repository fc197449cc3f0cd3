"""Chat with the ONNX model in this script's folder. The script needs only onnxruntime-genai.

python chat.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

NEW_TOKENS = 512


def answer(model: object, tokenizer: object, messages: Sequence[dict[str, str]]) -> Iterator[str]:
    """The greedy answer, one piece of text at a time."""
    import onnxruntime_genai as og

    prompt = tokenizer.apply_chat_template(json.dumps(list(messages)), add_generation_prompt=True)  # type: ignore[attr-defined]
    ids = tokenizer.encode(prompt)  # type: ignore[attr-defined]
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=len(ids) + NEW_TOKENS)
    generator = og.Generator(model, params)
    generator.append_tokens(ids)
    stream = tokenizer.create_stream()  # type: ignore[attr-defined]
    while not generator.is_done():
        generator.generate_next_token()
        yield stream.decode(generator.get_next_tokens()[0])


def main() -> None:
    """Read messages and answer them, until the input ends."""
    import onnxruntime_genai as og

    model = og.Model(str(Path(__file__).resolve().parent))
    tokenizer = og.Tokenizer(model)
    messages: list[dict[str, str]] = []
    while True:
        try:
            messages.append({"role": "user", "content": input("you> ")})
        except EOFError:
            return
        pieces = []
        for piece in answer(model, tokenizer, messages):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        messages.append({"role": "assistant", "content": "".join(pieces)})


if __name__ == "__main__":
    main()
