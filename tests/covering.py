"""Covering arrays: few rows in which every allowed pair of values of any two factors stands at least once."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

Row = dict[str, str]


def covering_array(factors: Mapping[str, Sequence[str]], allowed: Callable[[Row], bool]) -> list[Row]:
    """Greedy: each row starts from an uncovered pair and takes, factor by factor, the value that covers most new ones.

    allowed(row) judges partial rows, too: a row that it refuses stays refused whatever is added.
    """
    uncovered = {
        frozenset([(f, a), (g, b)])
        for f, g in combinations(factors, 2)
        for a in factors[f]
        for b in factors[g]
        if allowed({f: a, g: b})
    }
    rows = []
    for pair in sorted(uncovered, key=sorted):
        if pair in uncovered:
            row = _completed(dict(sorted(pair)), factors, allowed, uncovered)  # workers of pytest must agree
            if row is None:  # the pair is allowed, but nothing goes with it
                raise AssertionError(f"no row can hold {dict(pair)}")
            rows.append(row)
            uncovered -= {frozenset(p) for p in combinations(row.items(), 2)}
    return rows


def _completed(row: Row, factors: Mapping[str, Sequence[str]], allowed, uncovered) -> Row | None:
    """Depth first; the most constrained factors come first, so that there is little to take back."""
    missing = [f for f in factors if f not in row]
    if not missing:
        return row
    options = {f: [v for v in factors[f] if allowed({**row, f: v})] for f in missing}
    factor = min(missing, key=lambda f: len(options[f]))

    def gain(value: str) -> int:
        return sum(frozenset([(factor, value), item]) in uncovered for item in row.items())

    for value in sorted(options[factor], key=gain, reverse=True):
        found = _completed({**row, factor: value}, factors, allowed, uncovered)
        if found is not None:
            return found
    return None
