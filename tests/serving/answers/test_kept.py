"""Answers that are kept: found, listed, changed and forgotten by the official client, and there after a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest

from phinetune.serving.answers.kept import CHAT, KeptAnswers
from phinetune.serving.store import Store
from serving.answers.served import serving

ASKED: list[Any] = [{"role": "user", "content": "what is 7 · 8?"}]


def test_responses_go_on_after_a_restart_and_chats_are_found_again(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        client = served.client
        first = client.responses.create(model="tiny", input="hello", temperature=0, max_output_tokens=5)
        unkept = client.responses.create(model="tiny", input="hello", max_output_tokens=2, store=False)
        chats = [
            client.chat.completions.create(
                model="tiny", messages=ASKED, max_tokens=3, n=2, store=True, metadata={"who": who}
            )
            for who in ("ann", "bo")
        ]
        stream = client.chat.completions.create(
            model="tiny", messages=ASKED, max_tokens=3, temperature=0, store=True, stream=True
        )
        chunks = list(stream)
        lost = client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=3)
    with serving(tmp_path, adapter=False) as served:
        client = served.client
        assert client.responses.retrieve(first.id).output_text == first.output_text
        second = client.responses.create(
            model="tiny", input="more", previous_response_id=first.id, temperature=0, max_output_tokens=5
        )
        said = [item.content[0].text for item in client.responses.input_items.list(second.id, order="asc", limit=1)]  # type: ignore[union-attr]
        assert said == ["hello", first.output_text, "more"]
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(unkept.id)
        client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(first.id)
        with pytest.raises(openai.BadRequestError, match="not found"):
            client.responses.create(model="tiny", input="more", previous_response_id=first.id)

        kept = client.chat.completions
        assert [one.id for one in kept.list(limit=1)] == [chats[0].id, chats[1].id, chunks[0].id]
        assert [one.id for one in kept.list(metadata={"who": "bo"}, order="desc")] == [chats[1].id]
        assert [one.id for one in kept.list(model="other")] == []
        assert kept.retrieve(chats[0].id).choices == chats[0].choices
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert kept.retrieve(chunks[0].id).choices[0].message.content == text
        messages = list(kept.messages.list(chats[0].id))
        assert [(one.role, one.content) for one in messages] == [("user", "what is 7 · 8?")]  # type: ignore[comparison-overlap]
        assert kept.update(chats[0].id, metadata={"who": "cy"}).metadata == {"who": "cy"}
        assert [one.id for one in kept.list(metadata={"who": "cy"})] == [chats[0].id]
        assert kept.delete(chats[0].id).deleted
        for id in (chats[0].id, lost.id):
            with pytest.raises(openai.NotFoundError, match="'store': true"):
                kept.retrieve(id)


def test_the_oldest_are_forgotten_where_there_is_no_more_room(tmp_path: Path) -> None:
    store = Store(tmp_path / "server.sqlite")
    kept = KeptAnswers(store, 3_000)
    for i in range(9):
        kept.put(CHAT, {"id": f"chatcmpl-{i}", "created": i, "model": "tiny", "text": "x" * 800}, [])
    left = [row["id"] for row in store.rows("SELECT id FROM answers ORDER BY seq")]
    assert left == ["chatcmpl-6", "chatcmpl-7", "chatcmpl-8"]
    again = KeptAnswers(store, 3_000)  # a restarted server counts what is there
    again.delete(again.find(CHAT, "chatcmpl-6") or {})
    again.put(CHAT, {"id": "chatcmpl-9", "created": 9, "model": "tiny", "text": "x" * 800}, [])
    assert [row["id"] for row in store.rows("SELECT id FROM answers ORDER BY seq")] == [*left[1:], "chatcmpl-9"]
    store.close()
