"""Which samples suffice: rules that select a subset, its training, and the search for the smallest.

Map: `rules` (who is kept), `metagradient` (subsets found by the derivative of training), `training`
(one training on a subset, with a budget), `validation` (how a rule's parameter is chosen without
test labels), `search` (the smallest size that is good enough).
"""
