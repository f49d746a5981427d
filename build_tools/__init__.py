"""Builds ``fused_lm._C`` at install time. Part of the sdist, not of the package."""
