"""Optimizes a model, checks it against the original, and times both in turns.

MODEL gets fresh weights and calibrated batch norms. A copy of it is optimized once for inference and once for
training: outputs and gradients must agree with the original's within what rounding explains, each layer is
timed on the input that it meets, and only winners are swapped. Then the whole models take turns; the figures
are medians.

  python -m fastconv compare mobilenet_v1
  python -m fastconv compare mobilenet_v1 --inference --batch 4 --plot roofline.png --json compare.json
  python -m fastconv compare mypackage.mymodule:build --input-size 1,3,64,64 --layout nhwc
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._format import milliseconds, progress_bars
from .._timing import interleave, keep_freed_memory, wall_clock
from ..backends import BACKENDS
from . import UserError
from ._model import DTYPES, LAYOUTS, add_model_arguments, build, console, input_size, positive, warn_if_busy


def configure(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add = parser.add_argument
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--inference", action="store_true", help="the forward pass in eval mode only")
    mode.add_argument("--train", action="store_true", help="the training step, forward and backward, only")
    add(
        "--layout",
        choices=LAYOUTS,
        default="nchw",
        help="of model and input; nhwc: channels_last (default: nchw)",
    )
    add("--dtype", choices=DTYPES, default="float32", help="of the model and its input (default: float32)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--threads", type=positive, metavar="N", help="CPU threads (default: PyTorch's)")
    add("--rounds", type=positive, default=20, metavar="N", help="turns of each whole model (default: 20)")
    add("--backend", choices=BACKENDS, help="which kernels (default: the measured best)")
    add("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    add(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw the layers under the machine's roofline into FILE (PNG)",
    )


def run(args: argparse.Namespace) -> int:
    for path in (args.json, args.plot):
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot write {path}: {error}") from None
    if args.threads:
        torch.set_num_threads(args.threads)
    out = console()
    model, input = _prepare(args)
    modes = ["inference"] * (not args.train) + ["training"] * (not args.inference)
    results = {}
    warn_if_busy(out, torch.get_num_threads())
    with progress_bars(out) as progress:
        for mode in modes:
            results[mode] = _compare(model, input, mode, args, progress)
    failed = False
    for mode, result in results.items():
        out.print(result["report"])
        before, after = (statistics.median(result[side]) for side in ("before", "after"))
        what = "forward" if mode == "inference" else "forward and backward"
        out.print(
            f"[bold]{mode}[/] ({what}, batch {input.shape[0]}, {torch.get_num_threads()} threads): "
            f"PyTorch {milliseconds(before)} ms, fastconv {milliseconds(after)} ms, "
            f"[bold]{before / after:.2f}x[/]\n"
        )
        failed |= result["report"].parity is not None and not result["report"].parity.holds
    if args.json:
        args.json.write_text(json.dumps(_as_json(args, results), indent=1) + "\n")
        out.print(f"figures: {args.json}")
    if args.plot:
        from ._roofline import draw

        draw({mode: result["report"] for mode, result in results.items()}, args.model, args.plot)
        out.print(f"roofline: {args.plot}")
    if failed:
        out.print(
            "[red]The numbers differ by more than rounding explains; the layers were left to PyTorch.[/]"
        )
    return int(failed)


def _prepare(args: argparse.Namespace) -> tuple[nn.Module, torch.Tensor]:
    model = build(args.model, args.set)
    try:
        model = model.to(args.device, DTYPES[args.dtype])
        input = torch.randn(input_size(args)).to(args.device, DTYPES[args.dtype])
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device}: {error}") from None
    if args.layout != "nchw":
        if input.dim() != 4:
            raise UserError(f"--layout nhwc needs an input of 4 dimensions, got {tuple(input.shape)}")
        model = model.to(memory_format=LAYOUTS[args.layout])
        input = input.to(memory_format=LAYOUTS[args.layout])
    try:
        size = calibrate(model, input)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"the model does not take an input of size {tuple(input.shape)}: {error}") from error
    if not 1e-3 < size < 1e3:
        console().print(
            f"[yellow]The outputs are of size {size:.1e}, far from one: times may mean little.[/]"
        )
    return model, input


def calibrate(model: nn.Module, input: torch.Tensor) -> float:
    """Sets the batch norms' running statistics from two batches; returns the root mean square of the output.

    A network with fresh weights and default statistics decays to denormal numbers, whose times are wrong.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the mean over all batches
        norm.reset_running_stats()
    batch = input if input.shape[0] > 1 else torch.cat([input, input.flip(-1)])
    model.train()
    with torch.no_grad():
        for scale in (1.0, 0.9) if norms else ():
            model(batch * scale)
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        output = next(iter(_floats(model.eval()(input))), None)
    if output is None:
        raise TypeError("it returns no floating-point tensor")
    return float(output.float().square().mean().sqrt())


def _compare(
    model: nn.Module, input: torch.Tensor, mode: str, args: argparse.Namespace, progress: Any
) -> dict[str, Any]:
    from ..optimize._report import report
    from ..optimize._swap import optimize_with_progress

    training = mode == "training"
    keep_freed_memory()
    model.train(training)
    optimized = copy.deepcopy(model)
    task = progress.add_task(f"{mode}: layers", total=None)

    def layer_done(done: int, total: int, name: str) -> None:
        progress.update(task, completed=done, total=total)

    with torch.set_grad_enabled(True):
        optimize_with_progress(optimized, input, None, None, args.backend, False, layer_done)
    task = progress.add_task(f"{mode}: whole models", total=args.rounds)
    stopwatch = wall_clock
    if input.is_cuda:
        from ..optimize._trial import synchronized as stopwatch
    measured = interleave(
        {"before": step(model, input, training), "after": step(optimized, input, training)},
        args.rounds,
        turn=0.0,
        stopwatch=stopwatch,
        progress=lambda done, _: progress.update(task, completed=done),
    )
    return {"report": report(optimized), **measured}


def step(model: nn.Module, input: torch.Tensor, training: bool) -> Callable[[], None]:
    """A forward pass without gradients, or a training step without the optimizer."""
    if not training:

        def forward() -> None:
            with torch.no_grad():
                model(input)

        return forward
    from ..optimize._trial import cotangent

    cotangents = [cotangent(o, 0) for o in _floats(model(input)) if o.requires_grad]

    def forward_backward() -> None:
        model.zero_grad(set_to_none=True)
        torch.autograd.backward([o for o in _floats(model(input)) if o.requires_grad], cotangents)

    return forward_backward


def _floats(result: Any) -> list[torch.Tensor]:
    from ..optimize._trial import output_tensors

    return output_tensors(result)


def _as_json(args: argparse.Namespace, results: dict[str, Any]) -> dict[str, Any]:
    from .. import __version__

    ceilings = next(iter(results.values()))["report"].measure_ceilings()
    return {
        "model": args.model,
        "settings": args.set,
        "input_size": list(input_size(args)),
        "dtype": args.dtype,
        "layout": args.layout,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "versions": {
            "fastconv": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "ceilings": None if ceilings is None else ceilings.as_dict(),
        "modes": {
            mode: {
                "seconds_before": result["before"],
                "seconds_after": result["after"],
                "ratio": statistics.median(result["before"]) / statistics.median(result["after"]),
                **result["report"].as_dict(),
            }
            for mode, result in results.items()
        },
    }
