"""What the engines do, as numbers for Prometheus."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from phinetune.engine.continuous.answer_engine import Load


def engine_numbers(loads: Mapping[str, Load]) -> Iterator[tuple[str, float]]:
    """Names with labels, and values. Counters of a base begin anew when it is loaded again, as Prometheus allows."""
    for name, load in loads.items():
        base = f"base={json.dumps(name, ensure_ascii=False)}"
        for state in ("waiting", "reading", "answering"):
            yield f'phinetune_conversations{{{base},state="{state}"}}', getattr(load, state)
        yield f"phinetune_cache_bytes{{{base}}}", load.cache_bytes
        yield f"phinetune_cache_kept_tokens{{{base}}}", load.kept_tokens
        for kind in ("answered", "read", "reused"):
            yield f'phinetune_tokens_total{{{base},kind="{kind}"}}', getattr(load, f"{kind}_tokens")
        yield f"phinetune_steps_total{{{base}}}", load.steps
        yield f"phinetune_step_seconds_total{{{base}}}", load.busy_s
