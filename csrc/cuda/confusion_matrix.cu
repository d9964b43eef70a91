// Launches confusion_matrix_kernel.cuh.

#include <cuda_runtime.h>

#include "confusion_matrix.h"
#include "confusion_matrix_kernel.cuh"
#include "launch_plan.h"

namespace fcnseg {
namespace {

static_assert(sizeof(int64) == sizeof(int64_t), "the counters' type");

cudaError_t describe(int index, Device& device) {
  int shared_per_block = 0;
  int shared_per_multiprocessor = 0;
  cudaError_t error =
      cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  if (error == cudaSuccess) {
    error =
        cudaDeviceGetAttribute(&shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&shared_per_multiprocessor,
                                   cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
  }
  device.shared_per_block = shared_per_block;
  device.shared_per_multiprocessor = shared_per_multiprocessor;
  return error;
}

template <typename Kernel>
cudaError_t launch(Kernel kernel, const LaunchPlan& plan, int threads, cudaStream_t stream,
                   const Pixels& pixels, uint64* matrix, const Counters& counters) {
  constexpr int64_t kWithoutOptIn = 48 << 10;
  if (plan.shared > kWithoutOptIn) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared));
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(plan.blocks), threads, plan.shared, stream>>>(pixels, matrix,
                                                                               counters);
  return cudaGetLastError();
}

template <typename Prediction, typename Target>
cudaError_t count(const Pixels& pixels, uint64* matrix, const Counters& counters,
                  const Device& device, cudaStream_t stream) {
  const LaunchPlan plan =
      launch_plan(pixels.size, pixels.num_classes, VectorOf<Prediction, Target>::kSize, kThreads,
                  kThreadsLarge, kCopies, device);
  switch (plan.strategy) {
    case Strategy::kReplicated:
      return launch(count_replicated<Prediction, Target>, plan, kThreads, stream, pixels, matrix,
                    counters);
    case Strategy::kSingle:
      return launch(count_single<Prediction, Target>, plan, kThreadsLarge, stream, pixels, matrix,
                    counters);
    default:
      return launch(count_global<Prediction, Target>, plan, kThreads, stream, pixels, matrix,
                    counters);
  }
}

template <typename Visitor>
cudaError_t with_label(LabelType type, const Visitor& visit) {
  switch (type) {
    case LabelType::kUInt8:
      return visit(Label8{});
    case LabelType::kInt16:
      return visit(Label16{});
    case LabelType::kInt32:
      return visit(Label32{});
    default:
      return visit(Label64{});
  }
}

int bytes(LabelType type) { return 1 << static_cast<int>(type); }

}  // namespace

int launch_confusion_matrix(LabelMap prediction, LabelMap target, int64_t size, int num_classes,
                            int64_t ignore_index, int64_t* matrix, int64_t* counters, bool detailed,
                            int device, void* stream) {
  if (size == 0) return cudaSuccess;
  Device properties{};
  const cudaError_t error = describe(device, properties);
  if (error != cudaSuccess) return error;
  const Pixels pixels{prediction.data, target.data, size, num_classes, ignore_index};
  uint64* out = reinterpret_cast<uint64*>(matrix);
  uint64* base = reinterpret_cast<uint64*>(counters);
  const Counters fields{base, detailed ? base + 1 : nullptr, detailed ? base + 2 : nullptr};
  return with_label(prediction.type, [&](auto predicted) {
    return with_label(target.type, [&](auto truth) {
      return count<decltype(predicted), decltype(truth)>(pixels, out, fields, properties,
                                                         static_cast<cudaStream_t>(stream));
    });
  });
}

int launch_record_invalid(LabelMap prediction, LabelMap target, int64_t size, int num_classes,
                          int64_t height, int64_t width, const int64_t* counters, int64_t* record,
                          void* stream) {
  if (size == 0) return cudaSuccess;
  const Pixels pixels{prediction.data, target.data, size, num_classes, 0};
  record_invalid<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(
      pixels, bytes(prediction.type), bytes(target.type), height, width,
      reinterpret_cast<const uint64*>(counters), reinterpret_cast<uint64*>(record));
  return cudaGetLastError();
}

const char* cuda_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace fcnseg
