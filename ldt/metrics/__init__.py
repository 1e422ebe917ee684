"""Scores of generated images: feature nets, moments, distances."""
