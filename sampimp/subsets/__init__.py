"""Which samples suffice: rules that select a subset, and training on it alone.

Map: `rules` (who is kept), `metagradient` (subsets found by the derivative of training), `training`
(one training on a subset, with a budget), `validation` (the samples by which rules and their
parameters are chosen without test labels).
"""
