"""The efficiency run with containers: the engine's orders, its refusals, and what is left of it."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from harness import (
    StandInEngine,
    make_inputs,
    read_case,
    read_table,
    run_efficiency,
    start_efficiency,
    wait_for,
)

from benchmark.containers.runner import Container, Folders

BASE_IMAGE = "python:3.11-slim-bookworm"


def test_the_command_line_is_the_organisers():
    folders = Folders(Path("/here/inputs"), Path("/here/outputs"), Path("log"))
    line = Container("team:latest", "28g", "1")
    assert line.command_line("team", folders) == [
        *("docker", "container", "run", "--shm-size=28gb", "-m", "28G", "--gpus", "device=1"),
        *("--name", "team", "--rm", "-v", "/here/inputs/:/workspace/inputs/"),
        *("-v", "/here/outputs/:/workspace/outputs/", "team:latest"),
        *("/bin/bash", "-c", "sh predict.sh"),
    ]


class RealEngine:
    """The Docker engine of this machine."""

    environment: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, folder: Path):
        self.images: list[str] = []

    def make_image(self, name: str, predict: str) -> None:
        with_script = f"mkdir -p /workspace; printf %s '{predict}' > /workspace/predict.sh"
        self._docker("run", "--name", f"make-{name}", BASE_IMAGE, "sh", "-c", with_script)
        self._docker("commit", "--change", "WORKDIR /workspace", f"make-{name}", f"{name}:latest")
        self._docker("rm", f"make-{name}")
        self.images.append(name)

    def containers(self, name: str) -> list[str]:
        return self._docker("ps", "-a", "--filter", f"name=^/{name}-", "-q").split()

    def close(self) -> None:
        for name in self.images:
            self._docker("rmi", f"{name}:latest")

    def _docker(self, *arguments: str) -> str:
        done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True)
        return done.stdout


def engine_answers() -> bool:
    if shutil.which("docker") is None:
        return False
    question = ["docker", "image", "inspect", BASE_IMAGE]
    return subprocess.run(question, capture_output=True).returncode == 0


ENGINES = [StandInEngine, *([RealEngine] if engine_answers() else [])]


@pytest.fixture(params=ENGINES)
def engine(request, tmp_path):
    engine = request.param(tmp_path / "engine")
    yield engine
    engine.close()


CONTAINER_SCRIPT = """set -e
case $(basename inputs/*_0000.nii.gz _0000.nii.gz) in
a) sleep 0.4; cp inputs/a_0000.nii.gz outputs/a.nii.gz ;;
b) echo no luck; exit 4 ;;
c) sleep 1000 ;;
esac
"""


@pytest.mark.slow
def test_containers_run_fail_and_are_removed(engine, tmp_path):
    team = f"abdoseg-test-{os.getpid()}"
    engine.make_image(team, CONTAINER_SCRIPT)
    done = run_efficiency(
        *("--inputs", make_inputs(tmp_path / "in", "a", "b", "c"), "--outputs", tmp_path / "out"),
        *("--report", tmp_path / "run", "--image", f"{team}:latest", "--timeout", 3),
        **engine.environment,
    )
    assert done.returncode == 1, done.stderr
    statuses = [read_case(tmp_path / "run", name)["status"] for name in "abc"]
    assert statuses == ["ok", "crashed", "timeout"]
    assert read_case(tmp_path / "run", "b")["reason"] == "exit code 4: no luck"
    assert read_case(tmp_path / "run", "a")["seconds"] >= 0.4
    assert len(read_table(tmp_path / "run", team)) == 3
    assert engine.containers(team) == []
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    assert environment["image"] == f"{team}:latest"
    assert environment["image_digest"].startswith("sha256:")


@pytest.mark.slow
def test_ctrl_c_removes_the_container(engine, tmp_path):
    team = f"abdoseg-stop-{os.getpid()}"
    engine.make_image(team, CONTAINER_SCRIPT)
    process = start_efficiency(
        *("--inputs", make_inputs(tmp_path / "in", "c"), "--outputs", tmp_path / "out"),
        *("--report", tmp_path / "run", "--image", team),
        **engine.environment,
    )
    wait_for(lambda: engine.containers(team))
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert process.returncode == 130
    assert engine.containers(team) == []


@pytest.mark.slow
def test_the_engine_is_asked_for_what_the_organisers_ask(tmp_path):
    engine = StandInEngine(tmp_path / "engine")
    engine.make_image("team", CONTAINER_SCRIPT)
    archive = tmp_path / "TEAM.tar.gz"
    archive.write_text("team:latest")
    done = run_efficiency(
        *("--inputs", make_inputs(tmp_path / "in", "a"), "--outputs", tmp_path / "out"),
        *("--report", tmp_path / "run", "--archive", archive, "--memory-limit", "2g"),
        **engine.environment,
    )
    assert done.returncode == 0, done.stderr
    orders = [json.loads(line) for line in (engine.folder / "orders").read_text().splitlines()]
    assert ["load", "-i", str(archive)] in orders
    (order,) = [order for order in orders if order[:2] == ["container", "run"]]
    assert order[2:5] == ["--shm-size=2gb", "-m", "2G"]
    assert order[-4:] == ["team:latest", "/bin/bash", "-c", "sh predict.sh"]
    assert "-e" not in order


def test_an_archive_with_another_image_says_which_name_is_needed(tmp_path):
    engine = StandInEngine(tmp_path / "engine")
    archive = tmp_path / "Team.tar.gz"
    archive.write_text("our-best:v2")
    done = run_efficiency(
        *("--inputs", make_inputs(tmp_path / "in", "a"), "--outputs", tmp_path / "out"),
        *("--report", tmp_path / "run", "--archive", archive),
        **engine.environment,
    )
    assert done.returncode == 2
    assert "our-best:v2" in done.stderr
    assert "team:latest" in done.stderr


@pytest.mark.slow
def test_an_engine_that_refuses_is_not_the_teams_failure(tmp_path):
    engine = StandInEngine(tmp_path / "engine")
    engine.make_image("team", CONTAINER_SCRIPT)
    (engine.folder / "images/team/refused").touch()
    done = run_efficiency(
        *("--inputs", make_inputs(tmp_path / "in", "a"), "--outputs", tmp_path / "out"),
        *("--report", tmp_path / "run", "--image", "team"),
        **engine.environment,
    )
    assert done.returncode == 2
    assert "could not select device driver" in done.stderr
    assert not (tmp_path / "run/team_Efficiency.csv").exists()
