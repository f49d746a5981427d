"""The hand-written CUDA kernels of ``csrc/``: :mod:`.extension` loads them, the other modules call
them.
"""
