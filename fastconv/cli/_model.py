"""What commands share: arguments that name a model and its input, the model itself, the console."""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .. import models
from .._timing import busy
from . import UserError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=f"a network of the library ({', '.join(models.list())}), or package.module:factory, which is "
        "imported and called without arguments",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the library's network, such as width=0.5; may be repeated",
    )
    parser.add_argument(
        "--input-size",
        type=sizes,
        default=(1, 3, 224, 224),
        metavar="N,C,H,W",
        help="shape of the input (default: 1,3,224,224)",
    )
    parser.add_argument("--batch", type=positive, metavar="N", help="images, in place of --input-size's N")


def positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return number


def sizes(text: str) -> tuple[int, ...]:
    """``"1,3,224,224"``; three numbers are one image."""
    try:
        numbers = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"must be positive integers such as 1,3,224,224, got {text!r}")
    return (1, *numbers) if len(numbers) == 3 else numbers


def input_size(args: argparse.Namespace) -> tuple[int, ...]:
    return args.input_size if args.batch is None else (args.batch, *args.input_size[1:])


def build(name: str, settings: Sequence[str] = (), plain: bool = True) -> nn.Module:
    """The model that MODEL and --set name, with the same fresh weights at every call."""
    torch.manual_seed(0)
    if ":" in name:
        if settings:
            raise UserError("--set is for the library's networks; a factory is called without arguments")
        return _from_factory(name)
    try:
        return models.create(name, plain=plain, **_options(settings))
    except ValueError as error:
        raise UserError(f"MODEL: {error}, or package.module:factory") from None
    except TypeError as error:
        raise UserError(f"--set: {error}") from None


def _options(settings: Sequence[str]) -> dict[str, Any]:
    options = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not key or not equals:
            raise UserError(f"--set must be NAME=VALUE, got {setting!r}")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return options


def _from_factory(name: str) -> nn.Module:
    module_name, _, factory_name = name.partition(":")
    sys.path.insert(0, os.getcwd())  # as python -m does for its own module
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(f"MODEL: {module_name} needs {error.name}, which is not installed") from None
        raise UserError(f"MODEL: there is no module {error.name!r}") from None
    finally:
        sys.path.pop(0)
    factory = module
    for part in factory_name.split("."):
        factory = getattr(factory, part, None)
    if not callable(factory):
        raise UserError(f"MODEL: {module_name} has no callable {factory_name!r}")
    try:
        model = factory()
    except TypeError as error:
        raise UserError(f"MODEL: {name} cannot be called without arguments: {error}") from None
    if not isinstance(model, nn.Module):
        raise UserError(f"MODEL: {name}() must return a torch.nn.Module, got {type(model).__name__}")
    return model


def console() -> Any:
    """A rich console; wide when the output goes to a file or a pipe."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal else Console(width=150)


def warn_if_busy(console: Any, threads: int) -> None:
    """Says when other programs keep the machine from being measured."""
    if warning := busy(threads):
        console.print(warning, style="yellow")
