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

WORST_CASES = 3
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
        worst: list[tuple[float, Case, np.ndarray]] = []

        def keep_worst(case: Case, prediction: np.ndarray, of_case: list[Score]) -> None:
            if of_case:
                worst.append((float(np.mean([score.dsc for score in of_case])), case, prediction))
                worst.sort(key=lambda entry: entry[0])
                del worst[WORST_CASES:]

        found = score_cases(
            self.cases[processes.rank :: processes.count],
            state.trained().state_dict(),
            self.metadata,
            processes.device,
            step=state.step,
            batch_size=batch_size if processes.device.type == "cuda" else None,
            on_case=keep_worst,
        )
        overlays = {}
        for dsc, case, prediction in worst:
            overlays[case.name] = dsc
            title = f"{case.name}, step {state.step}: mean DSC {dsc:.3f}"
            path = self.output / "overlays" / f"{case.name}.png"
            or_warn(draw_overlay, path, case, prediction, title)
        if processes.count > 1:
            parts: list = [None] * processes.count
            distributed.all_gather_object(parts, (found, overlays))
            found = [score for part, _ in parts for score in part]
            overlays = {name: dsc for _, part in parts for name, dsc in part.items()}
        self.scores += found
        improved = mean_organ_dsc(found) > state.best
        state.best = max(state.best, mean_organ_dsc(found))
        if not processes.first:
            return
        if improved:
            state.save(self.output / "best.pt")
        write_scores(self.output / "held_out.csv", self.scores)
        shown = sorted(overlays, key=overlays.get)[:WORST_CASES]
        for path in (self.output / "overlays").glob("*.png"):
            if path.stem not in shown:
                path.unlink()
        or_warn(draw_curves, self.output)
        print(f"held-out cases at step {state.step}:", *summary_lines(found), sep="\n", flush=True)
