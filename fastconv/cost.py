"""What a network costs on paper: MACs, parameters, bytes, storage, receptive field, and the time these allow.

The formulas, for a batch of B, C input channels, M filters of K x K, G groups, outputs of E x F:

===============  ====================  ===========================================
layer            MACs                  storage in bits, at 32-bit values
===============  ====================  ===========================================
convolution      B*M*K*K*C*E*F / G     32 * (M*C*K*K / G + B*C*H*W + B*M*E*F)
depthwise        B*K*K*M*E*F           32 * (M*K*K + B*C*H*W + B*M*E*F)
linear           B*M*C                 32 * (M*C + B*C + B*M)
all others       0                     32 * (weights + input + output)
===============  ====================  ===========================================

Batch normalisation counts no MACs: at inference it is folded into the convolution before it. The receptive
field grows by ``(K-1) * D * prod(strides before)`` with every layer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from .nn.shift2d import Shift2d
from .nn.shift_conv2d import ShiftConv2d
from .nn.temporal_shift import ClipShift

Pair = tuple[int, int]


@dataclass(frozen=True)
class LayerCost:
    """One call of one layer.

    Attributes:
        name: the module's name in the model.
        type: the module's class.
        input_shape, output_shape: of its first input and its first output.
        macs: multiply-adds.
        parameters: values that are trained, biases too.
        bytes: input, output, parameters and buffers, each moved once, in the model's dtype.
        storage_bits: weights (without biases), input and output, 32 bits each.
        receptive_field: rows and columns of the network's input that one output value depends on.
        dtype: of the output.
    """

    name: str
    type: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    macs: int
    parameters: int
    bytes: int
    storage_bits: int
    receptive_field: Pair
    dtype: torch.dtype = torch.float32

    @property
    def intensity(self) -> float:
        """FLOPs (two for each MAC) for each byte moved."""
        return 2 * self.macs / self.bytes if self.bytes else math.inf

    def bound(self, ceilings: Any) -> str:
        """What limits the layer on a machine: ``"arithmetic"`` or ``"memory"``."""
        return ceilings.bound(2 * self.macs, self.bytes, self.dtype)

    def floor_seconds(self, ceilings: Any) -> float:
        """The least time that a machine's ceilings allow."""
        return ceilings.floor_time(2 * self.macs, self.bytes, self.dtype)


@dataclass
class CostTable:
    """The costs of a model's layers, in the order in which they run; ``str()`` and rich print it.

    Attributes:
        layers: one entry for each call of a layer.
        parameters: of the whole model; a layer that is called twice counts once.
        storage_bits: all weights, and each activation between layers once, 32 bits each.
        other_macs: multiply-adds outside the listed layers, such as calls of ``torch.nn.functional.conv2d``.
        given_ceilings: the machine's ceilings; None: measured here when they are first needed.
    """

    layers: list[LayerCost]
    parameters: int
    storage_bits: int
    other_macs: int = 0
    given_ceilings: Any = field(default=None, repr=False)

    @cached_property
    def ceilings(self) -> Any:
        """:func:`fastconv.ceilings.measure`'s result, or what :func:`cost` was given; None: see remarks."""
        return self._ceilings_or_reason[0]

    @cached_property
    def _ceilings_or_reason(self) -> tuple[Any, str | None]:
        if self.given_ceilings is not None:
            return self.given_ceilings, None
        from .ceilings import measure_or_reason

        return measure_or_reason()

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers) + self.other_macs

    @property
    def bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)

    @property
    def floor_seconds(self) -> float:
        """The least time of the layers one after the other, none folded into its neighbour.

        Raises:
            RuntimeError: the machine's limits cannot be measured here.
        """
        ceilings, reason = self._ceilings_or_reason
        if ceilings is None:
            raise RuntimeError(reason)
        return sum(layer.floor_seconds(ceilings) for layer in self.layers)

    @property
    def receptive_field(self) -> Pair:
        """Of the network's last layer."""
        return self.layers[-1].receptive_field if self.layers else (1, 1)

    def columns(self) -> list[str]:
        return [
            "layer",
            "type",
            "output",
            "MACs",
            "parameters",
            "bytes",
            "field",
            "FLOP/B",
            "bound",
            "floor ms",
        ]

    def cells(self) -> list[list[str]]:
        """The table as text, a list for each layer and one for the sum."""
        from ._format import count, milliseconds, shape

        limits = self.ceilings
        rows = [
            [
                layer.name,
                layer.type,
                shape(layer.output_shape),
                count(layer.macs),
                count(layer.parameters),
                count(layer.bytes),
                shape(layer.receptive_field),
                f"{layer.intensity:.2f}",
                "" if limits is None else layer.bound(limits),
                "" if limits is None else milliseconds(layer.floor_seconds(limits)),
            ]
            for layer in self.layers
        ]
        if self.other_macs:
            rows.append(["", "(outside modules)", "", count(self.other_macs), *[""] * 6])
        floor = "" if limits is None else milliseconds(self.floor_seconds)
        total = ["all", "", "", count(self.macs), count(self.parameters), count(self.bytes)]
        return [*rows, [*total, shape(self.receptive_field), "", "", floor]]

    def remarks(self) -> list[str]:
        """Why columns are empty."""
        reason = self._ceilings_or_reason[1]
        return [] if reason is None else [f"no bound and no floor: {reason}"]

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        from ._format import rich_table

        text_columns = ("layer", "type", "output", "bound")
        table = rich_table("Cost", self.columns(), self.cells(), text_columns)
        return Group(table, *map(Text, self.remarks()))

    def __str__(self) -> str:
        from ._format import text_table

        return "\n".join([text_table(self.columns(), self.cells()), *self.remarks()])


def cost(model: nn.Module, input_size: Sequence[int], *, ceilings: Any = None) -> CostTable:
    """Counts what a model costs for one input, without computing anything.

    The model runs on fake tensors, in eval mode; parameters, buffers, hooks and flags stay as they are.

    Args:
        model: any module that takes one tensor.
        input_size: shape of the input; three numbers are ``(C, H, W)`` of one image.
        ceilings: what :func:`fastconv.ceilings.measure` returns; None: measured when first needed.

    Returns:
        A table with a row for each layer that has parameters, pools, or is a module of this library.

    Raises:
        ValueError: ``input_size`` has a number below 0, or is empty.

    >>> print(fastconv.cost(fastconv.models.create("mobilenet_v1"), (3, 224, 224)).macs)
    568740352
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    size = tuple(int(n) for n in input_size)
    if not size or min(size) < 0:
        raise ValueError(f"input_size must be numbers of at least 0, got {tuple(input_size)}")
    if len(size) == 3:
        size = (1, *size)
    example = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )
    fakes = {tensor: fake_mode.from_tensor(tensor.detach()) for tensor in named.values()}
    tensors = {name: fakes[tensor] for name, tensor in named.items()}  # tied tensors stay tied
    recorder = _Recorder()
    flops = FlopCounterMode(display=False)
    with fake_mode, torch.no_grad(), _eval(model), recorder.watch(model), recorder, flops:
        input = torch.empty(size, dtype=example.dtype, device=example.device)
        recorder.start(input)
        torch.func.functional_call(model, tensors, (input,))
    parameters = sum(p.numel() for p in model.parameters())
    counted = sum(layer.macs for layer in recorder.layers)
    return CostTable(
        recorder.layers,
        parameters,
        storage_bits=32 * (recorder.weights + recorder.activations),
        other_macs=max(0, flops.get_total_flops() // 2 - counted),
        given_ceilings=ceilings,
    )


def macs(module: nn.Module, input_shape: Sequence[int], output_shape: Sequence[int]) -> int:
    """Multiply-adds of one call of a layer; 0 for layers that do not multiply by weights."""
    for kinds, formula in MACS.items():
        if isinstance(module, kinds):
            return formula(module, input_shape, output_shape)
    return 0


def _convolution_macs(module: Any, input_shape: Sequence[int], output_shape: Sequence[int]) -> int:
    return math.prod(output_shape) * math.prod(module.weight.shape[1:])


def _transposed_macs(module: Any, input_shape: Sequence[int], output_shape: Sequence[int]) -> int:
    return math.prod(input_shape) * math.prod(module.weight.shape[1:])


def _linear_macs(module: nn.Linear, input_shape: Sequence[int], output_shape: Sequence[int]) -> int:
    return math.prod(output_shape) * module.in_features


MACS: dict[tuple[type[nn.Module], ...], Callable[..., int]] = {
    (nn.Conv1d, nn.Conv2d, nn.Conv3d): _convolution_macs,
    (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d): _transposed_macs,
    (nn.Linear,): _linear_macs,
}
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


def bytes_moved(module: nn.Module, input: torch.Tensor, output: torch.Tensor) -> int:
    """Bytes of a call's input, output, parameters and floating-point buffers, each counted once.

    Of a shift in place, those of the channels that move, read and written.
    """
    if isinstance(module, ClipShift) and module.inplace:
        return 2 * input[:, : module.moved(input.shape[1])].nbytes
    own = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    return sum(t.numel() * t.element_size() for t in (input, output, *own))


def is_layer(module: nn.Module) -> bool:
    """Whether a module has a row of its own: it computes by itself, has parameters, pools or moves values."""
    leaf = not any(True for _ in module.children())
    own = any(True for _ in module.parameters(recurse=False))
    known = isinstance(
        module, (*POOLS, nn.ChannelShuffle, Shift2d, *(kind for kinds in MACS for kind in kinds))
    )
    return known or (leaf and (own or type(module).__module__.startswith("fastconv.nn.")))


@dataclass(frozen=True)
class _Field:
    """What a tensor has seen: the receptive field, the distance of its pixels in the input, its size."""

    extent: Pair = (1, 1)
    step: Pair = (1, 1)
    size: Pair = (1, 1)

    def window(self, kernel: Pair, stride: Pair, size: Pair) -> _Field:
        extent = tuple(e + (k - 1) * s for e, k, s in zip(self.extent, kernel, self.step))
        return _Field(extent, tuple(s * t for s, t in zip(self.step, stride)), size)

    @staticmethod
    def join(fields: list[_Field]) -> _Field:
        widest = [
            tuple(map(max, zip(*values))) for values in zip(*((f.extent, f.step, f.size) for f in fields))
        ]
        return _Field(*widest)


class _Recorder(torch.overrides.TorchFunctionMode):
    """Collects the layers' costs by hooks, and follows receptive fields through what is between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[LayerCost] = []
        self.weights = 0
        self.activations = 0
        self._fields: dict[int, _Field] = {}
        self._seen: dict[int, torch.Tensor] = {}  # keeps tensors alive, so that their ids stay their own
        self._weighed: set[int] = set()

    def start(self, input: torch.Tensor) -> None:
        self._set(input, _Field(size=tuple(input.shape[2:]) if input.dim() == 4 else (1, 1)))

    def _set(self, tensor: torch.Tensor, field: _Field) -> None:
        self._fields[id(tensor)] = field
        self._seen[id(tensor)] = tensor

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        seen = [self._fields[id(t)] for t in _tensors((args, kwargs)) if id(t) in self._fields]
        for tensor in _tensors(result) if seen else ():
            if id(tensor) not in self._fields:
                self._set(tensor, _Field.join(seen))
        return result

    @contextlib.contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        handles = []
        for name, module in model.named_modules():
            if is_layer(module):
                handles.append(module.register_forward_hook(self._hook(name), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict, result: Any) -> None:
            input = next(iter(_tensors((args, kwargs))), None)
            output = next(iter(_tensors(result)), None)
            if input is None or output is None:
                return
            with torch._C.DisableTorchFunction():
                self._add(name, module, input, output)

        return hook

    def _add(self, name: str, module: nn.Module, input: torch.Tensor, output: torch.Tensor) -> None:
        before = self._fields.get(id(input), _Field())
        field = _grow(module, before, input.shape, output.shape)
        parameters = sum(p.numel() for p in module.parameters())
        bias = getattr(module, "bias", None)
        weights = parameters - (bias.numel() if isinstance(bias, torch.Tensor) else 0)
        if id(module) not in self._weighed:
            self._weighed.add(id(module))
            self.weights += weights
        for tensor, seen in ((input, before), (output, field)):
            if id(tensor) not in self._weighed:
                self._weighed.add(id(tensor))
                self.activations += tensor.numel()
            self._set(tensor, seen)
        self.layers.append(
            LayerCost(
                name=name,
                type=type(module).__name__,
                input_shape=tuple(input.shape),
                output_shape=tuple(output.shape),
                macs=macs(module, input.shape, output.shape),
                parameters=parameters,
                bytes=bytes_moved(module, input, output),
                storage_bits=32 * (weights + input.numel() + output.numel()),
                receptive_field=field.extent,
                dtype=output.dtype,
            )
        )


def _grow(module: Any, field: _Field, input_shape: Sequence[int], output_shape: Sequence[int]) -> _Field:
    """The field of a layer's output, from that of its input."""
    if isinstance(module, nn.Linear) and len(input_shape) < 4:
        return field.window(field.size, (1, 1), (1, 1))  # it reads every pixel that was flattened
    if len(input_shape) != 4 or len(output_shape) != 4:
        return field
    size = tuple(output_shape[2:])
    if isinstance(module, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)):
        window = tuple(-(-i // o) if o else i for i, o in zip(input_shape[2:], size))
        return field.window(window, window, size)
    if isinstance(module, nn.ConvTranspose2d):
        reach = tuple(-(-((k - 1) * d + 1) // s) for k, d, s in zip(*_geometry(module)))
        field = field.window(reach, (1, 1), size)
        finer = (max(1, step // s) for step, s in zip(field.step, module.stride))
        return _Field(field.extent, tuple(finer), size)
    if isinstance(module, (Shift2d, ShiftConv2d)):
        return field.window(module.extent, getattr(module, "stride", (1, 1)), size)
    if isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
        kernel, dilation, stride = _geometry(module)
        return field.window(tuple((k - 1) * d + 1 for k, d in zip(kernel, dilation)), stride, size)
    return _Field(field.extent, field.step, size)


def _geometry(module: Any) -> tuple[Pair, Pair, Pair]:
    values = module.kernel_size, getattr(module, "dilation", 1), module.stride
    return tuple((v, v) if isinstance(v, int) else tuple(v) for v in values)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@contextlib.contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    """Eval mode for the block; every module's own flag comes back."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in flags.items():
            module.training = training
