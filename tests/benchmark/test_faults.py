"""Faults around a run: bad inputs, full disks, lost terminals, damaged run folders, odd names."""

import errno
import json
import os
import re
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from harness import ROOT, make_inputs, read_case, read_table, run_efficiency, save
from test_report import write_run

from benchmark.__main__ import main
from benchmark.containers import efficiency

COPY = 'cp {inputs}/* {outputs}/"$(basename {inputs}/* _0000.nii.gz)".nii.gz'


def arguments(folder, *names, command=COPY):
    return (
        *("--inputs", make_inputs(folder / "in", *names), "--outputs", folder / "out"),
        *("--report", folder / "run", "--command", command),
    )


@pytest.mark.slow
def test_an_input_that_is_no_ct_costs_itself(tmp_path):
    options = arguments(tmp_path, "good")
    (tmp_path / "in/text_0000.nii.gz").write_text("nothing")
    whole = (tmp_path / "in/good_0000.nii.gz").read_bytes()
    (tmp_path / "in/bits_0000.nii.gz").write_bytes(whole[:20] + bytes(20) + whole[40:])
    done = run_efficiency(*options)
    assert done.returncode == 1
    assert set(read_table(tmp_path / "run")) == {"good_0000.nii.gz"}
    said = [line for line in done.stderr.splitlines() if "not measured" in line]
    assert [line.split(":")[0] for line in said[-2:]] == ["bits_0000.nii.gz", "text_0000.nii.gz"]


def test_a_report_that_is_a_file_is_one_line(tmp_path):
    options = arguments(tmp_path, "a")
    (tmp_path / "run").write_text("a file")
    done = run_efficiency(*options)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("benchmark efficiency: [Errno")


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_finished_cases_stay(tmp_path):
    write_json, written = efficiency.write_json, []

    def full_from_the_second_case(path, content):
        written.append(path.name)
        if path.name == "b.json":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_json(path, content)

    with mock.patch.object(efficiency, "write_json", full_from_the_second_case):
        done = run_efficiency(*arguments(tmp_path, "a", "b"))
    assert written[-1] == "b.json"
    assert done.returncode == 2
    assert "No space left on device" in done.stderr.splitlines()[-1]
    assert read_case(tmp_path / "run", "a")["status"] == "ok"
    assert (tmp_path / "out/a.nii.gz").exists()


@pytest.mark.slow
def test_a_lost_terminal_costs_no_case(tmp_path):
    options = [str(word) for word in arguments(tmp_path, "a", "b")]
    read_end, write_end = os.pipe()
    os.close(read_end)
    harness = [sys.executable, "-m", "benchmark", "efficiency", *options]
    ended = subprocess.run(harness, cwd=ROOT, stdout=write_end, stderr=write_end)
    os.close(write_end)
    assert ended.returncode == 0
    assert len(read_table(tmp_path / "run")) == 2


@pytest.mark.slow
def test_a_name_is_text_in_the_table(tmp_path):
    name = "a|b<img src=x>`c`"
    done = run_efficiency(*arguments(tmp_path, name))
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "run/efficiency.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith("| a")]
    assert "<img" not in page
    assert r"a\|b&lt;img src=x&gt;\`c\`" in row
    assert len(re.findall(r"(?<!\\)\|", row)) == len(re.findall(r"\|", page.splitlines()[3]))


def measured(tmp_path, name="team"):
    folder = tmp_path / name
    write_run(folder, name, {"a": 30, "b": 40})
    return folder


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "efficiency/a.json").write_text("{"),
        lambda folder: (folder / "efficiency/a.json").write_text("[1]"),
        lambda folder: (folder / "efficiency/a.json").write_text('{"case": 7}'),
        lambda folder: (folder / "efficiency/a.json").write_text('{"case": "a", "samples": 7}'),
        lambda folder: (folder / "efficiency/a.json").write_text(
            (folder / "efficiency/a.json").read_text().replace('"time_s": [0.0', '"time_s": [NaN')
        ),
        lambda folder: (folder / "environment.json").write_text("[]"),
        lambda folder: (folder / "team_Efficiency.csv").write_bytes(b"Name,Time\na,\xff\xfe"),
        lambda folder: (folder / "team_Efficiency.csv").write_text("Name,Time\na,fast\n"),
        lambda folder: (folder / "team_Efficiency.csv").write_text("Case,Time\na,1\n"),
        lambda folder: (folder / "accuracy_per_case.csv").write_text("Name,Liver_DSC\na,1,2,3\n"),
    ],
)
def test_a_damaged_run_folder_is_one_line(tmp_path, damage, capsys):
    other, folder = measured(tmp_path, "other"), measured(tmp_path)
    damage(folder)
    both = [str(other), str(folder)]
    for command in (
        ["report", *both, "--output", str(tmp_path / "page.html")],
        ["rank", *both, "--report", str(tmp_path / "rank")],
        ["compare", *both],
    ):
        assert main(command) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1
        assert str(folder) in said[0]


def test_a_number_that_is_none_leaves_the_page_whole(tmp_path):
    folder = measured(tmp_path)
    table = folder / "accuracy_per_case.csv"
    header, row, *rest = table.read_text().splitlines()
    words = row.split(",")
    words[1:3] = ["nan", "inf"]
    table.write_text("\n".join([header, ",".join(words), *rest]))
    page = tmp_path / "page.html"
    assert main(["report", str(folder), "--output", str(page)]) == 0
    (data,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', page.read_text()
    )

    def refuse(name):
        raise AssertionError(f"{name} is no JSON, and blanks the page")

    assert json.loads(data, parse_constant=refuse)["rows"]


def test_names_are_text_in_every_page(tmp_path, capsys):
    evil = "x<img src=y>|`z`"
    folders = [measured(tmp_path, name) for name in (evil, "other")]
    write_run(tmp_path / "more", "more", {evil: 30, "b": 40})
    assert main(["compare", str(folders[0]), str(folders[1])]) == 0
    assert main(["compare", str(folders[0]), str(tmp_path / "more")]) == 0
    assert main(["rank", *map(str, folders), "--report", str(tmp_path / "rank")]) == 0
    pages = capsys.readouterr().out + (tmp_path / "rank/ranking.md").read_text()
    assert "<img" not in pages
    assert r"x&lt;img src=y&gt;\|\`z\`" in pages


@pytest.mark.slow
def test_what_a_label_map_is_called_is_text_in_its_remarks(tmp_path):
    for name in ("a.nii.gz", "<img src=y>.nii.gz"):
        save(tmp_path / "truth" / name, np.ones((4, 4, 4), np.uint8))
    save(tmp_path / "out/a.nii.gz", np.ones((4, 4, 4), np.uint8))
    command = ["--reference", tmp_path / "truth", "--prediction", tmp_path / "out"]
    command += ["--report", tmp_path / "report", "--workers", "1"]
    assert main(["accuracy", *map(str, command)]) == 1
    page = (tmp_path / "report/accuracy.md").read_text()
    assert "- &lt;img src=y&gt;.nii.gz: **failed**" in page
