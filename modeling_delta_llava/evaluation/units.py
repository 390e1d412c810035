"""Numbers as tables and figures print them."""

from typing import Any

FLOP_UNITS = (("TFLOPs", 1e12), ("GFLOPs", 1e9), ("MFLOPs", 1e6))


def flop_unit(document: dict[str, Any]) -> tuple[str, float]:
    """Unit in which the largest total reads well, with its size: ("TFLOPs", 1e12) for the published models."""
    largest = max(row["flops"]["counted"]["total"] for row in document["budgets"])
    return next(unit for unit in FLOP_UNITS if largest >= unit[1] / 10 or unit is FLOP_UNITS[-1])


def readable_number(count: int) -> str:
    """7084426752 as "7.08 B"."""
    for name, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {name}"
    return str(count)
