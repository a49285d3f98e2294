"""optimize and restore: which layers, on what proof."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .._format import milliseconds, progress_on_terminal
from .._timing import busy
from ..cost import is_layer
from ..nn import ConvBNAct
from ..nn._rules import Rule, check_backend, rule_for, rules
from ..ops._packed_weights import clear_packed_weights
from ._chains import fuse_chains, unfuse
from ._graph import restore_graph
from ._report import EACH_CALL, REPORTS, SWAPPED_FROM, LayerReport, Report
from ._trial import Call, Facts, LayerTrial, Parity, Run, bare, parity, rounding_noise, run, watch

WINS_BELOW = 0.98  # of PyTorch's time; what is closer is noise

Choose = str | type | Callable[[str, nn.Module], bool]


class OptimizeError(RuntimeError):
    """``optimize(strict=True)`` could not do everything it was asked to; the model is as it was before."""


def optimize(
    model: nn.Module,
    example_input: Any = None,
    *,
    only: Choose | Iterable[Choose] | None = None,
    exclude: Choose | Iterable[Choose] | None = None,
    backend: str | None = None,
    strict: bool = False,
) -> nn.Module:
    """Moves a model's layers to this library's kernels, in place.

    Only modules of exactly a type that has a counterpart change hands (see ``fastconv.nn.rules()``), and only
    by their class; subclasses, such as parametrized modules, stay and are reported.

    With ``example_input`` the model runs in the mode it is in (training or eval, autocast, no_grad), and

    1. every layer's output and gradients are compared with a float64 run of the original layer;
    2. every layer is timed against the original in turns, on the input that it met, forward and in training
       mode backward; only winners stay;
    3. the whole model's outputs and gradients are compared with the original's: each tensor within 16 times
       what rounding errors of the swapped layers' outputs alone cause. If one differs more, all go back.

    Buffers, ``.grad``, training flags and random number generators are left as they were; the model's hooks
    do run. Without ``example_input`` every layer that has a kernel changes hands, unmeasured. A second call
    looks again at the layers it selects and leaves the others as they are.

    On a terminal a bar shows how far the measuring is; a warning says when other programs disturb it.

    Args:
        model: any module.
        example_input: a tensor, a tuple of arguments or a dict of keyword arguments.
        only: which layers; a glob of module names (``"features.*"``), a type, a callable
            ``(name, module) -> bool``, or several of these, of which one must match.
        exclude: which layers not, in the same way.
        backend: which kernels, see :mod:`fastconv.backends`; None takes the measured best at each call.
        strict: raise unless every selected layer that has a counterpart is swapped.

    Returns:
        The same model; :func:`fastconv.report` tells what happened to each layer.

    Raises:
        OptimizeError: ``strict``, and a layer could not be swapped, lost, or gave other numbers.
        ValueError, TypeError: an argument is wrong, or a glob matches no module.
    """
    if example_input is not None and (warning := busy(torch.get_num_threads())):
        warnings.warn(warning, stacklevel=2)
    with progress_on_terminal("layers") as progress:
        return optimize_with_progress(model, example_input, only, exclude, backend, strict, progress)


def optimize_with_progress(
    model: nn.Module,
    example_input: Any,
    only: Any,
    exclude: Any,
    backend: str | None,
    strict: bool,
    progress: Callable[[int, int, str], None],
) -> nn.Module:
    """:func:`optimize`, which tells ``progress(done, total, what)`` after each layer that it measures."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_backend(backend)
    named = dict(model.named_modules())
    selected = _selection(named, only, exclude)
    before = [(module, type(module), dict(module.__dict__)) for module in named.values()]
    try:
        result = _optimize(model, named, selected, example_input, backend, progress)
        if strict:
            _raise_if_incomplete(result)
    except BaseException:
        for module, kind, state in before:
            if type(module) is not kind or SWAPPED_FROM in state or SWAPPED_FROM in module.__dict__:
                module.__class__ = kind
                module.__dict__.clear()
                module.__dict__.update(state)
        raise
    REPORTS[model] = result
    return model


def _optimize(
    model: nn.Module,
    named: dict[str, nn.Module],
    selected: set[str],
    example_input: Any,
    backend: str | None,
    progress: Callable[[int, int, str], None],
) -> Report:
    rows: dict[nn.Module, LayerReport] = {}
    candidates: dict[nn.Module, Rule] = {}
    for name, module in named.items():
        if name in selected and SWAPPED_FROM in module.__dict__:
            _restore_layer(name, module)
        if SWAPPED_FROM in module.__dict__:
            rows[module] = _earlier_row(model, name, module)
            continue
        rule = rule_for(module)
        if rule is None and not is_layer(module):
            continue
        row = rows[module] = LayerReport(
            name, type(module).__name__, matched=rule is not None and name in selected
        )
        if rule is None:
            row.reason = why_no_rule(module)
        elif name not in selected:
            row.reason = "left out by only= or exclude="
        elif isinstance(named.get(name.rpartition(".")[0]), ConvBNAct):
            row.reason = "it is part of a ConvBNAct, which runs its kernels"
        else:
            row.reason = _obstacle(module, rule, backend)
            if row.reason is None:
                candidates[module] = rule
    report = Report(list(rows.values()))
    if example_input is None:
        for module, rule in candidates.items():
            _swap(module, rule, backend)
            rows[module].kernel = backend or EACH_CALL
        report.chains = fuse_chains(model, selected)
        return report
    with watch(model, candidates) as (facts, calls):
        original = run(model, example_input)
    for module, fact in facts.items():
        if module in rows:
            row = rows[module]
            row.shape, row.calls, row.macs, row.bytes = fact.shape, fact.calls, fact.macs, fact.bytes
            row.dtype = fact.dtype
    for done, (module, rule) in enumerate(candidates.items()):
        _try(rows[module], module, rule, backend, list(calls.pop(module).values()), facts.get(module))
        progress(done + 1, len(candidates), rows[module].name)
    clear_packed_weights()  # most likely of layers that stay with PyTorch
    winners = [module for module in candidates if rows[module].kernel is not None]
    if winners:
        with rounding_noise(winners):
            noisy = run(model, example_input)
    without_gradient = _run_without_gradient(model, example_input)
    report.chains = fuse_chains(model, selected)
    fused = [named[layer] for chain in report.chains for layer in chain.layers]
    if fused:
        with rounding_noise(dict.fromkeys([*winners, *fused])):  # by hooks, under which no chain is fused
            noisy_chains = run(model, example_input)
            noisy_without_gradient = _run_without_gradient(model, example_input)
    for module in winners:
        _swap(module, candidates[module], backend)
    if fused:
        found = parity(original, noisy_chains, run(model, example_input))
        folded = _run_without_gradient(model, example_input)  # chains fold their weights there
        other = parity(without_gradient, noisy_without_gradient, folded)
        report.parity = found if other.holds else other
        if report.parity.holds:
            return report
        report.differing_chains, report.parity, report.chains = report.parity, None, []
        for module in model.modules():
            unfuse(module)
    if winners:
        report.parity = parity(original, noisy, run(model, example_input))
        if not report.parity.holds:
            _take_back(winners, rows, report.parity)
    return report


def _earlier_row(model: nn.Module, name: str, module: nn.Module) -> LayerReport:
    """The row of a layer that an earlier call swapped and this call leaves alone."""
    known = REPORTS[model].rows if model in REPORTS else []
    new = LayerReport(name, module.__dict__[SWAPPED_FROM].__name__, kernel=module.backend or EACH_CALL)
    return next((row for row in known if row.name == name), new)


def _try(
    row: LayerReport,
    module: nn.Module,
    rule: Rule,
    backend: str | None,
    calls: list[Call],
    fact: Facts | None,
) -> None:
    """Fills a row with the kernel, if one is exact and faster, or with the reason why none is."""
    if not calls:
        row.reason = "example_input does not reach it"
        return
    trial = LayerTrial(module, rule.source, rule.target, backend, calls)
    try:
        name, algorithm = trial.kernel()
        if name == "aten" and backend is None:
            row.reason = "PyTorch's own kernel is the best here"
            return
        row.reason = trial.why_not_exact()
        if row.reason is not None:
            return
        trial.time()
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        row.reason = f"the kernel raised {type(error).__name__}: {error}"
        return
    row.seconds_before, row.seconds_after = trial.seconds_before, trial.seconds_after
    row.trained = trial.trains()
    if fact is not None:
        row.timed_macs, row.timed_bytes = fact.trained if row.trained else (fact.macs, fact.bytes)
    if trial.seconds_after < WINS_BELOW * trial.seconds_before:
        row.kernel = f"{name}/{algorithm}" if algorithm else name
    else:
        times = milliseconds(trial.seconds_after), milliseconds(trial.seconds_before)
        row.reason = f"not faster: {times[0]} ms, PyTorch {times[1]} ms ({name})"


def _run_without_gradient(model: nn.Module, example_input: Any) -> Run:
    with torch.no_grad():
        return run(model, example_input)


def _take_back(winners: list[nn.Module], rows: dict[nn.Module, LayerReport], found: Parity) -> None:
    for module in winners:
        _restore_layer(rows[module].name, module)
        rows[module].kernel, rows[module].reason = None, f"the whole model differs: {found}"


def _raise_if_incomplete(report: Report) -> None:
    missing = [
        f"  {row.name or '(the model)'}: {row.reason}"
        for row in report.rows
        if row.matched and not row.kernel
    ]
    if missing:
        raise OptimizeError("strict=True, and these layers were not swapped:\n" + "\n".join(missing))


def why_no_rule(module: nn.Module) -> str:
    """Why ``optimize`` does not look at a module's kernels at all."""
    kind = type(module)
    if kind.__module__.startswith("fastconv.nn."):
        return "it is a module of this library already"
    for rule in rules():
        if kind is not rule.source and isinstance(module, rule.source):
            return f"its type is {kind.__name__}, not exactly {rule.source.__name__}"
    return f"no kernel for {kind.__name__} yet"


def _obstacle(module: nn.Module, rule: Rule, backend: str | None) -> str | None:
    """Why a module that a rule matches cannot be swapped, whatever its input."""
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance"
    return bare(module, rule.target, backend).why_not()


def _swap(module: nn.Module, rule: Rule, backend: str | None) -> None:
    module.__dict__[SWAPPED_FROM] = rule.source
    if backend is not None:
        module.__dict__["backend"] = backend
    module.__class__ = rule.target


def _restore_layer(name: str, module: nn.Module) -> None:
    if type(module) not in [rule.target for rule in rules()]:
        raise TypeError(
            f"{name or 'the model'} became a {type(module).__name__} after optimize; undo that first "
            "(such as by torch.nn.utils.parametrize.remove_parametrizations)"
        )
    module.__class__ = module.__dict__.pop(SWAPPED_FROM)
    module.__dict__.pop("backend", None)


def restore(model: nn.Module) -> nn.Module:
    """Undoes :func:`optimize`: every layer has its own class again, and nothing of this library on it.

    Modules that were built from ``fastconv.nn`` stay. Works on copies and on unpickled models too.
    Undoes :func:`fastconv.optimize_graph` as well, but not on copies.

    Raises:
        TypeError: a swapped layer's class has changed since, such as by a parametrization.
    """
    for name, module in model.named_modules():
        if SWAPPED_FROM in module.__dict__:
            _restore_layer(name, module)
        unfuse(module)
        restore_graph(module)
    REPORTS.pop(model, None)
    return model


def _selection(named: dict[str, nn.Module], only: Any, exclude: Any) -> set[str]:
    chosen = set(named) if only is None else _matching("only", only, named)
    return chosen if exclude is None else chosen - _matching("exclude", exclude, named)


def _matching(argument: str, choices: Any, named: dict[str, nn.Module]) -> set[str]:
    found: set[str] = set()
    several = not isinstance(choices, (str, type)) and not callable(choices)
    for choice in choices if several else [choices]:
        if isinstance(choice, str):
            names = set(fnmatch.filter(named, choice))
            if not names:
                raise ValueError(
                    f"{argument}={choice!r} matches no module; names are such as {list(named)[1:6]}"
                )
            found |= names
        elif isinstance(choice, type):
            found |= {name for name, module in named.items() if isinstance(module, choice)}
        elif callable(choice):
            found |= {name for name, module in named.items() if choice(name, module)}
        else:
            raise TypeError(f"{argument} must be globs, types or callables, got {choice!r}")
    return found
