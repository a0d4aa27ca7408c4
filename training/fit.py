"""The training loop.

A run's folder holds `recipe.toml` (its numbers, all of them), `run.json` (its cases and
intensities), `metrics.csv`, `held_out.csv`, `curves.png`, `last.pt` and `best.pt` (checkpoints),
and `overlays/` (of the first held-out cases).

Whatever is random at a step depends on the seed and the step alone, so a run that was stopped goes
on as if it had not been: the same command resumes at `last.pt`.
"""

import copy
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from inference.device import choose_dtype
from inference.network.model import DOWNSAMPLING, AttentionUNet
from inference.network.weights import WeightsMetadata
from inference.prediction import trained_network
from training import TrainingError
from training.augmentation import Intensities, prepare
from training.cases import Case
from training.checkpoint import ADVICE, State
from training.device_slices import DeviceSlices, fits
from training.held_out import HeldOut
from training.loss import deep_supervision_loss
from training.pictures import draw_curves, or_warn
from training.processes import Processes, StopRequest, leave_stopping_to_parent
from training.recipe import Recipe, learning_rate_at
from training.run_folder import (
    METRICS,
    read_metrics,
    weights_metadata,
    write_metrics,
)
from training.slices import Batch, Slice, SliceDataset, collate
from training.widening import widen

_AUGMENTATION, _DEVICE_NOISE = 1, 2  # streams of random numbers beside that of the slices
_STATISTICS_POSITIONS = range(0, 512, 8)  # of the first slices of batches
_CHECKPOINT_S = 300.0  # between checkpoints, at least
_SILENCE_S = 30.0  # without a line, at most
_UNKNOWN = 1_000_000  # steps, until their rate is measured


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the type of convolutions for a recipe's `precision`."""
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.type == "cuda":
        # Asked for bf16, torch says yes of Turing as well, which emulates it slowly.
        major, _ = torch.cuda.get_device_capability(device)
        return torch.bfloat16 if major >= 8 else torch.float16
    return choose_dtype(device)


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """Move the exponential moving average of a network's weights and statistics, in place.

    At first the decay is smaller, (1 + step) / (10 + step): the first weights are soon outdated.
    """
    pairs = list(zip(average.state_dict().values(), network.state_dict().values(), strict=True))
    averages, values = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
    torch._foreach_lerp_(averages, values, 1 - min(decay, (1 + step) / (10 + step)))
    for count, value in (pair for pair in pairs if not pair[0].is_floating_point()):
        count.copy_(value)


@torch.no_grad()
def estimate_statistics(
    network: nn.Module, batches: Iterable[Batch], recipe: Recipe, intensities: Intensities
) -> None:
    """Set batch normalisation's statistics to those of slices as inference shows them, in place.

    The running ones are of augmented slices sampled by label.

    Args:
        network: in training form.
        batches: of slices sampled uniformly.
        recipe: for cropping, clipping and the matrix reduction.
        intensities: for the z-score.
    """
    device = next(network.parameters()).device
    plain = dataclasses.replace(
        recipe, spatial_probability=0.0, window_probability=0.0, intensity_probability=0.0
    )
    layers = [layer for layer in network.modules() if isinstance(layer, _BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain mean over the batches
    mode = network.training
    network.train()
    for number, batch in enumerate(batches):
        rngs = [np.random.default_rng((number, row)) for row in range(len(batch.labels))]
        images, _ = prepare(batch, device, plain, intensities, rngs, torch.Generator(device))
        network(images)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    network.train(mode)


def _network(
    recipe: Recipe, start: tuple[dict[str, Tensor], WeightsMetadata] | None
) -> AttentionUNet:
    """Return a network with random weights, or those to start from; raises as `fit`."""
    torch.manual_seed(recipe.seed)
    network = AttentionUNet(
        base_channels=recipe.base_channels,
        attention=recipe.attention,
        supervised_channels=recipe.supervised_channels,
    )
    if start:
        try:
            widen(trained_network(*start), network)
        except ValueError as error:
            raise TrainingError(
                f"the weights to start from are of another network ({error}): give its numbers, or "
                "a multiple of its base_channels and no fewer supervised_channels"
            ) from error
    return network


def _optimizer(model: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """Return AdamW that decays convolutions alone; without decay, as in the paper, it is Adam."""
    weights = list(model.parameters())
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1]},
        {"params": [weight for weight in weights if weight.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        fused=device.type == "cuda",
    )


def fit(
    training: list[Case],
    held_out: list[Case],
    recipe: Recipe,
    intensities: Intensities,
    output: Path,
    processes: Processes,
    stop: StopRequest,
    *,
    workers: int = 0,
    on_device: bool | None = None,
    deadline: float | None = None,
    synthesise: Callable[[np.random.Generator], Slice] | None = None,
    start: tuple[dict[str, Tensor], WeightsMetadata] | None = None,
) -> int:
    """Train until the recipe's last step or a time, from `last.pt` if it is there.

    Args:
        training, held_out: cached cases.
        recipe: all numbers.
        intensities: of the training set.
        output: the run's folder.
        processes: of which this is one.
        stop: asks to save and end after a step.
        workers: processes that read slices; 0 reads them here.
        on_device: hold all slices on the device; None does where they fit a CUDA device.
        deadline: of `time.monotonic`, at which the last step ends, whatever the recipe's steps: the
            learning rate's schedule follows the measured rate of steps.
        synthesise: draws the recipe's synthetic part of the slices.
        start: the network's first weights, or a narrower network's, and their metadata; None begins
            with random ones.

    Returns:
        The steps done.

    Raises:
        TrainingError: the batch cannot be divided, or the loss is no longer a number.
        OSError: the run's files cannot be written.
    """
    device, first, report = processes.device, processes.first, processes.report
    share = recipe.batch_size // processes.count
    if share * processes.count != recipe.batch_size:
        raise TrainingError(
            f"a batch of {recipe.batch_size} cannot be divided over {processes.count} processes"
        )
    precision = choose_precision(recipe.precision, device)
    autocast = (
        torch.autocast(device.type, precision) if precision != torch.float32 else nullcontext()
    )
    torch.backends.cudnn.benchmark = recipe.slice_size > 0  # where all batches are of one size

    # The network. Normalisation sees the whole batch where torch can do that, which is on CUDA.
    network = _network(recipe, start).to(device, memory_format=torch.channels_last)
    average = copy.deepcopy(network) if recipe.ema_decay else None
    model: nn.Module = network
    if processes.count > 1:
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
        )
    bare = model.module if processes.count > 1 else model
    optimizer = _optimizer(model, recipe, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    state = State(bare, average, optimizer, scaler, torch.zeros((), device=device))
    last = output / "last.pt"
    if last.is_file():
        state.load(last, device)

    # The slices: position p of the endless sequence is in batch p // batch_size.
    dataset = SliceDataset(
        training,
        seed=recipe.seed,
        label_balanced_fraction=recipe.label_balanced_fraction,
        synthesise=synthesise,
        synthetic_fraction=recipe.synthetic_fraction,
    )
    plain = dataclasses.replace(
        dataset, label_balanced_fraction=0.0, synthetic_fraction=0.0 if training else 1.0
    )
    multiple = DOWNSAMPLING * recipe.matrix_reduction
    resident = None
    if fits(dataset, device) if on_device is None else on_device:
        resident = DeviceSlices(dataset, device, multiple)

    def batch_at(source: SliceDataset, positions: range) -> Batch:
        if resident:
            return resident.batch(source, positions)
        return collate([source[position] for position in positions], multiple)

    def positions_from(step: int) -> Iterator[range]:
        for number in itertools.count(step):
            begin = number * recipe.batch_size + processes.rank * share
            yield range(begin, begin + share)

    batches: Iterable[Batch] = (batch_at(dataset, drawn) for drawn in positions_from(state.step))
    if workers and not resident:
        batches = DataLoader(
            dataset,
            batch_sampler=positions_from(state.step),
            collate_fn=partial(collate, multiple=multiple),
            num_workers=workers,
            worker_init_fn=leave_stopping_to_parent,
            pin_memory=device.type == "cuda",
        )
    generator = torch.Generator(device)

    def gradient_step(positions: range, batch: Batch, rate: float) -> Tensor:
        """Change the weights by one batch; returns its loss, on the device."""
        for group in optimizer.param_groups:
            group["lr"] = rate
        rngs = [np.random.default_rng((recipe.seed, p, _AUGMENTATION)) for p in positions]
        noise_seed = np.random.SeedSequence((recipe.seed, positions[0], _DEVICE_NOISE))
        generator.manual_seed(int(noise_seed.generate_state(1, np.uint64)[0] >> 1))
        images, labels = prepare(batch, device, recipe, intensities, rngs, generator)
        annotated = batch.annotated.to(device, non_blocking=True)
        with autocast:
            logits, supervised = model(images)
        loss = deep_supervision_loss(
            [logits, *supervised],
            labels,
            annotated,
            cross_entropy=recipe.cross_entropy,
            dice_weight=recipe.dice_weight,
        )
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        if recipe.gradient_clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
        scaler.step(optimizer)
        scaler.update()
        if average:
            follow(average, bare, recipe.ema_decay, state.step)
        return loss.detach()

    metadata = weights_metadata(recipe, intensities.mean, intensities.std)
    scoring = HeldOut(held_out, metadata, output, processes, state)
    metrics = read_metrics(output) if (output / "metrics.csv").is_file() else []
    metrics = [row for row in metrics if row["step"] <= state.step]  # the others are done again
    if first:
        write_metrics(output, metrics)
    report(
        f"step {state.step}: {device}, {str(precision).removeprefix('torch.')}, "
        f"{processes.count} process(es), slices on {'the device' if resident else 'the host'}, "
        f"{sum(weight.numel() for weight in network.parameters()):,} parameters"
    )

    began, reported, told = state.step, (state.step, state.seconds), state.seconds
    measured: tuple[int, float] | None = None  # step and seconds after the sitting's first step
    end = recipe.steps if deadline is None else state.step + _UNKNOWN

    def planned_end() -> int:
        """Return the last step by the rate of steps measured so far."""
        if deadline is None or measured is None or state.step <= measured[0] + 1:
            return end
        pace = (state.seconds - measured[1]) / (state.step - 1 - measured[0])
        return state.step + max(0, int((deadline - time.monotonic()) / pace))

    def say(loss: float) -> float:
        """Print a line; returns the slices a second since the last row of metrics.csv."""
        pace = (state.seconds - reported[1]) / (state.step - reported[0])
        speed, left = recipe.batch_size / pace, tqdm.format_interval((end - state.step) * pace)
        report(
            f"step {state.step}/{end}  loss {loss:.4f}  lr {rate:.2e}  {speed:.1f} slices/s  "
            f"{left} left"
        )
        return speed

    def save() -> float:
        """Save a checkpoint; returns when the next is due: they take 5 % of the time at most."""
        start = time.monotonic()
        if first:
            state.save(last)
        now = time.monotonic()
        return now + max(_CHECKPOINT_S, 20 * (now - start))

    def score() -> float:
        """Save and score; returns when that is due again: it takes a tenth of the time at most."""
        start = time.monotonic()
        uniform = (batch_at(plain, range(n, n + 8)) for n in _STATISTICS_POSITIONS)
        estimate_statistics(state.trained(), uniform, recipe, intensities)
        save()  # before the scoring: what goes wrong there costs no steps
        if scoring.due:
            stop.after_step = False  # nothing is lost that is saved
            scoring.score(recipe.batch_size)
            stop.after_step = True
        now = time.monotonic()
        return now + max(60 * recipe.evaluation_minutes, 9 * (now - start))

    model.train()
    stop.after_step, stopped = True, 0
    next_save = time.monotonic() + _CHECKPOINT_S
    next_score = time.monotonic() + 60 * recipe.evaluation_minutes
    sequence = zip(positions_from(state.step), batches, strict=False)
    while state.step < end and not stopped:
        start = time.monotonic()
        rate = learning_rate_at(state.step, dataclasses.replace(recipe, steps=end))
        loss = gradient_step(*next(sequence), rate)
        state.step += 1
        state.loss_sum += loss
        state.loss_count += 1
        reporting, score_due = state.step % recipe.log_interval == 0, False
        if processes.count == 1 or reporting:  # asking the others waits for the device
            end, stopped, score_due = processes.greatest(
                planned_end() if first else 0, stop.signal, start > next_score
            )
        reporting = reporting or state.step >= end
        if reporting:
            if processes.count > 1:
                distributed.all_reduce(state.loss_sum)
            loss = state.loss_sum / (state.loss_count * processes.count)
        told_now = reporting or state.step == began + 1 or state.seconds - told > _SILENCE_S
        shown = loss.item() if told_now else 0.0  # waits for the device
        state.seconds += time.monotonic() - start
        measured = measured or (state.step, state.seconds)
        if not math.isfinite(shown):
            raise TrainingError(f"the loss is {shown} at step {state.step}: {ADVICE}")
        if told_now:
            told, speed = state.seconds, say(shown)
        if reporting:
            row = (state.step, shown, rate, round(speed, 2), round(state.seconds, 1))
            metrics.append(dict(zip(METRICS, row, strict=True)))
            if first:
                write_metrics(output, metrics)
            state.loss_sum, state.loss_count = torch.zeros((), device=device), 0
            reported = state.step, state.seconds
        if state.step < end and not stopped:
            if score_due:
                next_score = score()
            elif time.monotonic() > next_save:
                next_save = save()
    if stopped:
        save()
    elif state.step > began or scoring.due:
        score()
    if first:
        or_warn(draw_curves, output)
    if processes.count > 1:  # one that leaves while the first still writes may abort
        distributed.barrier()
    return state.step
