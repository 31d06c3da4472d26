"""Checkpoints as a contract: what every user of the weights must know, and how the weights are read."""
