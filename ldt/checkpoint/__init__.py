"""Elastic checkpoints: written by any number of ranks at any ZeRO stage, read by any other, or by one process alone."""
