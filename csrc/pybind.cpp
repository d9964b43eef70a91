// fcnseg._pybind: build information, and the entry points that speak NumPy instead of tensors.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/confusion_matrix.h"

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
  info["torch"] = FCNSEG_BUILD_TORCH;
  info["cuda"] = FCNSEG_BUILD_CUDA;
  info["cuda_archs"] = FCNSEG_BUILD_CUDA_ARCHS;
  info["compiler"] = compiler();
  return info;
}

template <typename Label>
using Labels = py::array_t<Label, py::array::c_style>;

// (matrix, (count, position, value, in_prediction)); the second says what is bad, if anything.
template <typename Prediction, typename Target>
std::tuple<py::array_t<int64_t>, std::tuple<int64_t, int64_t, int64_t, int64_t>> confusion_matrix(
    const Labels<Prediction>& prediction, const Labels<Target>& target, int64_t num_classes,
    int64_t ignore_index) {
  if (prediction.size() != target.size()) {
    throw py::value_error("prediction and target must have the same number of elements, got " +
                          std::to_string(prediction.size()) + " and " +
                          std::to_string(target.size()));
  }
  if (num_classes < 1) {
    throw py::value_error("num_classes must be at least 1, got " + std::to_string(num_classes));
  }
  py::array_t<int64_t> matrix({num_classes, num_classes});
  int64_t* table = matrix.mutable_data();
  fcnseg::BadLabels bad;
  {
    py::gil_scoped_release release;
    std::fill(table, table + num_classes * num_classes, 0);
    fcnseg::count_range(prediction.data(), target.data(), 0, prediction.size(), num_classes,
                        ignore_index, table, bad);
  }
  return {matrix, {bad.count, bad.position, bad.value, bad.in_prediction}};
}

template <typename Prediction, typename Target>
void bind_confusion_matrix(py::module_& module) {
  module.def("confusion_matrix", &confusion_matrix<Prediction, Target>,
             py::arg("prediction").noconvert(), py::arg("target").noconvert(),
             py::arg("num_classes"), py::arg("ignore_index") = -100);
}

template <typename Prediction>
void bind_predictions(py::module_& module) {
  bind_confusion_matrix<Prediction, uint8_t>(module);
  bind_confusion_matrix<Prediction, int16_t>(module);
  bind_confusion_matrix<Prediction, int32_t>(module);
  bind_confusion_matrix<Prediction, int64_t>(module);
}

}  // namespace

PYBIND11_MODULE(_pybind, module) {
  module.doc() = "Build information and NumPy entry points of fcnseg.";
  module.def("build_info", &build_info);
  bind_predictions<uint8_t>(module);
  bind_predictions<int16_t>(module);
  bind_predictions<int32_t>(module);
  bind_predictions<int64_t>(module);
}
