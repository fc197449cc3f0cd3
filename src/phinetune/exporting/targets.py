"""`phinetune export RUN --to TARGET`: the targets, their types, and the commands that run what was written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from phinetune.errors import ModelError
from phinetune.exporting.checkpoint_source import is_adapter, open_checkpoint, short_name
from phinetune.exporting.gguf.lora import write_gguf_lora
from phinetune.exporting.gguf.model import write_gguf
from phinetune.exporting.gguf.types import MIXED, PLAIN
from phinetune.exporting.hub.card_usage import llama_cli, model_name
from phinetune.exporting.longrope import trained_context
from phinetune.exporting.merge.merged import open_merged
from phinetune.exporting.ollama import modelfile as ollama
from phinetune.exporting.onnx import model as onnx
from phinetune.exporting.output_paths import LONGEST_CONTEXT, ExportResult, check_free, folder_size, quoted, staged_file


@dataclass(frozen=True)
class Request:
    """What the user asked for, with the defaults filled in.

    Attributes:
        run: what to export, as on the command line.
        kind: the type of the numbers.
        out: the place to write to.
        overwrite: whether to replace an earlier export there.
    """

    run: str
    kind: str
    out: Path
    overwrite: bool

    @property
    def name(self) -> str:
        """The name that the written model gets."""
        return short_name(self.run)


@dataclass(frozen=True)
class ExportTarget:
    """A form that a model can be written in.

    Attributes:
        types: the types that it can have; the first is the default.
        place: the default place, with {name} and {type}.
        write: the function that writes it.
    """

    types: tuple[str, ...]
    place: str
    write: Callable[[Request], ExportResult]


def export(
    run: str, to: str, *, kind: str | None = None, out: str | Path | None = None, overwrite: bool = False
) -> ExportResult:
    """Write a run, an adapter folder or a model in another program's form. It appears whole or not at all.

    Args:
        run: what to export, as on the command line.
        to: a key of `TARGETS`.
        kind: the type of the numbers; the target's first type if left out.
        out: the place to write to; if left out, a place in the current folder that is named after the run.
        overwrite: replace an earlier export there.

    Raises:
        ModelError: the target or the type is unknown, the place is taken, or the model can't be written in this form.
    """
    kind = check_kind(to, kind)
    target = TARGETS[to]
    place = Path(out).expanduser() if out else Path(target.place.format(name=short_name(run), type=kind))
    return target.write(Request(run, kind, place, overwrite))


def check_kind(to: str, kind: str | None) -> str:
    """The type that is meant: the target's first if none is given.

    Raises:
        ModelError: the target or the type is unknown.
    """
    if to not in TARGETS:
        raise ModelError(f"--to must be one of {', '.join(TARGETS)}, not {to}")
    types = TARGETS[to].types
    if kind is not None and kind not in types:
        raise ModelError(f"--type must be one of {', '.join(types)} for --to {to}, not {kind}")
    return kind or types[0]


def _gguf(request: Request) -> ExportResult:
    with staged_file(request.out, request.overwrite) as file:
        gguf = write_gguf(open_checkpoint(request.run), file, request.kind, request.name)
    return ExportResult(
        request.out,
        f"a GGUF of {gguf.tensors} tensors, {request.kind}",
        request.out.stat().st_size,
        [_llama_cli(request.out, gguf.context)],
        gguf.notes,
    )


def _llama_cli(file: Path, context: int, lora: Path | None = None) -> str:
    """The command for a greedy chat.

    llama.cpp chooses LongRoPE's factors by the size of the context, so the context ends where the short factors do.
    """
    return llama_cli(quoted(file), min(context, LONGEST_CONTEXT), quoted(lora) if lora else None)


def _gguf_lora(request: Request) -> ExportResult:
    if not is_adapter(request.run):
        raise ModelError(f"{request.run}: no adapter there; --to gguf-lora writes an adapter, so give a run")
    with staged_file(request.out, request.overwrite) as file:
        run = open_merged(request.run)
        layers = write_gguf_lora(run, file, request.kind, request.name)
    base = Path(f"{short_name(run.base.path)}-f16.gguf")
    return ExportResult(
        request.out,
        f"a GGUF LoRA of {layers} layers, {request.kind}",
        request.out.stat().st_size,
        [
            f"phinetune export {quoted(run.base.path)} --to gguf --type f16 --out {quoted(base)}",
            _llama_cli(base, trained_context(run.config), request.out),
        ],
    )


def _ollama(request: Request) -> ExportResult:
    check_free(request.out, request.overwrite, ollama.is_own)  # the slow part, opening the model, comes after this
    made = ollama.write_ollama(open_checkpoint(request.run), request.out, request.kind, request.name)
    name = model_name(request.name)
    return ExportResult(
        request.out,
        f"a Modelfile and a GGUF of {made.tensors} tensors, {request.kind}",
        folder_size(request.out),
        [f"ollama create {name} -f {quoted(request.out / ollama.MODELFILE)}", f"ollama run {name}"],
        made.notes,
    )


def _onnx(request: Request) -> ExportResult:
    check_free(request.out, request.overwrite, onnx.is_own)
    onnx.write_onnx(request.run, request.out, request.kind)
    return ExportResult(
        request.out,
        f"a folder for onnxruntime-genai, {request.kind}",
        folder_size(request.out),
        [f"python {quoted(request.out / onnx.CHAT)}"],
    )


TARGETS = {
    "gguf": ExportTarget(("f16", "f32", "bf16", "q8_0", *MIXED), "{name}-{type}.gguf", _gguf),
    "gguf-lora": ExportTarget(PLAIN, "{name}-lora-{type}.gguf", _gguf_lora),
    "ollama": ExportTarget(("q8_0", "f16", "f32", "bf16", *MIXED), "{name}-ollama", _ollama),
    "onnx": ExportTarget(tuple(onnx.PRECISIONS), "{name}-onnx-{type}", _onnx),
}
