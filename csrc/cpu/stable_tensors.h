// Tensors of the stable ABI as the plain structures of logits.h.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "cross_entropy.h"
#include "logits.h"

namespace fcnseg {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return DType::kDouble;
    case ScalarType::Half:
      return DType::kHalf;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float,
                      "logits must be float16, bfloat16, float32 or float64");
      return DType::kFloat;
  }
}

inline Logits logits_of(const Tensor& z) {
  STD_TORCH_CHECK(z.dim() == 4 && z.size(1) > 0 && z.size(2) > 0 && z.size(3) > 0,
                  "logits must be [N, C, h, w] with C, h and w of at least 1");
  return {z.const_data_ptr(), dtype_of(z), z.size(0),   z.size(1),   z.size(2),
          z.size(3),          z.stride(0), z.stride(1), z.stride(2), z.stride(3)};
}

// `target` must be contiguous.
inline Labels labels_of(const Tensor& target) {
  STD_TORCH_CHECK(target.dim() == 3, "target must be [N, H, W]");
  LabelType type = LabelType::kInt64;
  if (target.scalar_type() == ScalarType::Byte) {
    type = LabelType::kUInt8;
  } else if (target.scalar_type() == ScalarType::Int) {
    type = LabelType::kInt32;
  } else {
    STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long,
                    "target must be uint8, int32 or int64");
  }
  return {target.const_data_ptr(), type, target.size(1), target.size(2)};
}

// int64 [5]: count, value, n, y, x.
inline Tensor report_of(const BadLabel& bad, const Tensor& like) {
  Tensor report = torch::stable::new_empty(like, {5}, ScalarType::Long);
  int64_t* fields = static_cast<int64_t*>(report.mutable_data_ptr());
  fields[0] = bad.count;
  fields[1] = bad.value;
  fields[2] = bad.n;
  fields[3] = bad.y;
  fields[4] = bad.x;
  return report;
}

inline Reduction reduction_of(const std::string& name) {
  if (name == "none") return Reduction::kNone;
  if (name == "mean") return Reduction::kMean;
  STD_TORCH_CHECK(name == "sum", "reduction must be none, mean or sum");
  return Reduction::kSum;
}

// Of the arithmetic, the loss and unscaled gradients.
inline ScalarType real_of(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// [N, C, h, w] in the memory order of the logits where that is one of the two usual ones.
inline Tensor empty_gradient(const Tensor& logits) {
  const int64_t N = logits.size(0), C = logits.size(1), h = logits.size(2), w = logits.size(3);
  if (C > 1 && logits.stride(1) == 1 && logits.stride(3) != 1) {
    const Tensor last = torch::stable::new_empty(logits, {N, h, w, C}, real_of(logits));
    return torch::stable::transpose(torch::stable::transpose(last, 2, 3), 1, 2);
  }
  return torch::stable::new_empty(logits, {N, C, h, w}, real_of(logits));
}

// One task at a time: the tasks are few and fixed by the shapes.
inline void parallel_for(int64_t end, const std::function<void(int64_t, int64_t)>& run) {
  torch::stable::parallel_for(0, end, 1, run);
}

}  // namespace fcnseg
