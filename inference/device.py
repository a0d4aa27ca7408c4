"""Which device the network runs on, and in which precision there."""

import os
from pathlib import Path

import torch

from .cuda import runtime as cuda
from .memory import cpu_limit

_BFLOAT16_FLAGS = {"amx_bf16", "avx512_bf16"}  # as the kernel names them


def choose_device(requested: str) -> torch.device:
    """Return the device to run on: `auto` is the first CUDA device if there is one, else the CPU.

    One of CUDA always has its index, which half of torch's functions insist on.

    Raises:
        ValueError: a CUDA device was asked for that is not there.
    """
    if requested == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(requested)
    if device.type == "cpu":
        return device
    device, count = torch.device("cuda", device.index or 0), torch.cuda.device_count()
    if device.index >= count:
        reason = f": {cuda.why_no_device()}" if count == 0 else ""
        raise ValueError(f"no CUDA device {requested}: torch sees {count}{reason}")
    return device


def choose_dtype(device: torch.device) -> torch.dtype:
    """Return the precision that is fastest on a device.

    fp16 on CUDA. On a CPU bfloat16 if it has instructions for it that torch may use (it may not
    where `ATEN_CPU_CAPABILITY` holds it to AVX2), else fp32. The network's time in
    fp32 over that in bfloat16, measured: 2.2 at base_channels 8 and 3.8 at 64 on a Xeon with AMX,
    1.6 and 1.9 on an EPYC with AVX-512 BF16; with AVX-512 alone bfloat16 is slower.
    """
    if device.type == "cuda":
        return torch.float16
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return torch.float32
    cpuinfo = Path("/proc/cpuinfo")
    known = cpuinfo.read_text(encoding="utf-8").split() if cpuinfo.exists() else ()
    return torch.float32 if _BFLOAT16_FLAGS.isdisjoint(known) else torch.bfloat16


def thread_count() -> int:
    """Return how many threads to compute in: torch's number, at most `cpu_limit`.

    Where OMP_NUM_THREADS is set, torch has it from there, and that is what counts.
    """
    threads = torch.get_num_threads()
    return threads if os.environ.get("OMP_NUM_THREADS") else min(threads, cpu_limit())
