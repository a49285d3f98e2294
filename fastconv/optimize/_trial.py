"""Runs a model, and single layers of it, without leaving a trace; compares two runs."""

from __future__ import annotations

import contextlib
import math
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .._timing import interleave, wall_clock
from ..cost import bytes_moved, is_layer, macs

SLACK = 16  # a difference may be so many times what rounding alone explains
STATISTICS = 2  # rounding steps by which a batch's mean and deviation are off, for all of a channel's values
ROUNDS = 12  # of timing a layer
SECONDS = 0.6  # after which timing a layer stops


@dataclass
class Facts:
    """What one run shows of a layer: shapes, and counts over all of its calls."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    calls: int = 0
    macs: int = 0
    bytes: int = 0
    trained: tuple[int, int] = (0, 0)  # MACs and bytes of forward and backward together

    def add(self, module: nn.Module, input: torch.Tensor, output: torch.Tensor) -> None:
        multiplied, moved = macs(module, input.shape, output.shape), bytes_moved(module, input, output)
        self.calls += 1
        self.macs += multiplied
        self.bytes += moved
        # Backward reads the output's gradient, input and parameters, and writes the gradients of these two.
        passes = 3 if input.requires_grad else 2
        backward = 2 * moved - output.nbytes - (0 if input.requires_grad else input.nbytes)
        self.trained = self.trained[0] + passes * multiplied, self.trained[1] + moved + backward


@dataclass
class Call:
    """The arguments of a layer's call, and how many calls had tensors of the same geometry."""

    args: tuple
    kwargs: dict
    count: int = 0


@dataclass
class Run:
    """A model's floating-point outputs and the gradients that they cause."""

    outputs: list[torch.Tensor]
    grads: list[torch.Tensor]


@dataclass(frozen=True)
class Parity:
    """How far two models are apart.

    Attributes:
        output_error, gradient_error: norm of the difference over the norm, all outputs, or all gradients, as
            one vector; ``gradient_error`` is None if nothing takes a gradient.
        share: of what rounding explains, see :func:`parity`; of the output or gradient where it is largest.
    """

    output_error: float
    gradient_error: float | None
    share: float

    @property
    def holds(self) -> bool:
        return self.share <= 1

    def __str__(self) -> str:
        gradients = "" if self.gradient_error is None else f", gradients by {self.gradient_error:.1e}"
        share = f"{100 * self.share:.0f} % of what rounding explains"
        return f"outputs differ by {self.output_error:.1e}{gradients}; no tensor by more than {share}"


def copies(tree: Any) -> Any:
    """The same structure with copies of its tensors, which take a gradient where the tensors do."""
    return tree_map_only(torch.Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), tree)


def floats(tree: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def output_tensors(result: Any) -> list[torch.Tensor]:
    """The floating-point tensors of a model's result: a tensor, a structure, or an object with attributes."""
    return floats(result) or floats(getattr(result, "__dict__", None))


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """The model may run within the block; its buffers and all random numbers come back as they were."""
    saved = [
        (module._buffers, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {t.device.index for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    python, legacy_numpy = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(legacy_numpy)
        with torch.no_grad():
            for buffers, name, buffer, copy in saved:
                buffers[name] = buffer
                if not torch.equal(buffer, copy):  # an untouched buffer keeps its version
                    buffer.copy_(copy)


def run(model: nn.Module, example_input: Any) -> Run:
    """One forward pass and, where anything takes a gradient, one backward pass with fixed random cotangents.

    ``.grad`` of the parameters is neither read nor written.
    """
    input = copies(example_input)
    with untouched(model):
        if isinstance(input, tuple):
            result = model(*input)
        elif isinstance(input, dict):
            result = model(**input)
        else:
            result = model(input)
        outputs = output_tensors(result)
        if not outputs:
            raise TypeError(
                f"the model must return floating-point tensors to compare, got {type(result).__name__}"
            )
        sources = [t for t in (*model.parameters(), *floats(input)) if t.requires_grad]
        grads = [grad for grad in gradients(outputs, sources) if grad is not None]
    return Run([o.detach() for o in outputs], grads)


def gradients(
    outputs: list[torch.Tensor], sources: list[torch.Tensor], cotangents: list[torch.Tensor] | None = None
) -> list[torch.Tensor | None]:
    """One gradient for each source, None where the outputs do not depend on it."""
    outputs = [o for o in outputs if o.requires_grad]
    if not outputs or not sources:
        return [None] * len(sources)
    if cotangents is None:
        cotangents = [cotangent(output, index) for index, output in enumerate(outputs)]
    return list(torch.autograd.grad(outputs, sources, cotangents, allow_unused=True))


def cotangent(output: torch.Tensor, seed: int) -> torch.Tensor:
    """Fixed normal numbers with so few digits that every floating-point type holds them."""
    generator = torch.Generator(output.device).manual_seed(seed)
    numbers = torch.randn(output.shape, generator=generator, device=output.device, dtype=torch.float32)
    return numbers.bfloat16().to(output.dtype)


@contextlib.contextmanager
def watch(model: nn.Module, captured: Iterable[nn.Module]) -> Iterator[tuple[dict, dict]]:
    """Collects (facts of every layer, calls of some) while the model runs, by module."""
    facts: dict[nn.Module, Facts] = {}
    calls: dict[nn.Module, dict[Any, Call]] = {module: {} for module in captured}

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        geometry = tuple((t.shape, t.stride(), t.dtype, t.device) for t in floats((args, kwargs)))
        if geometry not in calls[module]:
            calls[module][geometry] = Call(copies(args), copies(kwargs))
        calls[module][geometry].count += 1

    def after(module: nn.Module, args: tuple, kwargs: dict, result: Any) -> None:
        inputs, outputs = floats((args, kwargs)), floats(result)
        if inputs and outputs:
            fact = facts.setdefault(module, Facts(tuple(inputs[0].shape), inputs[0].dtype))
            fact.add(module, inputs[0], outputs[0])

    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in calls]
    watched = (module for module in model.modules() if is_layer(module))
    handles += [module.register_forward_hook(after, with_kwargs=True) for module in watched]
    try:
        yield facts, calls
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def rounding_noise(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block, every output of the modules is off by one rounding step, up or down at random.

    What a batch's statistics have normalised is off by more, and alike in all of a channel: that does not
    cancel in the sums that follow.
    """

    def disturb(module: nn.Module, args: tuple, result: Any) -> Any:
        def move(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_floating_point():
                return tensor
            generator = torch.Generator(tensor.device).manual_seed(tensor.numel())

            def steps(shape: Sequence[int]) -> torch.Tensor:
                up = torch.randint(0, 2, shape, generator=generator, device=tensor.device)
                return (2 * up - 1).to(tensor.dtype) * torch.finfo(tensor.dtype).eps

            moved = tensor + tensor * steps(tensor.shape)
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and tensor.dim() > 1:
                channels = (1, tensor.shape[1], *[1] * (tensor.dim() - 2))
                size = tensor.detach().abs().mean()
                moved = moved + STATISTICS * (tensor * steps(channels) + size * steps(channels))
            return moved

        return tree_map_only(torch.Tensor, move, result)

    handles = [module.register_forward_hook(disturb) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def parity(original: Run, noisy: Run, other: Run) -> Parity:
    """Compares two runs; what rounding alone may cause is read off a third, in :func:`rounding_noise`.

    Each tensor may differ by ``SLACK`` times (its difference in the noisy run + eps), as norms. That follows
    the dtype, and what this network makes of rounding errors.
    """
    shares = [0.0]
    errors: list[float | None] = []
    for a, n, b in zip(*((r.outputs, r.grads) for r in (original, noisy, other))):
        if [t.shape for t in a] != [t.shape for t in b]:
            return Parity(math.inf, math.inf, math.inf)
        if not a:
            errors.append(None)
            continue
        norms, distances = [_norm(t) for t in a], [_norm(x, y) for x, y in zip(a, b)]
        overall = math.hypot(*norms)
        errors.append(math.hypot(*distances) / overall if overall else math.hypot(*distances))
        for x, y, norm, distance in zip(a, n, norms, distances):
            eps = torch.finfo(x.dtype).eps
            # A gradient that is zero but for rounding has no scale of its own.
            allowed = SLACK * (_norm(x, y) + eps * max(norm, eps * overall))
            shares.append(0.0 if distance == 0 else distance / allowed if allowed else math.inf)
    share = math.inf if any(map(math.isnan, shares)) else max(shares)
    return Parity(errors[0], errors[1], share)


def _norm(tensor: torch.Tensor, minus: torch.Tensor | None = None) -> float:
    return float(tensor.double().norm() if minus is None else (tensor.double() - minus.double()).norm())


def bare(
    module: nn.Module, kind: type[nn.Module], backend: str | None, dtype: torch.dtype | None = None
) -> Any:
    """A module of another class around the same parameters, without hooks; buffers are copies.

    With ``dtype`` the floating-point tensors are copies in that type.
    """

    def convert(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor) or dtype is None or not tensor.is_floating_point():
            return tensor
        copy = tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)
        return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy

    made = kind.__new__(kind)
    nn.Module.__init__(made)
    hooks = set(made.__dict__) - {"training", "_parameters", "_buffers", "_modules"}
    # Old-style weight_norm keeps the weight as a plain attribute, so those are converted too.
    state = {name: convert(value) for name, value in module.__dict__.items() if name not in hooks}
    state["_parameters"] = {name: convert(p) for name, p in module._parameters.items()}
    state["_buffers"] = {
        name: None if b is None else convert(b.detach().clone()) for name, b in module._buffers.items()
    }
    made.__dict__.update(state)
    if backend is not None:
        made.backend = backend
    return made


@dataclass
class LayerTrial:
    """One layer on the inputs that it met: is the other class as exact, and is it faster?"""

    module: nn.Module
    source: type[nn.Module]
    target: type[nn.Module]
    backend: str | None
    calls: list[Call]
    seconds_before: float = field(default=0.0, init=False)
    seconds_after: float = field(default=0.0, init=False)

    def kernel(self) -> tuple[str, str | None]:
        call = self.calls[0]
        with torch.set_grad_enabled(self.trains()):  # as it will be timed
            return bare(self.module, self.target, self.backend).kernel(*call.args, **call.kwargs)

    def why_not_exact(self) -> str | None:
        """Compares both with the original in float64; the other may err a little more than the original."""
        for call in self.calls:
            theirs = self._results(self.source, None, call)
            ours = self._results(self.target, self.backend, call)
            truth = self._results(self.source, None, call, torch.float64)
            eps = max(torch.finfo(t.dtype).eps for t in (*theirs.values(), *floats(call.args)))
            for name, exact in truth.items():
                scale = float(exact.abs().max()) if exact.numel() else 0.0
                allowed = SLACK * (_largest(theirs[name] - exact) + eps * scale)
                error = _largest(ours[name] - exact)
                if not error <= allowed:
                    return f"its {name} is off by {error:.1e} (allowed {allowed:.1e})"
        return None

    def _results(
        self, kind: type[nn.Module], backend: str | None, call: Call, dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        module = bare(self.module, kind, backend, dtype)
        args, kwargs = copies((call.args, call.kwargs))
        if dtype is not None:
            args, kwargs = tree_map_only(
                torch.Tensor,
                lambda t: (
                    t.detach().to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t
                ),
                (args, kwargs),
            )
        outputs = floats(module.forward(*args, **kwargs))
        named = [(f"gradient of {name}", p) for name, p in module.named_parameters()]
        named += [("gradient of the input", t) for t in floats((args, kwargs))]
        named = [(name, t) for name, t in named if t.requires_grad]
        grads = gradients(outputs, [t for _, t in named])
        results = {f"output {index}" if index else "output": o.detach() for index, o in enumerate(outputs)}
        return results | {name: grad for (name, _), grad in zip(named, grads) if grad is not None}

    def time(self) -> None:
        """Medians of both in turns: forward, and backward too where the layer is in training mode."""
        for call in self.calls:
            steps = {
                "before": self._step(self.source, None, call),
                "after": self._step(self.target, self.backend, call),
            }
            cuda = any(t.is_cuda for t in floats((call.args, call.kwargs)))
            stopwatch = synchronized if cuda else wall_clock
            measured = interleave(steps, ROUNDS, seconds=SECONDS, stopwatch=stopwatch)
            self.seconds_before += call.count * statistics.median(measured["before"])
            self.seconds_after += call.count * statistics.median(measured["after"])

    def trains(self) -> bool:
        tensors = [*self.module.parameters(), *floats([(c.args, c.kwargs) for c in self.calls])]
        return self.module.training and torch.is_grad_enabled() and any(t.requires_grad for t in tensors)

    def _step(self, kind: type[nn.Module], backend: str | None, call: Call) -> Callable[[], Any]:
        module = bare(self.module, kind, backend)
        if not self.trains():

            def forward() -> None:
                with torch.no_grad():
                    module.forward(*call.args, **call.kwargs)

            return forward
        sources = [t for t in (*module.parameters(), *floats((call.args, call.kwargs))) if t.requires_grad]
        outputs = floats(module.forward(*call.args, **call.kwargs))
        cotangents = [cotangent(output, 0) for output in outputs if output.requires_grad]

        def forward_backward() -> None:
            gradients(floats(module.forward(*call.args, **call.kwargs)), sources, cotangents)

        return forward_backward


def _largest(difference: torch.Tensor) -> float:
    return float(difference.abs().max()) if difference.numel() else 0.0


def synchronized(call: Callable[[], Any], times: int) -> float:
    """The stopwatch for a GPU, whose calls return before their work is done."""

    def all_times() -> None:
        for _ in range(times):
            call()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return wall_clock(all_times, 1) / times
