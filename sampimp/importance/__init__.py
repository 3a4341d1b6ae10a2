"""Sample importance of a training step: recorder, gradients, update, rules, ownership."""
