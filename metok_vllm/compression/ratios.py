"""Exact decimal shares: `ceil(rho * len)` of docs/method.md section 2 without floating point.

`0.55 * 100` is 55.00000000000001 in binary floating point, whose ceiling is 56. The scheduler, the model and
the reference must agree on every count, so a ratio is an integer number of millionths and all the arithmetic
on it is integer arithmetic.
"""

from decimal import Decimal

MICRO = 1_000_000
"""Millionths in one: the fixed denominator of every ratio in this package."""


def to_micro(ratio: float) -> int:
    """Millionths of a ratio in [0, 1], read as the decimal that it prints as.

    Raises:
        ValueError: the ratio is outside [0, 1], is not a number, or has more than six decimals.
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"a ratio must lie between 0 and 1, not {ratio}")
    scaled = Decimal(str(ratio)) * MICRO
    if scaled != scaled.to_integral_value():
        raise ValueError(f"a ratio takes at most six decimals, not {ratio}")
    return int(scaled)


def check_micro(ratio_micro: int) -> None:
    """Refuse anything but an integer number of millionths in [0, MICRO].

    Raises:
        ValueError: a float, or out of range; a float here is nearly always a ratio that skipped `to_micro`.
    """
    if not isinstance(ratio_micro, int) or not 0 <= ratio_micro <= MICRO:
        raise ValueError(f"a ratio in millionths must be an integer between 0 and {MICRO}, not {ratio_micro!r}")


def ceil_share(count: int, ratio_micro: int, divisor: int = 1) -> int:
    """`ceil(ratio * count / divisor)`, exactly."""
    check_micro(ratio_micro)
    denominator = MICRO * divisor
    return (ratio_micro * count + denominator - 1) // denominator
