"""Synchronisations that may be dropped without a difference that the harness sees, each with the
hardware's reason for keeping it. Everything else that survives is removed from the kernel.
"""

SURVIVORS: dict[tuple[str, str, int], str] = {}
"""(path below csrc, the source line without indentation, which of the file's lines that read so)
-> why the hardware needs it. An entry that no call needs any more fails the tests."""
