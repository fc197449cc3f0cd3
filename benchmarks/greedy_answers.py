"""Greedy answers to prompts as one measurement: by transformers, by this project, by llama.cpp."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.whole_run import LORA


def generate(
    model: str,
    prompts: str,
    limit: int,
    dtype: str,
    way: str,
    batch: int | None = None,
    adapter: bool = True,
    endless: bool = False,
    device: str = "cpu",
    weights: str | None = None,
) -> dict[str, Any]:
    """Greedy answers to prompts, the model under a new LoRA unless told otherwise.

    Args:
        prompts: a JSON file, a list of lists of token ids.
        way: `transformers` (its own classes, `batch` prompts a call in the order of the file, padded to the left) or
            `phinetune` (`batch` prompts together; None: as memory allows).
        weights: how phinetune's base lies in memory, as `load_base` takes it.
        endless: no token ends an answer, so all have `limit` tokens.
    """
    from peft import LoraConfig, get_peft_model

    from phinetune.checkpoints.load import load_base
    from phinetune.config.model import ModelSection
    from phinetune.engine.generate import stop_set
    from phinetune.engine.lora_layers import use_fused_layers

    ours = way == "phinetune"
    loaded = load_base(ModelSection(path=model, dtype=dtype, device=device), fast=ours, weights=weights)
    answering: Any = loaded.model
    if adapter:
        lora = LoraConfig(**LORA)
        answering = get_peft_model(loaded.model, use_fused_layers(lora, loaded.model) if ours else lora).eval()
    asked: list[list[int]] = json.loads(Path(prompts).read_text())
    stops = set[int]() if endless else stop_set(answering)
    run = _by_phinetune if ours else _by_transformers
    run(answering, asked[:2], 2, batch, stops)  # what is set up once
    start = time.perf_counter()
    answers = run(answering, asked, limit, batch, stops)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": sum(map(len, answers)), "answers": answers}


def _by_phinetune(
    model: Any, asked: list[list[int]], limit: int, batch: int | None, stops: set[int]
) -> list[list[int]]:
    from phinetune.engine.greedy_decode import decode

    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    return decode(core, asked, stops=stops, limit=limit, rows=batch)


def _by_transformers(
    model: Any, asked: list[list[int]], limit: int, batch: int | None, stops: set[int]
) -> list[list[int]]:
    answers: list[list[int]] = []
    pad = model.generation_config.pad_token_id
    for first in range(0, len(asked), batch or len(asked)):
        part = asked[first : first + (batch or len(asked))]
        ids, mask = (torch.tensor(rows, device=model.device) for rows in _padded(part, pad))
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=limit,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=sorted(stops),
        )
        for row in out[:, ids.shape[1] :].tolist():
            end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
            answers.append(row[:end])
    return answers


def _padded(prompts: list[list[int]], pad: int) -> tuple[list[list[int]], list[list[int]]]:
    """Ids and mask of one width; what is filled up stands to the left."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    return ids, [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]


def llama(gguf: str, prompts: str, limit: int) -> dict[str, Any]:
    """llama.cpp's greedy answers to all prompts at once, each of `limit` tokens, on a server in this process.

    Args:
        gguf: the model's file.
    """
    import urllib.request
    from concurrent.futures import ThreadPoolExecutor

    import xllamacpp

    asked: list[list[int]] = json.loads(Path(prompts).read_text())
    longest = max(map(len, asked)) + limit + 8
    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel, params.port = gguf, len(asked), 0
    params.n_ctx = len(asked) * (-(-longest // 256) * 256)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.n_gpu_layers, params.verbosity = 0, 0
    server = xllamacpp.Server(params)

    def answer(ids: list[int], count: int) -> list[int]:
        body = {"prompt": ids, "n_predict": count, "temperature": 0, "return_tokens": True, "ignore_eos": True}
        request = urllib.request.Request(
            server.listening_address + "/completion",
            json.dumps({**body, "cache_prompt": False}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as done:
            return list(json.load(done)["tokens"])

    answer(asked[0], 2)  # what is set up once
    start = time.perf_counter()
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda ids: answer(ids, limit), asked))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": sum(map(len, answers)), "answers": answers}
