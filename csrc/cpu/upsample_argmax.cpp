// fcnseg_cpu::upsample_argmax: the dispatcher's side of upsample_argmax.h. Returns [N, H, W], uint8
// or int64.

#include "upsample_argmax.h"

#include "stable_tensors.h"

namespace fcnseg {
namespace {

template <typename Label>
void write_labels(const UpsampleArgmax& problem, Tensor& out) {
  Label* const data = static_cast<Label*>(out.mutable_data_ptr());
  upsample_argmax(problem, &parallel_for,
                  [&] { return std::make_unique<LabelWriter<Label>>(data, problem.H, problem.W); });
}

Tensor upsample_argmax_cpu(Tensor logits, int64_t H, int64_t W, bool align_corners,
                           std::optional<double> scale_h, std::optional<double> scale_w,
                           bool uint8_output) {
  const UpsampleArgmax problem{logits_of(logits),    H, W, align_corners, scale_h.value_or(0.0),
                               scale_w.value_or(0.0)};
  STD_TORCH_CHECK(logits.size(1) > 0, "logits must have at least one class");
  Tensor out = torch::stable::new_empty(logits, {logits.size(0), H, W},
                                        uint8_output ? ScalarType::Byte : ScalarType::Long);
  if (uint8_output) {
    write_labels<uint8_t>(problem, out);
  } else {
    write_labels<int64_t>(problem, out);
  }
  return out;
}

}  // namespace
}  // namespace fcnseg

STABLE_TORCH_LIBRARY_FRAGMENT(fcnseg_cpu, m) {
  m.def(
      "upsample_argmax(Tensor logits, int H, int W, bool align_corners, float? scale_h, "
      "float? scale_w, bool uint8_output) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fcnseg_cpu, CPU, m) {
  m.impl("upsample_argmax", TORCH_BOX(&fcnseg::upsample_argmax_cpu));
}
