"""Sample importance of a training step: its definition, and its measurement in any training loop.

The importance of sample i in a layer is beta_i = sum_j (D_j g_ij)^2 (Gao & Jojic 2017, section 2):
g_i is the sample's part of the gradient, and D the derivative of the optimizer's update.

The definition:

================== ==========================================================================
`gradients`        g: per-sample gradients, as factors that are smaller than the gradients
`rules`            one per operation: such factors, from arguments and output gradient
`update`           D of a step, with `optimizers` (one rule for each class) and
                   `parameter_step` (the arguments of such a rule)
================== ==========================================================================

The measurement:

================== ==========================================================================
`recorder`         record in-step importance in any PyTorch training loop
`snapshot`         importance of every sample at fixed parameters
`step`             one training step, from the first forward call to the update
`watch`            forward: every torch function of a pass
`backward`         backward: output gradients arrive, and rules make factors of them
`update_hooks`     hooks on optimizers
`buffer`           squared norms of each step; `StepNorms.take` sums them to beta per layer
`gradient_checks`  whether a step's gradients are those of its samples
`known_layouts`    when the row-to-sample mapping is proved, and the layouts known since
`ownership`        which sample each row of an output gradient belongs to: the proof
================== ==========================================================================

Helpers of these: `per_sample`, `model_tensors`, `forward_pass`, `signature`, `sample_index`,
`output_hooks`, `epoch_parts`, `recorder_state`, `evaluation`.
"""
