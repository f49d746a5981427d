"""Is every operator right, on every backend that runs here? Cases, the textbook formulas, the
judge.
"""
