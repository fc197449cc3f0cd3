"""Running the notebooks of examples/ whole, and keeping their output as a reader should see it.

    python tools/notebooks.py examples/qlora.ipynb …                   # run each where it lies and keep its output
    python tools/notebooks.py --hub examples/lora_instructions.ipynb   # let it push, to the tests' stand-in for the hub

The tests run them through `execute` as well, with fewer steps: values for the cell tagged `parameters`.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

# tqdm says this, and shows its line, where Jupyter's widgets are missing, as in the environment that runs these.
NO_WIDGETS = re.compile(r".*TqdmWarning: IProgress not found.*\n.*notebook_tqdm\n?")
TIMEOUT = 1800  # seconds a cell may take
ANSI = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
# Folders whose names differ from machine to machine, and what stands for them.
MACHINE_PATHS = {
    r"/\S*/(?=starter-smollm2)": "~/.cache/phinetune/",
    r"/tmp/[\w./-]*?/(?=[\w.-]+(\s|$|[:,'\"]))": "/tmp/…/",
    r"/\S+/site-packages/": "…/site-packages/",
    r"(?<=http://127\.0\.0\.1):\d+": "",  # of the stand-in for the hub
}


def execute(path: Path, parameters: Mapping[str, Any] | None = None) -> NotebookNode:
    """The notebook with the output of a whole run in its own folder.

    Args:
        parameters: values that replace those of the cell tagged `parameters`.

    Raises:
        CellExecutionError: a cell raised.
        KeyError: the tagged cell doesn't set one of `parameters`.
    """
    notebook = nbformat.read(path, as_version=4)
    if parameters:
        cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
        for name, value in parameters.items():
            cell.source, count = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value!r}", cell.source)
            if not count:
                raise KeyError(f"{path}: the cell tagged `parameters` sets no {name}")
    NotebookClient(notebook, timeout=TIMEOUT, resources={"metadata": {"path": str(path.parent)}}).execute()
    return notebook


def tidy(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """The notebook with what a cell printed as one text, without bars that were redrawn, colours, times of the
    run, tqdm's word on widgets and this machine's paths.
    """
    notebook.metadata = {key: notebook.metadata[key] for key in ("kernelspec", "language_info")}
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _one_text(cell.outputs, folder)
    return notebook


def _one_text(outputs: list[NotebookNode], folder: Path) -> list[NotebookNode]:
    """What was printed, by `print`, by logging and by rich, in the order it came; results and pictures as they are."""
    kept: list[NotebookNode] = []
    for output in outputs:
        text = _text_of(output)
        if text is None:
            kept.append(output)
        elif kept and kept[-1].output_type == "stream":
            kept[-1].text += text
        else:
            kept.append(nbformat.v4.new_output("stream", name="stdout", text=text))
    for output in kept:
        if output.output_type == "stream":
            output.text = _plain(output.text, folder)
    return [output for output in kept if output.output_type != "stream" or output.text.strip()]


def _text_of(output: NotebookNode) -> str | None:
    if output.output_type == "stream":
        return str(output.text)
    if output.output_type == "display_data" and "image/png" not in output.data:
        return str(output.data.get("text/plain", "")).rstrip("\n") + "\n"
    return None


def _plain(text: str, folder: Path) -> str:
    text = NO_WIDGETS.sub("", ANSI.sub("", text))
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.split("\n")]
    text = "\n".join(lines).replace(f"{folder.resolve()}/", "").replace(str(Path.home()), "~")
    for pattern, stands_for in MACHINE_PATHS.items():
        text = re.sub(pattern, stands_for, text)
    return text


@contextmanager
def stand_in_hub() -> Iterator[dict[str, Any]]:
    """The tests' hub on loopback, set as this process's hub; parameters that make a notebook push there."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
    from hub_helpers import serve_hub

    with serve_hub() as hub, tempfile.TemporaryDirectory() as home:
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1"}
        yield {"REPO": "alice/shop-assistant"}


def main(arguments: list[str]) -> None:
    """Run notebooks and write them back with their output, their parameters as they stood."""
    hub = "--hub" in arguments
    with stand_in_hub() if hub else nullcontext() as parameters:
        for path in [Path(argument) for argument in arguments if argument != "--hub"]:
            sources = [cell.source for cell in nbformat.read(path, as_version=4).cells]
            notebook = tidy(execute(path, parameters), path.parent)
            for cell, source in zip(notebook.cells, sources, strict=True):
                cell.source = source
            nbformat.write(notebook, path)
            print(f"Wrote {path}: its output is that of the run just made")


if __name__ == "__main__":
    main(sys.argv[1:])
