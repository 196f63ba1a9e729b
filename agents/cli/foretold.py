"""Predictions in words: of a check, and beside their outcomes.

Law: prints nothing. Text of agents is in it as it came: escape the lines where they are printed.
"""

from __future__ import annotations

from typing import Final

from agents.units import approx_duration, approx_rate, approx_size
from migrate.forecast import Basis, Interval, Prediction

__all__ = ["FORETOLD_COLUMNS", "foretold_cells", "foretold_lines", "in_words"]

FORETOLD_COLUMNS: Final = (">TOTAL", ">DOWNTIME", "CONVERGES")
_BASES: Final = {
    Basis.MEASURED: "the guest was watched",
    Basis.REMEMBERED: "from earlier moves of the guest",
    Basis.ASSUMED: "nothing is known of what the guest writes",
}


def in_words(quantity: str, value: float) -> str:
    """Write one of `migrate.forecast.QUANTITIES`, for reading."""
    return approx_size(value) if quantity == "wire_bytes" else approx_duration(value)


def interval_in_words(quantity: str, interval: Interval) -> str:
    low, middle, high = (
        in_words(quantity, value) for value in (interval.low, interval.median, interval.high)
    )
    return f"{middle} ({low} to {high})"


def foretold_cells(prediction: Prediction | None) -> tuple[str, ...]:
    """Give the cells of FORETOLD_COLUMNS."""
    if prediction is None:
        return ("-", "-", "-")
    figures = prediction.figures
    return (
        interval_in_words("total_s", figures.total_s),
        interval_in_words("downtime_s", figures.downtime_s),
        f"{100 * prediction.converging_share:.0f} %",
    )


def foretold_lines(prediction: Prediction | None, unpredicted: str = "") -> list[str]:
    """Give what a person reads of a prediction; nothing where none was asked for."""
    if prediction is None:
        return [f"not predicted: {unpredicted}"] if unpredicted else []
    figures, limits = prediction.figures, prediction.conditions
    words = {"total": "total_s", "downtime": "downtime_s", "on the wire": "wire_bytes", "agent CPU": "cpu_s"}
    lines = [
        f"predicted {name:<12} {interval_in_words(quantity, figures.of(quantity))}"
        for name, quantity in words.items()
    ]
    past = {0: "no past move", 1: "1 past move"}.get(
        prediction.learned_from, f"{prediction.learned_from} past moves"
    )
    share = f"{100 * prediction.converging_share:.0f} % of the rehearsals"
    limit = f"a downtime limit of {approx_duration(limits.downtime_limit_s)}"
    verdict = "converges" if prediction.converges else "does NOT converge"
    lines.append(f"predicted {'ending':<12} {verdict} within {limit} ({share}): {prediction.because}")
    if prediction.remedy is not None:
        ways = []
        if prediction.remedy.downtime_limit_s is not None:
            ways.append(f"--downtime-limit {prediction.remedy.downtime_limit_s:.3g}s")
        if prediction.remedy.bandwidth_bytes_per_s is not None:
            rate = approx_rate(prediction.remedy.bandwidth_bytes_per_s)
            ways.append(f"--bandwidth of at least {rate}, if the path carries it")
        remedy = " or with ".join(ways) or "--offline or --on-timeout suspend: no limit was found"
        lines.append(f"predicted {'remedy':<12} it would with {remedy}")
    lines.append(
        f"predicted {'from':<12} {_BASES[prediction.basis]}; corrected by {past}; 8 of 10 should fit"
    )
    return lines
