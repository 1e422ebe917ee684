"""From noise to images."""
