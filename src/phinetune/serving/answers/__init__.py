"""The endpoints that answer: chat completions, completions, responses.

`answerers.py` has the models in memory; with `--backend llama.cpp` the package `llama_cpp` stands in its place.
`preparing.py` lets them load beside all other work. A request's body (`forms.py`) becomes token ids (`prompts.py`),
these are answered by the engine (`running.py`), and its tokens become text (`texts.py`) and events (`sse.py`). What a
client wants to find again is kept (`kept.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastapi import APIRouter

    from phinetune.serving.answers.answerer import Finder
    from phinetune.serving.state import ServerState


def router(state: ServerState, **engine: Any) -> APIRouter:
    """The endpoints of `/v1/chat/completions`, `/v1/completions` and `/v1/responses`.

    Args:
        state: offers the models; answers end when it closes.
        engine: more arguments of each `AnswerEngine`, such as `most_rows`.
    """
    from fastapi import APIRouter

    from phinetune.serving.answers import chat, completions, kept_routes, responses
    from phinetune.serving.answers.kept import KeptAnswers
    from phinetune.serving.answers.numbers import engine_numbers
    from phinetune.serving.answers.preparing import Preparing

    answerers = _answerers(state, engine)
    state.closing.append(answerers.close)
    state.gauges.append(lambda: engine_numbers(answerers.loads()))
    kept = KeptAnswers(state.store, state.settings.limits.answers)
    made = APIRouter(prefix="/v1", tags=["answers"])
    preparing = Preparing(answerers, state.settings.limits.loading)
    for part in (chat, responses):
        part.add_to(made, state, preparing, kept)
    completions.add_to(made, state, preparing)
    kept_routes.add_to(made, state, kept)
    return made


def _answerers(state: ServerState, engine: dict[str, Any]) -> Finder:
    """What answers, by the backend that the server was started with."""
    from phinetune.serving.answers.answerers import Answerers
    from phinetune.serving.answers.llama_cpp.answerers import LlamaAnswerers

    if state.settings.gguf:
        return LlamaAnswerers(state.models, state.folder, state.settings.gguf)
    return Answerers(state.models, state.settings.weights, **engine)
