// conv_transpose_cross_entropy and conv_transpose_argmax on the CPU, on plain pointers. No torch
// headers.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "cross_entropy.h"
#include "logits.h"
#include "parallel.h"
#include "upsample_argmax.h"

namespace fcnseg {

// The window [H, W] at (crop_h, crop_w) of conv_transpose2d(input, weight, bias, ...).
struct ConvTranspose {
  Logits input;              // its C is C_in
  const void* weight;        // [C_in, C / groups, kernel_h, kernel_w] of the input's dtype
  int64_t weight_stride[4];  // its strides
  const void* bias;          // [C] of the input's dtype, or null
  int64_t bias_stride;
  int64_t C, groups, kernel_h, kernel_w;
  int64_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, crop_h, crop_w;
  int64_t H, W;
};

struct ConvTransposeCrossEntropy {
  ConvTranspose conv;
  Labels target;
  const double* class_weight;  // [C], or null
  int64_t ignore_index;
  Reduction reduction;
  double label_smoothing;

  // All outputs are double for double input, float for every other dtype.
  void* loss;       // scalar, or [N, H, W] contiguous with kNone; null in the backward of kNone
  void* to_input;   // gradients: dense [N, C_in, h, w] of any layout,
  void* to_weight;  // contiguous, as the weight
  void* to_bias;    // [C]; each null where it is not wanted
  int64_t to_input_n, to_input_c, to_input_h, to_input_w;  // its strides
  const void* upstream;  // kNone's backward: [N, H, W], float or double; null otherwise
  int64_t upstream_n, upstream_h, upstream_w;
};

// Where bad labels are counted the outputs mean nothing.
BadLabel conv_transpose_cross_entropy(const ConvTransposeCrossEntropy& problem,
                                      const ParallelFor& parallel_for);

// `make_sink` is called once per range of work, possibly from several threads.
void conv_transpose_argmax(const ConvTranspose& problem, const ParallelFor& parallel_for,
                           const std::function<std::unique_ptr<LabelSink>()>& make_sink);

}  // namespace fcnseg
