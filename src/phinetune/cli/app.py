"""The command line: parse, call one function, print. Heavy libraries are imported by the verb that needs them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from phinetune.cli.data import app as data_app
from phinetune.cli.report import app as report_app
from phinetune.errors import PhinetuneError
from phinetune.program import console as _console
from phinetune.program import program as _program

app = typer.Typer(
    help="Fine-tune a Phi-3 with LoRA on your chats, and see whether it got better.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(data_app, name="data")
app.add_typer(report_app)

RunPath = Annotated[str, typer.Argument(metavar="RUN", help="a run, an adapter folder or a model (hub id or folder)")]
SetOption = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="override a key, e.g. training_config.max_steps=5; repeatable"),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace the run in output_dir")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps")]
NewTokens = Annotated[int, typer.Option(min=1, help="tokens an answer may have")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy; higher is more varied")]
TopP = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="sample from the likeliest tokens of this total probability")
]
TopK = Annotated[int, typer.Option(min=0, help="sample from this many likeliest tokens; 0 is all")]
Seed = Annotated[Optional[int], typer.Option(help="seed of the sampling")]  # noqa: UP045 (typer reads it at run time)
System = Annotated[Optional[str], typer.Option(help="a system message")]  # noqa: UP045


def main() -> None:
    """Entry point. A user's mistake ends with one sentence a problem and status 2, never with a traceback."""
    try:
        app(prog_name="phinetune")
    except PhinetuneError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a folder that can't be written, a full disk, a closed pipe
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


@app.command()
def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="the run's YAML file (`phinetune config` explains it)")
    ],
    resume: Annotated[bool, typer.Option("--resume", help="go on from the newest checkpoint in output_dir")] = False,
    overwrite: Overwrite = False,
    overrides: SetOption = [],  # noqa: B006 (typer copies it)
) -> None:
    """Fine-tune by a YAML file, then compare base and tuned model on the held-out chats."""
    from phinetune.config.run import load_config

    made = _train(load_config(config, overrides), f"{_program()} train {config}", resume, overwrite)
    _say_next(made.path)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="the run's YAML file")],
    as_json: Annotated[bool, typer.Option("--json", help="print the plan as JSON")] = False,
    probe: Annotated[bool, typer.Option(help="measure a layer of the model on this machine, for the time")] = True,
    overrides: SetOption = [],  # noqa: B006 (typer copies it)
) -> None:
    """Say what a run will take of memory, time and disk. Status 1: it does not fit; what would is listed."""
    from phinetune.config.run import load_config
    from phinetune.logs import quiet_libraries
    from phinetune.planning.plan import make_plan
    from phinetune.screen.plan import show_plan

    quiet_libraries()
    made = make_plan(load_config(config, overrides), probe=probe)
    if as_json:
        print(json.dumps(made.to_dict(), indent=2))
    else:
        show_plan(made, _console())
        if made.fits:
            _console().print(f"Next: {_program()} train {config}", highlight=False, soft_wrap=True)
    if not made.fits:
        sys.exit(1)


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="where the run goes")] = Path("runs/demo"),
    overwrite: Overwrite = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a stopped demo")] = False,
    overrides: SetOption = [],  # noqa: B006 (typer copies it)
) -> None:
    """Fine-tune the starter model on the bundled chats of an outdoor-gear shop: minutes on a CPU."""
    from phinetune.demo.job import demo_config, show_gain

    config = demo_config(output_dir, overrides)
    made = _train(config, f"{_program()} demo --output-dir {output_dir}", resume, overwrite)
    show_gain(made.results, _console())
    _say_next(made.path)


def _train(config: Any, command: str, resume: bool, overwrite: bool) -> Any:
    from phinetune.api.train import run

    console = _console()
    made = run(config, console, resume=resume, overwrite=overwrite)
    if made.stopped:
        steps = made.results["training"]["steps"]
        console.print(
            f"Stopped after step {steps}; a checkpoint is in {made.path}, a report in {made.path / 'report.html'}. "
            f"Go on with:\n  {command} --resume",
            highlight=False,
            soft_wrap=True,
        )
        sys.exit(130)
    return made


def _say_next(path: Path) -> None:
    page = path / "report.html"
    lines = [
        f"\nWrote {path}: the adapter, its tokenizer, checkpoints, results.json and a model card (README.md)",
        *([f"See how it went: {page}"] if page.is_file() else []),
        "Next:",
        f"  {_program()} chat {path}",
        f'  {_program()} generate {path} --prompt "…"',
        f"  {_program()} evaluate {path} --data FILE",
    ]
    _console().print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


@app.command()
def evaluate(
    run: RunPath,
    data: Annotated[
        list[str], typer.Option("--data", help="held-out chats; the run's own held-out file if left out")
    ] = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="write the results as JSON, every answer included")] = None,
    max_prompts: Annotated[Optional[int], typer.Option(min=1, help="answer the first N prompts only")] = None,  # noqa: UP045
    max_new_tokens: Annotated[Optional[int], typer.Option(min=1, help="tokens an answer may have")] = None,  # noqa: UP045
    batch_size: Annotated[Optional[int], typer.Option(min=1, help="prompts answered together")] = None,  # noqa: UP045
    metrics: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help='as evaluation.metrics, e.g. "[exact_match, {name: polite, function: polite.py:score}]"'),
    ] = None,
    tag: Annotated[Optional[str], typer.Option(help="column of the data by whose values to split as well")] = None,  # noqa: UP045
    generate: Annotated[bool, typer.Option(help="let the models answer, or score the chats only")] = True,
    tasks: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME,…", help="run these tasks of lm-evaluation-harness in place of held-out chats"),
    ] = None,
    include_path: Annotated[Optional[Path], typer.Option(help="a folder of task files of your own")] = None,  # noqa: UP045
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="with --tasks: prompts go into the checkpoint's chat template")
    ] = False,
    device: Device = "auto",
) -> None:
    """Compare a run with its base on held-out chats, or on tasks; a plain model is measured alone."""
    if tasks:
        if data:
            raise PhinetuneError("--data and --tasks are two evaluations; give one of them")
        _evaluate_tasks(run, tasks, include_path, max_prompts, batch_size, chat_template, device, out)
        return
    import yaml

    from phinetune.api.train import evaluate as evaluate_run
    from phinetune.api.train import record_evaluation
    from phinetune.files import write_text

    given: dict[str, Any] = {"max_prompts": max_prompts, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    try:
        given["metrics"] = yaml.safe_load(metrics) if metrics else None
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "broken"
        raise PhinetuneError(f"--metrics {metrics}: write it as YAML, e.g. [exact_match, bleu] ({problem})") from None
    section = {"generate": generate, **{key: value for key, value in given.items() if value is not None}}
    console = _console()
    comparison = evaluate_run(run, data or None, section, tag=tag, console=console, device=device)
    if out:
        write_text(out, json.dumps(comparison.to_tree(), indent=2, ensure_ascii=False) + "\n")
        console.print(f"Wrote {out}", highlight=False)
    page = record_evaluation(run, comparison)
    if page:
        console.print(f"Wrote {page.with_name('evaluation.json')} and {page}", highlight=False, soft_wrap=True)
    console.print(f"Next: {_program()} chat {run}", highlight=False)


def _evaluate_tasks(
    run: str,
    tasks: str,
    include_path: Path | None,
    limit: int | None,
    batch_size: int | None,
    chat_template: bool,
    device: str,
    out: Path | None,
) -> None:
    from phinetune.api.train import evaluate_tasks
    from phinetune.files import write_text

    console = _console()
    results = evaluate_tasks(
        run,
        [name.strip() for name in tasks.split(",") if name.strip()],
        include_path=include_path,
        limit=limit,
        batch_size=batch_size,
        chat_template=chat_template,
        console=console,
        device=device,
    )
    if out:
        tree = {"tasks": [one.to_dict() for one in results]}
        write_text(out, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
        console.print(f"Wrote {out}", highlight=False)
    console.print(f"Next: {_program()} evaluate {run} --data FILE", highlight=False)


@app.command()
def generate(
    run: RunPath,
    prompt: Annotated[Optional[str], typer.Option(help="the message; standard input if left out")] = None,  # noqa: UP045
    system: System = None,
    base: Annotated[bool, typer.Option("--base", help="let the base model answer")] = False,
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    device: Device = "auto",
) -> None:
    """Answer one message: the answer alone goes to standard output."""
    message = prompt if prompt is not None else sys.stdin.read()
    if not message.strip():
        raise PhinetuneError("there is no message: give --prompt, or text on standard input")
    conversation = _conversation(run, system, max_new_tokens, (temperature, top_p, top_k), seed, device)
    conversation.with_base = base
    answer = conversation.answer(message.strip())
    print(answer.text)
    if not answer.stopped:
        print(f"(cut at --max-new-tokens {max_new_tokens})", file=sys.stderr)


@app.command()
def chat(
    run: RunPath,
    system: System = None,
    max_new_tokens: NewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    device: Device = "auto",
) -> None:
    """Talk to a run: streamed answers, /reset, /base to hear the base model."""
    conversation = _conversation(run, system, max_new_tokens, (temperature, top_p, top_k), seed, device)
    from phinetune.talk.conversation import chat as talk

    talk(conversation, _console())


def _conversation(
    run: str,
    system: str | None,
    limit: int,
    sampling: tuple[float, float, int],
    seed: int | None,
    device: str,
) -> Any:
    from phinetune.talk.conversation import open_conversation

    return open_conversation(run, system, limit, sampling, seed, device)


@app.command()
def merge(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run, one of its checkpoints or an adapter folder")],
    out: Annotated[Path, typer.Option(help="the folder to write: a plain transformers model")],
    dtype: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="float32, bfloat16 or float16; the dtype of the base's files if left out"),
    ] = None,
    base: Annotated[
        str,
        typer.Option(help="for a run with model.quantization: 16bit, or quantized, the weights it was trained on"),
    ] = "16bit",
    score: Annotated[
        bool, typer.Option(help="measure base, adapter and merged model on the run's held-out chats")
    ] = True,
    device: Device = "auto",
) -> None:
    """Merge a run into its base: a model that runs without PEFT, written shard by shard."""
    from phinetune.api.train import merge as merge_run

    console = _console()
    made = merge_run(run, out, dtype=dtype, base=base, score=score, console=console, device=device)
    lines = ["Next:", f"  {_program()} chat {made.path}", f"  {_program()} evaluate {made.path} --data FILE"]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


@app.command()
def export(
    run: RunPath,
    to: Annotated[str, typer.Option(help="gguf, gguf-lora (the adapter alone), ollama or onnx")],
    kind: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--type",
            help="of the numbers: f32, f16, bf16 or q8_0, for onnx int4 or f32; what suits the target if left out",
        ),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="the file (ollama, onnx: the folder) to write; named after the run if left out"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is there")] = False,
) -> None:
    """Write a run or a model for another program: llama.cpp, Ollama, onnxruntime-genai."""
    from phinetune.export.targets import export as export_run

    done = export_run(run, to, kind=kind, out=out, overwrite=overwrite)
    _console().print("\n".join(done.report(_program())), markup=False, highlight=False, soft_wrap=True)


@app.command()
def push(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run, one of its checkpoints or an adapter folder")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="NAME or OWNER/NAME on the hub; made if it is not there")],
    private: Annotated[bool, typer.Option("--private", help="make the repository private")] = False,
    merged: Annotated[
        bool, typer.Option("--merged", help="push base and adapter merged into one model, not the adapter alone")
    ] = False,
) -> None:
    """Push a run to the Hugging Face hub with a model card; the token is HF_TOKEN's, .env's or `hf auth login`'s."""
    from phinetune.api.train import push as push_run

    done = push_run(run, repo, private=private, merged=merged)
    _console().print("\n".join(done.report(_program())), markup=False, highlight=False, soft_wrap=True)


@app.command()
def convert(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="a PEFT adapter folder, or a loralib checkpoint (.pt)")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="what to write: a folder (PEFT) or a .pt file (loralib)")],
    to: Annotated[
        str,
        typer.Option(
            help="peft or loralib; from a PEFT folder also peft-split (q_proj, k_proj, v_proj, gate_proj, up_proj, as "
            "vLLM takes) or peft-fused (qkv_proj, gate_up_proj)"
        ),
    ],
    lora_alpha: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="from loralib: the layers' lora_alpha; to loralib: theirs, if it is not to be the adapter's"),
    ] = None,
    merged: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=ROWS,ROWS,…",
            help="a fused layer (MergedLinear) and its splits' rows, e.g. qkv_proj=3072,-3072,3072; "
            "-ROWS is a split without an adapter; repeatable",
        ),
    ] = [],  # noqa: B006
    base: Annotated[Optional[str], typer.Option(help="to PEFT: the base model to record")] = None,  # noqa: UP045
    embedding: Annotated[
        list[str], typer.Option(metavar="NAME", help="from loralib: a layer that is an embedding; repeatable")
    ] = [],  # noqa: B006
    linear: Annotated[
        list[str],
        typer.Option(metavar="NAME", help="from loralib: a layer that is linear, whatever it looks like; repeatable"),
    ] = [],  # noqa: B006
) -> None:
    """Convert an adapter between PEFT's forms and loralib's, and check the update of every layer."""
    from phinetune.export.convert.convert import convert as convert_adapter

    done = convert_adapter(
        src, dst, to, lora_alpha=lora_alpha, base=base, merged=merged, embedding=embedding, linear=linear
    )
    _console().print("\n".join(done.report()), markup=False, highlight=False, soft_wrap=True)


@app.command()
def config() -> None:
    """Show every key of a run's YAML file, with its default and what it does."""
    from rich.table import Table

    from phinetune.config.run import describe_knobs

    table = Table(title="Keys of a run's YAML file", title_justify="left")
    for column in ("key", "default", "what it does"):
        table.add_column(column, overflow="fold")
    for row in describe_knobs():
        table.add_row(*row)
    _console().print(table, highlight=False)


if __name__ == "__main__":
    main()
