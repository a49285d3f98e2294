"""How much rounding the choice of an algorithm may trade for speed.

``"fast"``, the default, lets ``algorithm=None`` take Winograd's, as other libraries do: fewer
multiplications, and in exchange an error several times that of the plain sum. ``"exact"`` never takes it by
itself. An algorithm that a call names runs either way.
"""

from __future__ import annotations

PRECISIONS = ("exact", "fast")

_precision = "fast"


def set_precision(precision: str) -> None:
    """Sets the precision of all threads, for the calls that begin after it.

    Args:
        precision: ``"fast"`` or ``"exact"``.

    Raises:
        ValueError: it is neither.
    """
    global _precision
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    _precision = precision


def get_precision() -> str:
    """``"fast"`` or ``"exact"``."""
    return _precision
