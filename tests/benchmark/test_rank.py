"""Runs read back, ranked and compared: hand-computed tables, known ratios, what is refused."""

import csv
import json
from itertools import product

import numpy as np
import pytest
from harness import HEADER, page_data, read, run_benchmark, tables_of, write_run

from benchmark.containers.results import Tolerances
from benchmark.judging.compare import spread
from benchmark.judging.ranking import (
    METRICS,
    RULES,
    Rules,
    fewest_cases,
    rank_intervals,
    rank_teams,
)
from benchmark.judging.runs import RunError, case_of, read_run, read_runs

FREE = Tolerances(0, 0)


def rank(runs, *more):
    """Rank into RANK beside the first run."""
    return run_benchmark("rank", *runs, "--report", runs[0].parent / "RANK", *more)


def ranked(runs, *more):
    """The rows by team, and the content, of ranking.json."""
    done = rank(runs, *more)
    assert done.code == 0, done.err
    content = read(runs[0].parent / "RANK/ranking.json")
    return {row["team"]: row for row in content["ranking"]}, content


@pytest.fixture
def three_teams(tmp_path):
    """Three teams, two cases; `slow` has no row for y."""
    fast = {"x": (10, 3000, 20000, 900), "y": (20, 3000, 50000, 2000)}
    good = {"x": (30, 3000, 90000, 800), "y": (20, 3000, 40000, 3000)}
    of_fast = {"x": (0.8, 0.7, 0.5, 0.5), "y": (0.9, 0.9, 0.5, 0.5)}
    of_good = {"x": (0.9, 0.9, 0.6, 0.6), "y": (0.9, 0.8, 0.6, 0.6)}
    slow, of_slow = {"x": (30, 3000, 10000, 700)}, {"x": (0.7, 0.9, 0.7, 0.4)}
    return (
        write_run(tmp_path / "1", "fast", fast, of_fast),
        write_run(tmp_path / "2", "good", good, of_good),
        write_run(tmp_path / "3", "slow", slow, of_slow),
    )


def test_hand_computed_table(three_teams, tmp_path):
    rows, content = ranked(three_teams, "--protocol", "flare22")
    assert content["cases"] == ["x", "y"]
    # Ranks of fast, good, slow; ties share the better rank, a missing row is last.
    assert content["ranks"] == {
        "dsc": [[2, 1], [1, 1], [3, 3]],
        "nsd": [[3, 1], [1, 2], [1, 3]],
        "time": [[1, 1], [2, 1], [2, 3]],
        "gpu": [[2, 2], [3, 1], [1, 3]],
        "cpu": [[3, 1], [2, 2], [1, 3]],
    }
    last = {key: content["values"][key][2] for key in ("time", "gpu", "cpu", "dsc")}
    assert last == {
        "time": [30, 3600],
        "gpu": [10000, 29_491_200],
        "cpu": [700, 360_000],
        "dsc": [pytest.approx(0.7), 0],
    }
    # Weights 1, 1, 1, 0.5, 0.5 over two cases: 8 in all.
    assert rows["fast"]["score"] == (2 + 1 + 3 + 1 + 1 + 1 + (2 + 2 + 3 + 1) / 2) / 8
    assert rows["good"]["score"] == (1 + 1 + 1 + 2 + 2 + 1 + (3 + 1 + 2 + 2) / 2) / 8
    assert rows["slow"]["score"] == (3 + 3 + 1 + 3 + 2 + 3 + (1 + 3 + 1 + 3) / 2) / 8
    assert [rows[team]["rank"] for team in ("good", "fast", "slow")] == [1, 2, 3]
    page = (tmp_path / "RANK/ranking.md").read_text()
    assert tables_of(page)[1][:3] == ["1", "good", "1.500"]
    (first, *_) = csv.DictReader((tmp_path / "RANK/ranking.csv").open())
    assert (first["team"], float(first["time_rank"])) == ("good", 1.5)

    # Of two cases there are four equally likely samples; who is first in each is known.
    assert content["rules"]["memory_tolerance_mb"] == 0  # without samples nothing is subtracted
    weights = content["rules"]["weights"]
    values = {key: np.array(table) for key, table in content["values"].items()}
    ranking = rank_teams(content["teams"], content["cases"], values, Rules(weights, FREE))
    sums = sum(weights[key] * np.array(table) for key, table in content["ranks"].items())
    likely = np.zeros(3)
    for chosen in product((0, 1), repeat=2):
        total = sums[:, chosen].sum(axis=1)
        likely += (total == total.min()) / 4
    assert likely.tolist() == [0.25, 0.75, 0]
    assert ranking.first == pytest.approx(likely, abs=0.02)
    # Two cases give no probability, and rule no rank out.
    for row in rows.values():
        assert (row["probability_first"], row["rank_low"], row["rank_high"]) == (None, 1, 3)


@pytest.mark.parametrize("teams", [2, 3, 5, 30])
def test_a_rank_is_sure_only_where_chance_would_not_do_it(teams):
    """Of two equal teams one is ahead in all of n cases with probability 2 / 2**n."""
    least = fewest_cases(teams)
    for cases in (least - 1, least):
        sure = 2 / 2**cases <= 0.05 / (teams - 1)
        assert sure == (cases == least)
        totals = np.tile(np.arange(teams, dtype=float)[:, None], cases)
        interval = rank_intervals(totals, np.random.default_rng(0))
        ranks = np.arange(1, teams + 1)[:, None].repeat(2, axis=1)
        assert interval.tolist() == (ranks.tolist() if sure else [[1, teams]] * teams)


@pytest.mark.parametrize(
    ("teams", "cases", "cautions"), [(1, 3, 2), (2, 5, 1), (3, 6, 1), (3, 19, 1), (3, 20, 0)]
)
def test_few_cases_and_a_single_team_are_cautioned_against(tmp_path, teams, cases, cautions):
    row = {f"{n}": (10, None, None, 5) for n in range(cases)}
    rows, content = ranked([write_run(tmp_path / name, name, row) for name in "abc"[:teams]])
    assert len(content["cautions"]) == cautions
    assert rows["a"]["probability_first"] == (1 if cases == 20 else None)


def test_a_team_that_failed_everywhere_is_ranked_last(tmp_path):
    scores = dict.fromkeys("xy", (0.9, 0.9, 1, 1))
    good = write_run(tmp_path / "a", "good", dict.fromkeys("xy", (9, 3000, 500, 6)), scores)
    fair = write_run(tmp_path / "b", "fair", dict.fromkeys("xy", (30, 3000, 900, 6)), scores)
    # It has neither scores nor a figure of GPU memory.
    dead = write_run(tmp_path / "c", "dead", dict.fromkeys("xy", (3600, None, None, 360000)))
    rows, content = ranked((dead, good, fair))
    assert [rows[team]["rank"] for team in ("good", "fair", "dead")] == [1, 2, 3]
    assert content["values"]["gpu"][0] == [29_491_200] * 2
    assert content["values"]["dsc"][0] == [0, 0]


def test_tolerances_come_off_the_time_and_off_every_sample(tmp_path):
    used = [1000.0, 5000.0, 6000.0]  # above 4096: 904 + 1904, x 0.1 s = 281 MB·s
    twice = [(20, [4000.0] * 22), (20, [4000.0] * 23)]
    runs = (
        write_run(tmp_path / "a", "a", {"x": (14, 6000, 1200, 10)}, samples={"x": [(14, used)]}),
        write_run(tmp_path / "b", "b", {"x": (20, 4000, 8800, 10)}, samples={"x": twice}),
    )
    assert ranked(runs)[1]["values"] == {"time": [[0], [5]], "gpu": [[281], [0]]}
    _, content = ranked(runs, "--protocol", "flare22", "--weight", "cpu=0")
    assert content["values"] == {"time": [[14], [20]], "gpu": [[690], [4294]]}  # above 2048

    # A failed container has the failure's values, and no tolerance.
    rows = {"x": (3600, 9000, 29_491_200, 360_000), "y": (20, 5096, 510, 10)}
    run = write_run(tmp_path / "c", "c", rows, samples={"y": [(20, [5096.0])]})
    values = ranked([run], "--weight", "cpu=1")[1]["values"]
    assert values == {"time": [[3600, 5]], "gpu": [[29_491_200, 100]], "cpu": [[360_000, 10]]}


def test_without_gpu_the_area_is_skipped(tmp_path):
    # A failed case's penalty stands in the table even where no GPU was measured.
    rows = {"x": (20, None, None, 5), "y": (3600, None, 29_491_200, 360_000)}
    without = write_run(tmp_path / "a", "a", rows)
    other = write_run(tmp_path / "b", "b", {"x": (30, None, None, 6)})
    assert list(ranked((without, other))[1]["values"]) == ["time"]
    runs = (without, write_run(tmp_path / "c", "c", {"x": (30, 3000, 500, 6)}))
    assert rank(runs).code == 2
    assert rank(runs, "--weight", "gpu=0").code == 0


def test_weights_are_the_years(tmp_path):
    weights = {key: weight for key, weight in RULES["flare22"].weights.items() if weight}
    assert weights == {"dsc": 1, "nsd": 1, "time": 1, "gpu": 0.5, "cpu": 0.5}
    assert RULES["flare23"].weights == {**dict.fromkeys(METRICS, 1), "cpu": 0}
    for weight in ("speed=1", "gpu", "gpu=-1", "gpu=much"):
        assert rank([tmp_path], "--weight", weight).code == 2


# ---------------------------------------------------------------- reading


ROWS = dict.fromkeys("ab", (30, None, None, 5))
SCORES = dict.fromkeys("ab", (0.9, 0.9, 1, 1))
RESULT, TIMES, PER_CASE = (
    "efficiency/a_repeat0.json",
    "team_Efficiency.csv",
    "accuracy_per_case.csv",
)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (RESULT, lambda text: "{", []),
        (RESULT, lambda text: "[1]", []),
        (RESULT, lambda text: '{"case": 7}', []),
        (RESULT, lambda text: '{"case": "a", "samples": 7}', []),
        (RESULT, lambda text: text.replace("[0.0", "[NaN"), []),
        ("environment.json", lambda text: "[]", []),
        (TIMES, lambda text: text.replace("30", "fast"), ["a", "Time"]),
        (TIMES, lambda text: text.replace("30", "-5"), ["a", "Time", "-5"]),
        (TIMES, lambda text: text.replace("Time", "Seconds"), ["Time"]),
        (TIMES, lambda text: text.replace(",", ";"), ["Name"]),
        (TIMES, lambda text: text + "Average,1,,,1,1,1,1\n", ["Average"]),
        (TIMES, lambda text: text + "c_0000.nii.gz,1\n", ["c_0000.nii.gz"]),
        (PER_CASE, lambda text: text.replace("0.9", "80.5"), ["a", "80.5"]),
        (PER_CASE, lambda text: text.replace("0.9", "inf"), ["a", "inf"]),
        (PER_CASE, lambda text: text + text.splitlines()[1], ["a", "2"]),
        (PER_CASE, lambda text: text + "mean,1,1\n", ["mean"]),
        (PER_CASE, lambda text: text + "x,1,1\n", ["x", "3"]),
        (PER_CASE, lambda text: "", ["Name"]),
    ],
)
def test_a_folder_with_what_cannot_be_right_is_one_line(tmp_path, name, change, words):
    samples = {"a": [(30, None)]}
    folders = [
        write_run(tmp_path / team, team, ROWS, SCORES, samples, {"gpu": None})
        for team in ("other", "team")
    ]
    path = folders[1] / name
    path.write_text(change(path.read_text()))
    for command in (
        ["report", *folders, "--output", tmp_path / "page.html"],
        ["rank", *folders, "--report", tmp_path / "RANK"],
        ["compare", *folders],
    ):
        done = run_benchmark(*command)
        assert done.code == 2
        (line,) = done.err.splitlines()
        assert all(word in line for word in (str(folders[1]), *words))
    assert not (tmp_path / "RANK").exists()


@pytest.mark.parametrize(
    ("encoding", "code"), [("utf-8", 0), ("utf-8-sig", 0), ("utf-16", 2), ("latin-1", 2)]
)
def test_tables_are_utf_8_with_or_without_a_mark(tmp_path, encoding, code):
    run = write_run(tmp_path / "a", "a", {"Müller": (30, None, None, 5)})
    table = run / "a_Efficiency.csv"
    table.write_bytes(table.read_text(encoding="utf-8").encode(encoding))
    assert rank([run]).code == code


def test_a_number_that_is_none_leaves_the_page_whole(tmp_path):
    run = write_run(tmp_path / "a", "a", ROWS, SCORES)
    text = (run / PER_CASE).read_text().replace("0.9", "nan")
    (run / PER_CASE).write_text(text)
    assert run_benchmark("report", run, "--output", tmp_path / "page.html").code == 0
    text = (tmp_path / "page.html").read_text().split('id="data">')[1].split("</script>")[0]
    odd = []
    json.loads(text, parse_constant=odd.append)
    assert odd == []


def test_a_name_that_is_not_utf_8_is_one_case_in_tables_and_measurements(tmp_path):
    """JSON has its bytes, tables have them as escapes."""
    scores, samples = {"M\\udcfcller": (0.9, 0.9, 1, 1)}, {"M\udcfcller": [(30, None)]}
    run = read_run(write_run(tmp_path / "a", "a", scores=scores, samples=samples))
    assert run.cases == ["M\\udcfcller"] and run.shown[run.cases[0]]


def test_names_are_text_in_every_page(tmp_path):
    evil = "x<img src=y>|`z`"
    folders = [write_run(tmp_path / str(n), name, ROWS) for n, name in enumerate((evil, "other"))]
    more = write_run(tmp_path / "more", "more", {evil: ROWS["a"], "b": ROWS["b"]})
    pages = [run_benchmark("compare", folders[0], other).out for other in (folders[1], more)]
    for page in (*pages, rank(folders).out):
        assert "<img" not in page
        assert r"x&lt;img src=y&gt;\|\`z\`" in page


def test_folders_that_are_no_run_and_names_of_runs(tmp_path):
    assert run_benchmark("compare", tmp_path, tmp_path).code == 2
    assert run_benchmark("report", tmp_path, "--output", tmp_path / "p").code == 2
    for name in ("a", "b"):
        (tmp_path / f"{name}_Efficiency.csv").write_text(HEADER + "\n")
    with pytest.raises(RunError):
        read_run(tmp_path)
    inputs = ("x", "x_0000", "x.nii.gz", "x_0000.nii")
    assert {case_of(name, is_input=True) for name in inputs} == {"x"}
    assert case_of("phantom_0000_0000.nii.gz", is_input=True) == "phantom_0000"
    assert case_of("phantom_0000.nii.gz", is_input=False) == "phantom_0000"
    folders = [write_run(tmp_path / name, "team", ROWS) for name in ("one", "two", "deep/two")]
    folders.append(write_run(tmp_path / "scores", scores=SCORES))
    names = [run.team for run in read_runs(folders)]
    assert (names[0], names[3], len(set(names))) == (f"team ({folders[0]})", "scores", 4)


# ---------------------------------------------------------------- comparing


def test_compare_pairs_cases_and_takes_medians_of_repeats(tmp_path):
    ours = write_run(
        tmp_path / "a",
        "ours",
        {"x": (5, 100, 10, 1), "y": (4, 100, 10, 1), "z": (9, 100, 10, 1), "f": (3600, 9, 9, 9)},
        {"x": (0.9, 0.8, 0.5, 0.5), "y": (0.7, 0.8, 0.5, 0.5)},
        samples={"x": [(5, [100.0]), (2, [100.0]), (3, [100.0])]},
        environment={"gpu": "NVIDIA H100", "cpu": "x", "cores": 16},
    )
    theirs = write_run(
        tmp_path / "b",
        "theirs",
        {"x": (6, 200, 20, 1), "y": (16, 200, 0, 1), "f": (7, 9, 9, 9)},
        {"x": (0.8, 0.8, 0.4, 0.5), "y": (0.7, 0.7, 0.3, 0.5)},
        environment={"gpu": "NVIDIA H200", "cpu": "x", "cores": 16},
    )
    done = run_benchmark("compare", ours, theirs)
    assert done.code == 0
    rows = {row[0]: row[1:] for row in tables_of(done.out)}
    # x: median of 5, 2 and 3 s against 6; y: 4 against 16. sqrt(1/2 * 1/4) = 0.354; f: 3600 / 7.
    ends = np.exp(np.log(0.125) / 2 + np.array([-1, 1]) * 12.7062 * np.log(2) / 2)  # Student's t
    interval = "{:.3f} to {:.3f}".format(*ends)
    finished = ["2", "0.354", interval, "0.354", "0.250", "0.500"]
    assert rows["time (s), both finished"] == finished
    assert rows["time (s)"][:2] == ["3", f"{(0.125 * 3600 / 7) ** (1 / 3):.3f}"]
    assert rows["time (s)"][3:] == ["0.500", "0.250", "514.286"]
    assert rows["max GPU memory (MB)"][:2] == ["2", "0.500"]
    assert rows["GPU area (MB·s), both finished"][0] == "1"  # y's area of 0 has no ratio
    half = 12.7062 * 0.05  # t of one degree of freedom, from the tables; differences 0.1 and 0
    assert rows["organ DSC"][:3] == ["2", "+0.0500", f"{0.05 - half:+.4f} to {0.05 + half:+.4f}"]
    assert rows["tumor DSC"][:2] == ["2", "+0.1500"]
    for name in ("only in ours: z", "NVIDIA H100", "NVIDIA H200", "A failed 1 and B 0 of 3"):
        assert name in done.out


def test_without_any_spread_the_interval_is_the_mean_and_of_one_case_there_is_none():
    same = spread(np.array([[3, 1], [6, 2]], float), ratios=True)
    assert (same.mean, *same.interval) == pytest.approx((3, 3, 3))
    assert spread(np.array([[1.0, 2.0]]), ratios=True).interval is None


@pytest.mark.parametrize(
    ("factor", "verdict"), [(3, "3.00 times as fast"), (0.25, "4.00 times as long"), (1, "no diff")]
)
def test_compare_reports_a_difference_only_where_the_interval_has_no_one(tmp_path, factor, verdict):
    seconds = [10, 11, 12, 13, 14, 15]
    noise = {n: (-1) ** n * (factor == 1) for n in seconds}
    a = write_run(tmp_path / "a", "a", {f"{n}": (n, 1, 1, 1) for n in seconds})
    rows = {f"{n}": (factor * n + noise[n], 1, 1, 1) for n in seconds}
    page = run_benchmark("compare", a, write_run(tmp_path / "b", "b", rows)).out
    assert verdict in page.splitlines()[2]


@pytest.mark.parametrize("image", ["team:latest", None])
def test_the_ram_of_a_container_is_not_compared_with_a_commands(tmp_path, image):
    row = {"x": (1, None, None, 1), "y": (2, None, None, 1)}
    machine = {"gpu": None, "cpu": "x", "cores": 2}
    a = write_run(tmp_path / "a", "a", row, environment=machine | {"image": "abdoseg:latest"})
    b = write_run(tmp_path / "b", "b", row, environment=machine | {"image": image})
    page = run_benchmark("compare", a, b).out
    assert ("max RAM (MB)" in [row[0] for row in tables_of(page)]) == (image is not None)
    run_benchmark("report", a, b, "--output", tmp_path / "page.html")
    notes = " ".join(page_data(tmp_path / "page.html")["notes"])
    for text in (page, rank([a, b]).out, notes):
        assert ("a: cgroup; b: process tree" in text) == (image is None)


def test_runs_without_a_common_case_are_refused(tmp_path):
    runs = [
        write_run(tmp_path / name, name, dict.fromkeys(cases, (1, 1, 1, 1)))
        for name, cases in (("a", "wx"), ("b", "xy"), ("c", "yz"))
    ]
    assert run_benchmark("compare", runs[0], runs[2]).code == 2
    assert rank(runs).code == 2
    assert rank(runs[:2]).code == 0
