"""Scores of checkpoints."""
