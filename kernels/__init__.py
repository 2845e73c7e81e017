"""Triton kernels of the operations, installed as ``layerprune.kernels``.

None is written yet: `layerprune.ops` runs its eager reference on CUDA devices. This package imports
without Triton.
"""
