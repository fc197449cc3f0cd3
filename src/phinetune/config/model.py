"""The section `model`: which checkpoint is used, and how it is held in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from phinetune.config.model_keywords import translate_keywords
from phinetune.config.section import Section


class ModelSection(Section):
    """Which checkpoint is used, and how it is held in memory."""

    path: str = Field("starter", description="hub id, folder, `starter`, or `random:SHAPE` for random weights")
    adapter: str | None = Field(
        None,
        description="run or adapter folder that training goes on from; the base is its own unless `path` is given",
    )
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
        "needs phinetune[quant]; none: as the checkpoint has them",
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] = Field(
        "sdpa", description="attention of transformers' own model"
    )
    use_cache: bool = Field(True, description="key-value cache when generating (training never uses it)")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps; auto for several processes")
    seed: int = Field(0, description="seed of the weights of a `random:` model")

    @model_validator(mode="before")
    @classmethod
    def _old_names(cls, value: Any) -> Any:
        """Accept the keywords that scripts give to `from_pretrained`; see `phinetune.config.model_keywords`."""
        return translate_keywords(value) if isinstance(value, Mapping) else value
