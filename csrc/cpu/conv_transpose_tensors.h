// The operands of a transposed convolution, tensors of the stable ABI, as the plain structure.
#pragma once

#include <vector>

#include "conv_transpose.h"
#include "stable_tensors.h"

namespace fcnseg {

// Each pair: (height, width).
struct ConvGeometry {
  std::vector<int64_t> stride, padding;
  int64_t groups;
  std::vector<int64_t> dilation, crop;
};

inline ConvTranspose conv_transpose_of(const Tensor& input, const Tensor& weight,
                                       const std::optional<Tensor>& bias, const ConvGeometry& g,
                                       int64_t H, int64_t W) {
  ConvTranspose conv{};
  conv.input = logits_of(input);
  STD_TORCH_CHECK(g.groups > 0 && weight.dim() == 4 && weight.size(0) == input.size(1) &&
                      input.size(1) % g.groups == 0 && weight.numel() > 0 &&
                      weight.scalar_type() == input.scalar_type(),
                  "weight must be [C_in, C / groups, kH, kW] in the input's dtype");
  for (const auto* pair : {&g.stride, &g.padding, &g.dilation, &g.crop}) {
    STD_TORCH_CHECK(pair->size() == 2 && pair->at(0) >= 0 && pair->at(1) >= 0,
                    "the geometry must be pairs of numbers that are not negative");
  }
  STD_TORCH_CHECK(g.stride[0] > 0 && g.stride[1] > 0 && g.dilation[0] > 0 && g.dilation[1] > 0 &&
                      H > 0 && W > 0,
                  "stride, dilation and size must be positive");
  conv.weight = weight.const_data_ptr();
  for (int i = 0; i < 4; ++i) conv.weight_stride[i] = weight.stride(i);
  conv.groups = g.groups;
  conv.C = weight.size(1) * g.groups;
  if (bias.has_value()) {
    STD_TORCH_CHECK(
        bias->dim() == 1 && bias->size(0) == conv.C && bias->scalar_type() == input.scalar_type(),
        "bias must be [C] in the input's dtype");
    conv.bias = bias->const_data_ptr();
    conv.bias_stride = bias->stride(0);
  }
  conv.kernel_h = weight.size(2);
  conv.kernel_w = weight.size(3);
  conv.stride_h = g.stride[0];
  conv.stride_w = g.stride[1];
  conv.padding_h = g.padding[0];
  conv.padding_w = g.padding[1];
  conv.dilation_h = g.dilation[0];
  conv.dilation_w = g.dilation[1];
  conv.crop_h = g.crop[0];
  conv.crop_w = g.crop[1];
  conv.H = H;
  conv.W = W;
  return conv;
}

}  // namespace fcnseg
