"""What `/metrics` tells of the engines, and a flood of requests that ends without a trace."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from phinetune.engine.continuous.answer_engine import Load
from phinetune.serving.answers.numbers import engine_numbers
from phinetune.serving.health import prometheus
from serving.answers.served import serving
from serving.serving_helpers import until

FLOOD = 1000


def test_numbers_count_what_was_answered(tmp_path: Path) -> None:
    asked: Any = [{"role": "user", "content": "what is the answer to all of that, once more, and then again? " * 3}]
    with serving(tmp_path) as served:
        made = [
            served.client.chat.completions.create(model="tiny", messages=asked, max_tokens=5, logit_bias={"80": 100})
            for _ in range(2)
        ]
        engine: Any = served.state.closing[0].__self__  # type: ignore[attr-defined]
        until(lambda: not engine.loads()["tiny"].conversations)
        numbers = dict(line.rsplit(" ", 1) for line in prometheus(served.state).splitlines() if line[0] != "#")
    usages = [one.usage for one in made]
    assert all(usages)
    prompt, reused = usages[0].prompt_tokens, usages[1].prompt_tokens_details.cached_tokens  # type: ignore[union-attr]
    assert reused > prompt // 2
    label = '{base="tiny",kind="%s"}'
    told = [float(numbers["phinetune_tokens_total" + label % kind]) for kind in ("answered", "read", "reused")]
    assert told == [10, 2 * prompt - reused, reused]
    assert float(numbers['phinetune_conversations{base="tiny",state="answering"}']) == 0
    assert float(numbers['phinetune_cache_kept_tokens{base="tiny"}']) >= prompt
    assert float(numbers['phinetune_steps_total{base="tiny"}']) >= 10
    assert float(numbers['phinetune_step_seconds_total{base="tiny"}']) > 0


def test_a_name_with_quotes_stays_one_label() -> None:
    names = [name for name, _ in engine_numbers({'a"b\\c': Load(0, 0, 0, 0, 0)})]
    assert names[0] == 'phinetune_conversations{base="a\\"b\\\\c",state="waiting"}'


async def _flood(url: str, body: bytes) -> Counter[int]:
    place = urlsplit(url)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
    sent = f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    async def one() -> int:
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        writer.write(sent)
        status = int((await reader.readline()).split()[1])
        await reader.read()
        writer.close()
        return status

    return Counter(await asyncio.gather(*(one() for _ in range(FLOOD))))


def test_a_thousand_requests_at_once_get_answers_or_429s_and_leave_no_memory(tmp_path: Path) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "n": 4}
    resident = psutil.Process().memory_info
    with serving(tmp_path, most_rows=8, most_waiting=24) as served:
        engine: Any = served.state.closing[0].__self__  # type: ignore[attr-defined]
        sizes = []
        for _ in range(3):
            found = asyncio.run(_flood(served.url, json.dumps(body).encode()))
            assert set(found) == {200, 429}
            assert found[200] >= 8
            sizes.append(resident().rss)
        until(lambda: not engine.loads()["tiny"].conversations)
    if sizes[2] - sizes[0] > 48 << 20:
        pytest.fail(f"two more floods took {(sizes[2] - sizes[0]) >> 20} MiB")
