"""Rules of operations: from an operation's arguments and output gradient to per-sample gradients.

A rule yields, for each parameter among the arguments of an operation, a factor of the parameter's
per-sample gradients (`sampimp.importance.gradients`). Rules belong to functions
(`torch.nn.functional.linear`), not to modules (`nn.Linear`): there are many modules, and all of
them call a few functions. Tied weights, modules that are called twice, attention, and models with
parameters of their own therefore need no rules of their own.

Map:

`registry`          which rule belongs to which function, the call shape of all rules, and
                    `layer_rule` for operations of your own: start here
`batch`             `Batch`, the position of the samples in the tensors of an operation
`linear`, `embedding`, `normalization`, `convolution`, `arithmetic`
                    the rules, by kind of operation
`recurrent`         rules of RNN, LSTM, GRU and their cells, with `recurrent_call` (arguments),
                    `recurrent_graph` (reading autograd's graph) and `recurrent_backward`
                    (backpropagation through time)
`fallback`          operations without a rule, by `torch.func.vmap`
`inner_nodes`       nodes of autograd's graph inside one operation
"""
