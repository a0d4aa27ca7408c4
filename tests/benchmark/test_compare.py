"""Two runs compared: ratios of known numbers, their intervals, what is not compared."""

import numpy as np
import pytest
from made_up_runs import write_run

from benchmark.__main__ import main
from benchmark.judging.compare import spread


def test_spread_of_known_ratios():
    pairs = np.array([[1, 2], [2, 1], [1, 4], [1, 4]], float)  # ratios 1/2, 2, 1/4, 1/4
    found = spread(pairs, ratios=True)
    assert found.mean == pytest.approx((0.5 * 2 * 0.25 * 0.25) ** 0.25)
    assert found.median == pytest.approx(np.sqrt(0.5 * 0.25))  # middle of the logarithms
    assert (found.low, found.high) == pytest.approx((0.25, 2))
    assert found.interval[0] < found.mean < found.interval[1]
    turned = spread(pairs[:, ::-1], ratios=True)
    assert turned.mean == pytest.approx(1 / found.mean)
    same = spread(np.array([[3, 1], [6, 2]], float), ratios=True)
    assert (same.mean, *same.interval) == pytest.approx((3, 3, 3))
    assert spread(pairs[:1], ratios=True).interval is None


def test_interval_of_three_ratios_is_student_s():
    found = spread(np.array([[1, 2], [2, 2], [1, 4]], float), ratios=True)
    logs = np.log([0.5, 1, 0.25])
    half = 4.3027 * logs.std(ddof=1) / np.sqrt(3)  # t of 2 degrees of freedom, from the tables
    expected = np.exp([logs.mean() - half, logs.mean() + half])
    assert found.interval == pytest.approx(expected, rel=1e-4)


def test_interval_of_a_mean():
    rng = np.random.default_rng(0)
    differences = rng.normal(0.1, 1, 400)
    pairs = np.stack([differences, np.zeros(400)], axis=1)
    found = spread(pairs, ratios=False)
    error = differences.std(ddof=1) / 20  # standard error of the mean of 400
    assert found.mean == pytest.approx(differences.mean())
    assert found.interval == pytest.approx(
        (differences.mean() - 1.96 * error, differences.mean() + 1.96 * error), abs=0.1 * error
    )


def test_compare_pairs_cases_and_takes_medians_of_repeats(tmp_path, capsys):
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
    assert main(["compare", str(ours), str(theirs)]) == 0
    page = capsys.readouterr().out
    # x: median of 5, 2 and 3 s against 6; y: 4 against 16. sqrt(1/2 * 1/4) = 0.354; f: 3600 / 7.
    assert "**A failed 1 of 3 cases, B none.** With failures at 3600 s: no difference in" in page
    assert (
        "Of the cases that both finished: no difference in time shown: A takes 0.35 times" in page
    )
    low, high = np.exp(np.log(0.125) / 2 + np.array([-1, 1]) * 12.7062 * np.log(2) / 2)
    row = f"0.354 | {low:.3f} to {high:.3f} | 0.354 | 0.250 | 0.500 |"
    assert f"| time (s), both finished | 2 | {row}" in page
    assert f"| time (s) | 3 | {(0.125 * 3600 / 7) ** (1 / 3):.3f} |" in page
    assert "| max GPU memory (MB) | 2 | 0.500 |" in page
    assert "| GPU area (MB·s), both finished | 1 |" in page  # y's area of 0 has no ratio
    assert "| organ DSC | 2 | +0.0500 |" in page
    assert "| tumor DSC | 2 | +0.1500 | " in page
    assert "only in ours: z" in page
    assert "failed in ours: f" in page
    assert "**other gpu**: A on NVIDIA H100, B on NVIDIA H200" in page
    assert "other cpu" not in page


def test_compare_says_a_difference_only_where_the_interval_has_no_one(tmp_path, capsys):
    seconds = [10, 11, 12, 13, 14, 15]
    a = write_run(tmp_path / "a", "a", {f"{n}": (n, 1, 1, 1) for n in seconds})
    b = write_run(tmp_path / "b", "b", {f"{n}": (3 * n, 1, 1, 1) for n in seconds})
    mixed = {f"{n}": (n + (-1) ** n, 1, 1, 1) for n in seconds}
    c = write_run(tmp_path / "c", "c", mixed)
    main(["compare", str(a), str(b)])
    page = capsys.readouterr().out
    assert "**A is 3.00 times as fast as B** (geometric mean of 6 cases; 95 % interval 3.00" in page
    main(["compare", str(a), str(c)])
    assert "**no difference in time shown: A takes 1.00 times as long as B**" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("image", ["team:latest", None])
def test_compare_refuses_the_ram_of_a_container_against_a_command(tmp_path, capsys, image):
    row = {"x": (1, None, None, 1), "y": (2, None, None, 1)}
    machine = {"gpu": None, "cpu": "x", "cores": 2}
    a = write_run(tmp_path / "a", "a", row, environment=machine | {"image": "abdoseg:latest"})
    b = write_run(tmp_path / "b", "b", row, environment=machine | {"image": image})
    assert main(["compare", str(a), str(b)]) == 0
    page = capsys.readouterr().out
    assert ("| max RAM (MB) |" in page) == (image is not None)
    assert ("**RAM is not compared**: A's is cgroup, B's is process tree" in page) == (
        image is None
    )
    assert "a has no scores" in page
    assert f"--report {a} makes them" in page
    assert main(["rank", str(a), str(b), "--report", str(tmp_path / "out")]) == 0
    assert ("were not read in the same way" in capsys.readouterr().out) == (image is None)


def test_compare_needs_a_common_case(tmp_path, capsys):
    a = write_run(tmp_path / "a", "a", {"x": (1, 1, 1, 1)})
    b = write_run(tmp_path / "b", "b", {"y": (1, 1, 1, 1)})
    assert main(["compare", str(a), str(b)]) == 2
    assert "no case in common" in capsys.readouterr().err
    assert main(["compare", str(a), str(tmp_path / "none")]) == 2
