"""Kernels count in 32 bits, whatever JAX is set to."""

import jax
from jax.experimental import pallas as pl


def pallas_call(kernel, **options):
    """`pl.pallas_call`, with `jax_enable_x64` off while the kernel is traced.

    A Python number in a kernel is 64 bits wide under it: Mosaic has no such numbers, and integers
    of two widths do not mix. Arrays that are handed in are of 32 bits at most.
    """
    call = pl.pallas_call(kernel, **options)

    def run(*arrays):
        with jax.enable_x64(False):
            return call(*arrays)

    return run
