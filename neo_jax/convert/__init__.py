"""Checkpoints of published families to and from ours: one table per family, used in both directions."""
