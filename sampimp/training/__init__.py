"""Training runs: the loop, the networks, the batch strategies, the process group."""
