"""Keywords of transformers' and Unsloth's `from_pretrained` in the section `model`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig

from phinetune.config.run import RunConfig, make_config
from phinetune.errors import ConfigError


def config_of(model: dict[str, Any], **training: Any) -> RunConfig:
    return make_config({"model": model, "training_config": training})


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ({"model_name": "me/base"}, {"path": "me/base"}),
        ({"pretrained_model_name_or_path": "me/base", "path": "me/base"}, {"path": "me/base"}),
        ({"dtype": None}, {}),
        ({"torch_dtype": torch.float16}, {"dtype": "float16"}),
        ({"load_in_4bit": True}, {"quantization": "nf4"}),
        ({"load_in_4bit": False, "load_in_8bit": True}, {"quantization": "int8"}),
        ({"load_in_4bit": True, "quantization": "nf4"}, {"quantization": "nf4"}),
        ({"load_in_4bit": True, "quantization": "none"}, {"quantization": "nf4"}),
        ({"torch_dtype": "bfloat16", "dtype": "auto"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": torch.bfloat16, "dtype": "bf16"}, {"dtype": "bfloat16"}),
        ({"device": "auto", "device_map": "cuda"}, {"device": "cuda"}),
        ({"quantization_config": {"load_in_8bit": True}}, {"quantization": "int8"}),
        (
            {"quantization_config": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}},
            {"quantization": "nf4", "dtype": "bfloat16"},
        ),
        (
            {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)},
            {"quantization": "nf4", "dtype": "bfloat16"},
        ),
        ({"quantization_config": None, "device_map": None, "token": None, "full_finetuning": False}, {}),
        ({"device_map": "auto", "low_cpu_mem_usage": True, "use_safetensors": True}, {}),
        ({"device_map": "cpu"}, {"device": "cpu"}),
        ({"device_map": {"": 1}}, {"device": "cuda:1"}),
        ({"use_flash_attention_2": True}, {"attn_implementation": "flash_attention_2"}),
        ({"use_flash_attention_2": False}, {}),
    ],
)
def test_a_keyword_is_taken_in_our_words(given: dict[str, Any], changed: dict[str, Any]) -> None:
    assert config_of(given).model.model_dump() == {**RunConfig().model.model_dump(), **changed}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"full_finetuning": True}, "`full_finetuning` is not used here: a run trains an adapter"),
        ({"load_in_fp8": True}, "take quantization: nf4 or int8"),
        ({"use_safetensors": False}, "weights are read from safetensors files only"),
        ({"local_files_only": True}, "HF_HUB_OFFLINE=1"),
        ({"rope_scaling": {"type": "linear"}}, "write it into the checkpoint's config.json"),
        ({"token": "hf_secret"}, "set the environment variable HF_TOKEN"),
        ({"model_name": "a/b", "path": "c/d"}, "don't go together; keep `path`"),
        ({"load_in_8bit": True, "quantization": "nf4"}, "don't go together; keep `quantization`"),
        ({"device_map": {"model.layers.0": 0, "lm_head": "cpu"}}, "`device_map` is not used here"),
        ({"quantization_config": {"bits": 4}}, "it should have `load_in_4bit: true` or `load_in_8bit: true`"),
        ({"load_in_4bits": True}, "there is no key `load_in_4bits`"),
    ],
)
def test_what_can_not_be_had_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(given)
    assert words in str(caught.value)
    assert "hf_secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"fast_inference": True}, "model.fast_inference has no effect: answers come from"),
        ({"gpu_memory_utilization": 0.6}, "model.gpu_memory_utilization has no effect"),
        ({"device_map": "sequential"}, "model.device_map has no effect"),
        ({"load_in_4bit": True}, "model.load_in_4bit is taken as model.quantization: nf4"),
        ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}}, "`bnb_4bit_quant_type: fp4`"),
        ({"quantization_config": {"load_in_8bit": True, "llm_int8_threshold": 3.0}}, "`llm_int8_threshold: 3.0`"),
        (
            {"dtype": "float32", "quantization_config": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}},
            "products are computed in model.dtype, not in bfloat16",
        ),
    ],
)
def test_what_has_no_effect_is_named(caplog: pytest.LogCaptureFixture, given: dict[str, Any], words: str) -> None:
    config_of(given)
    assert words in caplog.text


def test_one_dtype_in_two_spellings_is_no_difference(caplog: pytest.LogCaptureFixture) -> None:
    four_bits = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}
    assert config_of({"dtype": "bf16", "quantization_config": four_bits}).model.dtype == "bfloat16"
    assert "products are computed" not in caplog.text


def test_settings_of_the_training_go_there(caplog: pytest.LogCaptureFixture) -> None:
    unsloth = {"max_seq_length": 512, "random_state": 3407, "use_gradient_checkpointing": "unsloth"}
    training = config_of(unsloth).training_config
    assert training == {"max_length": 512, "seed": 3407, "gradient_checkpointing": True}
    assert "model.max_seq_length is taken as training_config.max_length" in caplog.text


@pytest.mark.parametrize("key", ["max_length", "max_seq_length"])
def test_what_the_training_says_itself_is_kept(caplog: pytest.LogCaptureFixture, key: str) -> None:
    assert config_of({"max_seq_length": 512}, **{key: 256}).training_config == {key: 256}
    assert f"model.max_seq_length has no effect: training_config.{key} says it" in caplog.text


@pytest.mark.parametrize(
    ("training", "data", "loss_on", "words"),
    [
        ({"assistant_only_loss": True}, {}, "assistant", "taken as data.loss_on: assistant"),
        ({"assistant_only_loss": False}, {}, "assistant", "data.loss_on: all trains on every token"),
        ({"completion_only_loss": True}, {}, "assistant", "taken as data.loss_on: assistant"),
        ({"completion_only_loss": False}, {}, "all", "taken as data.loss_on: all"),
        ({"completion_only_loss": False, "assistant_only_loss": False}, {}, "all", "taken as data.loss_on: all"),
        ({"completion_only_loss": "false"}, {}, "all", "taken as data.loss_on: all"),
        ({"completion_only_loss": False, "assistant_only_loss": True}, {}, "assistant", "taken as data.loss_on: assis"),
        ({"completion_only_loss": False}, {"loss_on": "last"}, "last", "no effect, data.loss_on: last says"),
        ({"assistant_only_loss": True}, {"loss_on": "last"}, "last", "no effect, data.loss_on: last says"),
        ({"assistant_only_loss": None}, {}, "assistant", ""),
    ],
)
def test_trls_switches_of_the_loss_are_taken_with_a_line_each(
    caplog: pytest.LogCaptureFixture, training: dict[str, Any], data: dict[str, Any], loss_on: str, words: str
) -> None:
    config = make_config({"training_config": training, "data": data})
    assert (config.data.loss_on, config.training_config) == (loss_on, {})
    assert words in caplog.text
    assert len(caplog.records) == sum(value is not None for value in training.values())


def test_switches_of_the_loss_that_contradict_are_refused() -> None:
    both = {"training_config": {"assistant_only_loss": True}, "data": {"loss_on": "all"}}
    with pytest.raises(ConfigError, match=r"assistant_only_loss is true, and data\.loss_on is all; keep one"):
        make_config(both)
    with pytest.raises(ConfigError, match=r"completion_only_loss: it should be true or false \(given: 'perhaps'\)"):
        make_config({"training_config": {"completion_only_loss": "perhaps"}})


def test_keywords_of_trls_model_go_to_the_model(caplog: pytest.LogCaptureFixture) -> None:
    keywords = {"torch_dtype": torch.float32, "attn_implementation": "eager", "device_map": "cpu"}
    config = make_config({"model": "here", "training_config": {"model_init_kwargs": keywords}})
    assert (config.model.path, config.model.dtype, config.model.device) == ("here", "float32", "cpu")
    assert (config.model.attn_implementation, config.training_config) == ("eager", {})
    assert "training_config.model_init_kwargs: attn_implementation is taken as model.attn_impl" in caplog.text


def test_what_the_model_says_itself_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    given = {"model": {"dtype": "float32"}, "training_config": {"model_init_kwargs": {"torch_dtype": "bfloat16"}}}
    assert make_config(given).model.dtype == "float32"
    assert "model_init_kwargs: torch_dtype has no effect: model.dtype says it" in caplog.text
    with pytest.raises(ConfigError, match="model_init_kwargs: it should be a dictionary"):
        make_config({"training_config": {"model_init_kwargs": "bf16"}})


def test_an_object_that_is_long_to_print_is_not_printed_whole() -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({"model": {"path": torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(9)])}})
    assert str(caught.value).endswith("…, a Sequential)")
    assert len(str(caught.value)) < 300
