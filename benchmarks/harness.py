"""Contenders of one layer: checked against the definition, then timed in turns, then held against the limit.

A :class:`Benchmark` describes an operator, a :class:`Layer` its sizes in some network, a :class:`Problem` one
pass over that layer. :meth:`Problem.measure` checks every :class:`Contender` against the float64 definition,
refuses those that are wrong, leaves out those whose kernel does not serve such a layer, and times the others
interleaved: the machine's noise meets all of them alike.
"""

from __future__ import annotations

import importlib
import json
import math
import statistics
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastconv import backends
from fastconv._timing import interleave, keep_freed_memory, wall_clock
from fastconv.ceilings import Ceilings, measure
from fastconv.cli._model import LAYOUTS

FOLDER = Path(__file__).resolve().parent
PASSES = ("forward", "backward")
SLOW = ("reference", "emulator")  # they define or emulate; timed only when asked for by name


@dataclass(frozen=True)
class Layer:
    """One layer of a network; ``sizes`` is its row of the shape file, with the batch."""

    network: str
    name: str
    sizes: dict[str, int]

    def __str__(self) -> str:
        return f"{self.network}/{self.name}"


@dataclass(frozen=True)
class Benchmark:
    """What the suite must know of an operator; ``benchmarks/bench_<op>.py`` holds one as ``BENCHMARK``.

    Attributes:
        op: the operator's stem.
        tensors: ``tensors(sizes, generator) -> float32 tensors``; all receive gradients in the backward pass.
        reference: ``reference(sizes, *tensors) -> output``, the definition.
        ours: ``ours(sizes, *tensors, backend=, algorithm=) -> output``.
        peer: ``peer(sizes, *tensors) -> output``, what the user would run without fastconv.
        macs: ``macs(sizes) -> int``: multiply-adds of the textbook's formula.
        macs_inside: the same without those that meet the zero padding; the floor counts these.
        ladder: the layer that ``python -m fastconv ladder`` climbs on.
        tiny: sizes that the emulator and Triton's interpreter finish in a second.
        ladder_layout: a layout that every algorithm serves.
        ladder_steps: the algorithms of a backend, the plainest first; where it says nothing of a backend, the
            reverse of what is tried first.
        slow: algorithms that would take minutes a layer: timed on the ladder, else only where their backend
            is asked for by name.
        products_saved: ``products_saved(sizes) -> float``: the formula's multiplications over those of the
            fastest algorithm known here. A time so much below the floor is possible.
        rounding: how many times a plain sum's error is allowed of an algorithm, where a call names it.
    """

    op: str
    tensors: Callable[..., tuple[torch.Tensor, ...]]
    reference: Callable[..., torch.Tensor]
    ours: Callable[..., torch.Tensor]
    peer: Callable[..., torch.Tensor]
    macs: Callable[[dict], int]
    macs_inside: Callable[[dict], int]
    ladder: str
    tiny: dict[str, int] = field(default_factory=dict)
    ladder_layout: str = "nhwc"
    ladder_steps: dict[str, tuple[str, ...]] = field(default_factory=dict)
    slow: tuple[str, ...] = ()
    products_saved: Callable[[dict], float] = lambda sizes: 1.0
    rounding: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Contender:
    """One way to compute the layer.

    Attributes:
        side: who computes: ``"torch"``, ``"torch.compile"`` or ``"fastconv"``.
        layout: ``"nchw"`` or ``"nhwc"``.
        backend, algorithm: the kernel; None is the library's own choice, which is what a user gets.
        weight_layout: the layout of the second tensor, the weight; None: the same. PyTorch's speed depends on
            it.
    """

    side: str
    layout: str
    backend: str | None = None
    algorithm: str | None = None
    weight_layout: str | None = None

    @property
    def name(self) -> str:
        weight = f", weight {self.weight_layout}" if self.weight_layout else ""
        return f"{self.kernel} {self.layout}{weight}"

    @property
    def kernel(self) -> str:
        """``"torch"``, ``"fastconv"`` (its own choice), ``"cpu/vectorized"``, ..."""
        if self.backend is None:
            return self.side
        return f"{self.backend}/{self.algorithm}" if self.algorithm else self.backend


def no_macs(sizes: dict) -> int:
    """The multiply-adds of an operator that moves values only."""
    return 0


def load(op: str) -> Benchmark:
    """The benchmark of an operator.

    Raises:
        ValueError: ``benchmarks/`` has none of that name.
    """
    if op not in operators():
        raise ValueError(f"op must be one of {operators()}, got {op!r}")
    return importlib.import_module(f"{__package__}.bench_{op}").BENCHMARK


def operators() -> tuple[str, ...]:
    """The operators that have a benchmark."""
    stems = {path.stem.removeprefix("bench_") for path in FOLDER.glob("bench_*.py")}
    return tuple(sorted(stems & set(backends.CHOICES)))  # not bench_models.py


def networks() -> tuple[str, ...]:
    """The names of the shape files."""
    return tuple(sorted(path.stem for path in (FOLDER / "shapes").glob("*.json")))


def layers(op: str, names: Iterable[str] | None = None, batch: int = 4) -> list[Layer]:
    """The layers of an operator in some networks.

    Args:
        op: the operator's stem.
        names: networks (``"mobilenet_v1"``), layers (``"landmarks/144@56 k3"``), or ``"all"``, which is what
            None means: all networks but ``gpu``. Layers of other operators are left out.
        batch: images, where the shape file does not say.

    Raises:
        ValueError: there is no such network, or no operator's layer of that name.
    """
    found = []
    for name in _expanded(names or ["all"]):
        network, _, wanted = name.partition("/")
        if network not in networks():
            raise ValueError(f"shapes must be among {networks()}, got {network!r}")
        file = json.loads((FOLDER / f"shapes/{network}.json").read_text())
        known = {other: [row["name"] for row in file.get(other, [])] for other in operators()}
        if wanted and not any(wanted in names for names in known.values()):
            raise ValueError(f"{network} has {known[op]} for {op}, got {wanted!r}")
        found += [_layer(network, batch, **row) for row in file.get(op, []) if wanted in ("", row["name"])]
    return found


def _expanded(names: Iterable[str]) -> dict[str, None]:
    """Names in their order, each once, and the networks that "all" stands for."""
    every = [name for name in networks() if name != "gpu"]
    return dict.fromkeys(each for name in names for each in (every if name == "all" else [name]))


def _layer(network: str, default_batch: int, name: str, batch: int | None = None, **sizes: int) -> Layer:
    return Layer(network, name, {"batch": batch or default_batch, **sizes})


def contenders(
    op: str,
    device: str = "cpu",
    *,
    backends_wanted: Sequence[str] | None = None,
    layouts: Sequence[str] = tuple(LAYOUTS),
    peers: Sequence[str] = ("torch",),
    quick: bool = False,
) -> list[Contender]:
    """Who can run here: the peers, the library's own choice, and every algorithm of every backend.

    Args:
        op: the operator's stem.
        device: where the tensors lie.
        backends_wanted: only these; None: all but the reference, the emulator and interpreted Triton.
        layouts: ``"nchw"``, ``"nhwc"``.
        peers: ``"torch"``, ``"torch.compile"``.
        quick: only the peers and the library's own choice.

    Raises:
        ValueError: a wanted backend cannot run here; the message says why.
    """
    choice = backends.CHOICES[op]
    sides = [(peer, None, None) for peer in peers] + [("fastconv", None, None)]
    possible = backends.available(op, device)
    if backends_wanted is None:
        interpreted = backends.triton_interpreted() or device == "cpu"
        skipped = (*SLOW, "aten", *(("triton",) if interpreted else ()))  # aten is the peer, by another name
        wanted = [] if quick else [name for name in possible if name not in skipped]
    else:
        wanted = backends_wanted
        for name in wanted:
            if name not in possible:
                reason = backends.why_not(name, device) if name in backends.BACKENDS else "there is none"
                raise ValueError(f"backends must be among {possible} here, got {name!r}: {reason}")
    benchmark = load(op)
    slow = benchmark.slow if backends_wanted is None else ()
    for backend in wanted:
        algorithms = choice.algorithms[backend] or (None,)
        sides += [("fastconv", backend, algorithm) for algorithm in algorithms if algorithm not in slow]
    found = [Contender(side, layout, *kernel) for side, *kernel in sides for layout in layouts]
    has_weights = len(benchmark.tensors(benchmark.tiny, torch.Generator())) > 1
    if has_weights and "torch" in peers and "nhwc" in layouts:
        # What a user gets who converts the images only.
        found.insert(len(layouts), Contender("torch", "nhwc", weight_layout="nchw"))
    return found


@dataclass
class Problem:
    """One pass over one layer, in one type, on one device."""

    benchmark: Benchmark
    layer: Layer
    direction: str  # "forward" or "backward": the gradients of all tensors
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.direction not in PASSES:
            raise ValueError(f"direction must be one of {PASSES}, got {self.direction!r}")

    def __str__(self) -> str:
        return f"{self.layer} {self.direction}"

    @property
    def macs(self) -> int:
        return self.benchmark.macs(self.layer.sizes)

    def measure(
        self,
        contenders: Sequence[Contender],
        *,
        rounds: int = 20,
        seconds: float | None = 3.0,
        ceilings: Ceilings | None = None,
        stopwatch: Callable[[Callable[[], Any], int], float] | None = None,
    ) -> dict[str, Any]:
        """Checks and times the contenders; returns what a results file holds for this problem.

        ``rounds`` and ``seconds`` are those of :func:`fastconv._timing.interleave`. A contender that raises
        or is wrong is not timed: its ``refused`` says why. A kernel that does not serve this layer is no
        contender: ``left_out`` has its name and the reason.
        """
        ceilings = ceilings or measure(self.device)
        _settle(self.device, contenders)
        inputs, grad_output, expected = self._prepare()
        calls, entries, left_out = {}, [], {}
        for contender in contenders:
            call, entry = self._enter(contender, inputs, grad_output, expected)
            if reason := entry.pop("left_out"):
                left_out[contender.name] = reason
                continue
            entries.append(entry)
            if entry["refused"] is None:
                calls[contender.name] = call
        times = {}
        if calls:
            clock = stopwatch or (CudaStopwatch(self.device) if "cuda" in self.device else wall_clock)
            with torch.set_grad_enabled(self.direction == "backward"):
                times = interleave(calls, rounds, seconds=seconds, stopwatch=clock)
        work = self._work(inputs, grad_output, ceilings)
        for entry in entries:
            entry.update(self.figures(times.get(entry["name"]), work))
        add_ratios(entries)
        return {
            "network": self.layer.network,
            "layer": self.layer.name,
            "sizes": self.layer.sizes,
            "pass": self.direction,
            "dtype": str(self.dtype).removeprefix("torch."),
            **work,
            "products_saved": self.benchmark.products_saved(self.layer.sizes),
            "contenders": entries,
            "left_out": left_out,
        }

    def check(self, contenders: Sequence[Contender]) -> list[dict[str, Any]]:
        """Runs the contenders without timing them: the ``max_error`` of each, or why not."""
        inputs, grad_output, expected = self._prepare()
        return [self._enter(contender, inputs, grad_output, expected)[1] for contender in contenders]

    def _prepare(self) -> tuple[list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
        """Random tensors, the output's gradient, and the right answers: float64, from the rounded tensors."""
        generator = torch.Generator().manual_seed(zlib.crc32(str(self).encode()))
        sizes = self.layer.sizes
        inputs = [tensor.to(self.device, self.dtype) for tensor in self.benchmark.tensors(sizes, generator)]
        exact = [tensor.double().requires_grad_(self.direction == "backward") for tensor in inputs]
        output = self.benchmark.reference(sizes, *exact)
        grad_output = torch.randn(output.shape, generator=generator).to(self.device, self.dtype)
        if self.direction == "forward":
            return inputs, grad_output, [output]
        return inputs, grad_output, list(torch.autograd.grad(output, exact, grad_output.double()))

    def _enter(
        self,
        contender: Contender,
        inputs: Sequence[torch.Tensor],
        grad_output: torch.Tensor,
        expected: Sequence[torch.Tensor],
    ) -> tuple[Callable[[], Any], dict[str, Any]]:
        """The call to time, and the contender's entry, refused if its answer is wrong."""
        entry = {
            "name": contender.name,
            "kernel": contender.kernel,
            "side": contender.side,
            "layout": contender.layout,
            "max_error": None,
            "refused": None,
            "left_out": None,
        }
        call = None
        try:
            call = self._call(contender, inputs, grad_output)
            with torch.set_grad_enabled(self.direction == "backward"):
                answers = call()
            answers = [answers] if isinstance(answers, torch.Tensor) else list(answers)
            entry["max_error"], entry["refused"] = self._judge(answers, expected, contender)
        except Exception as error:  # whatever a kernel raises, the others must still be timed
            unserved = isinstance(error, backends.BackendError) and contender.backend is not None
            entry["left_out" if unserved else "refused"] = f"{type(error).__name__}: {error}"
        return call, entry

    def _call(self, contender: Contender, inputs, grad_output) -> Callable[[], Any]:
        benchmark, sizes = self.benchmark, self.layer.sizes

        def placed(tensor: torch.Tensor, layout: str) -> torch.Tensor:
            tensor = tensor.detach().clone()
            return tensor.to(memory_format=LAYOUTS[layout]) if tensor.dim() == 4 else tensor

        tensors = [placed(tensor, contender.layout) for tensor in inputs]
        if contender.weight_layout:
            tensors[1] = placed(inputs[1], contender.weight_layout)
        if contender.side == "fastconv":
            choice = {"backend": contender.backend, "algorithm": contender.algorithm}

            def run():
                return benchmark.ours(sizes, *tensors, **choice)
        else:
            peer = benchmark.peer
            if contender.side == "torch.compile":
                peer = torch.compile(peer, mode="max-autotune-no-cudagraphs", dynamic=False)

            def run():
                return peer(sizes, *tensors)

        if self.direction == "forward":
            return run
        for tensor in tensors:
            tensor.requires_grad_()
        output = run()
        grad = placed(grad_output, contender.layout)
        return lambda: torch.autograd.grad(output, tensors, grad, retain_graph=True)

    def _judge(self, answers, expected, contender: Contender) -> tuple[float, str | None]:
        """The largest error, relative to the largest value expected, and why it is too large, or None."""
        worst, reason = 0.0, None
        for answer, exact in zip(answers, expected, strict=True):
            if answer.shape != exact.shape:
                return math.inf, f"wrong shape {tuple(answer.shape)}, expected {tuple(exact.shape)}"
            scale = max(exact.abs().max().item(), 1e-30) if exact.numel() else 1.0
            error = (answer.double() - exact).abs().max().item() / scale if exact.numel() else 0.0
            rounding = self.benchmark.rounding.get(contender.algorithm, 1.0)
            allowed = tolerance(self.dtype, rounding**2 * self.macs / max(exact.numel(), 1))
            if not error <= allowed:  # a NaN too
                reason = f"wrong result: error {error:.1e} of the largest value, {allowed:.1e} allowed"
            if not error <= worst:
                worst = error
        return worst, reason

    def _work(self, inputs, grad_output, ceilings: Ceilings) -> dict[str, float | str]:
        """FLOPs, bytes and the floor: each tensor that is needed moves once."""
        tensors, output = sum(tensor.nbytes for tensor in inputs), grad_output.nbytes
        inside = self.benchmark.macs_inside(self.layer.sizes)
        if self.direction == "forward":
            flops, flops_inside, nbytes = 2 * self.macs, 2 * inside, tensors + output
        else:  # one gradient for each factor of the products; where nothing is multiplied, none is read
            read = tensors if self.macs else 0
            flops, flops_inside, nbytes = 4 * self.macs, 4 * inside, read + tensors + output
        return {
            "flops": flops,
            "flops_inside": flops_inside,
            "bytes": nbytes,
            "floor_seconds": ceilings.floor_time(flops_inside, nbytes, self.dtype),
            "bound": ceilings.bound(flops_inside, nbytes, self.dtype),
        }

    @staticmethod
    def figures(times: list[float] | None, work: dict) -> dict[str, Any]:
        if not times:
            keys = ("seconds", "gflops", "gbytes", "percent_of_limit")
            return {**dict.fromkeys(keys), "rounds": []}
        seconds = statistics.median(times)
        return {
            "seconds": seconds,
            "gflops": work["flops"] / seconds / 1e9,
            "gbytes": work["bytes"] / seconds / 1e9,
            "percent_of_limit": 100 * work["floor_seconds"] / seconds,
            "rounds": times,
        }


def _settle(device: str, contenders: Iterable[Contender]) -> None:
    """PyTorch at its best, float32 as float32 on both sides (no tf32), and no page faults in between."""
    keep_freed_memory()
    if "cuda" in device:
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False
    if any(contender.side == "torch.compile" for contender in contenders):
        from torch._functorch import config

        config.donated_buffer = False  # the backward pass runs many times on the same saved tensors
        torch.compiler.reset()  # or the limit of recompilations ends in eager mode, unsaid


def tolerance(dtype: torch.dtype, terms: float) -> float:
    """The error allowed of a sum of ``terms`` products, relative to the largest value.

    Rounding errors of a sum grow with the root of its length; the half types are summed in float32 and
    rounded once more when stored.
    """
    summed_in = torch.float64 if dtype == torch.float64 else torch.float32
    return 8 * (torch.finfo(summed_in).eps * math.sqrt(max(terms, 1)) + torch.finfo(dtype).eps / 2)


def add_ratios(entries: list[dict[str, Any]]) -> None:
    """``ratio``: how many times as fast as PyTorch in its best layout; ``ratio_same_layout``: in this one."""
    torch_entries = [entry for entry in entries if entry["side"] == "torch" and entry["seconds"]]
    best = min((entry["seconds"] for entry in torch_entries), default=None)
    for entry in entries:
        same_layout = (e["seconds"] for e in torch_entries if e["layout"] == entry["layout"])
        seconds, same = entry["seconds"], min(same_layout, default=None)
        entry["ratio"] = best / seconds if seconds and best else None
        entry["ratio_same_layout"] = same / seconds if seconds and same else None


class CudaStopwatch:
    """Times calls on a GPU by events, each with a cold L2 cache: first a larger buffer is overwritten."""

    def __init__(self, device: str = "cuda", flush_bytes: int = 2**30) -> None:
        self.flush = torch.empty(flush_bytes, dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], Any], times: int) -> float:
        events = []
        for _ in range(min(times, 10)):
            self.flush.zero_()  # also busies the device while the host prepares the launch
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events) * 1e-3
