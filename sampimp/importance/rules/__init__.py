"""Rules of operations: from an operation's arguments and output gradient to per-sample gradients.

A rule yields, for each parameter among the arguments of an operation, a factor of the parameter's
per-sample gradients (`sampimp.importance.gradients`). Rules belong to functions
(`torch.nn.functional.linear`), not to modules (`nn.Linear`): there are many modules, and all of
them call a few functions. So tied weights, modules that are called twice, attention, and models
with bare parameters need no further rules.

====================== =====================================================================
`registry`             which rule belongs to which function, the call shape of all rules, and
                       `layer_rule` for an operation of your own; start here
`batch`                the position of the samples in the tensors of an operation
`linear`               matrix products
`embedding`            tables
`normalization`        normalisations, and PReLU
`convolution`          convolutions, and their transposes
`arithmetic`           sums, products and expansion of bare parameters
`recurrent`            RNN, LSTM, GRU and their cells
`recurrent_call`       arguments of recurrent operations
`recurrent_graph`      nodes inside recurrent operations, read from autograd's graph
`recurrent_backward`   backpropagation through time of recurrent layers
`fallback`             operations without a rule, by `torch.func.vmap`
`inner_nodes`          nodes of autograd's graph inside one operation
====================== =====================================================================
"""
