"""The section `model`: which checkpoint is used, and how it is held in memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from phinetune.config.section import Section

logger = logging.getLogger(__name__)


class ModelSection(Section):
    """Which checkpoint is used, and how it is held in memory."""

    path: str = Field("starter", description="hub id, folder, `starter`, or `random:SHAPE` for random weights")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id; resolved to a commit")
    tokenizer: str | None = Field(None, description="another folder or hub id to take the tokenizer from")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="weights' dtype; auto: bfloat16 where training_config.bf16 is set or the device multiplies it no "
        "more slowly than float32, else float32",
    )
    quantization: Literal["none", "nf4", "int8"] = Field(
        "none",
        description="hold the decoder's linear layers in 4 bits (nf4: QLoRA, double quantisation) or 8 bits (int8); "
        "needs phinetune[quant]",
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] = Field(
        "sdpa", description="attention of transformers' Phi-3"
    )
    use_cache: bool = Field(True, description="key-value cache when generating (training never uses it)")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps; auto for several processes")
    seed: int = Field(0, description="seed of the weights of a `random:` model")

    @model_validator(mode="before")
    @classmethod
    def _old_names(cls, value: Any) -> Any:
        """Accept the keywords that scripts give to `from_pretrained`.

        `torch_dtype` is the older name of `dtype`. torch's dtype objects are replaced by their names. If a keyword has
        no effect here, the log says so.
        """
        if not isinstance(value, Mapping):
            return value
        value = dict(value)
        if value.pop("trust_remote_code", False):
            logger.warning("model.trust_remote_code has no effect: only transformers' own classes are used")
        if value.get("device_map", "given") is None:
            del value["device_map"]  # the model card's sample gives None; the model goes to model.device
        if "torch_dtype" in value:
            value.setdefault("dtype", value.pop("torch_dtype"))
        if "dtype" in value:
            name = str(value["dtype"]).removeprefix("torch.")
            value["dtype"] = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}.get(name, name)
        return value
