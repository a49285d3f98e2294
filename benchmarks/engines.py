"""The engines that people leave PyTorch for: ONNX Runtime and OpenVINO, float32, with PyTorch's threads.

Both read the ONNX file that PyTorch exports, with its sizes fixed. Where a package is missing, the error says
what installs it, and the benchmark goes on without that engine.
"""

from __future__ import annotations

import importlib
import io
import logging
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import nn

Run = Callable[[], torch.Tensor]


class EngineMissing(RuntimeError):
    """A package that an engine needs is not installed."""


def export(model: nn.Module, input: torch.Tensor) -> bytes:
    """A model in eval mode as an ONNX file for inputs of this size.

    Raises:
        EngineMissing: there is no ``onnx`` or ``onnxscript``.
    """
    for name in ("onnx", "onnxscript"):
        _module(name)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(model, (input,), dynamo=True, verbose=False)
    return program.model_proto.SerializeToString()


def onnxruntime(file: bytes, input: torch.Tensor) -> Run:
    """A call of ONNX Runtime on an input, with all its graph optimisations."""
    package = _module("onnxruntime")
    options = package.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = package.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    session = package.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: input.contiguous().numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino(file: bytes, input: torch.Tensor) -> Run:
    """A call of OpenVINO on an input, tuned for latency."""
    package = _module("openvino")
    core = package.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = core.compile_model(core.read_model(file), "CPU", settings).create_infer_request()
    feed = [input.contiguous().numpy()]

    def run() -> torch.Tensor:
        result = request.infer(feed, share_inputs=True, share_outputs=True)
        return torch.from_numpy(result[0])

    return run


ENGINES: dict[str, Callable[[bytes, torch.Tensor], Run]] = {"onnxruntime": onnxruntime, "openvino": openvino}


def versions() -> dict[str, str]:
    """Of the engines that are installed."""
    found = {}
    for name in ENGINES:
        try:
            found[name] = _module(name).__version__.partition("-")[0]
        except EngineMissing:
            continue
    return found


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EngineMissing(f"{error}; install it with: pip install 'fastconv[engines]'") from None
