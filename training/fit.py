"""The training loop, in a run's folder.

Whatever is random at a step depends on the seed and the step alone, so a run that was stopped
continues as if it had not been: the same command resumes at `last.pt`.
"""

import copy
import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from inference.device import choose_dtype
from inference.network.model import DOWNSAMPLING, AttentionUNet
from inference.network.weights import WeightsMetadata
from inference.prediction import trained_network
from training import TrainingError
from training.augmentation import Intensities, prepare, to_device
from training.cases import Case
from training.evaluation import score_cases
from training.loss import deep_supervision_loss
from training.pictures import draw_curves, draw_overlay, or_warn
from training.processes import Processes, StopRequest
from training.recipe import Recipe, learning_rate_at
from training.run_folder import ADVICE, Metrics, State, weights_metadata
from training.slices import Batch, Slices, collate, fit_on
from training.tables import Score, mean_organ_dsc, read_scores, summary, write_table
from training.widening import widen

OVERLAYS = 8
"""Held-out cases of which overlays are drawn at each scoring."""

_AUGMENTATION, _DEVICE_NOISE = 1, 2  # streams of random numbers beside that of the slices
_STATISTICS_BATCHES = 64  # of 8 slices
_CHECKPOINT_S = 300.0  # between checkpoints, at least
_SILENCE_S = 30.0  # without a line, at most
_UNKNOWN = 1_000_000  # steps, until their rate is measured
_SCORING_PART, _SCORING_S = 0.1, 60.0  # of a run by the clock, for its last scores, at most


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the type of convolutions for a recipe's `precision`."""
    if name == "auto" and device.type == "cuda":
        # `torch.cuda.is_bf16_supported` is True on Turing as well, which emulates it slowly.
        name = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}.get(name) or choose_dtype(device)


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """Move the exponential moving average of a network's weights and statistics, in place.

    At first the decay is smaller, (1 + step) / (10 + step): the first weights are soon outdated.
    """
    pairs = list(zip(average.state_dict().values(), network.state_dict().values(), strict=True))
    averages, values = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
    torch._foreach_lerp_(averages, values, 1 - min(decay, (1 + step) / (10 + step)))
    for count, value in (pair for pair in pairs if not pair[0].is_floating_point()):
        count.copy_(value)


class Run:
    """A network in training, with its slices and its folder."""

    def __init__(
        self,
        training: list[Case],
        synthetic: list[Case],
        held_out: list[Case],
        recipe: Recipe,
        intensities: Intensities,
        output: Path,
        processes: Processes,
        start: tuple[dict[str, Tensor], WeightsMetadata] | None = None,
    ) -> None:
        """Make the network, or resume at `last.pt` if it is there.

        It starts with random weights, or with those of `start`, which may be a narrower network's.

        Raises:
            TrainingError: the batch cannot be divided, the weights to start from are of another
                network, or the checkpoint is damaged.
        """
        device = processes.device
        self.share = recipe.batch_size // processes.count
        if self.share * processes.count != recipe.batch_size:
            raise TrainingError(
                f"a batch of {recipe.batch_size} cannot be divided over {processes.count} processes"
            )
        self.held_out, self.recipe, self.intensities = held_out, recipe, intensities
        self.output, self.processes, self.device = output, processes, device
        self.metadata = weights_metadata(recipe, intensities.mean, intensities.std)
        self.precision = choose_precision(recipe.precision, device)
        torch.backends.cudnn.benchmark = recipe.slice_size > 0  # where all batches are of one size
        torch.manual_seed(recipe.seed)
        network = AttentionUNet(**self.metadata.network)
        if start:
            try:
                widen(trained_network(*start), network)
            except ValueError as error:
                raise TrainingError(
                    f"the weights to start from are of another network ({error}): give its "
                    "numbers, or a multiple of its base_channels and no fewer supervised_channels"
                ) from error
        network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        average = copy.deepcopy(network) if recipe.ema_decay else None
        self.model: nn.Module = network
        if processes.count > 1:
            # Normalisation sees the whole batch where torch can do that, which is on CUDA.
            on_cuda = device.type == "cuda"
            shared = nn.SyncBatchNorm.convert_sync_batchnorm(network) if on_cuda else network
            self.model = DistributedDataParallel(
                shared, device_ids=[device] if on_cuda else None, broadcast_buffers=False
            )
        # Only convolutions decay; where none does, as in the paper, AdamW is Adam.
        groups: list[dict[str, Any]] = [{"params": []}, {"params": [], "weight_decay": 0.0}]
        for weight in self.model.parameters():
            groups[weight.ndim == 1]["params"].append(weight)
        optimizer = torch.optim.AdamW(
            groups,
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            fused=device.type == "cuda",
        )
        self.state = State(network, average, optimizer, torch.zeros((), device=device))
        if (output / "last.pt").is_file():
            self.state.load(output / "last.pt", device)
        self.scores: list[Score] = []
        if self.state.step and (output / "held_out.csv").is_file():
            known = read_scores(output / "held_out.csv")
            self.scores = [score for score in known if score.step <= self.state.step]
        resident = fit_on([*training, *synthetic], device)
        self.slices = Slices(training, synthetic, recipe, device if resident else None)
        self.generator = torch.Generator(device)
        self.reported = self.state.step, self.state.seconds
        processes.report(
            f"step {self.state.step}: {device}, {str(self.precision).removeprefix('torch.')}, "
            f"{processes.count} process(es), slices on {'the device' if resident else 'the host'}, "
            f"{sum(weight.numel() for weight in network.parameters()):,} parameters"
        )

    def batch(self, positions: range, *, plain: bool = False) -> Batch:
        """Return the slices at some positions of the sequence, sampled as `Slices.locate` does."""
        slices = [self.slices.slice_at(position, plain=plain) for position in positions]
        return collate(slices, DOWNSAMPLING * self.recipe.matrix_reduction)

    def plain_images(self, until: float) -> Iterator[Tensor]:
        """Return batches sampled uniformly, as inference shows them, until a time is reached.

        Batch normalisation's statistics, which at first are of augmented slices sampled by label,
        are set to those of these.
        """
        plain = dataclasses.replace(
            self.recipe, spatial_probability=0.0, window_probability=0.0, intensity_probability=0.0
        )
        for number in range(_STATISTICS_BATCHES):
            if number and time.monotonic() >= until:
                return
            batch = self.batch(range(8 * number, 8 * number + 8), plain=True)
            rngs = [np.random.default_rng((number, row)) for row in range(8)]
            generator = torch.Generator(self.device)
            yield prepare(batch, self.device, plain, self.intensities, rngs, generator)[0]

    def step(self, rate: float) -> None:
        """Change the weights by one batch: position p is in batch p // batch_size."""
        state, recipe, device = self.state, self.recipe, self.device
        start = state.step * recipe.batch_size + self.processes.rank * self.share
        positions = range(start, start + self.share)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        batch = self.batch(positions)
        rngs = [np.random.default_rng((recipe.seed, p, _AUGMENTATION)) for p in positions]
        noise_seed = np.random.SeedSequence((recipe.seed, start, _DEVICE_NOISE))
        self.generator.manual_seed(int(noise_seed.generate_state(1, np.uint64)[0] >> 1))
        images, labels = prepare(batch, device, recipe, self.intensities, rngs, self.generator)
        low = self.precision != torch.float32
        with torch.autocast(device.type, self.precision) if low else nullcontext():
            logits, supervised = self.model(images)
        loss = deep_supervision_loss(
            [logits, *supervised],
            labels,
            to_device(batch.annotated, device),
            cross_entropy=recipe.cross_entropy,
            dice_weight=recipe.dice_weight,
        )
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if recipe.gradient_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.gradient_clip)
        state.optimizer.step()
        if state.average:
            update_average(state.average, state.network, recipe.ema_decay, state.step)
        state.step += 1
        state.loss_sum += loss.detach()
        state.loss_count += 1

    def save(self) -> float:
        """Save a checkpoint; returns the seconds that it took."""
        start = time.monotonic()
        if self.processes.first:
            self.state.save(self.output / "last.pt")
        return time.monotonic() - start

    def score(self, stop: StopRequest, deadline: float = math.inf) -> None:
        """Save a checkpoint and score the held-out cases; every process must call it.

        Writes `held_out.csv`, `overlays/`, `curves.png` and, where the mean is the best yet,
        `best.pt`. A stop ends the scoring at once. No case is started that is likely to end after
        the deadline (of `time.monotonic`), and statistics take half of the time until then at most.
        """
        state, processes = self.state, self.processes
        until = (time.monotonic() + deadline) / 2
        update_bn(self.plain_images(until), state.trained)
        deadline -= self.save()
        if not self.held_out or any(score.step == state.step for score in self.scores):
            return
        stop.after_step = False
        found, started = [], time.monotonic()
        for case, prediction, scores in score_cases(
            self.held_out[processes.rank :: processes.count],
            state.trained.state_dict(),
            self.metadata,
            self.device,
            step=state.step,
            batch_size=self.recipe.batch_size if self.device.type == "cuda" else None,
        ):
            found.append((case.name, scores))
            if case in self.held_out[:OVERLAYS]:
                title = f"{case.name}, step {state.step}: mean DSC {mean_organ_dsc(scores):.3f}"
                path = self.output / "overlays" / f"{case.name}.png"
                or_warn(draw_overlay, path, case, prediction, title)
            now = time.monotonic()
            if now + (now - started) > deadline:
                break
            started = now
        if processes.count > 1:
            parts: list = [None] * processes.count
            distributed.all_gather_object(parts, found)
            found = [entry for part in parts for entry in part]
        of_step = [score for _, scores in found for score in scores]
        whole = len(found) == len(self.held_out)
        steps = {score.step for score in self.scores}
        best = [mean_organ_dsc([s for s in self.scores if s.step == step]) for step in steps]
        self.scores += of_step
        if processes.first:
            if whole and mean_organ_dsc(of_step) > max(best, default=-1):
                state.save(self.output / "best.pt")
            write_table(self.output / "held_out.csv", Score, self.scores)
            or_warn(draw_curves, self.output / "curves.png", state.metrics, self.scores)
            part = "" if whole else f", {len(found)} of {len(self.held_out)}: no time for more"
            processes.report(f"held-out cases at step {state.step}{part}:\n{summary(of_step)}")
        stop.after_step = True

    def report(self, end: int, rate: float, *, row: bool) -> None:
        """Print a line, and add a row to `metrics.csv`; waits for the device.

        Raises:
            TrainingError: the loss is no longer a number.
        """
        state = self.state
        if row and self.processes.count > 1:
            distributed.all_reduce(state.loss_sum)
        loss = (state.loss_sum / (state.loss_count * (self.processes.count if row else 1))).item()
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss} at step {state.step}: {ADVICE}")
        step, seconds = self.reported
        pace = max(state.seconds - seconds, 1e-9) / (state.step - step)
        speed = self.recipe.batch_size / pace
        self.processes.report(
            f"step {state.step}/{end}  loss {loss:.4f}  lr {rate:.2e}  {speed:.1f} slices/s  "
            f"{tqdm.format_interval((end - state.step) * pace)} left"
        )
        if row:
            seconds = round(state.seconds, 1)
            state.metrics.append(Metrics(state.step, loss, rate, round(speed, 2), seconds))
            if self.processes.first:
                write_table(self.output / "metrics.csv", Metrics, state.metrics)
            state.loss_sum, state.loss_count = torch.zeros((), device=self.device), 0
            self.reported = state.step, state.seconds

    def train(self, stop: StopRequest, deadline: float | None = None) -> int:
        """Train until the recipe's last step, a stop or a deadline; returns the steps done.

        At a deadline (of `time.monotonic`) the last scores end, whatever the recipe's steps: the
        learning rate's schedule follows the measured rate of steps.

        Raises:
            TrainingError: the loss or the weights are no longer finite.
            OSError: the run's files cannot be written.
        """
        state, recipe, processes = self.state, self.recipe, self.processes
        began, printed, now = state.step, -math.inf, time.monotonic()
        end, steps_until = recipe.steps, math.inf
        if deadline is not None:
            end = state.step + _UNKNOWN
            steps_until = deadline - min(_SCORING_PART * (deadline - now), _SCORING_S)
        next_save, next_score = now + _CHECKPOINT_S, now + 60 * recipe.evaluation_minutes
        first_ended = now
        self.model.train()
        stop.after_step, stopped = True, 0
        while state.step < end and not stopped:
            start = time.monotonic()
            rate = learning_rate_at(state.step, dataclasses.replace(recipe, steps=end))
            self.step(rate)
            now = time.monotonic()
            planned = end
            if state.step == began + 1:
                first_ended = now  # it is slower than the others
            elif deadline is not None:
                pace = (now - first_ended) / (state.step - began - 1)
                planned = state.step + max(0, int((steps_until - now) / max(pace, 1e-9)))
            row, score_due = state.step % recipe.log_interval == 0, 0
            if processes.count == 1 or row:  # asking the others waits for the device
                end, stopped, score_due = processes.greatest(
                    planned if processes.first else 0, stop.signal, int(now > next_score)
                )
            row = row or state.step >= end
            state.seconds += now - start
            if row or now - printed > _SILENCE_S:
                self.report(end, rate, row=row)
                printed = time.monotonic()
                state.seconds += printed - now
            if state.step < end and not stopped:
                if score_due:  # it takes a tenth of the time at most, and saving 5 %
                    before = time.monotonic()
                    self.score(stop)
                    now = time.monotonic()
                    next_score = now + max(60 * recipe.evaluation_minutes, 9 * (now - before))
                elif now > next_save:
                    took = self.save()
                    next_save = time.monotonic() + max(_CHECKPOINT_S, 20 * took)
        if stopped:
            self.save()
        else:
            self.score(stop, deadline or math.inf)
        if processes.first:
            or_warn(draw_curves, self.output / "curves.png", state.metrics, self.scores)
        if processes.count > 1:  # one that leaves while the first still writes may abort
            distributed.barrier()
        return state.step
