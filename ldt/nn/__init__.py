"""Denoisers: plain torch modules, tensors in and tensors out."""
