"""Influence: what each training sample did to the final model (Gao & Jojic 2017, section 4).

Influence is the derivative of a target, a function of the final parameters, by the weight of a
sample's loss in one epoch and through one layer, by way of all later steps of training.

Map, from the lowest level to the highest:

====================== =====================================================================
`targets`              functions of the final parameters, and their names
`updates`              an optimizer's update, linearized
`replay`               what a recorded run has to offer: training again, derivatives of a step
`linearized_step`      one step, taken and linearized: gradient, clipping, update
`linear_stack`         derivatives of a step, written out for stacks of linear layers
`twice_differentiable` operations that can be differentiated twice, in the place of others
`derivative_checks`    checks of second derivatives by autograd
`any_network`          derivatives of a step of any network, by autograd
`gauss_newton`         products with the Gauss-Newton matrix of any network
`trial_run`            a study's run, replayed
`recorded_loop`        a loop of one's own, replayed
`reverse_pass`         backward through a run: all samples, a few targets
`recursion`            forward through a run (eq. 5): all targets, a few samples
`fixed_point`          -H^-1 g (eq. 4)
`retraining`           the truth: training without the samples
====================== =====================================================================
"""
