"""Synchronisations that may be dropped without a difference that the harness sees, each with the
hardware's reason for keeping it. Everything else that survives is removed from the kernel.
"""

_PASSED_OVER = (
    "An arrival counts for the phase that a barrier is in. That it is the phase of the tile that "
    "is passed over follows from turns in the plain kernels, from one q in the general ones: no "
    "group is as many tiles ahead of another as there are places. The wait says so itself, and the "
    "record of an H200 is of the kernel that has it; it may go with that kernel's next change."
)
_WHOLE_WARPS = (
    "barrier.cluster takes whole warps (.aligned), and one lane of this one comes from a loop of "
    "its own. The harness takes lanes one by one."
)
_ASKED = "It is there for its result, which the harness leaves it; no memory is ordered by it."
SURVIVORS: dict[tuple[str, str, int], str] = {
    (
        "kernels/attention_fwd_consumer_sm90.h",
        f"ptx::mbarrier_wait(&barriers.{full}[at.index], at.parity);",
        1,
    ): _PASSED_OVER
    for full in ("k_full", "v_full")
} | {
    (
        "kernels/attention_bwd_rows_sm90.h",
        "const bool any_huge = __syncthreads_or(huge) != 0;",
        1,
    ): _ASKED,
    ("kernels/gemm_producer_sm90.h", "__syncwarp();", 1): _WHOLE_WARPS,
}
"""(path below csrc, the source line without indentation, which of the file's lines that read so)
-> why the hardware needs it. An entry that no call needs any more fails the tests."""
