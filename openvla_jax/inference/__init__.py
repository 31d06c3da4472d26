"""Inference: a checkpoint, an image and an instruction to a robot action."""
