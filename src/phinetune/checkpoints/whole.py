"""Makes sure that a checkpoint is whole: its files hold the tensors of its config.json, no fewer and no others.

transformers fills what is missing with random numbers and leaves out what it does not know. Here both are refused,
before a weight is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from phinetune.checkpoints.packed_weights import packed_weights, unpacked_view
from phinetune.checkpoints.prequantized import check_packed, own_form
from phinetune.checkpoints.target_modules import linear_layers
from phinetune.checkpoints.weight_files import HeldTensor, held_tensors, unreadable_dtypes
from phinetune.engine.families import ModelConfig, plain_model
from phinetune.errors import ModelError, at_most, told_as

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
HARMLESS = re.compile(r"(^|\.)rotary_emb\.\w+$")  # tables that older versions saved; they are computed anew
SHOWN = 8  # tensors of each kind that an error names
REMEDY = "fetch the checkpoint again, or write it again with save_pretrained of the whole …ForCausalLM"
NUMBERS_REMEDY = (
    "the files are damaged, the training that wrote them diverged, or model.dtype: float16 is too narrow for them"
)

# Other forms of the same model: what their tensors are called, and what to do.
OTHER_FORMS = (
    (
        r"^model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|gate|up)_proj\.weight$",
        "q_proj, k_proj, v_proj, gate_proj and up_proj stand by themselves: the weights are in Llama's or Mistral's "
        "form, and config.json says phi3; take the config.json that belongs to them (model_type llama or mistral)",
    ),
    (
        r"^model\.layers\.\d+\.(self_attn|mlp)\.(qkv|gate_up)_proj\.weight$",
        "q, k, v are one layer (qkv_proj), and gate, up are one (gate_up_proj): the weights are in Phi-3's own form; "
        "take the config.json that belongs to them (model_type phi3)",
    ),
    (
        r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\b",
        "LoRA tensors lie among the weights: an adapter was saved together with its base; merge it (PEFT's "
        "merge_and_unload) and save the model again, or give the adapter's own folder",
    ),
    (
        r"\.base_layer\.",
        "the layers are PEFT's (base_layer): call merge_and_unload() of the PEFT model and save what it returns",
    ),
    (
        r"\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\.\w+|SCB|weight_format)$",
        "the weights are quantised by bitsandbytes already, and config.json does not say so or the form is not nf4; "
        "take the config.json that belongs to them, or the 16-bit checkpoint and model.quantization: nf4 or int8",
    ),
    (
        r"\.(qweight|qzeros|g_idx|scales)$",
        "the weights are quantised already (GPTQ's or AWQ's form); give the 16-bit checkpoint",
    ),
    (
        r"\.(weight_scale|weight_scale_inv|input_scale|weight_packed)$",
        "the weights are quantised already (FP8, or another form with scales); give the 16-bit checkpoint",
    ),
)
# What puts a prefix in front of every name.
WRAPPERS = {
    "module.": "DistributedDataParallel",
    "_orig_mod.": "torch.compile",
    "base_model.model.": "PEFT",
    "base_model.": "a model with a value head",
    "language_model.": "a model of several modalities",
    "model.language_model.": "a model of several modalities",
}


def check_whole(folder: Path, config: ModelConfig) -> None:
    """Make sure that a checkpoint's files hold the tensors that its configuration describes.

    Of the files only the headers are read. The output head may be missing if it is tied to the embedding. Linear layers
    may be quantised already, if config.json says so and the form is one that is read.

    Raises:
        ModelError: the files are damaged, or tensors are missing, unknown, of another shape or quantised. The error
            names them, and the form of the model that they belong to if it is a known one.
    """
    held, wanted = _held_and_wanted(folder, config)
    tied = bool(config.tie_word_embeddings)
    missing = [name for name in wanted if name not in held and not (tied and _twin(name) in held)]
    unknown = [name for name in held if name not in wanted]
    unlike = [name for name in wanted if name in held and held[name].shape != wanted[name]]
    integers = unreadable_dtypes({name: held[name] for name in wanted if name in held})
    if not (missing or unknown or unlike or integers):
        return
    hints = [*_forms(held, wanted), *_sizes(held, wanted, config)]
    lists = (
        [f"missing: {name}" for name in missing],
        [f"unexpected: {name}" for name in unknown],
        [f"{n}: shape {held[n].shape} does not match the configuration's {wanted[n]}" for n in unlike],
        integers,
    )
    named = [line for problems in lists for line in at_most(problems, SHOWN)]
    raise ModelError(
        [f"{folder}: the weights don't fit its config.json:", *hints, *named, *([] if hints else [REMEDY])]
    )


def _held_and_wanted(folder: Path, config: ModelConfig) -> tuple[dict[str, HeldTensor], dict[str, tuple[int, ...]]]:
    """The tensors of the files, as if none were packed, and the shapes of those that the configuration describes."""
    form = own_form(config, str(folder / "config.json"))
    held = {name: tensor for name, tensor in held_tensors(folder).items() if not HARMLESS.search(name)}
    model = meta_model(str(folder / "config.json"), config)
    if form != "none":
        packed = packed_weights(held, str(folder))
        check_packed(packed, held, linear_layers(model), str(folder))
        held = unpacked_view(held, packed)
    return held, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_numbers(tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Make sure that weights are numbers. With a NaN among them a model trains on nothing and answers nothing.

    Args:
        tensors: names and tensors; those of whole numbers (quantised weights) are passed over.
        where: what the error calls the file or folder.

    Raises:
        ModelError: a tensor holds values that are NaN or infinite; the error names it.
    """
    problems = []
    for name, tensor in tensors:
        # A sum is the cheapest look. It may overflow where all values are finite, so each value is asked then.
        if not tensor.is_floating_point() or bool(tensor.detach().sum(dtype=torch.float32).isfinite()):
            continue
        bad = int((~tensor.detach().isfinite()).sum())
        if bad:
            problems.append(f"{name}: {bad:,} of {tensor.numel():,} values are not finite")
    if problems:
        lead = f"{where}: these weights hold values that are no numbers:"
        raise ModelError([lead, *at_most(problems, SHOWN), NUMBERS_REMEDY])


def meta_model(where: str, config: ModelConfig) -> PreTrainedModel:
    """The model of a configuration on torch's `meta` device: its layers and shapes, and no numbers.

    Args:
        where: what error messages call the configuration.

    Raises:
        ModelError: no model can be made of it.
    """
    with told_as(ModelError, f"{where}: no model can be made of it"), torch.device("meta"):
        model: PreTrainedModel = plain_model(config)
    return model


def _twin(name: str) -> str | None:
    """The other name of the embedding, or of the head that is tied to it."""
    return {EMBED: HEAD, HEAD: EMBED}.get(name)


def _forms(held: Mapping[str, HeldTensor], wanted: Mapping[str, object]) -> list[str]:
    """Which other form of the model the names belong to, in a sentence each."""
    strange = [name for name in held if name not in wanted]
    found = [words for sign, words in OTHER_FORMS if any(re.search(sign, name) for name in strange)]
    prefix = next((n.removesuffix(w) for w in wanted for n in strange if n.endswith(f".{w}")), None)
    if prefix:
        by = WRAPPERS.get(prefix, "another module")
        found.append(f"the names begin with `{prefix}`: the model was saved inside {by}; save the model itself")
    elif any(f"model.{name}" in wanted for name in strange):
        found.append(
            "the names lack `model.`: this is the decoder without its output head (…Model); save the …ForCausalLM"
        )
    return found


def _sizes(held: Mapping[str, HeldTensor], wanted: Mapping[str, tuple[int, ...]], config: ModelConfig) -> list[str]:
    """What the tensors say about sizes that config.json states otherwise."""
    said = []
    rows = {held[name].shape[:1] for name in (EMBED, HEAD) if name in held and held[name].shape != wanted[name]}
    for (count,) in sorted(size for size in rows if size not in ((), (config.vocab_size,))):
        said.append(
            f"the vocabulary has {count} rows here, and config.json says vocab_size: {config.vocab_size}; if tokens "
            f"were added or rows padded, set vocab_size to {count}"
        )
    numbers = [int(match[1]) for name in held if (match := re.search(r"(?:^|\.)layers\.(\d+)\.", name))]
    layers = max(numbers, default=-1) + 1
    if layers and layers != config.num_hidden_layers:
        said.append(
            f"the files hold {layers} layers, and config.json says num_hidden_layers: {config.num_hidden_layers}"
        )
    return said
