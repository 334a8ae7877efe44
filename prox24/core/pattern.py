"""N:M patterns: at most N of every M consecutive entries along one axis are nonzero."""

from typing import NamedTuple

PatternLike = tuple[int, int]


class Pattern(NamedTuple):
    """N:M sparsity: `kept` entries of every `group` consecutive ones may be nonzero."""

    kept: int
    group: int

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"


def as_pattern(pattern: PatternLike) -> Pattern:
    """Checks a pair (N, M) and names its parts.

    Args:
      pattern: two integers with 1 <= N <= M.

    Raises:
      ValueError: the pair is not a pattern.

    Example:
      >>> as_pattern((2, 4)).kept
      2
    """
    kept, group = pattern
    if not 1 <= kept <= group:
        raise ValueError(f"pattern {kept}:{group} is not N:M with 1 <= N <= M")
    return Pattern(kept, group)
