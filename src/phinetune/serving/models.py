"""`/v1/models`: what is on offer."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from phinetune.serving.catalogue import FINE_TUNED
from phinetune.serving.errors import ApiError
from phinetune.serving.state import ServerState


def no_model(model: str) -> ApiError:
    """The error for a model that is not on offer."""
    message = f"The model '{model}' does not exist or you do not have access to it."
    return ApiError(404, message, code="model_not_found", param="model")


def router(state: ServerState) -> APIRouter:
    """List, retrieve and delete models."""
    made = APIRouter(prefix="/v1/models", tags=["models"])

    @made.get("")
    def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model.to_dict() for model in state.models.names()]}

    @made.get("/{model}")
    def retrieve_model(model: str) -> dict[str, Any]:
        found = state.models.find(model)
        if found is None:
            raise no_model(model)
        return found.to_dict()

    @made.delete("/{model}")
    def delete_model(model: str) -> dict[str, Any]:
        """Offer a tuned model no longer. Its run stays on the disk."""
        if model in state.models.base_names:
            raise ApiError(403, f"'{model}' is a base model; it is on offer as long as the server is started with it.")
        if not model.startswith(FINE_TUNED) or not state.models.delete(model):
            raise no_model(model)
        return {"id": model, "object": "model", "deleted": True}

    return made
