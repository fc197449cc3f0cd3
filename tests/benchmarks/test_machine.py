"""A benchmark names the instruction set that its products used."""

from __future__ import annotations

import os

import pytest
import torch
from benchmarks.machine import LADDER, instruction_set, machine, named, slug

HASWELL = "fma avx2"
SKYLAKE = f"{HASWELL} avx512f avx512bw avx512vl avx512dq"
ZEN4 = f"{SKYLAKE} avx512_bf16"
SAPPHIRE = f"{ZEN4} amx_tile amx_bf16 amx_int8"


@pytest.mark.parametrize(
    ("flags", "capability", "limit", "name"),
    [
        ("", "DEFAULT", "", "DEFAULT"),
        (HASWELL, "AVX2", "", "AVX2"),
        (SKYLAKE, "AVX512", "", "AVX512"),
        (ZEN4, "AVX512", "", "AVX512-BF16"),
        (SAPPHIRE, "AVX512", "", "AMX"),
        # What a user limits is not used, whatever the processor has.
        (SAPPHIRE, "AVX2", "", "AVX2"),
        (SAPPHIRE, "AVX512", "AVX512_CORE_BF16", "AVX512-BF16"),
        (SAPPHIRE, "AVX512", "avx512_core", "AVX512"),
        (SAPPHIRE, "AVX512", "AVX2_VNNI", "AVX2"),
        (SAPPHIRE, "AVX512", "SSE41", "DEFAULT"),
        (SAPPHIRE, "AVX512", "AVX512_CORE_AMX", "AMX"),
        (SAPPHIRE, "AVX512", "ALL", "AMX"),
    ],
)
def test_the_strongest_set_that_is_used_has_the_name(flags: str, capability: str, limit: str, name: str) -> None:
    assert named(flags.split(), capability, {"ONEDNN_MAX_CPU_ISA": limit} if limit else {}) == name


def test_this_machine_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    about = machine("bfloat16")
    assert about["instructions"] in LADDER[:2] or os.uname().machine != "x86_64"
    assert about["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert about["versions"]["torch"] == torch.__version__
    assert about["memory_gb"] > 0
    assert instruction_set(torch.device("cpu")) == about["instructions"]


def test_a_file_has_the_name_in_plain_letters() -> None:
    assert slug("AVX512-BF16") == "avx512-bf16"
    assert slug("NVIDIA H100 80GB HBM3 (PCIe)") == "nvidia-h100-80gb-hbm3-pcie"
