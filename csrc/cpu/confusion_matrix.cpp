// fcnseg_cpu::confusion_matrix_: the dispatcher's side of confusion_matrix.h.
//
// Returns int64 [4] = (count, position, value, in_prediction) of the bad labels; where count is not
// zero, `matrix` has not been written. fcnseg/_ops.py turns that into an IndexError.

#include "confusion_matrix.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

namespace fcnseg {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMinPixelsPerTask = 1 << 16;

struct Work {
  int64_t size;
  int64_t num_classes;
  int64_t ignore_index;
};

// Counts into `matrix` unless a label is bad.
template <typename Prediction, typename Target>
BadLabels count(const Prediction* prediction, const Target* target, const Work& work,
                int64_t* matrix) {
  const int64_t bins = work.num_classes * work.num_classes;
  // A task costs a table of its own: no more tasks than threads, each worth its table.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t per_task = std::max({kMinPixelsPerTask, bins, (work.size + threads - 1) / threads});
  const int64_t tasks = (work.size + per_task - 1) / per_task;
  std::vector<std::vector<int64_t>> tables(tasks);
  std::vector<BadLabels> found(tasks);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      tables[task].assign(bins, 0);
      count_range(prediction, target, task * per_task, std::min(work.size, (task + 1) * per_task),
                  work.num_classes, work.ignore_index, tables[task].data(), found[task]);
    }
  });
  BadLabels bad;
  for (const BadLabels& part : found) bad.append(part);
  if (bad.count != 0) return bad;
  for (const std::vector<int64_t>& table : tables) {
    for (int64_t bin = 0; bin < bins; ++bin) matrix[bin] += table[bin];
  }
  return bad;
}

template <typename Visitor>
auto with_labels(const Tensor& labels, Visitor&& visit) {
  switch (labels.scalar_type()) {
    case ScalarType::Byte:
      return visit(static_cast<const uint8_t*>(labels.const_data_ptr()));
    case ScalarType::Short:
      return visit(static_cast<const int16_t*>(labels.const_data_ptr()));
    case ScalarType::Int:
      return visit(static_cast<const int32_t*>(labels.const_data_ptr()));
    default:
      STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long,
                      "confusion_matrix_: labels must be uint8, int16, int32 or int64");
      return visit(static_cast<const int64_t*>(labels.const_data_ptr()));
  }
}

Tensor confusion_matrix_cpu(Tensor matrix, Tensor prediction, Tensor target, int64_t ignore_index) {
  STD_TORCH_CHECK(matrix.dim() == 2 && matrix.size(0) == matrix.size(1) && matrix.is_contiguous() &&
                      matrix.scalar_type() == ScalarType::Long,
                  "confusion_matrix_: matrix must be a contiguous int64 [C, C] tensor");
  STD_TORCH_CHECK(prediction.numel() == target.numel(),
                  "confusion_matrix_: prediction and target differ in size");
  const Tensor p = torch::stable::contiguous(prediction);
  const Tensor t = torch::stable::contiguous(target);
  const Work work{p.numel(), matrix.size(0), ignore_index};
  int64_t* out = static_cast<int64_t*>(matrix.mutable_data_ptr());
  const BadLabels bad = with_labels(p, [&](const auto* predicted) {
    return with_labels(t, [&](const auto* truth) { return count(predicted, truth, work, out); });
  });
  Tensor report = torch::stable::new_empty(matrix, {4});
  int64_t* fields = static_cast<int64_t*>(report.mutable_data_ptr());
  fields[0] = bad.count;
  fields[1] = bad.position;
  fields[2] = bad.value;
  fields[3] = bad.in_prediction;
  return report;
}

}  // namespace
}  // namespace fcnseg

STABLE_TORCH_LIBRARY_FRAGMENT(fcnseg_cpu, m) {
  m.def(
      "confusion_matrix_(Tensor(a!) matrix, Tensor prediction, Tensor target, int ignore_index) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fcnseg_cpu, CPU, m) {
  m.impl("confusion_matrix_", TORCH_BOX(&fcnseg::confusion_matrix_cpu));
}
