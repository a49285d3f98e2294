"""What optimize did to each layer."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from .._format import count, milliseconds, rich_table, shape, text_table
from ._chains import ChainReport, rows_of
from ._trial import Parity

SWAPPED_FROM = "_fastconv_swapped_from"  # on a swapped module: the class that it had
EACH_CALL = "chosen at each call"


@dataclass
class LayerReport:
    """One layer.

    Attributes:
        name, type: of the module, as it was before.
        matched: a module of this library could take its place, and it was selected.
        kernel: what runs it, such as ``"cpu/vectorized"``; None if PyTorch does.
        reason: why PyTorch runs it; None if a kernel does.
        shape: of its first input; None if it was not seen running.
        calls: how often it ran; times, MACs and bytes are sums over these.
        seconds_before, seconds_after: PyTorch's time and the kernel's, medians; None if not measured.
        trained: the times are forward and backward, not forward alone.
        macs, bytes: multiply-adds, and bytes of input, output and parameters, of the forward pass.
        timed_macs, timed_bytes: of what was timed; backward reads the output's gradient, the input and the
            parameters, and writes the gradients of the last two.
        dtype: of the input.
    """

    name: str
    type: str
    matched: bool = False
    kernel: str | None = None
    reason: str | None = None
    shape: tuple[int, ...] | None = None
    calls: int = 0
    seconds_before: float | None = None
    seconds_after: float | None = None
    trained: bool = False
    macs: int = 0
    bytes: int = 0
    timed_macs: int = 0
    timed_bytes: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def speedup(self) -> float | None:
        return None if not self.seconds_after else self.seconds_before / self.seconds_after

    def percent_of_limit(self, ceilings: Any) -> float | None:
        """The least time that the machine's ceilings allow, as per cent of the kernel's time."""
        if not self.seconds_after:
            return None
        return (
            100 * ceilings.floor_time(2 * self.timed_macs, self.timed_bytes, self.dtype) / self.seconds_after
        )


@dataclass
class Report:
    """All layers of a model; ``str()`` and rich print it.

    Attributes:
        rows: a :class:`LayerReport` for each layer.
        parity: the whole model against the original; None without an ``example_input`` or a winner.
        chains: a :class:`ChainReport` for each chain of layers that one call runs.
        differing_chains: how far the model was off with its chains fused, if that was too far; else None.
    """

    rows: list[LayerReport]
    parity: Parity | None = None
    chains: list[ChainReport] = field(default_factory=list)
    differing_chains: Parity | None = None
    ceilings: Any = field(default=None, repr=False)
    no_ceilings: str | None = field(default=None, init=False, repr=False)  # why there are none

    @property
    def swapped(self) -> list[LayerReport]:
        return [row for row in self.rows if row.kernel is not None]

    def measure_ceilings(self) -> Any:
        """The machine's limits; None where nothing was timed, or where they cannot be measured."""
        if self.ceilings is None and any(row.seconds_after for row in self.rows):
            from ..ceilings import measure_or_reason

            self.ceilings, self.no_ceilings = measure_or_reason()
        return self.ceilings

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        layers = [
            {**asdict(row), "dtype": str(row.dtype).removeprefix("torch."), "speedup": row.speedup}
            for row in self.rows
        ]
        parity = None if self.parity is None else asdict(self.parity)
        return {"layers": layers, "chains": [asdict(chain) for chain in self.chains], "parity": parity}

    def columns(self) -> list[str]:
        return [
            "layer",
            "type",
            "input",
            "kernel",
            "before ms",
            "after ms",
            "ratio",
            "MACs",
            "bytes",
            "% limit",
        ]

    def cells(self) -> list[list[str]]:
        """As text: the layers that a module of this library could take, and their sum."""
        ceilings = self.measure_ceilings()
        cells = []
        for row in (row for row in self.rows if row.matched):
            percent = None if ceilings is None else row.percent_of_limit(ceilings)
            cells.append(
                [
                    row.name or "(the model)",
                    row.type,
                    "" if row.shape is None else shape(row.shape),
                    row.kernel or "PyTorch",
                    milliseconds(row.seconds_before),
                    milliseconds(row.seconds_after),
                    "" if row.speedup is None else f"{row.speedup:.2f}x",
                    count(row.macs) if row.macs else "",
                    count(row.bytes) if row.bytes else "",
                    "" if percent is None else f"{percent:.0f}",
                ]
            )
        timed = [row for row in self.rows if row.seconds_before is not None]
        before = sum(row.seconds_before for row in timed)
        after = sum(row.seconds_after if row.kernel else row.seconds_before for row in timed)
        times = [milliseconds(before), milliseconds(after), f"{before / after:.2f}x"] if timed else [""] * 3
        sums = [
            count(sum(getattr(row, name) for row in self.rows if row.matched)) for name in ("macs", "bytes")
        ]
        return [*cells, ["all of these", "", "", f"{len(self.swapped)} swapped", *times, *sums, ""]]

    def legend(self) -> str:
        """What the columns mean, in one line."""
        work = "forward and backward" if any(row.trained for row in self.rows) else "forward"
        return (
            f"before, after: medians of PyTorch and of the kernel, {work}; ratio: before / after; "
            "MACs, bytes: of the forward pass; % limit: the machine's least time / after"
        )

    def remarks(self) -> list[str]:
        """Why the layers that PyTorch runs were left to it, and whether the numbers are the same."""
        left: dict[str, list[str]] = {}
        for row in self.rows:
            if row.matched and row.reason:
                left.setdefault(row.reason, []).append(row.name or "(the model)")
        lines = [
            f"{names[0]}: {reason}"
            if len(names) == 1
            else f"{len(names)} layers: {reason} ({', '.join(names)})"
            for reason, names in left.items()
        ]
        fused = {layer for chain in self.chains for layer in chain.layers}
        unmatched = [row for row in self.rows if not row.matched and row.name not in fused]
        others = Counter((row.type, row.reason) for row in unmatched)
        macs = Counter()
        for row in self.rows:
            macs[row.type, row.reason] += row.macs
        for (kind, reason), number in others.items():
            work = f" ({count(macs[kind, reason])} MACs)" if macs[kind, reason] else ""
            lines.append(f"{number} x {kind}{work}: {reason}")
        lines += self._chain_remarks()
        if self.parity is not None:
            lines.append(f"whole model: {self.parity}")
        self.measure_ceilings()
        if self.no_ceilings is not None:
            lines.append(f"no % limit: {self.no_ceilings}")
        return lines

    def _chain_remarks(self) -> list[str]:
        if self.differing_chains is not None:
            return [
                f"chains of layers run one by one; fused, the whole model differs: {self.differing_chains}"
            ]
        chains = Counter(chain.chain for chain in self.chains)
        return [f"{number} x {chain}: in one call" for chain, number in chains.items()]

    def below(self) -> list[str]:
        """The lines below the table."""
        timed = any(row.seconds_after for row in self.rows)
        return [*([self.legend()] if timed else []), *self.remarks()]

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        text_columns = ("layer", "type", "input", "kernel")
        table = rich_table("Layers", self.columns(), self.cells(), text_columns)
        return Group(table, *map(Text, self.below()))

    def __str__(self) -> str:
        return "\n".join([text_table(self.columns(), self.cells()), *self.below()])


# Kept beside the models, not on them: nothing of a report gets into a checkpoint.
REPORTS: weakref.WeakKeyDictionary[nn.Module, Report] = weakref.WeakKeyDictionary()


def report(model: nn.Module) -> Report:
    """What :func:`fastconv.optimize` did to each layer of a model.

    For a model that it has not seen, such as a copy of an optimized one, the report has no times.
    """
    if model in REPORTS:
        return REPORTS[model]
    from ..cost import is_layer
    from ..nn._rules import rule_for
    from ._swap import why_no_rule

    rows = []
    for name, module in model.named_modules():
        source = module.__dict__.get(SWAPPED_FROM)
        if source is not None:
            kernel = module.backend or EACH_CALL
            rows.append(LayerReport(name, source.__name__, matched=True, kernel=kernel))
        elif rule_for(module) is not None:
            rows.append(LayerReport(name, type(module).__name__, matched=True, reason="not optimized"))
        elif is_layer(module):
            rows.append(LayerReport(name, type(module).__name__, reason=why_no_rule(module)))
    named = dict(model.named_modules())
    return Report(
        rows, chains=[row for name, module in named.items() for row in rows_of(name, module, named)]
    )
