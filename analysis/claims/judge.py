"""Verdicts: how an estimate and a threshold become a verdict, for one claim and for all of them.

The 95 % interval of the number decides; for claims with one run per strategy (`point`), the number
itself. A claim *holds* if all of the interval is on the claimed
side of the threshold, *does not hold* if all of it is on the other side, and there is *not enough
data* if the interval contains the threshold or could not be computed.

Map: `judge` (one estimate), `judge_claims` (the table of all claims), `VERDICTS`.
"""

from collections.abc import Mapping

import numpy as np
import xarray as xr

from sampimp.analysis.claims.evidence import NO_ESTIMATE, Claim, Estimate, Evidence, Side
from sampimp.analysis.claims.table import CLAIMS
from sampimp.analysis.claims.wording import write_claim, write_finding
from sampimp.analysis.influence_runs import has_influence
from sampimp.analysis.runs import PAPER, codes_of_labels, short_name
from sampimp.analysis.subset_runs import has_subsets

VERDICTS = ("holds", "does not hold", "not enough data")

_COMPUTED = {"4": has_influence, "5": has_subsets}
"""Of sections whose claims need more than a study: whether it was computed."""


def judge(
    estimate: Estimate,
    side: Side,
    threshold: float,
    *,
    point: bool = False,
) -> str:
    """Return the verdict on an estimate.

    Parameters
    ----------
    estimate
        Value, low, high.
    side, threshold
        `above` or `below` the threshold, or `within`: the whole interval lies between -threshold
        and threshold.
    point
        Let the value decide if there is no interval.

    Examples
    --------
    >>> judge((0.95, 0.94, 0.96), "above", 0.9), judge((0.95, 0.89, 0.97), "above", 0.9)
    ('holds', 'not enough data')
    >>> judge((0.02, 0.01, 0.03), "within", 0.1), judge((0.3, 0.2, 0.4), "within", 0.1)
    ('holds', 'does not hold')
    """
    value, low, high = estimate
    if point and np.isnan(low) and np.isnan(high):
        low = high = value
    if np.isnan([value, low, high]).any():
        return "not enough data"
    if side == "below":
        low, high, threshold = -high, -low, -threshold
    if side == "within":
        inside = -threshold < low and high < threshold
        outside = low > threshold or high < -threshold
    else:
        inside, outside = low > threshold, high < threshold
    return "holds" if inside else "does not hold" if outside else "not enough data"


def judge_claims(cube: xr.Dataset, results: Mapping[str, xr.Dataset]) -> xr.Dataset:
    """Return the paper's claims with our numbers and the verdicts.

    Parameters
    ----------
    cube
        One data set of the cube (a node of its tree).
    results
        Computed results by their key in `sampimp.analysis.results.analyse.RESULTS`. A claim whose
        results are missing gets the verdict "not enough data".

    Returns
    -------
    Dataset, in memory, on dim claim
        section, sentence, scope (data set, or "all"), short (the sentence in a few words), number
        (value and interval in words, or the command that computes it), finding (what was measured,
        as a clause; empty for most claims), value, low, high, rule, side, threshold, verdict.

    Examples
    --------
    >>> from sampimp.analysis.example_cube import example_cube
    >>> from sampimp.analysis.results.analyse import analyse
    >>> table = analyse(example_cube())["claims"].set_index(claim="sentence")
    >>> table["verdict"].sel(claim="Easy samples act early, hard samples late.").item()
    'holds'

    References
    ----------
    Gao & Jojic (2017), sections 3.2 to 5.
    """
    evidence = Evidence(results, len(codes_of_labels(cube)[0]))
    applicable = [claim for claim in CLAIMS if _applies(claim, cube)]
    estimates = [
        claim.estimate(evidence) if all(key in results for key in claim.needs) else NO_ESTIMATE
        for claim in applicable
    ]
    columns = {
        "section": [claim.section for claim in applicable],
        "sentence": [claim.sentence for claim in applicable],
        "scope": [claim.only or "all" for claim in applicable],
        "short": [claim.short for claim in applicable],
        "number": list(map(write_claim, applicable, estimates)),
        "finding": list(map(write_finding, applicable, estimates)),
        "rule": [_format_rule(claim) for claim in applicable],
        "side": [claim.side for claim in applicable],
        "verdict": [
            judge(estimate, claim.side, claim.threshold, point=claim.point)
            for claim, estimate in zip(applicable, estimates, strict=True)
        ],
    }
    numbers = np.array(estimates, dtype=np.float64).reshape(len(applicable), 3)
    result = xr.Dataset(
        {
            **{key: ("claim", np.array(value, dtype=str)) for key, value in columns.items()},
            "value": ("claim", numbers[:, 0]),
            "low": ("claim", numbers[:, 1]),
            "high": ("claim", numbers[:, 2]),
            "threshold": ("claim", np.array([claim.threshold for claim in applicable])),
        },
        coords={"claim": np.arange(1, len(applicable) + 1)},
        attrs={
            "method": "one number and one threshold per claim; holds if its 95 % interval is "
            "wholly on the claimed side, does not hold if wholly on the other, "
            "not enough data otherwise",
            "figure": "none",
            "source": f"{PAPER}, sections 3.2 to {applicable[-1].section}",
            "dataset": str(cube.attrs.get("dataset", "")),
        },
    )
    long_names = {
        "section": "section of the paper",
        "sentence": "claim",
        "scope": "data set that the claim is about",
        "short": "claim in a few words",
        "number": "our number in words, with its 95 % interval",
        "finding": "what was measured, as a clause",
        "rule": "how the number is made and judged",
        "side": "side of the threshold that is claimed",
        "verdict": "verdict",
        "value": "our number",
        "low": "lower end of its 95 % interval",
        "high": "upper end of its 95 % interval",
        "threshold": "threshold",
    }
    for key, long_name in long_names.items():
        result[key].attrs = {"units": "1", "long_name": long_name}
    return result


def _applies(claim: Claim, cube: xr.Dataset) -> bool:
    """Return whether a claim is about this data set and network, and judged in this cube."""
    name = short_name(cube)
    if claim.only and not name.startswith(claim.only):
        return False
    if claim.never and name.startswith(claim.never):
        return False
    if claim.section in _COMPUTED and not _COMPUTED[claim.section](cube):
        return False
    activation = cube["importance"].attrs.get("activation") if "importance" in cube else None
    return not claim.activation or (claim.activation == "relu") == (activation == "relu")


def _format_rule(claim: Claim) -> str:
    """Return the rule followed by its threshold."""
    sides = {
        "above": f"Holds above {claim.threshold:g}.",
        "below": f"Holds below {claim.threshold:g}.",
        "within": f"Holds within {claim.threshold:g} of 0.",
    }
    return f"{claim.rule} {sides[claim.side]}"
