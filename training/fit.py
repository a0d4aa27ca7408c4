"""The training loop.

A run's folder holds `recipe.toml` (its numbers, all of them), `run.json` (its cases and
intensities), `metrics.csv`, `held_out.csv`, `curves.png`, `last.pt` and `best.pt` (checkpoints),
and `overlays/` (the worst held-out cases).

Whatever is random at a step depends on the seed and the step alone, so a run that was stopped goes
on as if it had not been: the same command takes it up at `last.pt`.
"""

import copy
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

from inference.labels import LABEL_NAMES
from inference.model import DOWNSAMPLING, AttentionUNet
from inference.prediction import choose_dtype
from inference.weights import WeightsMetadata
from training.augmentation import Intensities, prepare
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
from training.loss import deep_supervision_loss
from training.pictures import draw_curves, draw_overlay
from training.processes import Processes, StopRequest, leave_stopping_to_parent
from training.recipe import Recipe
from training.run_folder import RunError, truncate_metrics
from training.slices import Slice, SliceDataset, collate

WORST_CASES = 3
"""Held-out cases of which overlays are drawn at each scoring."""

_AUGMENTATION, _DEVICE_NOISE = 1, 2  # streams of random numbers beside that of the slices


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """The learning rate of a step, from 0: a linear rise, then constant or half a cosine."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    if recipe.schedule == "constant":
        return recipe.learning_rate
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * min(done, 1)))


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The type of convolutions for a recipe's `precision`."""
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
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


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


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
    start: dict[str, Tensor] | None = None,
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
        start: state dict of the network's first weights; None begins with random ones.

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
    network = AttentionUNet(base_channels=recipe.base_channels, attention=recipe.attention)
    if start:
        try:
            network.load_state_dict(start)
        except RuntimeError as error:
            raise RunError("the weights to start from are of another network") from error
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
        model.parameters(),
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        fused=device.type == "cuda",
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    bare = model.module if processes.count > 1 else model

    state = State(bare, average, optimizer, scaler, torch.zeros((), device=device))
    scores: list[Score] = []
    last = output / "last.pt"
    if last.is_file():
        state.load(last, device)
        if (output / "held_out.csv").is_file():
            before = read_scores(output / "held_out.csv")
            scores = [score for score in before if score.step <= state.step]
    if first:
        truncate_metrics(output / "metrics.csv", state.step)
        print(
            f"{'goes on' if state.step else 'starts'} at step {state.step} of {recipe.steps}: "
            f"{device}, {str(precision).removeprefix('torch.')}, {processes.count} process(es), "
            f"{sum(weight.numel() for weight in network.parameters()):,} parameters",
            flush=True,
        )

    def evaluate() -> None:
        nonlocal scores
        start = time.monotonic()
        metadata = WeightsMetadata(
            base_channels=recipe.base_channels,
            num_classes=len(LABEL_NAMES),
            intensity_mean=intensities.mean,
            intensity_std=intensities.std,
            matrix_reduction=recipe.matrix_reduction,
            attention=recipe.attention,
            trained_on="",
            licence="",
            date="",
            revision="",
        )
        worst: list[tuple[float, Case, np.ndarray]] = []

        def keep_worst(case: Case, prediction: np.ndarray, of_case: list[Score]) -> None:
            worst.append((float(np.mean([score.dsc for score in of_case])), case, prediction))
            worst.sort(key=lambda entry: entry[0])
            del worst[WORST_CASES:]

        found = score_cases(
            held_out[processes.rank :: processes.count],
            state.trained_weights(),
            metadata,
            device,
            batch_size=recipe.batch_size if device.type == "cuda" else None,
            step=state.step,
            on_case=keep_worst,
        )
        overlays = {}
        for dsc, case, prediction in worst:
            overlays[case.name] = dsc
            title = f"{case.name}, step {state.step}: mean DSC {dsc:.3f}"
            draw_overlay(output / "overlays" / f"{case.name}.png", case, prediction, title)
        if processes.count > 1:
            parts: list = [None] * processes.count
            distributed.all_gather_object(parts, (found, overlays))
            found = [score for part, _ in parts for score in part]
            overlays = {name: dsc for _, part in parts for name, dsc in part.items()}
        scores = [score for score in scores if score.step != state.step] + found
        improved = mean_organ_dsc(found) > state.best
        state.best = max(state.best, mean_organ_dsc(found))
        if improved and first:
            state.save(output / "best.pt")
        if first:
            shown = sorted(overlays, key=overlays.get)[:WORST_CASES]
            for path in (output / "overlays").glob("*.png"):
                if path.stem not in shown:
                    path.unlink()
            write_scores(output / "held_out.csv", scores)
            draw_curves(output)
            print(f"{summary_line(found)}  ({_duration(time.monotonic() - start)})", flush=True)

    # The slices: position p of the endless sequence is in batch p // batch_size.
    dataset = SliceDataset(
        training,
        seed=recipe.seed,
        rare_organ_fraction=recipe.rare_organ_fraction,
        synthesise=synthesise,
        synthetic_fraction=recipe.synthetic_fraction,
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

    model.train()
    stop = StopRequest()
    since, reported = time.monotonic(), state.step
    for drawn, batch in zip(positions, loader, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(state.step, recipe)
        rngs = [np.random.default_rng((recipe.seed, p, _AUGMENTATION)) for p in drawn]
        noise_seed = np.random.SeedSequence((recipe.seed, drawn[0], _DEVICE_NOISE))
        generator.manual_seed(int(noise_seed.generate_state(1, np.uint64)[0] >> 1))
        images, labels = prepare(batch, device, recipe, intensities, rngs, generator)
        with autocast:
            logits, supervised = model(images)
        loss = deep_supervision_loss(
            [logits, *supervised],
            labels,
            batch.annotated.to(device, non_blocking=True),
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
        state.step += 1
        state.loss_sum += loss.detach()
        state.loss_count += 1

        # Asking the other processes costs time, so they are asked where the device is waited for.
        reporting = state.step % recipe.log_interval == 0 or state.step == recipe.steps
        stopping = (processes.count == 1 or reporting) and stop.seen_by_any(processes)
        if reporting:
            if processes.count > 1:
                distributed.all_reduce(state.loss_sum)
                state.loss_sum /= processes.count
            mean_loss = state.loss_sum.item() / state.loss_count
            if not math.isfinite(mean_loss):
                raise RunError(
                    f"the loss is {mean_loss} at step {state.step}: try a lower --learning-rate, "
                    "--gradient-clip 1 or --precision fp32"
                )
            now = time.monotonic()
            state.seconds += now - since
            speed = (state.step - reported) * recipe.batch_size / (now - since)
            since, reported = now, state.step
            state.loss_sum, state.loss_count = torch.zeros((), device=device), 0
            if first:
                rate = learning_rate_at(state.step - 1, recipe)
                left = _duration((recipe.steps - state.step) * recipe.batch_size / speed)
                numbers = f"{mean_loss!r},{rate!r},{speed:.2f},{state.seconds:.1f}"
                with (output / "metrics.csv").open("a") as file:
                    file.write(f"{state.step},{numbers}\n")
                print(
                    f"step {state.step}/{recipe.steps}  loss {mean_loss:.4f}  lr {rate:.2e}  "
                    f"{speed:.1f} slices/s  {left} left",
                    flush=True,
                )
        ending = state.step == recipe.steps
        due = ending or state.step % recipe.evaluation_interval == 0
        if held_out and due and not stopping:
            paused = time.monotonic()
            evaluate()
            since += time.monotonic() - paused
        if first and (stopping or ending or state.step % recipe.checkpoint_interval == 0):
            state.save(last)
        if stopping:
            break
    stop.restore()
    if first:
        draw_curves(output)
    if processes.count > 1:  # one that leaves while the first still writes may abort
        distributed.barrier()
    if stop.signal and state.step < recipe.steps:
        if first:
            print(f"stopped at step {state.step}; the same command goes on from there", flush=True)
        return 128 + stop.signal
    return 0
