// fcnseg_cpu::upsample_cross_entropy and its backward: the dispatcher's side of
// upsample_cross_entropy.h.
//
// The forward returns (loss, gradient, bad_label): loss and gradient in the arithmetic's dtype
// (float64 for float64, else float32), the gradient of a scalar loss (empty where compute_grad is
// false or the reduction is "none"), and int64 [5] = (count, value, n, y, x) of the bad labels.
// Where count is not zero, the other two mean nothing; fcnseg/_ops.py raises an IndexError.

#include "upsample_cross_entropy.h"

#include <string>
#include <tuple>

#include "stable_tensors.h"

namespace fcnseg {
namespace {

struct Options {
  std::optional<Tensor> weight;
  int64_t ignore_index;
  double label_smoothing;
  bool align_corners;
  std::optional<double> scale_h, scale_w;
};

void set_gradient(UpsampleCrossEntropy& problem, Tensor& gradient) {
  problem.gradient = gradient.mutable_data_ptr();
  problem.gradient_n = gradient.stride(0);
  problem.gradient_c = gradient.stride(1);
  problem.gradient_h = gradient.stride(2);
  problem.gradient_w = gradient.stride(3);
}

// Runs `problem`, to which the caller has added the outputs.
BadLabel run(UpsampleCrossEntropy& problem, const Tensor& logits, const Tensor& target,
             const Options& options) {
  problem.logits = logits_of(logits);
  const Tensor labels = torch::stable::contiguous(target);
  problem.target = labels_of(labels);
  STD_TORCH_CHECK(target.size(0) == logits.size(0), "logits and target differ in N");
  STD_TORCH_CHECK(logits.size(1) > 0, "logits must have at least one class");
  std::optional<Tensor> weight;
  if (options.weight.has_value()) {
    weight = torch::stable::contiguous(torch::stable::to(*options.weight, ScalarType::Double));
    STD_TORCH_CHECK(weight->numel() == logits.size(1), "weight must be [C]");
    problem.weight = static_cast<const double*>(weight->const_data_ptr());
  }
  problem.ignore_index = options.ignore_index;
  problem.label_smoothing = options.label_smoothing;
  problem.align_corners = options.align_corners;
  problem.scale_h = options.scale_h.value_or(0.0);
  problem.scale_w = options.scale_w.value_or(0.0);
  return upsample_cross_entropy(problem, &parallel_for).bad;
}

std::tuple<Tensor, Tensor, Tensor> upsample_cross_entropy_cpu(
    Tensor logits, Tensor target, std::optional<Tensor> weight, int64_t ignore_index,
    std::string reduction, double label_smoothing, bool align_corners,
    std::optional<double> scale_h, std::optional<double> scale_w, bool compute_grad) {
  UpsampleCrossEntropy problem{};
  problem.reduction = reduction_of(reduction);
  const bool map = problem.reduction == Reduction::kNone;
  Tensor loss = map ? torch::stable::new_empty(
                          logits, {target.size(0), target.size(1), target.size(2)}, real_of(logits))
                    : torch::stable::new_empty(logits, {}, real_of(logits));
  problem.loss = loss.mutable_data_ptr();
  const bool with_gradient = compute_grad && !map;
  Tensor gradient = with_gradient ? empty_gradient(logits)
                                  : torch::stable::new_empty(logits, {0}, real_of(logits));
  if (with_gradient) set_gradient(problem, gradient);
  const BadLabel bad =
      run(problem, logits, target,
          {weight, ignore_index, label_smoothing, align_corners, scale_h, scale_w});
  return {loss, gradient, report_of(bad, logits)};
}

// The gradient of reduction "none", in the dtype of the logits. The labels were checked before.
Tensor upsample_cross_entropy_backward_cpu(Tensor grad_output, Tensor logits, Tensor target,
                                           std::optional<Tensor> weight, int64_t ignore_index,
                                           double label_smoothing, bool align_corners,
                                           std::optional<double> scale_h,
                                           std::optional<double> scale_w) {
  const Tensor upstream = torch::stable::to(grad_output, real_of(logits));
  STD_TORCH_CHECK(upstream.dim() == 3 && upstream.size(0) == target.size(0) &&
                      upstream.size(1) == target.size(1) && upstream.size(2) == target.size(2),
                  "grad_output must be [N, H, W]");
  UpsampleCrossEntropy problem{};
  problem.reduction = Reduction::kNone;
  problem.upstream = upstream.const_data_ptr();
  problem.upstream_n = upstream.stride(0);
  problem.upstream_h = upstream.stride(1);
  problem.upstream_w = upstream.stride(2);
  Tensor gradient = empty_gradient(logits);
  set_gradient(problem, gradient);
  run(problem, logits, target,
      {weight, ignore_index, label_smoothing, align_corners, scale_h, scale_w});
  return torch::stable::to(gradient, logits.scalar_type());
}

}  // namespace
}  // namespace fcnseg

STABLE_TORCH_LIBRARY_FRAGMENT(fcnseg_cpu, m) {
  m.def(
      "upsample_cross_entropy(Tensor logits, Tensor target, Tensor? weight, int ignore_index, "
      "str reduction, float label_smoothing, bool align_corners, float? scale_h, float? scale_w, "
      "bool compute_grad) -> (Tensor loss, Tensor gradient, Tensor bad_label)");
  m.def(
      "upsample_cross_entropy_backward(Tensor grad_output, Tensor logits, Tensor target, "
      "Tensor? weight, int ignore_index, float label_smoothing, bool align_corners, "
      "float? scale_h, float? scale_w) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fcnseg_cpu, CPU, m) {
  m.impl("upsample_cross_entropy", TORCH_BOX(&fcnseg::upsample_cross_entropy_cpu));
  m.impl("upsample_cross_entropy_backward",
         TORCH_BOX(&fcnseg::upsample_cross_entropy_backward_cpu));
}
