"""What a person sees: one line for what is wrong, colours where wanted, and what --quiet leaves."""

import io
import sys
from argparse import Namespace

import numpy as np
import pytest

import benchmark.__main__
import training.__main__
from cluster.command import main as cluster_main
from inference import progress, startup
from inference.case import Case
from inference.command import main
from inference.phases import PhaseTimer
from inference.records.manifest import Records
from inference.terminal import log
from tests.conftest import save_nifti


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "environment", "line", "coloured"),
    [
        (Terminal, {}, "warning: a", True),
        (Terminal, {}, "error: a", False),
        (Terminal, {"NO_COLOR": "1"}, "warning: a", False),
        (Terminal, {"NO_COLOR": ""}, "warning: a", True),  # no-color.org: empty is as if not set
        (Terminal, {"TERM": "dumb"}, "warning: a", False),
        (io.StringIO, {}, "warning: a", False),
    ],
)
def test_warnings_are_yellow_on_a_terminal(monkeypatch, stream, environment, line, coloured):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    log(line, to=(to := stream()))
    assert to.getvalue() == (f"\033[33m{line}\033[0m\n" if coloured else f"{line}\n")


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (main, "--input MISSING --output OUT"),
        (main, "--input CTS --output FILE/x"),
        (main, "--input CTS --output OUT --weights MISSING"),
        (main, "--input CTS --output OUT --no-such-option"),
        (cluster_main, "--input MISSING --output OUT"),
        (cluster_main, "--input CTS --output OUT --workers 0"),
        (benchmark.__main__.main, "accuracy --reference MISSING --prediction CTS --report OUT"),
        (benchmark.__main__.main, "accuracy --reference CTS --prediction CTS --report FILE/x"),
        (benchmark.__main__.main, "plain-pipeline --input MISSING --output OUT --weights FILE"),
        (benchmark.__main__.main, "demo --output FILE/x"),
        (benchmark.__main__.main, "rank"),
        (training.__main__.main, "fit --data MISSING --output OUT"),
        (training.__main__.main, "check"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path, capfd, monkeypatch, command, arguments):
    (tmp_path / "FILE").touch()
    (tmp_path / "CTS").mkdir()
    (tmp_path / "CTS" / "a_0000.nii.gz").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        sys.exit(startup.run(lambda: lambda: command(arguments.split())))
    out, err = capfd.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)


def test_quiet_is_silent_but_for_errors(folders, run, capfd):
    inputs, outputs = folders
    outputs.mkdir()
    (outputs / "a.nii.gz").write_bytes(b"")  # a warning: it is made again
    save_nifti(inputs / "a_0000.nii.gz", np.full((32, 32, 4), 3000, np.int16))  # flagged: not HU
    (inputs / "b_0000.nii.gz").write_bytes(b"no volume")
    assert run("--quiet", "--keep-existing") == 1
    out, err = capfd.readouterr()
    assert (out, err.count("\n"), err[:6]) == ("", 1, "error:")


def case_of(name, slices):
    case = Case(source=name, name=name)
    case.volume = type("Volume", (), {"voxels": np.zeros((slices, 1, 1))})
    return case


def test_a_long_case_reports_within_it(monkeypatch, capfd):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    for quiet, lines in ((False, 2), (True, 0)):
        records = Records(Namespace(statistics=None, manifest=None), PhaseTimer(), None)
        report = progress.Progress(2, records, quiet=quiet)
        for case in (case_of("a", 100), case_of("b", 100)):
            for _ in range(100):
                now[0] += 0.5  # 50 s a case, 30 s from its first slice to a line
                report.on_slices(case, 1, 100)
        assert capfd.readouterr().err.count("\n") == lines


def test_the_closing_table_is_aligned():
    cases = [case_of("a", 1), case_of("肝臓", 1), case_of("e\u0301e", 1)]
    timer = PhaseTimer()
    for case, seconds in zip(cases, (1.5, 100.25, 22.0), strict=True):
        case.shape, case.status = (512, 512, int(seconds)), "done"
        timer.record(case.name, dict.fromkeys(("read", "percentiles", "predict"), seconds))
    lines = progress.closing_table(cases, timer).splitlines()
    shown = {"肝臓": "xxxx", "e\u0301e": "xx"}  # columns on a terminal
    for name, width in shown.items():
        lines = [line.replace(name, width) for line in lines]
    assert len({len(line) for line in lines[1:]}) == 1
    ends = [line.index("100.25") + 6 for line in lines if "100.25" in line]
    assert [line.index("22.00") + 5 for line in lines if "22.00" in line] == ends
