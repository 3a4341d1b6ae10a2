"""Sample importance of a training step: its definition, and its measurement in any training loop.

The importance of sample i in a layer is beta_i = sum_j (D_j g_ij)^2 (Gao & Jojic 2017, section 2):
g_i is the sample's part of the gradient, and D the derivative of the optimizer's update.

The definition:

================== ==========================================================================
`gradients`        g: per-sample gradients, as factors that are smaller than the gradients
`rules`            from an operation and its output gradient to such factors
`update`           D of a step, with `optimizers` (one rule for each class) and
                   `parameter_step` (what such a rule sees)
================== ==========================================================================

The measurement:

================== ==========================================================================
`recorder`         record in-step importance in any PyTorch training loop
`snapshot`         importance of every sample at fixed parameters
`step`             one training step, from the first forward call to the update
`watch`            forward: every torch function of a pass
`backward`         backward: output gradients arrive, and rules make factors of them
`update_hooks`     hooks on optimizers
`buffer`           squared norms, kept until importance is formed
`gradient_checks`  whether a step's gradients are those of its samples
`ownership`        which sample each row of an output gradient belongs to: the proof
================== ==========================================================================

The other modules serve these, and say so in their first sentences.
"""
