"""Gives the base of a model with an adapter, exactly as it was before the adapter came."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel

from phinetune.checkpoints.load import Loaded, load_base
from phinetune.config.model import ModelSection
from phinetune.engine.choice import has_packed_form
from phinetune.engine.peft_variants import moves_the_base
from phinetune.errors import ModelError

logger = logging.getLogger(__name__)


@contextmanager
def untouched_base(model: Any, loaded: Loaded, section: ModelSection) -> Iterator[Any]:
    """The base to answer and score with, while the context lasts.

    It is the model itself with its adapter switched off. Some adapters change the base (PiSSA, OLoRA, KaSA, layers that
    stand twice); then switching them off does not give the base back, and it is loaded once more.

    Args:
        model: with an adapter, or without one.
        loaded: what the model was made of.
        section: where the base came from.

    Raises:
        ModelError: the base has to be loaded again and is not there, or is not the same any more.
    """
    again = base_again(model, loaded, section)
    if again is not None:
        yield again
    elif isinstance(model, PeftModel):
        with model.disable_adapter():
            yield model
    else:
        yield model


def base_again(model: Any, loaded: Loaded, section: ModelSection) -> Any | None:
    """The base, loaded once more, if the model's adapter has changed it; None if switching it off gives the base back.

    Args, Raises:
        See `untouched_base`.
    """
    if not isinstance(model, PeftModel) or not moves_the_base(vars(model.peft_config[model.active_adapter])):
        return None
    logger.info("the adapter changed its base, so the base is loaded once more")
    again = load_base(section.model_copy(update={"revision": loaded.base.revision}), fast=has_packed_form(loaded.model))
    if again.base.fingerprint != loaded.base.fingerprint:
        raise ModelError(f"{loaded.base.path}: the base has changed since it was loaded, so it can't be used")
    return again.model
