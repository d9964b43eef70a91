"""The learning rate, as a pure function of the step: linear warm-up, then cosine annealing."""

import math


def lr_factor(step: int, *, total_steps: int, warmup_steps: int) -> float:
    """What the base learning rate is multiplied by at a step.

    Rises linearly to 1 over the first ``warmup_steps`` (never starting at 0, which would waste a
    step), then follows half a cosine that would reach 0 at ``total_steps``.

    Args:
        step: 0-based count of the batches before this one.
        total_steps: batches of the whole run, warm-up included.
        warmup_steps: batches of the warm-up, fewer than ``total_steps``.

    Returns:
        A factor in [0, 1].

    Raises:
        ValueError: an argument is out of range.

    Source:
        Loshchilov and Hutter, SGDR (eq. 5, one period); Goyal et al. (gradual warm-up).

    >>> [round(lr_factor(s, total_steps=8, warmup_steps=2), 3) for s in range(8)]
    [0.5, 1.0, 1.0, 0.933, 0.75, 0.5, 0.25, 0.067]
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps: expected 0 <= warmup_steps < total_steps = {total_steps}, "
            f"got {warmup_steps}"
        )
    if not 0 <= step <= total_steps:
        raise ValueError(f"step: expected 0 <= step <= total_steps = {total_steps}, got {step}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * progress))
