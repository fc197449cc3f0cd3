"""Writes what of docs/ is made: tables of references, and figures.

    python tools/write_docs.py              write all
    python tools/write_docs.py --check      write nothing; status 1, and a list, if a file is behind
    python tools/write_docs.py --measure    time a layer of each model on this machine first (minutes, quiet machine)
    python tools/write_docs.py --support CPU.json [CUDA.json]
                                            take what tests ran from `pytest --support-matrix FILE`

Pages hold their made parts between two comments; the rest of them is written by people. See tools/doc_pages.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from doc_pages import api_parts, cli_parts, config_parts, figures, memory_parts, scale_parts, support_parts, words
from doc_pages.filling import DOCS, Part, filled, language_of, pages

PARTS: dict[str, Part] = {
    "config": config_parts.config_keys,
    "config entries": config_parts.config_entries,
    "objective keys": config_parts.objective_keys,
    "auto keys": config_parts.auto_keys,
    "retired keys": config_parts.retired_keys,
    "model keywords": config_parts.model_keywords,
    "row forms": config_parts.row_forms,
    "cli": cli_parts.cli_commands,
    "api functions": api_parts.api_functions,
    "api objects": api_parts.api_objects,
    "api lora": api_parts.api_lora,
    "memory models": memory_parts.memory_models,
    "memory fits": memory_parts.memory_fits,
    "memory parts": memory_parts.memory_parts,
    "memory time": memory_parts.memory_time,
    "scale memory": scale_parts.scale_memory,
    "scale traffic": scale_parts.scale_traffic,
    "scale accumulation": scale_parts.scale_accumulation,
    "scale data": scale_parts.scale_data,
    "scale failures": scale_parts.scale_failures,
    "support matrix": support_parts.support_matrix,
    "support tests": support_parts.support_tests,
}


def wanted() -> dict[Path, str]:
    """Every file that is made, in whole or in part, and what belongs into it."""
    made = {page: filled(page.read_text(encoding="utf-8"), PARTS, language_of(page)) for page in pages()}
    return made | figures.files() | for_the_site()


def for_the_site() -> dict[Path, str]:
    """What agents read stands in the root; the site has copies, whose links are those of its own pages."""
    root = DOCS.parent
    copies = {"llms.txt": root / "llms.txt", "agents.md": root / "AGENTS.md"}
    return {DOCS / name: _relinked(source.read_text(encoding="utf-8")) for name, source in copies.items()}


def _relinked(text: str) -> str:
    text = text.replace("](docs/", "](").replace("](AGENTS.md)", "](agents.md)")
    return re.sub(r"\[([^\]]*)\]\((?:CONTRIBUTING|README)[\w.-]*\)", r"\1", text)


def behind() -> dict[Path, str]:
    """The files that are not as they should be, and what belongs into them."""
    return {file: text for file, text in wanted().items() if not file.is_file() or file.read_text("utf-8") != text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a file is behind")
    parser.add_argument("--measure", action="store_true", help="time a layer of each model on this machine first")
    parser.add_argument("--support", nargs="+", type=Path, default=[], help="files of `pytest --support-matrix FILE`")
    given = parser.parse_args()
    if given.measure:
        sys.path[:0] = [str(DOCS.parent)]  # for benchmarks
        from doc_pages.speeds import measure_speeds

        measure_speeds()
    if given.support:
        support_parts.record(given.support)
    late = behind()
    for file, text in late.items():
        print("behind:" if given.check else "wrote", file)
        if not given.check:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    for sentence in sorted(words.missing):
        print(f"no Chinese in {words.FILE.name}: {sentence}", file=sys.stderr)
    if given.check and (late or words.missing):
        sys.exit(1)


if __name__ == "__main__":
    main()
