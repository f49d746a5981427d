"""Synchronisations that may be dropped without a difference that the harness sees, each with the
hardware's reason for keeping it. Everything else that survives is removed from the kernel.
"""

SURVIVORS: dict[tuple[str, str], str] = {}
"""(file below csrc, the source line without indentation) -> why the hardware needs it."""
