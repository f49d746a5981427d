"""The forced backend in torch's own thread-local state, which autograd carries into the threads of
a GPU's backward: there a checkpointed forward runs again.
"""

from __future__ import annotations

import ctypes
import sys

from torch._C import (
    _current_graph_task_id,
    _get_obj_in_tls,
    _is_key_in_tls,
    _stash_obj_in_tls,
)

_KEY = "fused_lm_backend"
_NO_BACKWARD = -1


def stash(backend: str) -> None:
    """What backwards that start in this thread from now on find as :func:`inherited`."""
    if _STEALS:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(backend))
    _stash_obj_in_tls(_KEY, backend)


def inherited() -> str | None:
    """What was forced where a backward was started, while it runs: only there does torch bring a
    state that this thread has not set.
    """
    if _current_graph_task_id() == _NO_BACKWARD or not _is_key_in_tls(_KEY):
        return None
    return _get_obj_in_tls(_KEY)


# What torch.compiler.assume_constant_result sets, which imports all of dynamo to do so: a graph is
# traced outside of backwards.
inherited._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _steals() -> bool:
    """Whether torch's stash drops a reference that it has not taken, as that of 2.10 does: after
    some hundred calls the value's memory would be another's.
    """
    before = sys.getrefcount(_PROBE)
    _stash_obj_in_tls(_KEY + "_probe", _PROBE)
    if sys.getrefcount(_PROBE) > before:
        return False
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_PROBE))
    return True


_PROBE = object()
_STEALS = _steals()
