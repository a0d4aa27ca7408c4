"""Which precision the network runs in."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inference.device import choose_dtype

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("flags", "capability", "expected"),
    [
        ("fpu avx2 avx512f avx512_vnni", "AVX512", torch.float32),
        ("fpu avx512f avx512_bf16 clflush", "AVX512", torch.bfloat16),
        ("fpu avx512f avx512_bf16 clflush", "AVX2", torch.float32),
        ("fpu amx_bf16 amx_tile", "AVX512", torch.bfloat16),
        ("fpu amx_tile amx_int8", "AVX512", torch.float32),
    ],
)
def test_processors_with_instructions_for_bfloat16_use_it(monkeypatch, flags, capability, expected):
    cpuinfo = f"flags\t\t: {flags}\nbugs\t\t:\n"
    monkeypatch.setattr(Path, "read_text", lambda path, **how: cpuinfo)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert choose_dtype(torch.device("cpu")) == expected


@pytest.mark.slow
def test_the_environment_holds_a_processor_to_fp32():
    program = "import torch; from inference.device import choose_dtype; print(choose_dtype("
    command = [sys.executable, "-c", program + "torch.device('cpu')))"]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    shown = subprocess.check_output(command, cwd=ROOT, env=environment, text=True)
    assert shown.strip() == "torch.float32"


def test_cuda_devices_compute_in_fp16():
    assert choose_dtype(torch.device("cuda:0")) == torch.float16
