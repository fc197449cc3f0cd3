"""Quantised GGUF files beside those of llama.cpp's own quantiser: types, bytes, size, and what each costs in loss.

    npm pack @node-llama-cpp/linux-x64 && tar xzf node-llama-cpp-linux-x64-*.tgz   # llama.cpp, built
    python -m benchmarks.quantise --llama package/bins/linux-x64 [--run runs/demo] [--types q4_k_m,q8_0]

llama.cpp's quantiser reads this project's f32 file. Without --run it is the starter's weights alone, and no loss.
Writes benchmarks/results/quantise/*.json and quantise.md.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from rich.console import Console

from benchmarks.machine import machine
from benchmarks.store import Book, Part, Row

HEADINGS = ("", "MB", "tensors of another type", "tensors of other bytes", "held-out loss", "the same answers")
ROOM = 4096  # bytes; more than llama.cpp's parameters take


class _Parameters(ctypes.Structure):
    """Of `llama_model_quantize`: the first two fields, which have not moved since there is this function."""

    _fields_ = (("nthread", ctypes.c_int32), ("ftype", ctypes.c_int32), ("rest", ctypes.c_byte * ROOM))


def llamas_own(folder: Path, source: Path, file: Path, kind: str) -> None:
    """Let llama.cpp's library in `folder` quantise `source`."""
    from phinetune.exporting.gguf.types import FILE_TYPES

    llama = ctypes.CDLL(str(next(folder.glob("libllama.*so*"))))
    llama.llama_model_quantize_default_params.restype = _Parameters
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = int(FILE_TYPES[kind][0])
    status = llama.llama_model_quantize(str(source).encode(), str(file).encode(), ctypes.byref(parameters))
    if status:
        raise RuntimeError(f"llama_model_quantize: status {status}")


def differences(ours: Path, theirs: Path) -> dict[str, Any]:
    """How many tensors of two files differ in type, and in bytes."""
    mine, other = ({one.name: one for one in gguf.GGUFReader(file).tensors} for file in (ours, theirs))
    assert mine.keys() == other.keys(), mine.keys() ^ other.keys()
    types = [name for name, one in mine.items() if one.tensor_type != other[name].tensor_type]
    bytes_ = [name for name in mine if name not in types and not np.array_equal(mine[name].data, other[name].data)]
    return {"types": len(types), "bytes": len(bytes_), "named": [*types, *bytes_][:8], "tensors": len(mine)}


def compared(llama: Path | None, run: str, kinds: list[str], measure: bool) -> list[Row]:
    """A row for each type: this project's file, and llama.cpp's own of the same numbers if it is another."""
    from phinetune.api.export import export, measure_exports

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        source = place / "f32.gguf"
        export(run, "gguf", kind="f32", out=source)
        rows, files = [], []
        for kind in kinds:
            ours = place / f"{kind}.gguf"
            export(run, "gguf", kind=kind, out=ours)
            rows.append({"what": kind, "mb": ours.stat().st_size / 1e6})
            files.append(ours)
            if llama:
                theirs = place / f"{kind}-llama.gguf"
                llamas_own(llama, source, theirs, kind)
                rows[-1] |= (found := differences(ours, theirs))
                if found["types"] or found["bytes"]:  # the same bytes give the same loss
                    rows.append({"what": f"{kind}, llama.cpp's own", "mb": theirs.stat().st_size / 1e6})
                    files.append(theirs)
        if measure:
            own, *measured = measure_exports(run, files)
            rows.insert(0, {"what": "the run", "loss": own.loss})
            for row, one in zip(rows[1:], measured, strict=True):
                row |= {"loss": one.loss}
                if one.agreement:
                    row |= {"same": one.agreement.same, "answers": one.agreement.answers}
    return rows


def cells(row: Row) -> list[str]:
    """A row as text, in the order of `HEADINGS`."""
    return [
        row["what"],
        f"{row['mb']:.1f}" if "mb" in row else "",
        f"{row['types']} of {row['tensors']}" if "types" in row else "",
        f"{row['bytes']} of {row['tensors']}" if "bytes" in row else "",
        f"{row['loss']:.4f}" if row.get("loss") is not None else "",
        f"{row['same']} of {row['answers']}" if "same" in row else "",
    ]


def meaning(name: str, part: Part) -> str:
    """What was quantised."""
    return f"{part['run']}."


BOOK = Book("quantise", "Quantised files beside llama.cpp's own", HEADINGS, cells, meaning)


def main() -> None:
    """Quantise, compare, print and keep the table."""
    from phinetune.checkpoints.starter import ensure_starter
    from phinetune.exporting.gguf.types import MIXED

    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("--llama", type=Path)
    cli.add_argument("--run")
    cli.add_argument("--types", default=",".join(("f16", "q8_0", *MIXED)))
    options = cli.parse_args()
    run = options.run or str(ensure_starter())
    rows = compared(options.llama, run, options.types.split(","), measure=bool(options.run))
    what = f"The run {Path(run).name}" if options.run else "The starter"
    console = Console()
    console.print(BOOK.table("files", rows))
    part = {"machine": machine("float32"), "run": what, "rows": rows}
    console.print(f"Wrote {' and '.join(map(str, BOOK.keep({'files': part})))}")


if __name__ == "__main__":
    main()
