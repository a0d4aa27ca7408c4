"""The held-out cases of a run: when they are scored, and what is kept of it."""

import time
from pathlib import Path

import numpy as np
from torch import distributed

from inference.labels import LABEL_NAMES
from inference.weights import WeightsMetadata
from training.augmentation import Intensities
from training.cases import Case
from training.checkpoint import State
from training.evaluation import (
    Score,
    mean_organ_dsc,
    read_scores,
    score_cases,
    summary_line,
    write_scores,
)
from training.pictures import draw_curves, draw_overlay
from training.processes import Processes, StopRequest
from training.progress import duration
from training.recipe import Recipe

WORST_CASES = 3
"""Held-out cases of which overlays are drawn at each scoring."""


class HeldOut:
    """Scores a run's held-out cases and keeps `held_out.csv`, `overlays/` and `best.pt`."""

    def __init__(
        self,
        cases: list[Case],
        recipe: Recipe,
        intensities: Intensities,
        output: Path,
        processes: Processes,
        state: State,
    ) -> None:
        """Take up the scores that were written until the state's step."""
        self.cases = cases
        self.recipe = recipe
        self.output = output
        self.processes = processes
        self.state = state
        self.metadata = WeightsMetadata(
            base_channels=recipe.base_channels,
            num_classes=len(LABEL_NAMES),
            intensity_mean=intensities.mean,
            intensity_std=intensities.std,
            matrix_reduction=recipe.matrix_reduction,
            attention=recipe.attention,
            supervised_channels=recipe.supervised_channels,
            clip_hu=recipe.clips,
            trained_on="",
            licence="",
            date="",
            revision="",
        )
        self.scores: list[Score] = []
        table = output / "held_out.csv"
        if state.step and table.is_file():
            self.scores = [score for score in read_scores(table) if score.step <= state.step]

    def due(self) -> bool:
        """Whether the state's step is one to score at and has not been scored yet."""
        step, recipe = self.state.step, self.recipe
        ends = step == recipe.steps or step % recipe.evaluation_interval == 0
        return (
            bool(self.cases and step)
            and ends
            and not any(score.step == step for score in self.scores)
        )

    def score(self, stop: StopRequest) -> None:
        """Score all cases with the state's weights; every process must call it.

        Args:
            stop: holds back an end while `best.pt` is written.
        """
        started, state, processes = time.monotonic(), self.state, self.processes
        worst: list[tuple[float, Case, np.ndarray]] = []

        def keep_worst(case: Case, prediction: np.ndarray, of_case: list[Score]) -> None:
            if of_case:
                worst.append((float(np.mean([score.dsc for score in of_case])), case, prediction))
                worst.sort(key=lambda entry: entry[0])
                del worst[WORST_CASES:]

        found = score_cases(
            self.cases[processes.rank :: processes.count],
            state.trained_weights(),
            self.metadata,
            processes.device,
            batch_size=self.recipe.batch_size if processes.device.type == "cuda" else None,
            step=state.step,
            on_case=keep_worst,
        )
        overlays = {}
        for dsc, case, prediction in worst:
            overlays[case.name] = dsc
            title = f"{case.name}, step {state.step}: mean DSC {dsc:.3f}"
            path = self.output / "overlays" / f"{case.name}.png"
            draw_overlay(path, case, prediction, title)
        if processes.count > 1:
            parts: list = [None] * processes.count
            distributed.all_gather_object(parts, (found, overlays))
            found = [score for part, _ in parts for score in part]
            overlays = {name: dsc for _, part in parts for name, dsc in part.items()}
        self.scores = [score for score in self.scores if score.step != state.step] + found
        with stop.unbroken:
            improved = mean_organ_dsc(found) > state.best
            state.best = max(state.best, mean_organ_dsc(found))
            if improved and processes.first:
                state.save(self.output / "best.pt")
            if processes.first:
                write_scores(self.output / "held_out.csv", self.scores)
        if processes.first:
            shown = sorted(overlays, key=overlays.get)[:WORST_CASES]
            for path in (self.output / "overlays").glob("*.png"):
                if path.stem not in shown:
                    path.unlink()
            draw_curves(self.output)
            print(f"{summary_line(found)}  ({duration(time.monotonic() - started)})", flush=True)
