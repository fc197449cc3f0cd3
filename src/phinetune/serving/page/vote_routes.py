"""`/phinetune/votes`: which of two answers someone prefers, and the preference file that this becomes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import PlainTextResponse

from phinetune.serving.errors import ApiError
from phinetune.serving.files import keep_lines
from phinetune.serving.ids import new_id, now
from phinetune.serving.page.forms import Answer, Deleted, Message, Vote, VoteAsked, VoteFile, Votes
from phinetune.serving.pages import page
from phinetune.serving.state import ServerState
from phinetune.serving.store import Row

MOST_VOTES = 20_000
FILE_NAME = "votes.jsonl"


def show_vote(row: Row) -> Vote:
    """A vote as the endpoints show it."""
    return Vote(
        id=row["id"],
        created_at=row["created_at"],
        messages=[Message(**one) for one in json.loads(row["messages"])],
        preferred=Answer(model=row["preferred_model"], content=row["preferred"]),
        other=Answer(model=row["other_model"], content=row["other"]),
        equal=bool(row["equal"]),
    )


def preference_lines(state: ServerState) -> Iterator[str]:
    """The votes that prefer an answer, as lines of OpenAI's form of preferences, oldest first."""
    for row in state.store.rows("SELECT * FROM votes WHERE NOT equal ORDER BY seq"):
        tree = {
            "input": {"messages": json.loads(row["messages"])},
            "preferred_output": [{"role": "assistant", "content": row["preferred"]}],
            "non_preferred_output": [{"role": "assistant", "content": row["other"]}],
        }
        yield json.dumps(tree, ensure_ascii=False) + "\n"


def count_votes(state: ServerState) -> tuple[int, int]:
    """How many votes prefer an answer, and how many say that both are alike."""
    row = state.store.row("SELECT count(*) AS many, coalesce(sum(equal), 0) AS equal FROM votes") or {}
    return row["many"] - row["equal"], row["equal"]


def router(state: ServerState) -> APIRouter:
    """Vote, list votes, delete them, and make a file of them."""
    made = APIRouter(prefix="/phinetune/votes", tags=["votes"])

    @made.post("")
    def vote(asked: VoteAsked) -> Vote:
        """Keep which of two answers to a conversation is preferred."""
        if sum(count_votes(state)) >= MOST_VOTES:
            raise ApiError(400, f"This server holds {MOST_VOTES:,} votes, its limit; delete some.", code="too_many")
        row = {
            "id": new_id("vote"),
            "created_at": now(),
            "messages": json.dumps([one.model_dump() for one in asked.messages], ensure_ascii=False),
            "preferred_model": asked.preferred.model,
            "preferred": asked.preferred.content,
            "other_model": asked.other.model,
            "other": asked.other.content,
            "equal": int(asked.equal),
        }
        state.store.insert("votes", row)
        return show_vote(row)

    @made.get("")
    def list_votes(
        after: Annotated[str | None, Query(max_length=128)] = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
    ) -> Votes:
        return Votes(**page(state.store, "votes", _shown, after=after, limit=limit))

    @made.get("/rows", response_class=PlainTextResponse)
    def vote_rows() -> PlainTextResponse:
        """The votes as a preference file, to download."""
        text = "".join(preference_lines(state))
        headers = {"Content-Disposition": f'attachment; filename="{FILE_NAME}"'}
        return PlainTextResponse(text, media_type="application/jsonl; charset=utf-8", headers=headers)

    @made.post("/file")
    def make_file() -> VoteFile:
        """Keep the votes as a file of the API, which a job of the method `dpo` takes."""
        rows, equal = count_votes(state)
        if not rows:
            raise ApiError(400, "No vote prefers an answer yet.", code="no_votes")
        kept = keep_lines(state, preference_lines(state), FILE_NAME)
        return VoteFile(file=kept["id"], rows=kept["rows"], equal=equal)

    @made.delete("")
    def delete_votes() -> Deleted:
        """Delete all votes. Files that were made of them stay."""
        state.store.write("DELETE FROM votes")
        return Deleted(id="all", object="vote")

    @made.delete("/{vote_id}")
    def delete_vote(vote_id: str) -> Deleted:
        if not state.store.write("DELETE FROM votes WHERE id = ?", [vote_id]):
            raise ApiError(404, f"No such vote: {vote_id}", param="vote_id")
        return Deleted(id=vote_id, object="vote")

    return made


def _shown(row: Row) -> dict[str, Any]:
    return show_vote(row).model_dump()
