"""The learning rate, as a pure function of the step: linear warm-up, then a decay."""

import math

SCHEDULES = ("cosine", "poly", "step")


def lr_factor(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    kind: str = "cosine",
    power: float = 0.9,
    drop_every: int = 0,
) -> float:
    """What the base learning rate is multiplied by at a step.

    Rises linearly to 1 over the first ``warmup_steps`` (never starting at 0, which would waste a
    step), then falls. With t the share of the steps after the warm-up that is behind:

    * ``"cosine"``: half a cosine, ``(1 + cos(pi t)) / 2``.
    * ``"poly"``: ``(1 - t) ** power``.
    * ``"step"``: a tenth of the rate after every ``drop_every`` steps, counted from the first one.

    Args:
        step: 0-based count of the batches before this one.
        total_steps: batches of the whole run, warm-up included.
        warmup_steps: batches of the warm-up, fewer than ``total_steps``.
        kind: one of ``SCHEDULES``.
        power: exponent of ``"poly"``.
        drop_every: steps between the drops of ``"step"``.

    Returns:
        A factor in [0, 1].

    Raises:
        ValueError: an argument is out of range.

    Source:
        Loshchilov and Hutter, SGDR (eq. 5, one period); Liu, Rabinovich and Berg, ParseNet (poly);
        Goyal et al. (gradual warm-up).

    Examples:
        >>> [round(lr_factor(s, total_steps=8, warmup_steps=2), 3) for s in range(8)]
        [0.5, 1.0, 1.0, 0.933, 0.75, 0.5, 0.25, 0.067]
    """
    if kind not in SCHEDULES:
        raise ValueError(f"kind: expected one of {', '.join(SCHEDULES)}, got {kind!r}")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps: expected 0 <= warmup_steps < total_steps = {total_steps}, "
            f"got {warmup_steps}"
        )
    if not 0 <= step <= total_steps:
        raise ValueError(f"step: expected 0 <= step <= total_steps = {total_steps}, got {step}")
    if kind == "step" and drop_every < 1:
        raise ValueError(f"drop_every: expected a number of steps >= 1, got {drop_every}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    if kind == "step":
        return 0.1 ** (step // drop_every)
    if kind == "poly":
        return (1.0 - progress) ** power
    return 0.5 * (1.0 + math.cos(math.pi * progress))
