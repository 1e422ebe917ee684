"""A run directory: who owns it, how it ended, and what ends a run."""
