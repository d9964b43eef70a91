// upsample_cross_entropy on the CPU, on plain pointers. No torch headers.
#pragma once

#include <cstdint>

#include "cross_entropy.h"
#include "logits.h"
#include "parallel.h"

namespace fcnseg {

struct UpsampleCrossEntropy {
  Logits logits;
  Labels target;
  const double* weight;  // [C], or null
  int64_t ignore_index;
  Reduction reduction;
  double label_smoothing;
  bool align_corners;
  double scale_h, scale_w;  // 0: the ratio of the sizes

  // All outputs are double for double logits, float for every other dtype.
  void* loss;      // scalar, or [N, H, W] contiguous with kNone; null in the backward of kNone
  void* gradient;  // dense [N, C, h, w] of any layout; null where none is wanted
  int64_t gradient_n, gradient_c, gradient_h, gradient_w;  // its strides
  const void* upstream;  // kNone's backward: [N, H, W], float or double; null otherwise
  int64_t upstream_n, upstream_h, upstream_w;
};

struct UpsampleCrossEntropyReport {
  BadLabel bad;  // where bad.count is not zero, loss and gradient mean nothing
  int64_t tiles = 0, direct_tiles = 0, exact_rows = 0;
};

UpsampleCrossEntropyReport upsample_cross_entropy(const UpsampleCrossEntropy& problem,
                                                  const ParallelFor& parallel_for);

}  // namespace fcnseg
