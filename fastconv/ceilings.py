"""What a machine can do at most: multiply-adds, and a copy, per second. Measured, not read off a datasheet.

Every benchmark puts its time beside the floor that these two give:

    floor = max(FLOPs / rate of multiply-adds, bytes / rate of a copy)

with each input read once and each output written once.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, field

import torch

from . import _library

COPY_SIZES = tuple(2**power for power in range(17, 29))  # bytes read plus written: 128 KiB to 256 MiB


@dataclass(frozen=True)
class Ceilings:
    """The measured limits of one device.

    Attributes:
        device: ``"cpu"`` or the name of the GPU.
        capability: the instruction set (``"avx512"``) or the GPU's compute capability (``"9.0"``).
        threads: how many CPU threads the figures are for; 0 for a GPU.
        flops_per_second: float32 multiply-adds, two FLOPs each.
        bytes_per_second: a copy that is far larger than the caches, bytes read plus bytes written.
        copy_rates: bytes/s of a copy of so many bytes read and written in all; small ones stay in the caches.
        dtype_flops_per_second: multiply-adds of other types, where they differ from float32's.
    """

    device: str
    capability: str
    threads: int
    flops_per_second: float
    bytes_per_second: float
    copy_rates: dict[int, float] = field(default_factory=dict)
    dtype_flops_per_second: dict[str, float] = field(default_factory=dict)

    def copy_rate(self, nbytes: float) -> float:
        """Bytes/s of a copy of ``nbytes`` in all: no slower than any larger copy."""
        fits = [rate for size, rate in self.copy_rates.items() if size * 2 > nbytes]
        return max([self.bytes_per_second, *fits])

    def arithmetic_rate(self, dtype: str | torch.dtype = torch.float32) -> float:
        """FLOP/s of multiply-adds on tensors of a type."""
        return self.dtype_flops_per_second.get(str(dtype).removeprefix("torch."), self.flops_per_second)

    def floor_time(self, flops: float, nbytes: float, dtype: str | torch.dtype = torch.float32) -> float:
        """Seconds below which no kernel can do ``flops`` and move ``nbytes``: the larger of the two times."""
        return max(flops / self.arithmetic_rate(dtype), nbytes / self.copy_rate(nbytes))

    def bound(self, flops: float, nbytes: float, dtype: str | torch.dtype = torch.float32) -> str:
        """``"arithmetic"`` or ``"memory"``: which of the two times is the larger."""
        arithmetic = flops / self.arithmetic_rate(dtype) > nbytes / self.copy_rate(nbytes)
        return "arithmetic" if arithmetic else "memory"

    def as_dict(self) -> dict:
        """For JSON; :meth:`from_dict` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> Ceilings:
        """The inverse of :meth:`as_dict`, also after a trip through JSON, which turns sizes into strings."""
        rates = {int(size): rate for size, rate in values["copy_rates"].items()}
        return cls(**{**values, "copy_rates": rates})


def measure(device: str | torch.device = "cpu", threads: int | None = None) -> Ceilings:
    """Measures a device's limits, in about two seconds; once in a process.

    Args:
        device: a CPU or CUDA device.
        threads: CPU threads; None: as many as PyTorch uses.

    Raises:
        RuntimeError: the CPU's limits need ``fastconv._host``, and it is not built.
        ValueError: ``device`` is neither a CPU nor a CUDA device, or ``threads`` is below 1.
    """
    device = torch.device(device)
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if device.type == "cpu":
        return _measure_cpu(threads or torch.get_num_threads())
    if device.type == "cuda":
        return _measure_cuda(torch.cuda.current_device() if device.index is None else device.index)
    raise ValueError(f"device must be a CPU or CUDA device, got {device}")


def measure_or_reason(device: str | torch.device = "cpu") -> tuple[Ceilings | None, str | None]:
    """:func:`measure`'s result, or None and why the limits cannot be measured here; for tables that go on."""
    try:
        return measure(device), None
    except RuntimeError as error:
        return None, str(error)


@functools.cache
def _measure_cpu(threads: int) -> Ceilings:
    host = _library.host()
    if host is None:
        raise RuntimeError(
            "the machine's limits are measured by fastconv._host, which is not built; "
            f"build it with: {_library.build_command()}"
        )
    rates = {size: host.copy_rate(size, threads, 0.1) for size in COPY_SIZES}
    return Ceilings(
        device="cpu",
        capability=host.cpu_capability(),
        threads=threads,
        flops_per_second=host.fma_peak(threads, 0.3),
        bytes_per_second=rates[COPY_SIZES[-1]],
        copy_rates=rates,
        dtype_flops_per_second={"float64": host.fma_peak_double(threads, 0.3)},
    )


@functools.cache
def _measure_cuda(index: int) -> Ceilings:
    device = torch.device("cuda", index)
    major, minor = torch.cuda.get_device_capability(device)
    copy = _copy_rate_cuda(device)
    return Ceilings(
        device=torch.cuda.get_device_name(device),
        capability=f"{major}.{minor}",
        threads=0,
        flops_per_second=_matmul_rate_cuda(device, torch.float32),
        bytes_per_second=copy,
        # Half types may go through the matrix units, so these are their limit.
        dtype_flops_per_second={
            "bfloat16": _matmul_rate_cuda(device, torch.bfloat16),
            "float16": _matmul_rate_cuda(device, torch.float16),
            "float64": _matmul_rate_cuda(device, torch.float64),
        },
    )


def _copy_rate_cuda(device: torch.device) -> float:
    source = torch.empty(2**28, device=device).normal_()  # 1 GiB: far beyond any cache
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_seconds_cuda(lambda: target.copy_(source))


def _matmul_rate_cuda(device: torch.device, dtype: torch.dtype) -> float:
    size = 4096 if dtype == torch.float64 else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # float32 means float32: no tf32
    try:
        return 2 * size**3 / _best_seconds_cuda(lambda: torch.matmul(a, b))
    finally:
        torch.set_float32_matmul_precision(before)


def _best_seconds_cuda(call, repeats: int = 10) -> float:
    """The shortest of some calls, by device events: the ceiling is the best that the device does."""
    for _ in range(3):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return min(start.elapsed_time(end) for start, end in events) * 1e-3
