import csv
import json
from itertools import product

import numpy as np
import pytest
from made_up_runs import HEADER, write_run

from benchmark.__main__ import main
from benchmark.judging.ranking import METRICS, RULES, rank_intervals, rank_teams
from benchmark.judging.runs import RunError, case_of, read_run, read_runs


def rank(runs, output, *more):
    return main(["rank", *map(str, runs), "--report", str(output), *more])


@pytest.fixture
def three_teams(tmp_path):
    """Three teams, two cases; `slow` has no row for y."""
    fast = write_run(
        tmp_path / "1",
        "fast",
        {"x": (10, 3000, 20000, 900), "y": (20, 3000, 50000, 2000)},
        {"x": (0.8, 0.7, 0.5, 0.5), "y": (0.9, 0.9, 0.5, 0.5)},
    )
    good = write_run(
        tmp_path / "2",
        "good",
        {"x": (30, 3000, 90000, 800), "y": (20, 3000, 40000, 3000)},
        {"x": (0.9, 0.9, 0.6, 0.6), "y": (0.9, 0.8, 0.6, 0.6)},
    )
    slow = write_run(
        tmp_path / "3",
        "slow",
        {"x": (30, 3000, 10000, 700)},
        {"x": (0.7, 0.9, 0.7, 0.4)},
    )
    return fast, good, slow


def read_ranking(folder):
    content = json.loads((folder / "ranking.json").read_text())
    return {row["team"]: row for row in content["ranking"]}, content


def test_hand_computed_table(three_teams, tmp_path, capsys):
    rules = ("--protocol", "flare22", "--memory-tolerance", "0")
    assert rank(three_teams, tmp_path / "out", *rules) == 0
    rows, content = read_ranking(tmp_path / "out")
    assert content["cases"] == ["x", "y"]
    # Ranks of fast, good, slow; ties share the better rank, a missing row is last.
    assert content["ranks"] == {
        "dsc": [[2, 1], [1, 1], [3, 3]],
        "nsd": [[3, 1], [1, 2], [1, 3]],
        "time": [[1, 1], [2, 1], [2, 3]],
        "gpu": [[2, 2], [3, 1], [1, 3]],
        "cpu": [[3, 1], [2, 2], [1, 3]],
    }
    assert content["values"]["time"][2] == [30, 3600]
    assert content["values"]["gpu"][2] == [10000, 29_491_200]
    assert content["values"]["cpu"][2] == [700, 360_000]
    assert content["values"]["dsc"][2] == pytest.approx([0.7, 0])
    # Weights 1, 1, 1, 0.5, 0.5 over two cases: 8 in all.
    assert rows["fast"]["score"] == (2 + 1 + 3 + 1 + 1 + 1 + (2 + 2 + 3 + 1) / 2) / 8
    assert rows["good"]["score"] == (1 + 1 + 1 + 2 + 2 + 1 + (3 + 1 + 2 + 2) / 2) / 8
    assert rows["slow"]["score"] == (3 + 3 + 1 + 3 + 2 + 3 + (1 + 3 + 1 + 3) / 2) / 8
    assert [rows[team]["rank"] for team in ("good", "fast", "slow")] == [1, 2, 3]
    page = (tmp_path / "out/ranking.md").read_text()
    assert "| 1 | good | 1.500 |" in page
    assert page in capsys.readouterr().out
    (first, *_) = csv.DictReader((tmp_path / "out/ranking.csv").open())
    assert (first["team"], float(first["time_rank"])) == ("good", 1.5)
    assert "slow, time (s): counted as failed in y" in page


def test_bootstrap_agrees_with_every_possible_resampling(three_teams, tmp_path):
    rules = ("--protocol", "flare22", "--memory-tolerance", "0")
    rank(three_teams, tmp_path, *rules)
    rows, content = read_ranking(tmp_path)
    weights = content["rules"]["weights"]
    values = {key: np.array(table) for key, table in content["values"].items()}
    ranking = rank_teams(content["teams"], content["cases"], values, weights)
    sums = sum(weights[key] * np.array(table) for key, table in content["ranks"].items())
    # Of two cases there are four equally likely samples; who is first in each is known.
    first = np.zeros(3)
    for chosen in product((0, 1), repeat=2):
        total = sums[:, chosen].sum(axis=1)
        first += (total == total.min()) / 4
    assert ranking.first == pytest.approx(first, abs=0.01)
    # fast, good, slow: x alone 8.5, 6.5, 7; y alone 4.5, 5.5, 12; both 13, 12, 19.
    assert first.tolist() == [0.25, 0.75, 0]
    # Two cases cannot tell how likely anything is, and leave every rank open.
    for row in rows.values():
        assert row["probability_first"] is None
        assert (row["rank_low"], row["rank_high"]) == (1, 3)


def test_a_team_that_is_always_better_is_surely_first():
    cases = [f"case {number}" for number in range(20)]
    values = {"dsc": np.array([np.full(20, 0.9), np.full(20, 0.8), np.full(20, 0.8)])}
    ranking = rank_teams(["a", "b", "c"], cases, values, {"dsc": 1.0})
    assert ranking.final.tolist() == [1, 2, 2]
    assert ranking.scores.tolist() == [1, 2, 2]
    assert ranking.interval.tolist() == [[1, 1], [2, 3], [2, 3]]
    assert ranking.first.tolist() == [1, 0, 0]


@pytest.mark.parametrize("cases", [1, 3, 5, 6, 20])
def test_a_rank_is_sure_only_where_chance_would_not_do_it(cases):
    """Of two equal teams one is ahead in all of n cases with probability 2 / 2**n."""
    values = {"time": np.array([np.full(cases, 1.0), np.full(cases, 2.0)])}
    ranking = rank_teams(["a", "b"], list(map(str, range(cases))), values, {"time": 1.0})
    assert ranking.final.tolist() == [1, 2]
    sure = 2 / 2**cases <= 0.05
    assert ranking.interval.tolist() == ([[1, 1], [2, 2]] if sure else [[1, 2], [1, 2]])


@pytest.mark.slow
@pytest.mark.parametrize("cases", [3, 8, 25])
def test_equal_teams_are_told_apart_in_one_of_twenty_at_most(cases):
    random = np.random.default_rng(cases)
    wrong = [
        rank_intervals(random.normal(size=(2, cases)), random)[0].tolist() != [1, 2]
        for _ in range(400)
    ]
    assert np.mean(wrong) < 0.05 + 2 * np.sqrt(0.05 * 0.95 / 400)


def test_few_cases_and_a_single_team_are_cautioned_against(tmp_path, capsys):
    row = dict.fromkeys("xyz", (10, None, None, 5))
    alone = write_run(tmp_path / "a", "a", row)
    assert rank([alone], tmp_path / "out", "--time-tolerance", "0") == 0
    page = capsys.readouterr().out
    assert "One team: there is nobody to be ranked against" in page
    assert "Caution: 3 cases." in page
    assert "| 1 | a | 1.000 | 1–1 | – |" in page
    many = {f"{n}": (10, None, None, 5) for n in range(20)}
    runs = [write_run(tmp_path / name, name, many) for name in ("b", "c")]
    assert rank(runs, tmp_path / "many") == 0
    assert "Caution" not in capsys.readouterr().out
    assert read_ranking(tmp_path / "many")[0]["b"]["probability_first"] == 1


def test_a_team_that_failed_everywhere_is_ranked_last(tmp_path, capsys):
    scores = dict.fromkeys("xy", (0.9, 0.9, 1, 1))
    good = write_run(tmp_path / "a", "good", dict.fromkeys("xy", (9, 3000, 500, 6)), scores)
    fair = write_run(tmp_path / "b", "fair", dict.fromkeys("xy", (30, 3000, 900, 6)), scores)
    # It has neither scores nor a figure of GPU memory.
    dead = write_run(tmp_path / "c", "dead", dict.fromkeys("xy", (3600, None, None, 360000)))
    assert rank((dead, good, fair), tmp_path / "out", "--memory-tolerance", "0") == 0
    rows, content = read_ranking(tmp_path / "out")
    assert [rows[team]["rank"] for team in ("good", "fair", "dead")] == [1, 2, 3]
    assert content["values"]["gpu"][0] == [29_491_200] * 2
    assert content["values"]["dsc"][0] == [0, 0]


@pytest.mark.slow
def test_probability_of_a_coin_toss():
    """Of n cases in which two teams win half each, resampling gives either the same chance."""
    cases = [str(number) for number in range(101)]
    wins = np.arange(101) % 2 == 0  # 51 against 50
    values = {"time": np.array([np.where(wins, 1, 2), np.where(wins, 2, 1)], float)}
    ranking = rank_teams(["a", "b"], cases, values, {"time": 1.0})
    # P(Binomial(101, 51/101) > 50.5), by the normal approximation with mean 51 and sd 5.025
    assert ranking.first[0] == pytest.approx(0.5396, abs=0.015)
    assert ranking.first.sum() == pytest.approx(1)  # 101 cases cannot tie
    again = rank_teams(["a", "b"], cases, values, {"time": 1.0})
    assert again.first.tolist() == ranking.first.tolist()


def test_tolerances_come_off_the_time_and_off_every_sample(tmp_path):
    used = [1000.0, 5000.0, 6000.0]  # above 4096: 904 + 1904, x 0.1 s = 281 MB·s
    first = write_run(
        tmp_path / "a",
        "a",
        {"x": (14, 6000, 1200, 10)},
        samples={"x": [(14, used)]},
    )
    second = write_run(
        tmp_path / "b",
        "b",
        {"x": (20, 4000, 8800, 10)},
        samples={"x": [(20, [4000.0] * 22), (20, [4000.0] * 23)]},
    )
    rank((first, second), tmp_path / "out")
    _, content = read_ranking(tmp_path / "out")
    assert content["values"] == {"time": [[0], [5]], "gpu": [[281], [0]]}
    page = (tmp_path / "out/ranking.md").read_text()
    assert "time above 15 s (s) ×1" in page
    assert "area of GPU memory above 4096 MB (MB·s) ×1" in page
    rank((first, second), tmp_path / "out", "--memory-tolerance", "0", "--time-tolerance", "0")
    _, content = read_ranking(tmp_path / "out")
    assert content["values"] == {"time": [[14], [20]], "gpu": [[1200], [8800]]}
    assert "| time (s) ×1 | GPU area (MB·s) ×1 |" in (tmp_path / "out/ranking.md").read_text()


def test_failed_container_has_the_failures_values_and_no_tolerance(tmp_path):
    rows = {"x": (3600, 9000, 29_491_200, 360_000), "y": (20, 5096, 510, 10)}
    run = write_run(tmp_path / "a", "a", rows, samples={"y": [(20, [5096.0])]})
    rank([run], tmp_path / "out", "--weight", "cpu=1")
    _, content = read_ranking(tmp_path / "out")
    assert content["values"] == {
        "time": [[3600, 5]],
        "gpu": [[29_491_200, 100]],
        "cpu": [[360_000, 10]],
    }


def test_without_gpu_the_area_is_left_out(tmp_path, capsys):
    # A failed case's penalty stands in the table even where no GPU was measured.
    rows = {"x": (20, None, None, 5), "y": (3600, None, 29_491_200, 360_000)}
    without = write_run(tmp_path / "a", "a", rows)
    other = write_run(tmp_path / "b", "b", {"x": (30, None, None, 6)})
    assert rank((without, other), tmp_path / "out") == 0
    _, content = read_ranking(tmp_path / "out")
    assert list(content["values"]) == ["time"]
    assert any("GPU area (MB·s): no team has it" in remark for remark in content["remarks"])

    capsys.readouterr()
    with_gpu = write_run(tmp_path / "c", "c", {"x": (30, 3000, 500, 6)})
    runs = (without, with_gpu)
    assert rank(runs, tmp_path / "no", "--memory-tolerance", "0") == 2
    assert "--weight gpu=0" in capsys.readouterr().err
    assert rank(runs, tmp_path / "no") == 2
    assert "--memory-tolerance 0" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    assert rank(runs, tmp_path / "out", "--weight", "gpu=0") == 0


def test_weights_are_the_years(tmp_path):
    assert {key: weight for key, weight in RULES["flare22"].weights.items() if weight} == {
        "dsc": 1,
        "nsd": 1,
        "time": 1,
        "gpu": 0.5,
        "cpu": 0.5,
    }
    assert set(RULES["flare23"].weights) == set(METRICS)
    assert RULES["flare23"].weights["cpu"] == 0


@pytest.mark.parametrize("weight", ["speed=1", "gpu", "gpu=-1", "gpu=much"])
def test_wrong_weights_are_wrong_usage(weight, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        rank([tmp_path], tmp_path, "--weight", weight)
    assert stop.value.code == 2
    assert "--weight" in capsys.readouterr().err


def test_folders_that_are_no_run(tmp_path):
    with pytest.raises(RunError, match="neither"):
        read_run(tmp_path)
    (tmp_path / "a_Efficiency.csv").write_text(HEADER + "\nx.nii.gz,fast,1,1,1,1,1,1\n")
    with pytest.raises(RunError, match=r"case x\.nii\.gz, Time: 'fast' is no number"):
        read_run(tmp_path)
    (tmp_path / "b_Efficiency.csv").write_text(HEADER + "\n")
    with pytest.raises(RunError, match=r"a_Efficiency\.csv, b_Efficiency\.csv"):
        read_run(tmp_path)


def test_names(tmp_path):
    inputs = ("x", "x_0000", "x.nii.gz", "x_0000.nii")
    assert {case_of(name, is_input=True) for name in inputs} == {"x"}
    assert case_of("phantom_0000_0000.nii.gz", is_input=True) == "phantom_0000"
    assert case_of("phantom_0000.nii.gz", is_input=False) == "phantom_0000"
    row = {"x": (1, 1, 1, 1)}
    folders = [
        write_run(tmp_path / "one", "team", row),
        write_run(tmp_path / "two", "team", row),
        write_run(tmp_path / "deep/two", "team", row),
        write_run(tmp_path / "scores", scores={"x": (1, 1, 1, 1)}),
    ]
    names = [run.team for run in read_runs(folders)]
    assert names[0] == "team (one)"
    assert names[3] == "scores"
    assert len(set(names)) == 4
