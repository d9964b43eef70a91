// fcnseg_cuda::confusion_matrix_ and record_invalid_: the dispatcher's side of confusion_matrix.h.
// The host's compiler builds it: no CUDA headers.

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "confusion_matrix.h"

namespace fcnseg {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxClasses = 46340;  // squared, fits an int
constexpr int64_t kCounters = 3;
constexpr int64_t kRecord = 5;

// From libtorch_cuda, which a CUDA build of torch has loaded and a CPU build lacks: it is looked
// up, not linked, so that one build of this library loads beside both.
void* current_stream(int32_t device) {
  using CurrentStream = int32_t (*)(int32_t device_index, void** stream);
  static const auto get = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol =
        torch_cuda == nullptr ? nullptr : dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<CurrentStream>(symbol);
  }();
  STD_TORCH_CHECK(get != nullptr, "fcnseg: this PyTorch has no CUDA support");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}

LabelMap label_map(const Tensor& labels) {
  switch (labels.scalar_type()) {
    case ScalarType::Byte:
      return {labels.const_data_ptr(), LabelType::kUInt8};
    case ScalarType::Short:
      return {labels.const_data_ptr(), LabelType::kInt16};
    case ScalarType::Int:
      return {labels.const_data_ptr(), LabelType::kInt32};
    default:
      STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long,
                      "confusion_matrix_: labels must be uint8, int16, int32 or int64");
      return {labels.const_data_ptr(), LabelType::kInt64};
  }
}

int64_t width_of(const Tensor& labels) {
  return labels.dim() == 0 ? 1 : labels.size(labels.dim() - 1);
}

int64_t* int64_data(Tensor& tensor, const char* expected, bool fits) {
  STD_TORCH_CHECK(fits && tensor.is_contiguous() && tensor.scalar_type() == ScalarType::Long,
                  "confusion_matrix_: expected a contiguous int64 ", expected);
  return static_cast<int64_t*>(tensor.mutable_data_ptr());
}

void check_launch(int error) {
  STD_TORCH_CHECK(error == 0, "confusion_matrix_: CUDA error ", error, ": ",
                  cuda_error_string(error));
}

// `invalid`: the number of invalid pixels is added to it; of 3 elements, zero at first, it also
// takes the number of ignored pixels and ~position of the first invalid one.
void confusion_matrix_cuda(Tensor matrix, Tensor prediction, Tensor target, int64_t ignore_index,
                           Tensor invalid) {
  const bool square = matrix.dim() == 2 && matrix.size(0) == matrix.size(1);
  int64_t* out = int64_data(matrix, "matrix [C, C] with C up to 46340",
                            square && matrix.size(0) <= kMaxClasses);
  const bool detailed = invalid.numel() == kCounters;
  int64_t* counters =
      int64_data(invalid, "`invalid` of 1 or 3 elements", detailed || invalid.numel() == 1);
  STD_TORCH_CHECK(prediction.numel() == target.numel(),
                  "confusion_matrix_: prediction and target differ in size");
  const int32_t device = matrix.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor p = torch::stable::contiguous(prediction);
  const Tensor t = torch::stable::contiguous(target);
  check_launch(launch_confusion_matrix(label_map(p), label_map(t), p.numel(), width_of(t),
                                       static_cast<int>(matrix.size(0)), ignore_index, out,
                                       counters, detailed, device, current_stream(device)));
}

// Adds the 3 counters of a call to the record (count, value, n, y, x) of fcnseg/_labels.py.
void record_invalid_cuda(Tensor record, Tensor counters, Tensor prediction, Tensor target,
                         int64_t num_classes) {
  int64_t* fields = int64_data(record, "record of 5 elements", record.numel() == kRecord);
  const int64_t* counted =
      int64_data(counters, "`counters` of 3 elements", counters.numel() == kCounters);
  const int32_t device = record.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor p = torch::stable::contiguous(prediction);
  const Tensor t = torch::stable::contiguous(target);
  const int64_t height = t.dim() < 2 ? 1 : t.size(t.dim() - 2);
  check_launch(launch_record_invalid(label_map(p), label_map(t), t.numel(),
                                     static_cast<int>(num_classes), height, width_of(t), counted,
                                     fields, current_stream(device)));
}

}  // namespace
}  // namespace fcnseg

STABLE_TORCH_LIBRARY_FRAGMENT(fcnseg_cuda, m) {
  m.def(
      "confusion_matrix_(Tensor(a!) matrix, Tensor prediction, Tensor target, int ignore_index, "
      "Tensor(b!) invalid) -> ()");
  m.def(
      "record_invalid_(Tensor(a!) record, Tensor counters, Tensor prediction, Tensor target, "
      "int num_classes) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fcnseg_cuda, CUDA, m) {
  m.impl("confusion_matrix_", TORCH_BOX(&fcnseg::confusion_matrix_cuda));
  m.impl("record_invalid_", TORCH_BOX(&fcnseg::record_invalid_cuda));
}
