"""Which precision the network runs in."""

from pathlib import Path

import pytest
import torch

from inference.device import choose_dtype


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu avx2 avx512f avx512_vnni", torch.float32),
        ("fpu avx512f avx512_bf16 clflush", torch.bfloat16),
        ("fpu amx_bf16 amx_tile", torch.bfloat16),
        ("fpu amx_tile amx_int8", torch.float32),
    ],
)
def test_processors_with_instructions_for_bfloat16_use_it(monkeypatch, flags, expected):
    monkeypatch.setattr(Path, "read_text", lambda path, **_: f"flags\t\t: {flags}\nbugs\t\t:\n")
    assert choose_dtype(torch.device("cpu")) == expected


def test_cuda_devices_compute_in_fp16():
    assert choose_dtype(torch.device("cuda:0")) == torch.float16
