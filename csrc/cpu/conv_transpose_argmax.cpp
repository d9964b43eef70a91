// fcnseg_cpu::conv_transpose_argmax: the dispatcher's side of conv_transpose.h. Returns [N, H, W],
// uint8 or int64. The output_padding only bounds the size, which was checked before.

#include "conv_transpose_tensors.h"

namespace fcnseg {
namespace {

template <typename Label>
void write_labels(const ConvTranspose& problem, Tensor& out) {
  Label* const data = static_cast<Label*>(out.mutable_data_ptr());
  conv_transpose_argmax(problem, &parallel_for, [&] {
    return std::make_unique<LabelWriter<Label>>(data, problem.H, problem.W);
  });
}

Tensor conv_transpose_argmax_cpu(Tensor input, Tensor weight, std::optional<Tensor> bias, int64_t H,
                                 int64_t W, std::vector<int64_t> stride,
                                 std::vector<int64_t> padding, int64_t groups,
                                 std::vector<int64_t> dilation, std::vector<int64_t> crop,
                                 bool uint8_output) {
  const ConvTranspose problem =
      conv_transpose_of(input, weight, bias, {stride, padding, groups, dilation, crop}, H, W);
  Tensor out = torch::stable::new_empty(input, {input.size(0), H, W},
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
      "conv_transpose_argmax(Tensor input, Tensor weight, Tensor? bias, int H, int W, int[] "
      "stride, "
      "int[] padding, int groups, int[] dilation, int[] crop, bool uint8_output) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fcnseg_cpu, CPU, m) {
  m.impl("conv_transpose_argmax", TORCH_BOX(&fcnseg::conv_transpose_argmax_cpu));
}
