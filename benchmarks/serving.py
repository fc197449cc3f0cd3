"""Clients that stream at once, 1, 8 and 32 of them, beside llama.cpp's server and beside one after the other.

    python -m benchmarks.serving [--only 1,8,32] [--limit 32] [--model starter] [--adapters 4] [--no-flood]

Each server runs in a process of its own; the clients stream `/v1/completions` of token ids in this one. The prompts are
the demo's, 32 different ones. No token ends an answer, so everybody makes as many. "adapters" has the clients spread
over that many rank-16 adapters on the same base, "base" none. llama.cpp (xllamacpp, f16, continuous batching, as many
slots as clients) has the base's weights in a GGUF file of this project's own. "first" is the time to the first token,
at the median and at the worst. The flood sends 1,000 requests at once and counts what becomes of them; the memory is
the server's resident memory before and at its highest after. Writes benchmarks/results/serving/*.json and serving.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console

from benchmarks.machine import machine
from benchmarks.store import HERE, Book, Part, Row

COUNTS = (1, 8, 32)
FLOOD = 1000
HEADINGS = ("", "clients", "tokens/s", "× one after the other", "first, median s", "first, worst s", "besides")


# -- the servers, each in a process of its own ----------------------------------------------------------------------


def serve_ours(folder: Path, model: str, dtype: str, adapters: int) -> None:
    """Serve the model `base` and the adapters `ft:base:0`, … until the process is ended. Prints the URL."""
    import torch
    import uvicorn
    from fastapi import FastAPI
    from peft import LoraConfig, get_peft_model

    from phinetune.checkpoints.load import load_base
    from phinetune.config.model import ModelSection
    from phinetune.serving.answers import router
    from phinetune.serving.errors import add_handlers
    from phinetune.serving.settings import ServerSettings
    from phinetune.serving.state import open_state

    section = ModelSection(path=model, dtype=dtype)  # type: ignore[arg-type]
    state = open_state(ServerSettings(folder=folder, models={"base": section}), key="benchmark")
    for i in range(adapters):
        torch.manual_seed(i)
        lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        tuned = get_peft_model(load_base(section).model, lora)
        tuned.peft_config["default"].base_model_name_or_path = model
        tuned.save_pretrained(folder / "runs" / str(i))
        state.models.add(f"ft:base:{i}", section.model_dump(), folder / "runs" / str(i), f"ftjob-{i}")
    app = FastAPI()
    add_handlers(app)
    app.include_router(router(state))

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            print(f"http://127.0.0.1:{self.servers[0].sockets[0].getsockname()[1]}", flush=True)

    Server(uvicorn.Config(app, port=0, log_level="error", backlog=2048)).run()


def serve_llama(file: str, slots: int, tokens: int) -> None:
    """llama.cpp's server, until the process is ended. Prints the URL."""
    import torch
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel, params.port = file, slots, 0
    params.n_ctx = slots * (-(-tokens // 256) * 256)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.n_gpu_layers, params.verbosity = 0, 0
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


@dataclass(frozen=True)
class Server:
    """A server that runs: where, and its process."""

    url: str
    process: int


@contextmanager
def running(*arguments: str) -> Iterator[Server]:
    """A server while the context lasts."""
    command = [sys.executable, "-m", "benchmarks.serving", *arguments]
    with subprocess.Popen(
        command, cwd=HERE.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout
            url = next((line.strip() for line in process.stdout if line.startswith("http")), "")
            if not url:
                raise RuntimeError(f"the server did not start: {' '.join(arguments)}")
            yield Server(url, process.pid)
        finally:
            process.terminate()


# -- the clients ----------------------------------------------------------------------------------------------------


@dataclass
class Answered:
    """What came of one request; times in seconds."""

    status: int
    tokens: int = 0
    first: float = 0.0
    whole: float = 0.0


async def ask(url: str, body: dict[str, Any]) -> Answered:
    """Send a request and read the answer's events. A plain socket, so that clients take little of the processor."""
    place = urlsplit(url)
    data, start = json.dumps(body).encode(), time.perf_counter()
    reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=1 << 20)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: %b\r\nContent-Type: application/json\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (place.netloc.encode(), len(data), data)
    )
    await writer.drain()
    made = Answered(int((await reader.readline()).split()[1]))
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            made.first = made.first or (time.perf_counter() - start if event.get("choices") else 0.0)
            made.tokens = (event.get("usage") or {}).get("completion_tokens", made.tokens)
    writer.close()
    made.whole = time.perf_counter() - start
    return made


def body_of(prompt: Sequence[int], model: str, limit: int, stops: Sequence[int]) -> dict[str, Any]:
    """A request whose answer has exactly `limit` tokens."""
    bias = {str(id): -100 for id in stops}
    wish = {"model": model, "prompt": list(prompt), "max_tokens": limit, "temperature": 0, "logit_bias": bias}
    return {**wish, "stream": True, "stream_options": {"include_usage": True}}


async def all_at_once(url: str, bodies: Sequence[dict[str, Any]]) -> list[Answered]:
    return list(await asyncio.gather(*(ask(url, body) for body in bodies)))


async def one_by_one(url: str, bodies: Sequence[dict[str, Any]]) -> list[Answered]:
    return [await ask(url, body) for body in bodies]


def streamed(what: str, url: str, bodies: Sequence[dict[str, Any]], together: bool = True) -> Row:
    """A row: the rate of all clients, and when their first tokens came."""
    start = time.perf_counter()
    answers = asyncio.run((all_at_once if together else one_by_one)(url, bodies))
    seconds = time.perf_counter() - start
    failed = [one.status for one in answers if one.status != 200]
    if failed:
        return {"what": what, "clients": len(bodies), "failed": f"{len(failed)} of {len(bodies)}: status {failed[0]}"}
    first = [one.first for one in answers]
    return {
        "what": what,
        "clients": len(bodies) if together else 1,
        "seconds": seconds,
        "tokens": sum(one.tokens for one in answers),
        "tokens_per_s": sum(one.tokens for one in answers) / seconds,
        "first": statistics.median(first),
        "first_worst": max(first),
    }


def resident(process: int) -> int:
    """Bytes of a process's resident memory."""
    import psutil

    return int(psutil.Process(process).memory_info().rss)


async def flooded(server: Server, bodies: Sequence[dict[str, Any]]) -> Row:
    """What becomes of very many requests at once, and of the server's memory meanwhile."""
    before = peak = resident(server.process)
    work = asyncio.ensure_future(all_at_once(server.url, bodies))
    while not work.done():
        await asyncio.sleep(0.2)
        peak = max(peak, resident(server.process))
    statuses = [one.status for one in work.result()]
    counts = ", ".join(f"{statuses.count(status)} × {status}" for status in sorted(set(statuses)))
    memory = f"memory {before / 1e9:.2f} GB before, {peak / 1e9:.2f} GB at most"
    return {"what": f"phinetune, {len(bodies):,} at once", "clients": len(bodies), "failed": f"{counts}; {memory}"}


# -- the parts ------------------------------------------------------------------------------------------------------


def prompts_and_stops(model: str, count: int) -> tuple[list[list[int]], list[int]]:
    """Token ids of the demo's chats, different ones, and the ids that would end an answer."""
    from phinetune.chats.encoder import make_encoder
    from phinetune.checkpoints.load import load_base
    from phinetune.config.model import ModelSection
    from phinetune.engine.generate import stop_set

    loaded = load_base(ModelSection(path=model, device="cpu"))
    encoder = make_encoder(loaded.tokenizer)
    demo = HERE.parent / "src" / "phinetune" / "demo_data"
    lines = [line for name in ("heldout", "train") for line in (demo / f"{name}.jsonl").read_text().splitlines()]
    chats = [json.loads(line)["messages"] for line in lines[:count]]
    return [encoder.prompt_ids(chat[:-1]) for chat in chats], sorted(stop_set(loaded.model))


def part(options: argparse.Namespace, folder: Path, gguf: str | None) -> tuple[list[Row], Row | None]:
    """All rows, and the flood."""
    counts = [int(count) for count in options.only.split(",")]
    prompts, stops = prompts_and_stops(options.model, max(counts))
    rows: list[Row] = []
    flood = None
    given = ("--ours", str(folder), "--model", options.model, "--dtype", options.dtype)
    with running(*given, "--adapters", str(options.adapters)) as server:
        names = {"base": ["base"], f"{options.adapters} adapters": [f"ft:base:{i}" for i in range(options.adapters)]}
        for what, models in names.items():
            bodies = [
                body_of(prompt, models[i % len(models)], options.limit, stops) for i, prompt in enumerate(prompts)
            ]
            asyncio.run(one_by_one(server.url, [{**body, "prompt": [5, 6, 7]} for body in bodies]))  # loads and sets up
            fresh = iter(range(1, 1000))  # another first token each time, so that nothing is known from before
            alone = streamed(
                f"phinetune, {what}, one after the other", server.url, _anew(bodies, next(fresh)), together=False
            )
            rows.append({**alone, "times": 1.0})
            for count in counts:
                row = streamed(f"phinetune, {what}", server.url, _anew(bodies[:count], next(fresh)))
                rows.append(row | ({"times": row["tokens_per_s"] / alone["tokens_per_s"]} if "seconds" in row else {}))
        if options.flood:
            many = [body_of([*prompts[i % len(prompts)], i % 100 + 5], "base", 8, stops) for i in range(FLOOD)]
            flood = asyncio.run(flooded(server, many))
    for count in counts if gguf else []:
        longest = max(map(len, prompts)) + options.limit + 8
        with running("--llama", gguf or "", "--slots", str(count), "--tokens", str(longest)) as server:
            bodies = [body_of(prompt, "base", options.limit, stops) for prompt in prompts[:count]]
            asyncio.run(one_by_one(server.url, [{**bodies[0], "prompt": [5, 6, 7]}]))
            rows.append(streamed("llama.cpp, f16", server.url, bodies))
    return rows, flood


def _anew(bodies: Sequence[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """The same requests with another token in front."""
    return [{**body, "prompt": [100 + number, *body["prompt"]]} for body in bodies]


def cells(row: Row) -> list[str]:
    """A row as text, in the order of `HEADINGS`."""
    if "failed" in row:
        return [row["what"], str(row["clients"]), "", "", "", "", row["failed"]]
    times = f"{row['times']:.2f}" if "times" in row else ""
    first = (f"{row['first']:.2f}", f"{row['first_worst']:.2f}")
    return [row["what"], str(row["clients"]), f"{row['tokens_per_s']:.0f}", times, *first, f"{row['seconds']:.1f} s"]


def meaning(name: str, part: Part) -> str:
    """What a part measures."""
    return f"Streams of {part['limit']} tokens from the demo's prompts, {part['model']} in {part['dtype']}."


BOOK = Book("serving", "Clients that stream at once, beside llama.cpp's server", HEADINGS, cells, meaning)


def read_options() -> argparse.Namespace:
    import torch

    from phinetune.checkpoints.device import has_native_bf16

    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("--only", default=",".join(map(str, COUNTS)))
    cli.add_argument("--limit", type=int, default=32)
    cli.add_argument("--model", default="starter")
    cli.add_argument("--adapters", type=int, default=4)
    cli.add_argument("--dtype", default="bfloat16" if has_native_bf16(torch.device("cpu")) else "float32")
    cli.add_argument("--no-flood", dest="flood", action="store_false")
    cli.add_argument("--keep", action=argparse.BooleanOptionalAction, default=True, help="write the results")
    for name in ("ours", "llama", "slots", "tokens"):  # a server's process
        cli.add_argument(f"--{name}", help=argparse.SUPPRESS)
    return cli.parse_args()


def main() -> None:
    """Run all, print the table, write the results."""
    options = read_options()
    if options.ours:
        serve_ours(Path(options.ours), options.model, options.dtype, options.adapters)
        return
    if options.llama:
        serve_llama(options.llama, int(options.slots), int(options.tokens))
        return
    from benchmarks.answers import write_file

    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        llama = options.model == "starter" and find_spec("xllamacpp")
        gguf = write_file(Path(folder), "f16") if llama else None
        rows, flood = part(options, Path(folder), gguf)
    rows += [flood] if flood else []
    console.print(BOOK.table("streams", rows))
    if options.keep:
        made = {"machine": machine(options.dtype), "rows": rows}
        made |= {"limit": options.limit, "model": options.model, "dtype": options.dtype}
        console.print(f"Wrote {' and '.join(map(str, BOOK.keep({'streams': made})))}")


if __name__ == "__main__":
    main()
