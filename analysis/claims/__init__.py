"""The paper's claims and our verdicts on them (sections 3.2 to 5).

Each claim is a sentence of the paper, turned into one number and one threshold. The number's 95 %
interval decides (for claims with one run per strategy, the number itself): the claim *holds* if the
interval is wholly on the claimed side of the threshold, *does not hold* if it is wholly on the
other side, and there is *not enough data* if it contains the threshold or cannot be computed.

Map: `table` (`CLAIMS`: every sentence with its rule, its threshold and the function that estimates
the number), `section_3_2` to `section_5` (these functions, by section of the paper), `evidence`
(the results they read, and estimates that several of them use), `wording` (numbers in words),
`judge` (from an estimate to a verdict; `judge_claims` judges all).
"""

from sampimp._renamed import moved

__getattr__ = moved(__name__)
