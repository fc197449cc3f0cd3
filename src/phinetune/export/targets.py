"""`phinetune export RUN --to TARGET`: what can be written, in which types, and what runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from phinetune.errors import ModelError
from phinetune.export.gguf.lora import write_gguf_lora
from phinetune.export.gguf.model import FILE_TYPES, write_gguf
from phinetune.export.hub.card_usage import llama_cli, model_name
from phinetune.export.longrope import trained_context
from phinetune.export.merge.merged import open_merged
from phinetune.export.ollama import modelfile as ollama
from phinetune.export.onnx import model as onnx
from phinetune.export.output_paths import LONGEST_CONTEXT, Export, check_free, folder_size, quoted, staged_file
from phinetune.export.source import is_adapter, open_checkpoint, short_name

BY_QUANTISER = ("q4_k_m",)  # llama.cpp makes these from another GGUF


@dataclass(frozen=True)
class Request:
    """What the user asked for: `kind` is the type, `out` the place, both settled."""

    run: str
    kind: str
    out: Path
    overwrite: bool

    @property
    def name(self) -> str:
        return short_name(self.run)


@dataclass(frozen=True)
class ExportTarget:
    """A form that can be written.

    Attributes:
        types: that it can be written in; the first one where none is asked for.
        place: the default place, with {name} and {type}.
        write: does it.
    """

    types: tuple[str, ...]
    place: str
    write: Callable[[Request], Export]


def export(
    run: str, to: str, *, kind: str | None = None, out: str | Path | None = None, overwrite: bool = False
) -> Export:
    """Write a run, an adapter folder or a model in another program's form; what appears, appears whole.

    Args:
        run: as the command line takes it.
        to: a key of `TARGETS`.
        kind: the type of the numbers; the target's first if left out.
        out: where to; a name made of the run's in the current folder if left out.
        overwrite: replace what is there.

    Raises:
        ModelError: an unknown target or type, a place that is taken, a model that has no such form.
    """
    if to not in TARGETS:
        raise ModelError(f"--to must be one of {', '.join(TARGETS)}, not {to}")
    target = TARGETS[to]
    kind = kind or target.types[0]
    if kind not in target.types:
        raise ModelError(_wrong_type(to, kind, run))
    place = Path(out).expanduser() if out else Path(target.place.format(name=short_name(run), type=kind))
    return target.write(Request(run, kind, place, overwrite))


def _wrong_type(to: str, kind: str, run: str) -> str:
    if kind not in BY_QUANTISER or to not in ("gguf", "ollama"):
        return f"--type must be one of {', '.join(TARGETS[to].types)} for --to {to}, not {kind}"
    file = Path(f"{short_name(run)}-f16.gguf")
    made = file.with_name(f"{short_name(run)}-{kind}.gguf")
    return (
        f"--type {kind}: made by llama.cpp's own quantiser, which is in none of the packages that phinetune builds on; "
        f"with llama.cpp's programs installed, run: phinetune export {quoted(run)} --to gguf --type f16 && "
        f"llama-quantize {quoted(file)} {quoted(made)} {kind.upper()}"
    )


def _gguf(request: Request) -> Export:
    with staged_file(request.out, request.overwrite) as file:
        written = write_gguf(open_checkpoint(request.run), file, request.kind, request.name)
    return Export(
        request.out,
        f"a GGUF of {written.tensors} tensors, {request.kind}",
        request.out.stat().st_size,
        [_llama_cli(request.out, written.context)],
        written.vocabulary.notes,
    )


def _llama_cli(file: Path, context: int, lora: Path | None = None) -> str:
    """A greedy chat, not longer than LongRoPE's short factors last: llama.cpp chooses them by the context's size."""
    return llama_cli(quoted(file), min(context, LONGEST_CONTEXT), quoted(lora) if lora else None)


def _gguf_lora(request: Request) -> Export:
    if not is_adapter(request.run):
        raise ModelError(f"{request.run}: no adapter there, and --to gguf-lora writes an adapter; give a run")
    with staged_file(request.out, request.overwrite) as file:
        run = open_merged(request.run)
        layers = write_gguf_lora(run, file, request.kind, request.name)
    base = Path(f"{short_name(run.base.path)}-f16.gguf")
    return Export(
        request.out,
        f"a GGUF LoRA of {layers} layers, {request.kind}",
        request.out.stat().st_size,
        [
            f"phinetune export {quoted(run.base.path)} --to gguf --type f16 --out {quoted(base)}",
            _llama_cli(base, trained_context(run.config), request.out),
        ],
    )


def _ollama(request: Request) -> Export:
    check_free(request.out, request.overwrite, ollama.is_own)  # before the model is opened
    written = ollama.write_ollama(open_checkpoint(request.run), request.out, request.kind, request.name)
    called = model_name(request.name)
    return Export(
        request.out,
        f"a Modelfile and a GGUF of {written.tensors} tensors, {request.kind}",
        folder_size(request.out),
        [f"ollama create {called} -f {quoted(request.out / ollama.MODELFILE)}", f"ollama run {called}"],
        written.vocabulary.notes,
    )


def _onnx(request: Request) -> Export:
    check_free(request.out, request.overwrite, onnx.is_own)
    onnx.write_onnx(request.run, request.out, request.kind)
    return Export(
        request.out,
        f"a folder for onnxruntime-genai, {request.kind}",
        folder_size(request.out),
        [f"python {quoted(request.out / onnx.CHAT)}"],
    )


_GGUF_TYPES = tuple(FILE_TYPES)
TARGETS = {
    "gguf": ExportTarget(("f16", "f32", "bf16", "q8_0"), "{name}-{type}.gguf", _gguf),
    "gguf-lora": ExportTarget(_GGUF_TYPES, "{name}-lora-{type}.gguf", _gguf_lora),
    "ollama": ExportTarget(("q8_0", "f16", "f32", "bf16"), "{name}-ollama", _ollama),
    "onnx": ExportTarget(tuple(onnx.PRECISIONS), "{name}-onnx-{type}", _onnx),
}
