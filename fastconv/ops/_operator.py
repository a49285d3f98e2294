"""How an operator becomes known to PyTorch: schema, fake, autograd, vmap, autocast, FLOPs.

An operator ``fastconv::<name>`` has one overload for each implementation behind it:

==================  ==================================================================
``<name>``          the compiled kernels: C++ for CPU tensors, CUDA for CUDA tensors
``<name>.emulator`` the same CUDA kernels, run on CPU tensors by ``csrc/emulator``
``<name>.triton``   the Triton kernels of ``fastconv.kernels.<name>``
==================  ==================================================================

All overloads share the schema and every formula, which an operator's own file states once. The gradient is an
``autograd.Function``, as ``torch.func`` needs it, that the operator itself applies, as ``torch.compile`` and
``torch.export`` need it. ``torch.library.register_autograd`` would refuse ``torch.func``, compiled or not.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._functorch.utils import unwrap_dead_wrappers
from torch.utils.flop_counter import register_flop_formula

library = torch.library.Library("fastconv", "FRAGMENT")

OVERLOADS = {"cpu": "", "cuda": "", "emulator": "emulator", "triton": "triton"}


def is_autocast(tensor: torch.Tensor) -> bool:
    """Whether ``torch.autocast`` is on for a tensor's device."""
    return tensor.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(tensor.device.type)


def autocast(device_type: str, arguments: Sequence[Any]) -> list[Any]:
    """Casts float tensors to the type that ``torch.autocast`` asks for on a device type.

    float64 tensors are left alone, as PyTorch's own convolutions leave them.
    """
    dtype = torch.get_autocast_dtype(device_type)
    return [
        argument.to(dtype)
        if isinstance(argument, torch.Tensor)
        and argument.is_floating_point()
        and argument.dtype != torch.float64
        and argument.layout == torch.strided  # what is not is refused, by name
        else argument
        for argument in arguments
    ]


PLAIN = (torch.Tensor, torch.nn.Parameter)  # exactly these: a subclass may be anything


def is_recorded() -> bool:
    """Whether calls are looked at or recorded: what they do must then be what they say."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or bool(torch._C._len_torch_dispatch_stack())
        or torch._C._is_tracing()
    )


def define_overloads(
    name: str, schema: str, *, check: Callable[..., object] | None, triton: str | None
) -> dict[str, torch._ops.OpOverload]:
    """Defines an operator's overloads, Triton's with its launcher; the arguments are those of `Operator`."""
    if triton is None:
        library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        return {"": getattr(torch.ops.fastconv, name).default}

    def launch(*arguments: Any) -> Any:
        check(*arguments)
        module, function = triton.split(":")
        return getattr(importlib.import_module(f"fastconv.kernels.{module}"), function)(*arguments)

    ops = {}
    for overload in dict.fromkeys(OVERLOADS.values()):
        local = f"{name}.{overload}" if overload else name
        library.define(f"{local}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        ops[overload] = getattr(getattr(torch.ops.fastconv, name), overload or "default")
    for device_type in ("CPU", "CUDA"):
        library.impl(f"fastconv::{name}.triton", launch, device_type)
    return ops


class Operator:
    """One operator of the library, registered with PyTorch for every kind of kernel.

    Args:
        name: the operator's name in ``torch.ops.fastconv``.
        schema: arguments and returns in PyTorch's schema language, without the name.
        fake: ``fake(*arguments) -> tensors`` of the right shape, dtype and strides.
        setup_context: ``setup_context(ctx, inputs, output)`` saves what the gradient needs;
            ``ctx.backend`` names the overload that ran.
        backward: ``backward(ctx, *grads)`` returns one gradient for each argument. Written with other
            operators of the library, so that it can be differentiated again.
        vmap: ``vmap(info, in_dims, *arguments) -> (output, out_dims)``.
        flops: ``flops(*argument_shapes, out_shape) -> int``, two for each multiply-add.
        check: ``check(*arguments)`` raises on arguments that do not fit together. It runs before Triton's
            kernels; the compiled ones check for themselves.
        triton: ``"module:function"`` below ``fastconv.kernels`` that launches the Triton kernels. An operator
            without it has C++ kernels alone, no other overload and no ``check``.
        autocast: ``autocast(device_type, arguments) -> arguments`` as ``torch.autocast`` wants them; None
            where the operator does no arithmetic.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        fake: Callable[..., Any],
        setup_context: Callable[..., None],
        backward: Callable[..., Any],
        vmap: Callable[..., Any],
        flops: Callable[..., int],
        check: Callable[..., object] | None = None,
        triton: str | None = None,
        autocast: Callable[[str, Sequence[Any]], Sequence[Any]] | None = autocast,
    ) -> None:
        self.name = name
        self._ops = define_overloads(name, schema, check=check, triton=triton)
        self._functions: dict[str, type[torch.autograd.Function]] = {}
        for overload, op in self._ops.items():
            qualname = op.name()
            setup = self._remember_backend(overload, setup_context)
            torch.library.register_fake(qualname, fake, lib=library)
            torch.library.register_vmap(qualname, self._vmap_for(op, vmap), lib=library)
            for device_type in ("CPU", "CUDA") if autocast else ():
                cast = self._autocast_for(op, device_type, autocast)
                library.impl(qualname, cast, f"Autocast{device_type}")
            self._functions[overload] = type(
                f"{_camel_case(name)}Function",
                (torch.autograd.Function,),
                {
                    "__doc__": f"``torch.autograd.Function`` over ``torch.ops.{op}``.",
                    "__module__": __name__,
                    "forward": staticmethod(_plain_call(op)),
                    "setup_context": staticmethod(setup),
                    "backward": staticmethod(backward),
                    "vmap": staticmethod(self._vmap_for(op, vmap)),
                },
            )
            library.impl(qualname, self._autograd_for(op, self._functions[overload]), "Autograd")
        register_flop_formula(getattr(torch.ops.fastconv, name))(flops)

    def function(self, backend: str = "cpu") -> type[torch.autograd.Function]:
        """The ``torch.autograd.Function`` of one backend's kernels."""
        return self._functions[OVERLOADS[backend]]

    def overload(self, backend: str) -> torch._ops.OpOverload:
        """What one backend's kernels are called by."""
        return self._ops[OVERLOADS[backend]]

    def __call__(self, backend: str, *arguments: Any) -> Any:
        """Runs the operator with one backend's kernels, differentiably."""
        op = self._ops[OVERLOADS[backend]]
        if (
            torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
            or _is_differentiated(arguments)
        ):
            return op(*arguments)
        with torch._C._AutoDispatchBelowAutograd():  # the way there takes as long as a small convolution
            return op(*arguments)

    @staticmethod
    def _remember_backend(overload: str, setup_context: Callable[..., None]) -> Callable[..., None]:
        backend = overload or "cpu"

        def setup(ctx: Any, inputs: tuple, output: Any) -> None:
            ctx.backend = backend
            setup_context(ctx, inputs, output)

        return setup

    @staticmethod
    def _autograd_for(op: Any, function: type[torch.autograd.Function]) -> Callable[..., Any]:
        front = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode)
        # What Function.apply comes to without torch.func; on its way it inspects a signature, for 15 us.
        apply = super(torch.autograd.Function, function).apply

        def differentiable(*arguments: Any) -> Any:
            if not _is_differentiated(arguments):
                with torch._C._AutoDispatchBelowAutograd():
                    return op(*arguments)
            if not torch._C._are_functorch_transforms_active():
                return apply(*unwrap_dead_wrappers(arguments))
            # torch.func steps aside when it calls an operator; a Function needs it back in front.
            include = torch._C._dispatch_tls_local_include_set() | front
            exclude = torch._C._dispatch_tls_local_exclude_set() - front
            with torch._C._ForceDispatchKeyGuard(include, exclude):
                return function.apply(*arguments)

        return differentiable

    @staticmethod
    def _vmap_for(op: Any, vmap: Callable[..., Any]) -> Callable[..., Any]:
        return lambda info, in_dims, *arguments: vmap(op, info, in_dims, *arguments)

    @staticmethod
    def _autocast_for(op: Any, device_type: str, autocast: Callable[..., Any]) -> Callable[..., Any]:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device_type}"))

        def cast(*arguments: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return op(*autocast(device_type.lower(), arguments))

        return cast


class InplaceOperator:
    """An operator that overwrites its first argument and returns nothing; it has no gradient.

    ``torch.compile`` reads what is overwritten from the schema, ``(Tensor(a!) input, ...) -> ()``. The other
    arguments are those of :class:`Operator`.
    """

    def __init__(self, name: str, schema: str, *, check: Callable[..., object], triton: str) -> None:
        self._ops = define_overloads(name, schema, check=check, triton=triton)
        for op in self._ops.values():
            torch.library.register_fake(op.name(), lambda *_: None, lib=library)
            library.impl(op.name(), self._autograd_for(op), "Autograd", with_keyset=True)
            library.impl(op.name(), self._version_for(op), "ADInplaceOrView", with_keyset=True)

    def __call__(self, backend: str, *arguments: Any) -> None:
        """Runs the operator with one backend's kernels."""
        self._ops[OVERLOADS[backend]](*arguments)

    @staticmethod
    def _autograd_for(op: Any) -> Callable[..., None]:
        def refuse_gradient(keys: torch._C.DispatchKeySet, input: torch.Tensor, *rest: Any) -> None:
            if _is_differentiated((input,)):
                raise RuntimeError(f"{op.name()} has no gradient, and its input requires one")
            op.redispatch(keys & torch._C._after_autograd_keyset, input, *rest)

        return refuse_gradient

    @staticmethod
    def _version_for(op: Any) -> Callable[..., None]:
        def count_version(keys: torch._C.DispatchKeySet, input: torch.Tensor, *rest: Any) -> None:
            torch.autograd.graph.increment_version(input)  # for a gradient that has saved it
            op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, input, *rest)

        return count_version


def sum_type(dtype: torch.dtype) -> torch.dtype:
    """The type that sums of a tensor's products are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def memory_format_of(tensor: torch.Tensor) -> torch.memory_format:
    """``channels_last`` if a 4-D tensor's strides say so, else ``contiguous_format``.

    The rule is PyTorch's own; ``memory_format_of`` in ``csrc/common/binding.h`` is its twin.
    """
    smallest = 0
    strides, sizes = tensor.stride(), tensor.shape
    if strides[1] == 0:
        return torch.contiguous_format
    for dim in (1, 3, 2, 0):
        if sizes[dim] == 0 or strides[dim] < smallest:
            return torch.contiguous_format
        if dim == 0 and smallest == strides[1]:  # N x 1 x 1 x 1 could be either
            return torch.contiguous_format
        smallest = strides[dim] * max(sizes[dim], 1)
    return torch.channels_last


def new_output(input: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """An uninitialised tensor of a shape, with the dtype, device and memory format of a 4-D input."""
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format_of(input))


def as_memory_format(tensor: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """The 4-D tensor itself where it is dense and in that format, else a copy; differentiable, mappable.

    The format is what :func:`memory_format_of` says. Not ``Tensor.contiguous``, which takes a tensor of one
    channel or pixel for either format.
    """
    channels_last = memory_format == torch.channels_last
    rows = tensor.permute(0, 2, 3, 1) if channels_last else tensor
    if memory_format_of(tensor) == memory_format and rows.is_contiguous():
        return tensor
    rows = rows.clone(memory_format=torch.contiguous_format)
    return rows.permute(0, 3, 1, 2) if channels_last else rows


def fold_into_batch(op: Any, info: Any, in_dims: Sequence[int | None], input: torch.Tensor, *rest: Any):
    """``vmap`` where only the input is mapped: more images."""
    folded = input.movedim(in_dims[0], 0)
    output = op(folded.flatten(0, 1), *rest)
    return output.unflatten(0, folded.shape[:2]), 0


def fold_images(op: Any, info: Any, in_dims: Sequence[int | None], *arguments: Any):
    """``vmap``: more images where the input alone is mapped, else a loop."""
    alone = all(dim is None for dim in in_dims[1:])
    return (fold_into_batch if alone else map_one_by_one)(op, info, in_dims, *arguments)


def fold_into(dim: int, tensor: torch.Tensor, in_dim: int | None, count: int) -> torch.Tensor:
    """``vmap``: folds a mapped dimension of ``count`` into ``dim``; an unmapped tensor is repeated."""
    if in_dim is None:
        tensor = tensor.unsqueeze(dim)
        tensor = tensor.expand(*tensor.shape[:dim], count, *tensor.shape[dim + 1 :])
    else:
        tensor = tensor.movedim(in_dim, dim)
    return tensor.flatten(dim, dim + 1)


def map_one_by_one(op: Any, info: Any, in_dims: Sequence[Any], *arguments: Any):
    """``vmap`` as a loop, for what cannot be folded into one call."""
    results = []
    for i in range(info.batch_size):
        here = (
            a.select(d, i) if isinstance(a, torch.Tensor) and d is not None else a
            for a, d in zip(arguments, in_dims)
        )
        results.append(op(*here))
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(parts) for parts in zip(*results)), (0,) * len(results[0])


def _is_differentiated(arguments: Sequence[Any]) -> bool:
    tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    forward_ad = torch.autograd.forward_ad
    if (
        forward_ad._current_level >= 0
        and torch._C._is_fwd_grad_enabled()
        and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
    ):
        raise NotImplementedError(
            "fastconv's kernels have no forward-mode derivatives: use reverse mode, or backend='aten'"
        )
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _plain_call(op: Any) -> Callable[..., Any]:
    return lambda *arguments: op(*arguments)


def _camel_case(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))
