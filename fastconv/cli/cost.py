"""MACs, parameters, bytes, receptive field, intensity and floor time of a model's layers.

Nothing is computed: the model runs on fake tensors. The floor is the least time that this machine's measured
ceilings allow (multiply-adds and copies a second).

  python -m fastconv cost mobilenet_v1 --set width=0.5
  python -m fastconv cost mypackage.mymodule:build --input-size 1,3,64,64
"""

from __future__ import annotations

import argparse

from . import UserError
from ._model import add_model_arguments, build, console, input_size


def configure(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from ..cost import cost

    model = build(args.model, args.set)
    try:
        table = cost(model, input_size(args))
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"the model does not take an input of size {input_size(args)}: {error}") from error
    out = console()
    out.print(table)
    bits = f"{table.storage_bits:,} bits of storage at 32-bit values"
    out.print(f"{table.macs:,} MACs, {table.parameters:,} parameters, {bits}")
    return 0
