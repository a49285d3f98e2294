"""Puts this library's kernels into a model written for PyTorch alone, and takes them out again.

    model = fastconv.optimize(model, example_input)   # the same object, same parameters, same numbers
    print(fastconv.report(model))                     # which kernel runs each layer, or why none does
    fastconv.restore(model)

A layer changes hands by its class alone: ``torch.nn.Conv2d`` becomes ``fastconv.nn.DepthwiseConv2d`` in
place. So parameters, buffers, hooks, optimizers, state_dict keys, pickling and deepcopy stay as they were.
"""

from ._chains import ChainReport
from ._functional import enable
from ._graph import GraphReport, optimize_graph
from ._report import LayerReport, Report, report
from ._swap import OptimizeError, optimize, restore

__all__ = [
    "ChainReport",
    "GraphReport",
    "LayerReport",
    "OptimizeError",
    "Report",
    "enable",
    "optimize",
    "optimize_graph",
    "report",
    "restore",
]
