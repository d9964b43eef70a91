"""Draws cells.png: ``python docs/figures/cells.py`` (needs matplotlib)."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

SAMPLES, STRIDE = 4, 4
PIXELS = SAMPLES * STRIDE


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), width_ratios=(1, 1.15))

    pixels = np.arange(PIXELS)
    source = (pixels + 0.5) / STRIDE - 0.5
    cell = np.floor(source).astype(int) + 1  # 0 .. SAMPLES
    board = (cell[:, None] + cell[None, :]) % 2
    left.imshow(board, cmap="Blues", vmin=-0.4, vmax=2.5, extent=(0, PIXELS, PIXELS, 0))
    for line in range(PIXELS + 1):
        left.axhline(line, color="white", linewidth=0.5)
        left.axvline(line, color="white", linewidth=0.5)
    centres = (np.arange(SAMPLES) + 0.5) * STRIDE
    x, y = np.meshgrid(centres, centres)
    left.plot(x, y, "o", color="tab:red", markersize=6)
    corner = centres[1]
    left.add_patch(
        plt.Rectangle((corner, corner), STRIDE, STRIDE, fill=False, edgecolor="tab:red", lw=2)
    )
    left.set_title("A cell: the pixels between the same four samples")
    left.set_xlabel(f"{SAMPLES} x {SAMPLES} logits (red) upsampled {STRIDE} times")
    left.set_xticks([])
    left.set_yticks([])

    rows = np.arange(STRIDE)
    for a, d, name in ((0.6, -0.45, "class 0"), (-0.3, 0.35, "class 1"), (0.1, 0.02, "class 2")):
        right.plot(rows, a + d * rows, "o-", label=f"{name}: exp(a) = {np.exp(a):.2f}, "
                   f"q = {np.exp(d):.2f}")  # fmt: skip
    right.set_title("Down a column of a cell every logit is linear:\nexp(a + r d) = exp(a) q^r")
    right.set_xlabel("row r of the cell")
    right.set_ylabel("logit")
    right.set_xticks(rows)
    right.legend()
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
