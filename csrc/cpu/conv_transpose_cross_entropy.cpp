// fcnseg_cpu::conv_transpose_cross_entropy and its backward: the dispatcher's side of
// conv_transpose.h.
//
// The forward returns (loss, three gradients, bad_label): loss and the gradients of input, weight
// and bias in the arithmetic's dtype, those of a scalar loss (empty where compute_grad is false or
// the reduction is "none"), and int64 [5] = (count, value, n, y, x) of the bad labels. Where count
// is not zero, the others mean nothing; fcnseg/_ops.py raises an IndexError. The output_padding
// only bounds the target's size, which was checked before.

#include <string>
#include <tuple>

#include "conv_transpose_tensors.h"

namespace fcnseg {
namespace {

struct Options {
  std::optional<Tensor> class_weight;
  int64_t ignore_index;
  double label_smoothing;
  std::vector<bool> compute_grad;  // of input, weight, bias
};

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// Allocates the gradients and runs `problem`, to which the caller has added loss or upstream.
Gradients run(ConvTransposeCrossEntropy& problem, BadLabel& bad, const Tensor& input,
              const Tensor& weight, const Tensor& target, const std::optional<Tensor>& bias,
              const ConvGeometry& geometry, const Options& options) {
  const Tensor labels = torch::stable::contiguous(target);
  problem.target = labels_of(labels);
  STD_TORCH_CHECK(target.size(0) == input.size(0), "input and target differ in N");
  problem.conv =
      conv_transpose_of(input, weight, bias, geometry, problem.target.H, problem.target.W);
  std::optional<Tensor> class_weight;
  if (options.class_weight.has_value()) {
    class_weight =
        torch::stable::contiguous(torch::stable::to(*options.class_weight, ScalarType::Double));
    STD_TORCH_CHECK(class_weight->numel() == problem.conv.C, "class_weight must be [C]");
    problem.class_weight = static_cast<const double*>(class_weight->const_data_ptr());
  }
  problem.ignore_index = options.ignore_index;
  problem.label_smoothing = options.label_smoothing;
  STD_TORCH_CHECK(options.compute_grad.size() == 3, "compute_grad must be three flags");
  const auto allocate = [&](std::vector<int64_t> shape) {
    return torch::stable::new_empty(input, shape, real_of(input));
  };
  Tensor to_input = options.compute_grad[0] ? empty_gradient(input) : allocate({0});
  Tensor to_weight =
      options.compute_grad[1]
          ? allocate({weight.size(0), weight.size(1), weight.size(2), weight.size(3)})
          : allocate({0});
  Tensor to_bias = allocate({options.compute_grad[2] ? problem.conv.C : 0});
  if (options.compute_grad[0]) {
    problem.to_input = to_input.mutable_data_ptr();
    problem.to_input_n = to_input.stride(0);
    problem.to_input_c = to_input.stride(1);
    problem.to_input_h = to_input.stride(2);
    problem.to_input_w = to_input.stride(3);
  }
  if (options.compute_grad[1]) problem.to_weight = to_weight.mutable_data_ptr();
  if (options.compute_grad[2]) problem.to_bias = to_bias.mutable_data_ptr();
  bad = conv_transpose_cross_entropy(problem, &parallel_for);
  return {to_input, to_weight, to_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_transpose_cross_entropy_cpu(
    Tensor input, Tensor weight, Tensor target, std::optional<Tensor> bias,
    std::optional<Tensor> class_weight, std::vector<int64_t> stride, std::vector<int64_t> padding,
    int64_t groups, std::vector<int64_t> dilation, std::vector<int64_t> crop, int64_t ignore_index,
    std::string reduction, double label_smoothing, std::vector<bool> compute_grad) {
  ConvTransposeCrossEntropy problem{};
  problem.reduction = reduction_of(reduction);
  const bool map = problem.reduction == Reduction::kNone;
  Tensor loss = map ? torch::stable::new_empty(
                          input, {target.size(0), target.size(1), target.size(2)}, real_of(input))
                    : torch::stable::new_empty(input, {}, real_of(input));
  problem.loss = loss.mutable_data_ptr();
  if (map) compute_grad.assign(3, false);
  BadLabel bad;
  const auto [to_input, to_weight, to_bias] =
      run(problem, bad, input, weight, target, bias, {stride, padding, groups, dilation, crop},
          {class_weight, ignore_index, label_smoothing, compute_grad});
  return {loss, to_input, to_weight, to_bias, report_of(bad, input)};
}

// The gradients of reduction "none", in the dtype of the input. The labels were checked before.
Gradients conv_transpose_cross_entropy_backward_cpu(
    Tensor grad_output, Tensor input, Tensor weight, Tensor target, std::optional<Tensor> bias,
    std::optional<Tensor> class_weight, std::vector<int64_t> stride, std::vector<int64_t> padding,
    int64_t groups, std::vector<int64_t> dilation, std::vector<int64_t> crop, int64_t ignore_index,
    double label_smoothing, std::vector<bool> compute_grad) {
  const Tensor upstream = torch::stable::to(grad_output, real_of(input));
  STD_TORCH_CHECK(upstream.dim() == 3 && upstream.size(0) == target.size(0) &&
                      upstream.size(1) == target.size(1) && upstream.size(2) == target.size(2),
                  "grad_output must be [N, H, W]");
  ConvTransposeCrossEntropy problem{};
  problem.reduction = Reduction::kNone;
  problem.upstream = upstream.const_data_ptr();
  problem.upstream_n = upstream.stride(0);
  problem.upstream_h = upstream.stride(1);
  problem.upstream_w = upstream.stride(2);
  BadLabel bad;
  const auto [to_input, to_weight, to_bias] =
      run(problem, bad, input, weight, target, bias, {stride, padding, groups, dilation, crop},
          {class_weight, ignore_index, label_smoothing, compute_grad});
  const ScalarType dtype = input.scalar_type();
  return {torch::stable::to(to_input, dtype), torch::stable::to(to_weight, dtype),
          torch::stable::to(to_bias, dtype)};
}

}  // namespace
}  // namespace fcnseg

STABLE_TORCH_LIBRARY_FRAGMENT(fcnseg_cpu, m) {
  m.def(
      "conv_transpose_cross_entropy(Tensor input, Tensor weight, Tensor target, Tensor? bias, "
      "Tensor? class_weight, int[] stride, int[] padding, int groups, int[] dilation, int[] crop, "
      "int ignore_index, str reduction, float label_smoothing, bool[] compute_grad) "
      "-> (Tensor loss, Tensor to_input, Tensor to_weight, Tensor to_bias, Tensor bad_label)");
  m.def(
      "conv_transpose_cross_entropy_backward(Tensor grad_output, Tensor input, Tensor weight, "
      "Tensor target, Tensor? bias, Tensor? class_weight, int[] stride, int[] padding, "
      "int groups, int[] dilation, int[] crop, int ignore_index, float label_smoothing, "
      "bool[] compute_grad) -> (Tensor to_input, Tensor to_weight, Tensor to_bias)");
}

STABLE_TORCH_LIBRARY_IMPL(fcnseg_cpu, CPU, m) {
  m.impl("conv_transpose_cross_entropy", TORCH_BOX(&fcnseg::conv_transpose_cross_entropy_cpu));
  m.impl("conv_transpose_cross_entropy_backward",
         TORCH_BOX(&fcnseg::conv_transpose_cross_entropy_backward_cpu));
}
