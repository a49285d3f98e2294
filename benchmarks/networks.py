"""Whole networks: inference and training steps of every contender, checked against PyTorch, timed in turns.

A :class:`NetworkProblem` is to a network what :class:`.harness.Problem` is to a layer, and its groups have
the same form. ``"forward"`` is inference in eval mode, ``"backward"`` a training step: forward, backward and
SGD. Batch norms are calibrated first, or activations would decay to denormal numbers. Nothing is dropped at
random, so that all contenders compute the same.
"""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fastconv
from fastconv._timing import interleave, keep_freed_memory
from fastconv.ceilings import Ceilings, measure
from fastconv.cli._model import LAYOUTS
from fastconv.cli.compare import calibrate
from fastconv.optimize._swap import optimize_with_progress

from . import attribution, engines
from .harness import PASSES, Contender, Problem, add_ratios

BATCHES, IMAGE = (1, 4), 224
# What is measured, with options under which nothing is random; and in which passes.
_STILL = {"dropout": 0.0}
NETWORKS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "mobilenet_v1": ({}, PASSES),
    "mobilenet_v2": (_STILL, PASSES),
    # With the layer scale of fresh weights, 1e-6, errors in the blocks would not be seen.
    "convnext_t": ({"layer_scale": 1.0, "stochastic_depth": 0.0}, PASSES),
    "resnet18": ({}, PASSES),
    "resnet50": ({}, PASSES),
    "efficientnet_b0": ({**_STILL, "stochastic_depth": 0.0}, PASSES),
    "shufflenet_v1": ({}, ("backward",)),
}
COMPILED = ("torch.compile", "torch.compile freezing", "fastconv.compile")
# Largest difference to PyTorch's own answer: in terms of the largest output; of a training step, the norm of
# all gradients. There rounding decides on which side of ReLU's corner a value is: PyTorch's own two layouts
# differ by up to 2 %; so that difference counts four times, up to the third figure.
ALLOWED = {"forward": (1e-3, 0.0, 1e-3), "backward": (1e-2, 4.0, 0.1)}
WINOGRAD_SAVES = 81 / 16  # F(6x6, 3x3): 36 * 9 multiplications in 64
LEARNING_RATE = 1e-6  # the weights change, and stay what they were but for the last digits


def contenders(direction: str, quick: bool = False) -> list[Contender]:
    """PyTorch, its compiler, the engines, ``optimize`` and the library's compiler backend."""
    pairs = [("torch", "nchw"), ("torch", "nhwc")]
    if not quick:
        pairs += [("torch.compile", "nchw")]
        if direction == "forward":
            pairs += [("torch.compile freezing", "nchw"), *((name, "nchw") for name in engines.ENGINES)]
        pairs += [("fastconv.compile", "nchw"), ("fastconv.compile", "nhwc")]
    return [Contender(*pair) for pair in [*pairs, ("fastconv", "nchw"), ("fastconv", "nhwc")]]


def problems(
    names: Sequence[str] | None, batches: Sequence[int], passes: Sequence[str], **more: Any
) -> list[NetworkProblem]:
    """Each network with each batch, in the passes that are measured of it.

    Raises:
        ValueError: a network is not among those that are measured.
    """
    for name in names or ():
        if name not in (*NETWORKS, "all"):
            raise ValueError(f"shapes must be among {(*NETWORKS, 'all')}, got {name!r}")
    wanted = NETWORKS if not names or "all" in names else dict.fromkeys(names)
    return [
        NetworkProblem(name, batch, direction, **more)
        for name in wanted
        for batch in batches
        for direction in passes
        if direction in NETWORKS[name][1]
    ]


def _alone(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function with code of its own: what is compiled for one contender is not found for another."""

    def run(input: torch.Tensor) -> torch.Tensor:
        return model(input)

    return types.FunctionType(run.__code__.replace(), run.__globals__, closure=run.__closure__)


@dataclass
class NetworkProblem:
    """One network, batch and pass.

    Attributes:
        network: a name of :data:`NETWORKS`.
        batch: images.
        direction: ``"forward"`` (inference) or ``"backward"`` (a training step).
        image: height and width of the images.
        options: more of the network's, such as ``{"width": 0.25}``.
    """

    network: str
    batch: int
    direction: str
    image: int = IMAGE
    options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.direction not in PASSES:
            raise ValueError(f"direction must be one of {PASSES}, got {self.direction!r}")

    def __str__(self) -> str:
        return f"{self.network}, {self.layer}, {self.direction}"

    @property
    def layer(self) -> str:
        """What the problem is called among those of its network."""
        return f"batch {self.batch}" + ("" if self.image == IMAGE else f", {self.image}x{self.image}")

    @property
    def training(self) -> bool:
        return self.direction == "backward"

    @cached_property
    def input(self) -> torch.Tensor:
        shape = (self.batch, 3, self.image, self.image)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))

    @cached_property
    def labels(self) -> torch.Tensor:
        return torch.arange(self.batch) % 10

    @cached_property
    def model(self) -> nn.Module:
        """From ``torch.nn`` alone, calibrated, in the mode that is measured."""
        torch.manual_seed(0)
        options = {**NETWORKS[self.network][0], **(self.options or {})}
        model = fastconv.models.create(self.network, plain=True, **options)
        size = calibrate(model, self.input)
        if not 1e-3 < size < 1e3:
            raise RuntimeError(f"outputs of {self.network} are of size {size:.1e}, far from one")
        return model.train(self.training)

    @cached_property
    def file(self) -> bytes:
        return engines.export(self.model, self.input)

    def measure(
        self,
        contenders: Sequence[Contender],
        *,
        rounds: int = 20,
        seconds: float | None = 3.0,
        ceilings: Ceilings | None = None,
        progress: Callable[[str], None] = lambda what: None,
    ) -> dict[str, Any]:
        """Checks and times the contenders; returns a group of a results file.

        ``rounds`` is as :func:`fastconv._timing.interleave` has it, ``seconds`` the time of each contender.
        One that raises or is wrong is not timed: its ``refused`` says why. Engines that are not installed are
        in ``left_out``. Of a forward pass, ``attribution`` says what the time of ``optimize``'s network is
        made of, see :mod:`.attribution`.
        """
        ceilings = ceilings or measure()
        keep_freed_memory()
        torch.compiler.reset()
        calls, entries, left_out = {}, [], {}
        expected = self._answers(self._model("nchw"), self.input)
        least, times_noise, most = ALLOWED[self.direction]
        noise = self._error(self._answers(self._model("nhwc"), self._placed("nhwc")), expected)
        allowed = min(max(least, times_noise * noise), most)
        for contender in contenders:
            progress(f"{self}: {contender.name}")
            entry = {
                "name": contender.name,
                "kernel": contender.kernel,
                "side": contender.side,
                "layout": contender.layout,
                "max_error": None,
                "refused": None,
            }
            try:
                call, answers = self._enter(contender)
                entry["max_error"] = error = self._error(answers, expected)
                if not error <= allowed:  # a NaN too
                    entry["refused"] = f"wrong result: error {error:.1e}, {allowed:.1e} allowed"
            except engines.EngineMissing as error:
                left_out[contender.name] = str(error)
                continue
            except Exception as error:  # whatever one of them raises, the others must still be timed
                entry["refused"] = f"{type(error).__name__}: {error}".splitlines()[0]
            entries.append(entry)
            if entry["refused"] is None:
                calls[contender.name] = call
        progress(f"{self}: {len(calls)} in turns")
        limit = None if seconds is None else seconds * len(calls)
        times = interleave(calls, rounds, seconds=limit, turn=0.0) if calls else {}
        work = self._work(ceilings)
        for entry in entries:
            entry.update(Problem.figures(times.get(entry["name"]), work))
        add_ratios(entries)
        group = {
            "network": self.network,
            "layer": self.layer,
            "sizes": {"batch": self.batch, "channels": 3, "height": self.image, "width": self.image},
            "pass": self.direction,
            "dtype": "float32",
            **work,
            "products_saved": self._products_saved(),
            "contenders": entries,
            "left_out": left_out,
        }
        ours = [entry for entry in entries if entry["side"] == "fastconv" and entry["seconds"]]
        if ours and not self.training:
            best = min(ours, key=lambda entry: entry["seconds"])
            found = attribution.measure(calls[best["name"]], ceilings)
            group["attribution"] = {"name": best["name"], "seconds": best["seconds"], **found}
        for name in ("model", "file", "input"):  # a list of problems need not hold all networks
            self.__dict__.pop(name, None)
        return group

    def _model(self, layout: str) -> nn.Module:
        return copy.deepcopy(self.model).to(memory_format=LAYOUTS[layout])

    def _placed(self, layout: str) -> torch.Tensor:
        return self.input.to(memory_format=LAYOUTS[layout])

    def _enter(self, contender: Contender) -> tuple[Callable[[], Any], list[torch.Tensor]]:
        """The call to time, and the contender's answers."""
        if contender.side in engines.ENGINES:
            call = engines.ENGINES[contender.side](self.file, self.input)
            return call, [call().clone()]
        model = self._model(contender.layout)
        input = self._placed(contender.layout)
        run: Callable = model
        if contender.side == "fastconv":
            with torch.set_grad_enabled(self.training), warnings.catch_warnings():
                optimize_with_progress(model, input, None, None, None, False, lambda *_: None)
        elif contender.side in COMPILED:
            backend = "fastconv" if contender.side == "fastconv.compile" else "inductor"
            run = torch.compile(_alone(model), backend=backend, dynamic=False)
        freezing = contender.side == "torch.compile freezing"
        from torch._inductor import config

        with config.patch(freezing=freezing):
            answers = self._answers(run, input, model)
        return self._call(run, input, model), answers

    def _answers(
        self, run: Callable, input: torch.Tensor, model: nn.Module | None = None
    ) -> list[torch.Tensor]:
        """The output; of a training step all gradients too, one after the other."""
        with torch.set_grad_enabled(self.training):
            output = run(input)
        if not self.training:
            return [output]
        parameters = list((model or run).parameters())
        gradients = torch.autograd.grad(cross_entropy(output, self.labels), parameters)
        return [output.detach(), torch.cat([gradient.flatten() for gradient in gradients])]

    def _call(self, run: Callable, input: torch.Tensor, model: nn.Module) -> Callable[[], Any]:
        if not self.training:

            def forward():
                with torch.no_grad():
                    return run(input)

            return forward
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

        def step():
            optimizer.zero_grad(set_to_none=True)
            cross_entropy(run(input), self.labels).backward()
            optimizer.step()

        return step

    def _error(self, answers: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
        """The largest difference, see :data:`ALLOWED`; NaN if there is one."""
        order = 2 if self.training else float("inf")
        errors = []
        for answer, exact in zip(answers, expected, strict=True):
            if answer.shape != exact.shape:
                raise ValueError(f"wrong shape {tuple(answer.shape)}, expected {tuple(exact.shape)}")
            difference = torch.linalg.vector_norm((answer - exact).flatten(), order)
            errors.append(difference / torch.linalg.vector_norm(exact.flatten(), order))
        return float(torch.stack(errors).max())

    def _products_saved(self) -> float:
        """The formula's multiplications over the fastest algorithm's, of a 3x3 layer, where there are any."""
        dense = (m for m in self.model.modules() if isinstance(m, nn.Conv2d) and m.groups == 1)
        return WINOGRAD_SAVES if any(m.kernel_size == (3, 3) and m.in_channels > 3 for m in dense) else 1.0

    def _work(self, ceilings: Ceilings) -> dict[str, Any]:
        """FLOPs, bytes and the floor of the layers that multiply, one after the other.

        The rest can be folded into them. A training step does as much again for each of two gradients.
        """
        table = fastconv.cost(self.model, self.input.shape, ceilings=ceilings)
        layers = [layer for layer in table.layers if layer.macs]
        times = 3 if self.training else 1
        flops, nbytes = 2 * times * table.macs, times * sum(layer.bytes for layer in layers)
        return {
            "flops": flops,
            "flops_inside": flops,
            "bytes": nbytes,
            "floor_seconds": times * sum(layer.floor_seconds(ceilings) for layer in layers),
            "bound": ceilings.bound(flops, nbytes),
        }
