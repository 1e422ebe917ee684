"""Imported by the server of forked processes (forked.py): what would otherwise take each of them seconds is done once.

The draws and the digest are compiled, and diffusers' and DeepSpeed's lazy imports are made.
"""

import warnings

import numpy as np

from ldt.data import digest, philox

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of their own dependencies
    import setuptools  # noqa: F401
    from diffusers import AutoencoderKL  # noqa: F401

philox.fill_normal(0, 0, np.arange(1), np.empty((1, 4), np.float32))
philox.uniform(0, 0, np.arange(1), 1)
for kind in (np.int16, np.int32):
    digest._add_products(np.ones((1, 1), kind), digest.multipliers(1), np.zeros(1, np.uint64))
