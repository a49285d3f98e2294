"""Trains a small MobileNet on scanned digits twice: with plain PyTorch, and with fastconv.optimize.

The images are the 1,797 of scikit-learn's digits (8x8 pixels, scanned from handwritten forms), enlarged to
32x32. Both networks start from the same weights and see the same batches, so their losses may differ by
rounding alone. Exits with 1 if they differ by more, or if the test accuracy stays below 97 %.

  python examples/digits.py --epochs 6
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import fastconv

BATCH = 64
ACCURACY = 0.97
# Relative. Rounding errors (1e-7 in the first epoch) grow from step to step, as every training's do.
LOSS_TOLERANCE = 1e-3
RATE = 0.1  # of learning, at its peak


@dataclass
class Training:
    """What one training showed."""

    losses: list[float] = field(default_factory=list)
    accuracy: float = 0.0
    seconds: float = 0.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=6, help="passes over the training images (default: 6)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {args.epochs}")
    if args.threads:
        torch.set_num_threads(args.threads)
    console = Console(width=None if sys.stdout.isatty() else 120)
    train, test = digits()
    plain = network()
    ours = fastconv.optimize(copy.deepcopy(plain), train[0][:BATCH])
    console.print(fastconv.report(ours))
    models = {"PyTorch": plain, "fastconv": ours}
    results = {name: Training() for name in models}
    steps = args.epochs * -(-len(train[0]) // BATCH)
    optimizers, schedules = {}, {}
    for name, model in models.items():
        optimizer = optimizers[name] = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
        schedules[name] = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, cycle_momentum=False)
    columns = TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        bars = {name: progress.add_task(name, total=steps) for name in models}
        for epoch in range(args.epochs):
            # Epoch by epoch in turns, so that a busy machine is busy for both.
            for name in models if epoch % 2 == 0 else reversed(models):

                def after_step(name=name) -> None:
                    schedules[name].step()
                    progress.advance(bars[name])

                start = time.perf_counter()
                loss = train_epoch(models[name], optimizers[name], train, epoch, after_step)
                results[name].seconds += time.perf_counter() - start
                results[name].losses.append(loss)
    for name, model in models.items():
        results[name].accuracy = accuracy(model, test)
    return summary(results, console)


def digits() -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """(images, labels) for training and for testing: images (N, 1, 32, 32), always the same split."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16 - 0.3
    images = nn.functional.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    labels = torch.tensor(labels)
    train, test = train_test_split(torch.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    return (images[train], labels[train]), (images[test], labels[test])


def network() -> nn.Module:
    """A MobileNet of depthwise separable blocks, from torch.nn alone: (N, 1, 32, 32) -> (N, 10).

    SiLU, for a ReLU's gradient jumps where rounding decides on a sign: two trainings would drift apart.
    """
    torch.manual_seed(0)

    def conv(channels: int, filters: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
        layer = nn.Conv2d(channels, filters, size, stride, size // 2, groups=groups, bias=False)
        return [layer, nn.BatchNorm2d(filters), nn.SiLU(inplace=True)]

    def separable(channels: int, filters: int, stride: int) -> list[nn.Module]:
        return [*conv(channels, channels, 5, stride, groups=channels), *conv(channels, filters, 1)]

    return nn.Sequential(
        *conv(1, 16, 3),
        *separable(16, 32, 2),
        *separable(32, 64, 1),
        *separable(64, 64, 2),
        *separable(64, 128, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    ).train()


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: tuple[torch.Tensor, torch.Tensor],
    epoch: int,
    after_step: Callable[[], None],
) -> float:
    """One pass over the training images, in an order that depends on the epoch alone; the mean loss."""
    images, labels = train
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
    total = 0.0
    model.train()
    for batch in order.split(BATCH):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        total += loss.item() * len(batch)
        after_step()
    return total / len(images)


def accuracy(model: nn.Module, test: tuple[torch.Tensor, torch.Tensor]) -> float:
    images, labels = test
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).double().mean())


def summary(results: dict[str, Training], console: Console) -> int:
    plain, ours = results["PyTorch"], results["fastconv"]
    differences = [abs(a - b) / a for a, b in zip(plain.losses, ours.losses)]
    table = Table(title="Training on scikit-learn's digits", title_justify="left")
    for column in ("", "PyTorch", "fastconv", "relative difference"):
        table.add_column(column, justify="right" if column else "left")
    for epoch, (a, b, difference) in enumerate(zip(plain.losses, ours.losses, differences), 1):
        table.add_row(f"loss, epoch {epoch}", f"{a:.7f}", f"{b:.7f}", f"{difference:.1e}")
    table.add_section()
    table.add_row("test accuracy", f"{plain.accuracy:.2%}", f"{ours.accuracy:.2%}")
    speedup = f"{plain.seconds / ours.seconds:.2f}x"
    table.add_row("training time", f"{plain.seconds:.1f} s", f"{ours.seconds:.1f} s", speedup)
    console.print(table)
    failures = []
    if max(differences) > LOSS_TOLERANCE or max(differences) != max(differences):
        failures.append(f"the losses differ by {max(differences):.1e}, more than {LOSS_TOLERANCE:g}")
    for name, result in results.items():
        if not result.accuracy >= ACCURACY:
            failures.append(f"{name}'s test accuracy is {result.accuracy:.2%}, below {ACCURACY:.0%}")
    for failure in failures:
        console.print(f"[red]{failure}[/]")
    if not failures:
        console.print(
            f"Largest difference of a loss: {max(differences):.1e} of it (allowed: {LOSS_TOLERANCE:g})."
        )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
