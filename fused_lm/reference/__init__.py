"""Every operator in plain PyTorch, fp64-able and differentiable: the derivations, as code that
runs.
"""
