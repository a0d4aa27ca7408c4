"""The report page: what a browser makes of it, its curves, large reports, every command's help."""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from harness import ROOT, page_data, result_of, run_benchmark, write_run

from benchmark.__main__ import COMMANDS
from benchmark.judging.report import CURVE_BUCKETS, render, thin
from benchmark.judging.runs import Run
from benchmark.scoring.protocol import COLUMNS

TRICKY = "<img src=x onerror=alert(1)> & </script><b>"


@pytest.fixture(scope="session")
def open_page(tmp_path_factory):
    """Opens a page in headless chromium, at an address's end, and hands back what it made of it."""
    program = shutil.which("chromium")
    assert program, "this test opens the page in chromium: run `apt-get install -y chromium`"

    def open_page(page, fragment=""):
        profile = tmp_path_factory.mktemp("profile")
        command = [
            *(program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *("--disable-sync", "--disable-dev-shm-usage", f"--user-data-dir={profile}"),
            *("--dump-dom", page.as_uri() + fragment),
        ]
        environment = {**os.environ, "HOME": str(profile)}
        how = {"capture_output": True, "text": True, "check": True, "env": environment}
        return Dom(subprocess.run(command, timeout=120, **how).stdout)

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
        return [a for _, a in self.elements if name in (a.get("class") or "").split()]

    def count(self, name):
        return len(self.of_class(name))

    def column(self, owner, title):
        head, *body = self.tables[owner]
        place = next(i for i, cell in enumerate(head) if cell.startswith(title))
        return [row[place] for row in body]

    def hidden(self):
        return {a["id"] for tag, a in self.elements if tag == "section" and "hidden" in a}


def samples(seconds):
    return [500 + 2500 * (0.3 < n * 0.1 / seconds < 0.9) for n in range(int(seconds * 10))]


@pytest.fixture(scope="module")
def two_teams(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    cases = {f"case_{n:04}": n / 50 for n in (100, 200, 300, 450)}
    every = {**cases, TRICKY: 1.2}
    failed = {"status": "crashed", "reason": f"exit code 3: {TRICKY}", "penalty": {"seconds": 3600}}
    first = write_run(
        folder / "a",
        "abdoseg",
        {case: (seconds, 3000, 500, 5) for case, seconds in every.items()},
        {case: (0.8, 0.7, 0.6, 0.5 + s / 100) for case, s in cases.items()},
        {case: [(s, samples(s))] for case, s in every.items()},
        {"gpu": "NVIDIA H100", "cpu": "Xeon", "versions": {"torch": "2.14"}},
    )
    second = write_run(
        folder / "b",
        "Team Ünïcode",
        {case: (5 * seconds, 3000, 900, 5) for case, seconds in cases.items()},
        dict.fromkeys(cases, (0.5, 0.5, 0, 0)),
        {c: [(5 * s, samples(5 * s), failed if s == 6 else {})] for c, s in cases.items()},
        {"gpu": "NVIDIA H100"},
    )
    page = folder / "pages/report.html"
    done = run_benchmark("report", first, second, "--output", page)
    assert done.code == 0, done.err
    return page


def test_page_has_no_address_and_may_open_none(two_teams):
    text = two_teams.read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text
    assert not re.search(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=", text.split("<main>")[0])


@pytest.mark.slow
def test_browser_draws_and_sorts(two_teams, open_page):
    dom = open_page(two_teams, "#sort=time&sort-desc=&metric=gpu")
    assert dom.column("cases", "Case") == [
        # slowest first: the failed case counts an hour
        *("case_0300", "case_0450", "case_0200", "case_0100", "case_0450", "case_0300"),
        *("case_0200", "case_0100", TRICKY),
    ]
    assert dom.column("cases", "Time")[:3] == ["3,600.00", "45.00", "20.00"]
    first = {t: dom.column("cases", t)[0] for t in ("GPU area", "Max RAM", "Team", "Status")}
    assert list(first.values()) == ["29,491,200", "–", "Team Ünïcode", "crashed"]
    assert TRICKY in dom.column("cases", "Reason")[0]
    sorted_by = {a["aria-sort"] for tag, a in dom.elements if tag == "th" and "aria-sort" in a}
    assert "descending" in sorted_by

    curves = [a["d"] for a in dom.of_class("curve")]
    assert len(curves) == 9
    assert all(re.fullmatch(r"M[\d.,L]+", curve) for curve in curves)
    assert dom.count("limit") == 1
    assert dom.count("box") == 28  # 14 structures of two teams
    assert len(dom.tables["organ-table"]) == 1 + 14
    assert dom.column("summary", "Cases done") == ["5", "3"]
    assert dom.column("summary", "Time")[1] == "32.5"  # median of 10, 20, 45 and 3600 s
    assert dom.column("summary", "Organ DSC") == ["80.00", "50.00"]
    place = dom.column("cases", "Team").index("abdoseg")
    assert dom.column("cases", "Tumor NSD")[place] == "59.00"
    assert dom.column("organ-table", "abdoseg")[-1] == "60.00 ± 0.00"

    # No name became markup.
    assert not [tag for tag, a in dom.elements if tag == "img" or "onerror" in a]
    assert "alert" not in str([a for _, a in dom.elements if "src" in a])


@pytest.mark.slow
def test_a_run_without_gpu_and_scores_alone_make_pages(tmp_path, open_page):
    phases = [
        {"phase": name, "case": None, "start_s": start, "end_s": start + 0.1}
        for name, start in (("imports", 0), ("predict", 0.1), ("write", 0.2))
    ]
    row, repeat = {"only": (10, None, None, 5)}, [(0.5, None, {"phases": phases})]
    environment = {"gpu_note": "NVML: no"}
    run = write_run(tmp_path / "run", "cpu", row, None, {"only": repeat}, environment)
    run_benchmark("report", run, "--output", tmp_path / "cpu.html")
    dom = open_page(tmp_path / "cpu.html")
    assert dom.count("curve") == 1
    assert dom.count("phase") == 3
    head = dom.tables["cases"][0]
    assert any(cell.startswith("Max RAM") for cell in head)
    assert not any("GPU" in cell or "DSC" in cell for cell in head)
    assert dom.hidden() == {"scores", "notes", "challenge", "checks"}
    assert "NVML: no" in str(page_data(tmp_path / "cpu.html")["teams"])

    run = write_run(tmp_path / "t", scores=dict.fromkeys("ab", (0.9, 0.9, 1, 1)))
    run_benchmark("report", run, "--output", tmp_path / "scores.html")
    dom = open_page(tmp_path / "scores.html")
    assert len(dom.tables["cases"]) == 3
    assert dom.count("box") == 14
    assert dom.hidden() == {"curves", "environment", "notes", "challenge", "checks"}


@pytest.mark.slow
def test_a_large_report_draws_what_is_asked_for(tmp_path, open_page):
    names = [f"case {n}" for n in range(200)]
    scores = {name: {f"{c}_{m}": 0.9 for c in COLUMNS for m in ("DSC", "NSD")} for name in names}
    runs = []
    for number in range(30):
        results = {name: [result_of(name, 10 + number, [500.0] * 40)] for name in names}
        runs.append(Run(f"team {number}", tmp_path, results, scores, {"gpu": "x"}, has_gpu=True))
    page = tmp_path / "page.html"
    page.write_text(render(runs, f"Large {TRICKY}"), encoding="utf-8")
    dom = open_page(page)
    assert dom.count("curve") == 1
    assert len(dom.tables["cases"]) == 1 + 200
    assert len(dom.column("summary", "Team")) == 30
    assert len(dom.elements) < 15_000  # of 6,000 cases; all drawn at once there were 219,550
    assert not [tag for tag, a in dom.elements if tag == "img"]


def test_thinned_curve_has_its_peaks_and_ends():
    times = np.arange(36_000) / 10
    values = np.sin(times / 50)
    values[12_345] = 99
    some_times, some = thin(times.tolist(), values.tolist())
    assert len(some) <= 2 * CURVE_BUCKETS + 2
    assert some_times == sorted(some_times)
    assert (some_times[0], some_times[-1]) == (0, 3599.9)
    assert some[some_times.index(1234.5)] == 99
    assert np.abs(np.interp(times, some_times, some) - values)[13_000:].max() < 0.25
    assert thin([0.0, 0.1], [5.0, 6.0]) == [[0.0, 0.1], [5.0, 6.0]]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example(name):
    done = run_benchmark(name, "--help")
    assert done.code == 0
    assert f"example: python -m benchmark {name} " in done.out


def test_help_names_every_command_and_imports_none():
    code = "import sys\nfrom benchmark.__main__ import main\n"
    code += "try: main(['--help'])\nexcept SystemExit: print('numpy' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"
    for name in COMMANDS:
        assert re.search(rf"^    {name}\b", done.stdout, re.MULTILINE)
