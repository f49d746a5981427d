"""Is it Python? A cheap look at sampled text, line by line, with Python's own tokenizer."""

from __future__ import annotations

import io
import tokenize


def tokenizes(line: str) -> bool:
    """Whether one line, dedented, is a run of Python tokens by itself.

    An open bracket or string, a stray quote or a character that Python doesn't know fails it.
    Python before 3.12 reports some of these as an ERRORTOKEN instead of raising.
    """
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(line.strip() + "\n").readline))
    except (tokenize.TokenError, SyntaxError):
        return False
    return all(token.type != tokenize.ERRORTOKEN for token in tokens)


def count_tokenizable(content: bytes, begin: int = 0) -> tuple[int, int]:
    """Lines that tokenize and lines in all, blank ones and a cut-off last one left out.

    Args:
        content: Text.
        begin: Lines that end before this byte are left out: they are the prompt's.
    """
    begin = content.rfind(b"\n", 0, begin) + 1
    whole = content[begin : content.rfind(b"\n") + 1]
    lines = [line for line in whole.decode("utf-8", "replace").split("\n") if line.strip()]
    return sum(tokenizes(line) for line in lines), len(lines)
