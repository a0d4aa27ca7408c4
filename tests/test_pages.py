"""The pages for readers: every sub-command, flag, make target, path and link in them exists."""

import argparse
import importlib
import re
from pathlib import Path

import pytest

from benchmark.__main__ import COMMANDS
from cluster.command import make_cluster_parser
from inference.options import make_parser
from training.options import make_parser as make_training_parser

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "training/README.md"]
PAGES += ["benchmark/GPU.md", "benchmark/LIMITS.md"]
PAGES += [str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").glob("*.md"))]

FOREIGN = {  # of docker, sbatch, ray, torchrun, nnU-Net and pip; of `python -m tests.hostile`
    *("--no-deps", "--no-index", "--only-binary", "--python-version", "--implementation"),
    *("--platform", "--target", "--upgrade"),
    *("--gpus", "--rm", "--user", "--cap-drop", "--security-opt", "--network", "--read-only"),
    *("--tmpfs", "--shm-size", "--build-arg", "--array", "--head", "--disable-usage-stats"),
    *("--generate", "--nproc-per-node", "--disable_tta", "--count", "--dicom"),
}
COMMAND = re.compile(
    r"(?:python -m (inference|cluster|benchmark|training)|-m (training)|sh predict\.sh|"
    r"abdoseg(?= --))\b([^\n#`|;]*)"
)


def flags(parser):
    return {flag for action in parser._actions for flag in action.option_strings}


def known_flags():
    """The flags of each command by (program, sub-command)."""
    known = {("inference", ""): flags(make_parser())}
    known["cluster", ""] = flags(make_cluster_parser())
    for name, (module, *_) in COMMANDS.items():
        parser = argparse.ArgumentParser()
        importlib.import_module(module).add_arguments(parser)
        known["benchmark", name] = flags(parser)
    (training,) = make_training_parser()._subparsers._group_actions
    return known | {("training", name): flags(sub) for name, sub in training.choices.items()}


KNOWN = known_flags()
ALL = FOREIGN.union(*KNOWN.values())


def wrong_commands(text):
    """Commands, over several lines or not, that no argument parser takes; so single flags."""
    text = re.sub(r"\s*\\\n\s*", " ", text)
    text = re.sub(r"`[^`]+`", lambda code: " ".join(code[0].split()), text)
    for command in COMMAND.finditer(text):
        program = command[1] or command[2] or "inference"
        words = re.split(r"[\s\"']+", command[3].strip())
        names = {name for known, name in KNOWN if known == program}
        name = "" if "" in names else "fit" if words[0].startswith("--") else words[0]
        if name in names:
            given = {word.partition("=")[0] for word in words if word.startswith("--")}
            yield from (f"{command[0]}: {flag}" for flag in given - KNOWN[program, name] - FOREIGN)
        elif name not in ("", "COMMAND", "…"):
            yield command[0]
    yield from set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) - ALL


def wrong_places(page, text):
    """Make targets, paths and links, with their anchors, that are not there."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    yield from set(re.findall(r"(?:`|^ {4})make ([\w-]+)", text, re.M)) - set(targets)
    packages = "inference|cluster|benchmark|training|synthetic|deploy|tests|docs"
    for place in re.findall(rf"`((?:{packages})/[\w./-]*)`", text):
        if not (ROOT / place).exists():
            yield place
    for link in re.findall(r"\]\((?!https:)([^)]+)\)", text):
        target, _, anchor = link.partition("#")
        file = page.parent / target if target else page
        if not file.exists():
            yield link
        elif anchor:
            heads = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), re.M)
            if anchor not in {re.sub(r"[^\w-]", "", h.lower().replace(" ", "-")) for h in heads}:
                yield link


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_names_exists(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert [*wrong_commands(text), *wrong_places(ROOT / name, text)] == []


def test_a_wrong_command_is_found():
    page = "`python -m benchmark chek`, python -m training fit --seed 1 \\\n --report X; --dta"
    found = [line.split()[-1] for line in wrong_commands(page)]
    assert found == ["chek", "--report", "--dta"]


def test_the_first_page_is_one_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
