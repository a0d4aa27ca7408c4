"""The training loop.

A run's folder holds `recipe.toml` (its numbers, all of them), `run.json` (its cases and
intensities), `metrics.csv`, `held_out.csv`, `curves.png`, `last.pt` and `best.pt` (checkpoints),
and `overlays/` (the worst held-out cases).

Whatever is random at a step depends on the seed and the step alone, so a run that was stopped goes
on as if it had not been: the same command takes it up at `last.pt`.
"""

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from inference.device import choose_dtype
from inference.model import DOWNSAMPLING, AttentionUNet
from inference.prediction import trained_network
from inference.weights import WeightsMetadata
from training.augmentation import Intensities, prepare
from training.cases import Case
from training.checkpoint import ADVICE, State
from training.held_out import HeldOut
from training.loss import deep_supervision_loss
from training.pictures import draw_curves
from training.processes import Processes, StopRequest, leave_stopping_to_parent
from training.progress import StepClock, duration
from training.recipe import Recipe, learning_rate_at
from training.run_folder import RunError, truncate_metrics
from training.slices import Slice, SliceDataset, collate
from training.widening import widen

_AUGMENTATION, _DEVICE_NOISE = 1, 2  # streams of random numbers beside that of the slices


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The type of convolutions for a recipe's `precision`."""
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


_STATISTICS_BATCHES, _STATISTICS_SLICES = 64, 8


@torch.no_grad()
def estimate_statistics(
    network: nn.Module, dataset: SliceDataset, recipe: Recipe, intensities: Intensities
) -> None:
    """Set batch normalisation's statistics to those of slices as inference shows them, in place.

    The running ones are of augmented slices sampled by label.

    Args:
        network: in training form.
        dataset: to sample uniformly from.
        recipe: for cropping, clipping and the matrix reduction.
        intensities: for the z-score.
    """
    device = next(network.parameters()).device
    plain = dataclasses.replace(
        recipe, spatial_probability=0.0, window_probability=0.0, intensity_probability=0.0
    )
    layers = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain mean over the batches
    mode = network.training
    network.train()
    for number in range(_STATISTICS_BATCHES):
        positions = range(number * _STATISTICS_SLICES, (number + 1) * _STATISTICS_SLICES)
        batch = collate(
            [dataset[position] for position in positions], DOWNSAMPLING * recipe.matrix_reduction
        )
        rngs = [np.random.default_rng((recipe.seed, p, _AUGMENTATION)) for p in positions]
        images, _ = prepare(batch, device, plain, intensities, rngs, torch.Generator(device))
        network(images)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    network.train(mode)


def fit(
    training: list[Case],
    held_out: list[Case],
    recipe: Recipe,
    intensities: Intensities,
    output: Path,
    processes: Processes,
    *,
    workers: int = 0,
    synthesise: Callable[[np.random.Generator], Slice] | None = None,
    start: tuple[dict[str, Tensor], WeightsMetadata] | None = None,
) -> int:
    """Train until the recipe's last step, from `last.pt` if it is there.

    Args:
        training, held_out: cached cases.
        recipe: all numbers.
        intensities: of the training set.
        output: the run's folder.
        processes: of which this is one.
        workers: processes that read slices; 0 reads them here.
        synthesise: draws the recipe's synthetic part of the slices.
        start: the network's first weights, or a narrower network's, and their metadata; None begins
            with random ones.

    Returns:
        0, or 128 and the signal's number if one stopped it.

    Raises:
        RunError: the batch cannot be divided, or the loss is no longer a number.
    """
    device, first = processes.device, processes.first
    share = recipe.batch_size // processes.count
    if share * processes.count != recipe.batch_size:
        raise RunError(
            f"a batch of {recipe.batch_size} cannot be divided over {processes.count} processes"
        )
    precision = choose_precision(recipe.precision, device)
    autocast = (
        torch.autocast(device.type, precision) if precision != torch.float32 else nullcontext()
    )

    # The network. Normalisation sees the whole batch where torch can do that, which is on CUDA.
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
            raise RunError(
                f"the weights to start from are of another network ({error}): give its numbers, or "
                "a multiple of its --base-channels and no fewer --supervised-channels"
            ) from error
    network = network.to(device, memory_format=torch.channels_last)
    average = copy.deepcopy(network) if recipe.ema_decay else None
    model: nn.Module = network
    if processes.count > 1:
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
        )
    # Without weight decay, as in the paper, this is Adam.
    optimizer = torch.optim.AdamW(
        [
            {"params": [weight for weight in model.parameters() if weight.ndim > 1]},
            {
                "params": [weight for weight in model.parameters() if weight.ndim == 1],
                "weight_decay": 0.0,
            },
        ],
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        fused=device.type == "cuda",
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    bare = model.module if processes.count > 1 else model

    state = State(bare, average, optimizer, scaler, torch.zeros((), device=device))
    last = output / "last.pt"
    if last.is_file():
        state.load(last, device)
    scoring = HeldOut(held_out, recipe, intensities, output, processes, state)
    if first:
        truncate_metrics(output / "metrics.csv", state.step)
        print(
            f"{'goes on' if state.step else 'starts'} at step {state.step} of {recipe.steps}: "
            f"{device}, {str(precision).removeprefix('torch.')}, {processes.count} process(es), "
            f"{sum(weight.numel() for weight in network.parameters()):,} parameters",
            flush=True,
        )

    # The slices: position p of the endless sequence is in batch p // batch_size.
    dataset = SliceDataset(
        training,
        seed=recipe.seed,
        label_balanced_fraction=recipe.label_balanced_fraction,
        synthesise=synthesise,
        synthetic_fraction=recipe.synthetic_fraction,
    )
    unbalanced = dataclasses.replace(
        dataset, label_balanced_fraction=0.0, synthetic_fraction=0.0 if training else 1.0
    )
    positions = [
        range(
            number * recipe.batch_size + processes.rank * share,
            number * recipe.batch_size + (processes.rank + 1) * share,
        )
        for number in range(state.step, recipe.steps)
    ]
    loader = DataLoader(
        dataset,
        batch_sampler=positions,
        collate_fn=partial(collate, multiple=DOWNSAMPLING * recipe.matrix_reduction),
        num_workers=workers,
        worker_init_fn=leave_stopping_to_parent,
        pin_memory=device.type == "cuda",
    )
    generator = torch.Generator(device)

    saved_at = state.step

    def save_last() -> None:
        nonlocal saved_at
        state.save(last)
        saved_at = state.step

    def save_and_say() -> str:
        if state.step > saved_at:
            save_last()
        return f"stopped at step {state.step}; the same command goes on from there"

    model.train()
    clock = StepClock(recipe, device, state.step)
    with StopRequest(save_and_say if processes.count == 1 else None) as stop, clock:
        if scoring.due():  # stopped, or lost, between the step and its scores
            scoring.score(stop)
        stopping = False
        clock.start()
        since, reported = time.monotonic(), state.step
        for drawn, batch in zip(positions, loader, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(state.step, recipe)
            rngs = [np.random.default_rng((recipe.seed, p, _AUGMENTATION)) for p in drawn]
            noise_seed = np.random.SeedSequence((recipe.seed, drawn[0], _DEVICE_NOISE))
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
            with stop.unbroken:
                if recipe.gradient_clip:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
                scaler.step(optimizer)
                scaler.update()
                if average:
                    follow(average, bare, recipe.ema_decay, state.step)
                state.settle()
                state.step += 1
                state.loss_sum += loss.detach()
                state.loss_count += 1

            # Asking the other processes costs time: they are asked where the device is waited for.
            reporting = state.step % recipe.log_interval == 0 or state.step == recipe.steps
            stopping = (processes.count == 1 or reporting) and stop.seen_by_any(processes)
            if first and not reporting and clock.due(state.step):
                print(*clock.lines(state.step, loss.item()), sep="\n", flush=True)
            if reporting:
                if processes.count > 1:
                    distributed.all_reduce(state.loss_sum)
                    state.loss_sum /= processes.count
                mean_loss = state.loss_sum.item() / state.loss_count
                if not math.isfinite(mean_loss):
                    raise RunError(f"the loss is {mean_loss} at step {state.step}: {ADVICE}")
                now = time.monotonic()
                speed = (state.step - reported) * recipe.batch_size / (now - since)
                with stop.unbroken:
                    state.seconds += now - since
                    state.loss_sum, state.loss_count = torch.zeros((), device=device), 0
                    if first:
                        rate = learning_rate_at(state.step - 1, recipe)
                        numbers = f"{mean_loss!r},{rate!r},{speed:.2f},{state.seconds:.1f}"
                        with (output / "metrics.csv").open("a", encoding="utf-8") as file:
                            file.write(f"{state.step},{numbers}\n")
                since, reported = now, state.step
                if first:
                    left = duration((recipe.steps - state.step) * recipe.batch_size / speed)
                    print(
                        f"step {state.step}/{recipe.steps}  loss {mean_loss:.4f}  lr {rate:.2e}  "
                        f"{speed:.1f} slices/s  {left} left",
                        flush=True,
                    )
                clock.told_now()
            scored = scoring.due() and not stopping
            if scored or state.step == recipe.steps:
                estimate_statistics(average or bare, unbalanced, recipe, intensities)
            # Before it is scored, and not after: what goes wrong there costs no steps.
            if first and (scored or state.step % recipe.checkpoint_interval == 0):
                with stop.unbroken:
                    save_last()
            if scored:
                paused = time.monotonic()
                scoring.score(stop)
                since += time.monotonic() - paused
                clock.pause(time.monotonic() - paused)
            if stopping:
                break
        if first:
            with stop.unbroken:
                save_last()
            draw_curves(output)
    if processes.count > 1:  # one that leaves while the first still writes may abort
        distributed.barrier()
    if stop.signal and state.step < recipe.steps:
        if first:
            print(f"stopped at step {state.step}; the same command goes on from there", flush=True)
        return 128 + stop.signal
    return 0
