import csv
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from benchmark.__main__ import COMMANDS, main
from benchmark.judging.report import CURVE_BUCKETS, thin
from benchmark.scoring.protocol import COLUMNS

ROOT = Path(__file__).parents[2]
HEADER = "Name,Time,MaxGPU_Mem,AUC_GPU_Time,MaxCPU_Utilization,AUC_CPU_Time,MaxRAM,AUC_RAM_Time"
TRICKY = "<img src=x onerror=alert(1)> & </script><b>"


def write_run(folder, team, cases, *, speed=1.0, gpu=True, failed=None, scores=True):
    """A run's folder as `efficiency` and `accuracy` write it, with made-up curves.

    cases: case to slices; a case lasts slices / 10 s / speed and takes 3000 MB at its height.
    """
    (folder / "efficiency").mkdir(parents=True)
    lines = [HEADER]
    for case, slices in cases.items():
        seconds = slices / 10 / speed
        times = np.arange(0, seconds, 0.1)
        used = 500 + 2500 * np.clip((times - 0.2 * seconds) / (0.1 * seconds), 0, 1) * (
            times < 0.9 * seconds
        )
        crashed = case == failed
        area = round(used.sum() * 0.1)
        content = {
            "case": case,
            "team": team,
            "status": "crashed" if crashed else "ok",
            "reason": f"exit code 3: {TRICKY}" if crashed else None,
            "penalty": {"seconds": 3600.0} if crashed else None,
            "exit_code": 3 if crashed else 0,
            "seconds": seconds,
            "repeat": 0,
            "image_size": [512, 512, slices],
            "interval_s": 0.1,
            "idle_gpu_mb": 500.0 if gpu else None,
            "peak_gpu_mb": used.max() if gpu else None,
            "auc_flare_mb_s": area if gpu else None,
            "auc_true_mb_s": area * 1.01 if gpu else None,
            "auc_flare_tolerated_mb_s": 0.0 if gpu else None,
            "auc_true_tolerated_mb_s": 0.0 if gpu else None,
            "seconds_tolerated": max(0, seconds - 15),
            "tolerances": {"seconds": 15.0, "mb": 2048.0},
            "max_cpu_percent": 80.0,
            "auc_cpu_percent_s": 60 * seconds,
            "max_ram_mb": 2000.0 + slices,
            "auc_ram_mb_s": 1800 * seconds,
            "samples": {
                "time_s": times.tolist(),
                "gpu_used_mb": used.tolist() if gpu else None,
                "cpu_percent": (40 + 40 * np.sin(times)).tolist(),
                "ram_mb": np.linspace(200, 2000 + slices, len(times)).tolist(),
            },
            "phases": [
                {"phase": "imports", "case": None, "start_s": 0, "end_s": 0.2 * seconds},
                {
                    "phase": "predict",
                    "case": case,
                    "start_s": 0.2 * seconds,
                    "end_s": 0.9 * seconds,
                },
                {"phase": "write", "case": case, "start_s": 0.9 * seconds, "end_s": seconds},
            ],
            "output": {"found": not crashed, "valid": not crashed, "problems": []},
        }
        (folder / "efficiency" / f"{re.sub('[^a-z0-9]', '_', case)}.json").write_text(
            json.dumps(content)
        )
        row = [3600, content["peak_gpu_mb"], 29491200] if crashed else [seconds, 3000, area]
        row = row if gpu else [row[0], None, None]
        cells = [f"{case}_0000.nii.gz", *row, 80, 60 * seconds, 2000 + slices, 1800 * seconds]
        text = ["" if cell is None else str(cell) for cell in cells]
        lines.append(",".join(f'"{cell}"' for cell in text))
    (folder / f"{team}_Efficiency.csv").write_text("\n".join(lines) + "\n")
    if scores:
        rng = np.random.default_rng(len(team))
        with (folder / "accuracy_per_case.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["Name", *(f"{c}_{m}" for m in ("DSC", "NSD") for c in COLUMNS)])
            for case in cases:
                values = np.clip(rng.normal(0.85, 0.12, 28), 0, 1).round(4) * (case != failed)
                table.writerow([f"{case}.nii.gz", *values])
    environment = {"gpu": "NVIDIA H100" if gpu else None, "cpu": "Xeon", "cores": 16}
    environment |= {"gpu_note": None if gpu else "NVML: no driver", "image_digest": "sha256:12ab"}
    environment |= {"versions": {"python": "3.11", "torch": "2.14"}}
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """Runs headless chromium: (page, address's end, more flags) -> what it prints."""
    program = shutil.which("chromium")
    assert program, "this test opens the page in chromium: run `apt-get install -y chromium`"

    def open_page(page, fragment="", *flags):
        profile = tmp_path_factory.mktemp("profile")
        command = [
            *(program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *("--disable-sync", "--disable-dev-shm-usage", f"--user-data-dir={profile}", *flags),
            page.as_uri() + fragment,
        ]
        environment = {**os.environ, "HOME": str(profile)}
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=True, env=environment
        ).stdout

    return open_page


class Dom(HTMLParser):
    """What a test needs of a page: tables as rows of text, and every element with attributes."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.tables, self.owner = [], {}, None
        self.cell = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        self.owner = attributes.get("id", self.owner)
        if tag == "tr":
            self.tables.setdefault(self.owner, []).append([])
        if tag in ("td", "th"):
            self.cell = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[self.owner][-1].append(self.cell)
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data

    def of_class(self, name):
        return [(tag, a) for tag, a in self.elements if name in (a.get("class") or "").split()]

    def column(self, owner, title):
        head, *body = self.tables[owner]
        place = next(i for i, cell in enumerate(head) if cell.startswith(title))
        return [row[place] for row in body]


@pytest.fixture(scope="session")
def two_teams(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    cases = {f"case_{slices:04}": slices for slices in (100, 200, 300, 450)}
    first = write_run(folder / "a", "abdoseg", {**cases, TRICKY: 60}, speed=5.0)
    second = write_run(folder / "b", "Team Ünïcode", cases, failed="case_0300")
    page = folder / "pages/report.html"
    title = f"Two teams {TRICKY}"
    assert main(["report", str(first), str(second), "--output", str(page), "--title", title]) == 0
    return page


def test_page_holds_no_address_and_may_open_none(two_teams):
    text = two_teams.read_text()
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text
    assert not re.search(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=", text.split("<main>")[0])


@pytest.mark.slow
def test_browser_draws_and_sorts(two_teams, chromium):
    dom = Dom(chromium(two_teams, "#sort=time&sort-desc=&metric=gpu", "--dump-dom"))
    assert dom.column("cases", "Case") == [
        # slowest first: b takes slices / 10 s, a a fifth of it; the failed case counts an hour
        *("case_0300", "case_0450", "case_0200", "case_0100", "case_0450", "case_0300"),
        *("case_0200", "case_0100", TRICKY),
    ]
    assert dom.column("cases", "Time")[:3] == ["3,600.00", "45.00", "20.00"]
    assert dom.column("cases", "GPU area")[0] == "29,491,200"
    assert dom.column("cases", "Max RAM")[0] == "–"
    assert dom.column("cases", "Team")[0] == "Team Ünïcode"
    assert dom.column("cases", "Status")[0] == "crashed"
    assert TRICKY in dom.column("cases", "Reason")[0]
    sorted_by = [a for tag, a in dom.elements if tag == "th" and "aria-sort" in a]
    assert "descending" in {a["aria-sort"] for a in sorted_by}

    curves = [a["d"] for tag, a in dom.of_class("curve")]
    assert len(curves) == 9
    assert all(re.fullmatch(r"M[\d.,L]+", curve) for curve in curves)
    assert len(dom.of_class("limit")) == 1
    # 14 structures of two teams
    assert len(dom.of_class("box")) == 28
    assert len(dom.tables["organ-table"]) == 1 + 14
    assert dom.column("summary", "Cases done") == ["5", "3"]
    assert dom.column("summary", "Time")[1] == "32.5"  # median of 10, 20, 45 and 3600 s

    # Nothing of the names and the title became markup.
    assert not [tag for tag, a in dom.elements if tag == "img" or "onerror" in a]
    assert "alert" not in str([a for _, a in dom.elements if "src" in a])


@pytest.mark.slow
def test_browser_keeps_numbers_in_step_with_the_files(two_teams, chromium):
    dom = Dom(chromium(two_teams, "#sort=case&kind=nsd", "--dump-dom"))
    scores = {
        row["Name"]: row
        for row in csv.DictReader((two_teams.parents[1] / "a/accuracy_per_case.csv").open())
    }
    first = scores["case_0100.nii.gz"]
    organs = np.mean([float(first[f"{column}_NSD"]) for column in COLUMNS[:13]])
    place = dom.column("cases", "Case").index("case_0100")
    assert dom.column("cases", "Organ NSD")[place] == f"{100 * organs:.2f}"
    assert dom.column("cases", "Tumor NSD")[place] == f"{100 * float(first['Lesion_NSD']):.2f}"
    livers = [float(row["Liver_NSD"]) for row in scores.values()]
    shown = f"{100 * np.mean(livers):.2f} ± {100 * np.std(livers, ddof=1):.2f}"
    assert dom.column("organ-table", "abdoseg")[0] == shown


@pytest.mark.slow
def test_single_run_without_gpu_shows_ram_and_phases(tmp_path, chromium):
    run = write_run(tmp_path / "run", "cpu", {"only": 100}, gpu=False, scores=False)
    page = tmp_path / "page.html"
    assert main(["report", str(run), "--output", str(page)]) == 0
    dom = Dom(chromium(page, "", "--dump-dom"))
    assert [tag for tag, _ in dom.of_class("curve")] == ["path"]
    assert len(dom.of_class("phase")) == 3
    head = dom.tables["cases"][0]
    assert any(cell.startswith("Max RAM") for cell in head)
    assert not any("GPU" in cell or "DSC" in cell for cell in head)
    hidden = {a["id"] for tag, a in dom.elements if tag == "section" and "hidden" in a}
    assert hidden == {"scores", "notes", "challenge"}
    assert "NVML: no driver" in page.read_text()


@pytest.mark.slow
def test_scores_alone_make_a_page(tmp_path, chromium):
    run = write_run(tmp_path / "run", "t", {"a": 20, "b": 30})
    for path in [
        *run.glob("*_Efficiency.csv"),
        *run.glob("efficiency/*"),
        run / "environment.json",
    ]:
        path.unlink()
    page = tmp_path / "page.html"
    assert main(["report", str(run), "--output", str(page)]) == 0
    dom = Dom(chromium(page, "", "--dump-dom"))
    assert len(dom.tables["cases"]) == 3
    assert len(dom.of_class("box")) == 14
    hidden = {a["id"] for tag, a in dom.elements if tag == "section" and "hidden" in a}
    assert hidden == {"curves", "environment", "notes", "challenge"}


def test_thinned_curve_keeps_peaks_and_ends():
    times = np.arange(36_000) / 10
    values = np.sin(times / 50)
    values[12_345] = 99
    kept_times, kept = thin(times.tolist(), values.tolist())
    assert len(kept) <= 2 * CURVE_BUCKETS + 2
    assert kept_times == sorted(kept_times)
    assert (kept_times[0], kept_times[-1]) == (0, 3599.9)
    assert kept[kept_times.index(1234.5)] == 99
    assert np.abs(np.interp(times, kept_times, kept) - values)[13_000:].max() < 0.25
    assert thin([0.0, 0.1], [5.0, 6.0]) == [[0.0, 0.1], [5.0, 6.0]]


def test_folder_that_is_no_run(tmp_path, capsys):
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "page.html")]) == 2
    assert "benchmark report:" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


@pytest.mark.slow
def test_harness_never_imports_torch():
    # What the harness measures (the plain pipeline, the bare network) runs in processes of its own.
    measured = ("plain-pipeline", "network-speed")
    names = [module for name, (module, *_) in COMMANDS.items() if name not in measured]
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    code += "import benchmark.__main__\nprint('torch' in sys.modules, len(sys.argv))"
    done = subprocess.run(
        [sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", str(len(names) + 1)]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert f"example: python -m benchmark {name} " in capsys.readouterr().out


def test_help_names_every_command_and_imports_none():
    code = "import sys\nfrom benchmark.__main__ import main\n"
    code += "try: main(['--help'])\nexcept SystemExit: print('numpy' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"
    for name in COMMANDS:
        assert re.search(rf"^    {name}\b", done.stdout, re.MULTILINE)
