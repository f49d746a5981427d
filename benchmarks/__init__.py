"""Programs that measure fused_lm against what it replaces; run ``python -m benchmarks.<name>``."""
