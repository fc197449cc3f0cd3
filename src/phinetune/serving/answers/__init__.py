"""The endpoints that answer: chat completions, completions, responses.

`answerers.py` has the models in memory. A request's body (`forms.py`) becomes token ids (`prompts.py`), these are
answered by the engine (`running.py`), and its tokens become text (`texts.py`) and events (`sse.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import APIRouter

    from phinetune.serving.state import ServerState


def router(state: ServerState, **engine: Any) -> APIRouter:
    """The endpoints of `/v1/chat/completions`, `/v1/completions` and `/v1/responses`.

    Args:
        state: offers the models; answers end when it closes.
        engine: more arguments of each `AnswerEngine`, such as `most_rows`.
    """
    from fastapi import APIRouter

    from phinetune.serving.answers import chat, completions, responses
    from phinetune.serving.answers.answerers import Answerers

    answerers = Answerers(state.models, **engine)
    state.closing.append(answerers.close)
    made = APIRouter(prefix="/v1", tags=["answers"])
    for part in (chat, completions, responses):
        part.add_to(made, state, answerers)
    return made
