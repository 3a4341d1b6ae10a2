"""What a study found, in one sentence that is made from its claims by rule.

The sentence counts the verdicts. Then it states, in the order of the claims, the first finding of
at most `MOST_HELD` sections among the claims that hold, and the first among those that do not.

Map: `count_verdicts`, `write_findings`.
"""

from collections.abc import Mapping, Sequence

MOST_HELD = 2
"""Findings that agree with the paper, each of another section (arbitrary)."""


def count_verdicts(claims: Sequence[Mapping[str, str]]) -> str:
    """Return how many claims hold, do not hold, and lack data.

    Examples
    --------
    >>> count_verdicts([{"verdict": "holds"}, {"verdict": "holds"}, {"verdict": "does not hold"}])
    '2 hold, 1 does not hold'
    """
    parts = []
    for verdict, one, many in (
        ("holds", "holds", "hold"),
        ("does not hold", "does not hold", "do not hold"),
        ("not enough data", "lacks data", "lack data"),
    ):
        count = sum(claim["verdict"] == verdict for claim in claims)
        if count:
            parts.append(f"{count} {one if count == 1 else many}")
    return ", ".join(parts)


def write_findings(claims: Sequence[Mapping[str, str]]) -> str:
    """Return the sentence of a study's findings.

    Parameters
    ----------
    claims
        Rows of `claim_rows`.

    Examples
    --------
    >>> write_findings([
    ...     {"section": "3.2", "verdict": "holds", "finding": "a is 1"},
    ...     {"section": "3.6", "verdict": "does not hold", "finding": "b is 2"},
    ... ])
    'Of 2 claims, 1 holds, 1 does not hold: a is 1; against the paper, b is 2.'
    """
    if not claims or all(claim["verdict"] == "not enough data" for claim in claims):
        return "No claim can be judged yet: too few runs are complete."
    held: dict[str, str] = {}
    for claim in claims:
        if claim["finding"] and claim["verdict"] == "holds":
            held.setdefault(claim["section"], claim["finding"])
    failed = [c["finding"] for c in claims if c["finding"] and c["verdict"] == "does not hold"]
    clauses = list(held.values())[:MOST_HELD]
    if failed:
        clauses.append(f"against the paper, {failed[0]}")
    counts = f"Of {len(claims)} claim{'s' * (len(claims) > 1)}, {count_verdicts(claims)}"
    return counts + (f": {'; '.join(clauses)}." if clauses else ".")
