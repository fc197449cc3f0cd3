"""A judge of `evaluation.metrics` at our own server: the same client, key and errors as with any other endpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from phinetune.config.judge import JudgeMetric
from phinetune.evaluation.judge_client import JudgeClient, read_key
from serving.serving_helpers import KEY, threaded

ASKED = [{"role": "system", "content": "You judge."}, {"role": "user", "content": "Is A or B better?"}]


def test_a_judge_asks_our_own_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with threaded(tmp_path) as (_, client):

        def ask(**more: str) -> tuple[str | None, str, bool]:
            wish = {"url": str(client.base_url), "model": "tiny", "key_env": "JUDGE_KEY", "max_tokens": 12, **more}
            judge = JudgeMetric.model_validate(wish)
            with JudgeClient(judge, read_key(judge)) as asking:
                reply = asking.ask(ASKED)
            return reply.text, reply.trouble, reply.final

        made = client.chat.completions.create(model="tiny", messages=ASKED, temperature=0, max_tokens=12)  # type: ignore[arg-type]
        assert ask() == (made.choices[0].message.content, "", False)
        text, trouble, final = ask(model="gpt-5")
        assert (text, final) == (None, True)
        assert "`gpt-5` does not exist" in trouble
        monkeypatch.setenv("JUDGE_KEY", "sk-another-key-altogether")
        assert ask() == (None, "the key was refused (401)", True)
