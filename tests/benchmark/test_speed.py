"""The speed comparison: its arithmetic on known numbers, and one real run of it."""

import re
from argparse import ArgumentParser

import pytest

from benchmark.options import UsageError
from benchmark.speed import speed


@pytest.mark.parametrize("device", ["CPU", "A Card"])
def test_tables(device):
    plain = {"wall": 20, "start": 2, "read": 4, "percentiles": 2, "predict": 8}
    service = {"wall": 4, "start": 2, "read": 1, "percentiles": 0.5, "predict": 2}
    page = speed.markdown(
        {
            "volume": [512, 512, 7],
            "weights": "w.safetensors",
            "repeat": 3,
            "seconds": {
                "plain": {**plain, "components": 3, "write": 1},
                "service": {**service, "components": 0.25, "write": 0.25},
            },
            "label_agreement": 0.99995,
            "network": {
                "device": device,
                "threads": 2,
                "matrix": [256, 256],
                "steps": [["plain", 80.0], ["half", 20.0]],
            },
            "machine": {"cpu": "a CPU", "cores": 2, "memory_gb": 4, "date": "today"},
        }
    )
    assert "| reading | 4.00 | 1.00 | 4.0 |" in page
    assert "| all but start and network | 10.00 | 2.00 | 5.0 |" in page
    assert "| **whole process** | 20.00 | 4.00 | 5.0 |" in page
    assert "| half | 20.0 | 4.00 |" in page
    assert "99.9950 %" in page
    assert ("TF32" in page) == (device == "A Card")  # of which the plain convolutions make use


def arguments(*words):
    parser = ArgumentParser()
    speed.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.slow
def test_a_real_run(tmp_path, capsys):
    words = ("--slices", "6", "--size", "64", "--repeat", "1", "--device", "cpu")
    assert speed.run(arguments(*words, "--report", str(tmp_path))) == 0
    page = (tmp_path / "speed.md").read_text()
    assert page in capsys.readouterr().out
    for name in ("reading", "normalising", "network", "components", "writing"):
        times = re.search(rf"^\| {name} \| ([\d.]+) \| ([\d.]+) \|", page, re.MULTILINE)
        assert times, name
    agreement = float(re.search(r"agree in ([\d.]+) %", page)[1])
    assert agreement > 98


@pytest.mark.parametrize("option", ["--input", "--weights"])
def test_a_file_that_is_not_there(option):
    with pytest.raises(UsageError):
        speed.run(arguments(option, "nowhere"))
