// fcnseg_cpu::upsample_confusion_matrix: rows of labels from upsample_argmax.h are counted against
// the target as they come; neither logits nor labels of the output's size exist.
//
// Every range of work counts into a table of its own; the tables, which hold integers, are added at
// the end, and only where no target label is bad. Returns int64 [5] = (count, value, n, y, x) of
// the bad labels.

#include <mutex>
#include <tuple>
#include <vector>

#include "confusion_matrix.h"
#include "stable_tensors.h"
#include "upsample_argmax.h"

namespace fcnseg {
namespace {

// The sum over all sinks.
struct Counts {
  std::mutex mutex;
  std::vector<int64_t> table;
  BadLabel bad;

  void add(const std::vector<int64_t>& part, const BadLabel& part_bad) {
    const std::lock_guard<std::mutex> lock(mutex);
    for (size_t i = 0; i < part.size(); ++i) table[i] += part[i];
    bad.merge(part_bad);
  }
};

class LabelCounter : public LabelSink {
 public:
  LabelCounter(const Labels& target, int64_t C, int64_t ignore_index, Counts& counts)
      : target_(target), C_(C), ignore_index_(ignore_index), counts_(counts), table_(C * C) {}
  ~LabelCounter() override { counts_.add(table_, bad_); }

  void take_row(int64_t n, int64_t y, const int32_t* labels) override {
    const int64_t at = (n * target_.H + y) * target_.W;
    switch (target_.type) {
      case LabelType::kUInt8:
        return count(labels, static_cast<const uint8_t*>(target_.data) + at, n, y);
      case LabelType::kInt32:
        return count(labels, static_cast<const int32_t*>(target_.data) + at, n, y);
      case LabelType::kInt64:
        return count(labels, static_cast<const int64_t*>(target_.data) + at, n, y);
    }
  }

 private:
  template <typename Target>
  void count(const int32_t* labels, const Target* target, int64_t n, int64_t y) {
    BadLabels found;
    count_range(labels, target, 0, target_.W, C_, ignore_index_, table_.data(), found);
    if (found.count != 0) bad_.merge({found.count, found.value, n, y, found.position});
  }

  const Labels target_;
  const int64_t C_, ignore_index_;
  Counts& counts_;
  std::vector<int64_t> table_;
  BadLabel bad_;
};

Tensor upsample_confusion_matrix_cpu(Tensor matrix, Tensor logits, Tensor target,
                                     int64_t ignore_index, bool align_corners,
                                     std::optional<double> scale_h, std::optional<double> scale_w) {
  const int64_t C = logits.size(1);
  STD_TORCH_CHECK(C > 0 && matrix.dim() == 2 && matrix.size(0) == C && matrix.size(1) == C &&
                      matrix.is_contiguous() && matrix.scalar_type() == ScalarType::Long,
                  "matrix must be a contiguous int64 [C, C] tensor");
  STD_TORCH_CHECK(target.size(0) == logits.size(0), "logits and target differ in N");
  const Tensor contiguous = torch::stable::contiguous(target);
  const Labels labels = labels_of(contiguous);
  Counts counts;
  counts.table.resize(C * C);
  upsample_argmax({logits_of(logits), labels.H, labels.W, align_corners, scale_h.value_or(0.0),
                   scale_w.value_or(0.0)},
                  &parallel_for,
                  [&] { return std::make_unique<LabelCounter>(labels, C, ignore_index, counts); });
  if (counts.bad.count == 0) {
    int64_t* const out = static_cast<int64_t*>(matrix.mutable_data_ptr());
    for (int64_t i = 0; i < C * C; ++i) out[i] += counts.table[i];
  }
  return report_of(counts.bad, logits);
}

}  // namespace
}  // namespace fcnseg

STABLE_TORCH_LIBRARY_FRAGMENT(fcnseg_cpu, m) {
  m.def(
      "upsample_confusion_matrix(Tensor(a!) matrix, Tensor logits, Tensor target, "
      "int ignore_index, bool align_corners, float? scale_h, float? scale_w) -> Tensor bad_label");
}

STABLE_TORCH_LIBRARY_IMPL(fcnseg_cpu, CPU, m) {
  m.impl("upsample_confusion_matrix", TORCH_BOX(&fcnseg::upsample_confusion_matrix_cpu));
}
