// Launches confusion_matrix_kernel.cuh.

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "confusion_matrix.h"
#include "confusion_matrix_kernel.cuh"
#include "launch_plan.h"

namespace fcnseg {
namespace {

static_assert(sizeof(int64) == sizeof(int64_t), "the counters' type");

// One attribute of the device, asked once in a process.
cudaError_t attribute(cudaDeviceAttr name, int device, int& value) {
  static std::mutex mutex;
  static std::map<std::pair<int, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(static_cast<int>(name), device);
  const auto found = known.find(key);
  if (found != known.end()) {
    value = found->second;
    return cudaSuccess;
  }
  const cudaError_t error = cudaDeviceGetAttribute(&value, name, device);
  if (error == cudaSuccess) known[key] = value;
  return error;
}

cudaError_t describe(int index, Device& device) {
  int shared = 0;
  cudaError_t error = attribute(cudaDevAttrMultiProcessorCount, index, device.multiprocessors);
  if (error == cudaSuccess) {
    error = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index, shared);
  }
  device.shared_per_block = shared;
  return error;
}

// Lets the kernel have so much shared memory, and asks how many of its blocks run on one
// multiprocessor at a time: once per device, kernel and size. The device is the current one.
cudaError_t prepare(const void* kernel, int threads, int64_t shared, int device, int& resident) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, int64_t>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(device, kernel, shared);
  const auto found = known.find(key);
  if (found != known.end()) {
    resident = found->second;
    return cudaSuccess;
  }
  constexpr int64_t kWithoutOptIn = 48 << 10;
  if (shared > kWithoutOptIn) {
    // As much as any call may want: a later call with fewer classes must not take it back.
    int most = 0;
    cudaError_t error = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, most);
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    }
    if (error != cudaSuccess) return error;
  }
  const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &resident, kernel, threads, static_cast<size_t>(shared));
  if (error == cudaSuccess) known[key] = resident;
  return error;
}

// kernel<<<blocks, threads, shared, stream>>>(arguments...) as a call, so that the launcher is
// plain C++ and tested without a GPU.
template <typename... Parameters>
cudaError_t start(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared,
                  cudaStream_t stream, Parameters... arguments) {
  void* addresses[] = {&arguments...};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel),
                          dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
                          addresses, static_cast<size_t>(shared), stream);
}

// What to count, where, and on which device and stream.
struct Call {
  Pixels pixels;
  int64_t width;
  uint64* matrix;
  Counters counters;
  int device;
  cudaStream_t stream;
};

cudaError_t launch(void (*kernel)(Pixels, uint64*, Counters), int threads, int pixels_per_vector,
                   int64_t shared, const Device& device, const Call& call) {
  int resident = 0;
  const cudaError_t error =
      prepare(reinterpret_cast<const void*>(kernel), threads, shared, call.device, resident);
  if (error != cudaSuccess) return error;
  const LaunchPlan plan =
      launch_plan(call.pixels.size, call.width, pixels_per_vector, threads, resident, device);
  Pixels pixels = call.pixels;
  pixels.columns = plan.columns;
  pixels.rows = plan.rows;
  return start(kernel, plan.blocks, threads, shared, call.stream, pixels, call.matrix,
               call.counters);
}

template <typename Prediction, typename Target>
cudaError_t count(const Call& call) {
  constexpr int kVector = VectorOf<Prediction, Target>::kSize;
  Device device{};
  const cudaError_t error = describe(call.device, device);
  if (error != cudaSuccess) return error;
  const Tables tables =
      choose_tables(call.pixels.num_classes, kExtraBins, kCopies, kMaxTableClasses, device);
  switch (tables.strategy) {
    case Strategy::kReplicated:
      return launch(count_replicated<Prediction, Target>, kThreads, kVector, tables.shared, device,
                    call);
    case Strategy::kSingle:
      return launch(count_single<Prediction, Target>, kThreadsLarge, kVector, tables.shared, device,
                    call);
    default:
      return launch(count_global<Prediction, Target>, kThreads, kVector, 0, device, call);
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

// An error is the caller's now: PyTorch's next check must not find it again.
int taken(cudaError_t error) {
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error;
}

int bytes(LabelType type) { return 1 << static_cast<int>(type); }

}  // namespace

int launch_confusion_matrix(LabelMap prediction, LabelMap target, int64_t size, int64_t width,
                            int num_classes, int64_t ignore_index, int64_t* matrix,
                            int64_t* counters, bool detailed, int device, void* stream) {
  if (size == 0) return cudaSuccess;
  uint64* base = reinterpret_cast<uint64*>(counters);
  Call call{};
  call.pixels.prediction = prediction.data;
  call.pixels.target = target.data;
  call.pixels.size = size;
  call.pixels.num_classes = num_classes;
  call.pixels.ignore_index = ignore_index;
  call.width = width;
  call.matrix = reinterpret_cast<uint64*>(matrix);
  call.counters = {base, detailed ? base + 1 : nullptr, detailed ? base + 2 : nullptr};
  call.device = device;
  call.stream = static_cast<cudaStream_t>(stream);
  return taken(with_label(prediction.type, [&](auto predicted) {
    return with_label(
        target.type, [&](auto truth) { return count<decltype(predicted), decltype(truth)>(call); });
  }));
}

int launch_record_invalid(LabelMap prediction, LabelMap target, int64_t size, int num_classes,
                          int64_t height, int64_t width, const int64_t* counters, int64_t* record,
                          void* stream) {
  if (size == 0) return cudaSuccess;
  Pixels pixels{};
  pixels.prediction = prediction.data;
  pixels.target = target.data;
  pixels.num_classes = num_classes;
  return taken(start(record_invalid, 1, 1, 0, static_cast<cudaStream_t>(stream), pixels,
                     bytes(prediction.type), bytes(target.type), int64{height}, int64{width},
                     reinterpret_cast<const uint64*>(counters), reinterpret_cast<uint64*>(record)));
}

const char* cuda_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace fcnseg
