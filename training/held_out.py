"""The held-out cases of a run: scored from time to time, with what is written of it."""

from pathlib import Path

import numpy as np
from torch import distributed

from inference.network.weights import WeightsMetadata
from training.cases import Case
from training.checkpoint import State
from training.evaluation import (
    Score,
    mean_organ_dsc,
    read_scores,
    score_cases,
    summary_lines,
    write_scores,
)
from training.pictures import draw_curves, draw_overlay, or_warn
from training.processes import Processes

OVERLAYS = 8
"""Held-out cases of which overlays are drawn at each scoring."""


class HeldOut:
    """Scores a run's held-out cases; writes `held_out.csv`, `overlays/` and `best.pt`."""

    def __init__(
        self,
        cases: list[Case],
        metadata: WeightsMetadata,
        output: Path,
        processes: Processes,
        state: State,
    ) -> None:
        """Read the scores that were written until the state's step.

        Raises:
            ValueError: they are damaged.
        """
        self.cases = cases
        self.metadata = metadata
        self.output = output
        self.processes = processes
        self.state = state
        self.scores: list[Score] = []
        table = output / "held_out.csv"
        if state.step and table.is_file():
            self.scores = [score for score in read_scores(table) if score.step <= state.step]

    @property
    def due(self) -> bool:
        """Whether there are cases, and they have no scores of the state's step."""
        return bool(self.cases and self.state.step) and not any(
            score.step == self.state.step for score in self.scores
        )

    def score(self, batch_size: int) -> None:
        """Score all cases with the state's weights; every process must call it.

        Args:
            batch_size: slices at once on CUDA, where training needs memory as well.
        """
        state, processes = self.state, self.processes

        def draw(case: Case, prediction: np.ndarray, scores: list[Score]) -> None:
            if case in self.cases[:OVERLAYS]:
                title = f"{case.name}, step {state.step}: {summary_lines(scores)[-1].strip()}"
                path = self.output / "overlays" / f"{case.name}.png"
                or_warn(draw_overlay, path, case, prediction, title)

        found = score_cases(
            self.cases[processes.rank :: processes.count],
            state.trained().state_dict(),
            self.metadata,
            processes.device,
            step=state.step,
            batch_size=batch_size if processes.device.type == "cuda" else None,
            on_case=draw,
        )
        if processes.count > 1:
            parts: list = [None] * processes.count
            distributed.all_gather_object(parts, found)
            found = [Score(*score) for part in parts for score in part]
        self.scores += found
        improved = mean_organ_dsc(found) > state.best
        state.best = max(state.best, mean_organ_dsc(found))
        if processes.first:
            if improved:
                state.save(self.output / "best.pt")
            write_scores(self.output / "held_out.csv", self.scores)
            or_warn(draw_curves, self.output)
            lines = [f"held-out cases at step {state.step}:", *summary_lines(found)]
            processes.report("\n".join(lines))
