// The launcher of the CUDA confusion matrix on the CPU: what it asks the runtime, what it launches,
// and what comes back. The runtime is a stand-in that runs kernels as host_emulation.h does.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "confusion_matrix.cu"

using namespace fcnseg;

namespace {

int failures = 0;

void expect(bool holds, const char* what) {
  if (!holds) {
    std::printf("FAIL %s\n", what);
    ++failures;
  }
}

// The device as the stand-in has it, and what was asked of it since `calls` was cleared.
std::vector<std::string> calls;
std::string broken;     // the call that fails
int shared_of_a_block;  // bytes, after opting in
int resident = 2;
bool opted_in;
bool last_error;
cudaStream_t launched_on;
unsigned launched_blocks;

cudaError_t answer(const std::string& call) {
  calls.push_back(call);
  last_error = last_error || call == broken;
  return call == broken ? cudaErrorInvalidValue : cudaSuccess;
}

long count_of(const std::string& call) { return std::count(calls.begin(), calls.end(), call); }

}  // namespace

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  *value = name == cudaDevAttrMultiProcessorCount ? 3 : shared_of_a_block;
  return answer("attribute");
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  opted_in = value == shared_of_a_block;
  return answer("opt in");
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int,
                                                          size_t shared) {
  expect(shared <= (48 << 10) || opted_in, "opted in before occupancy is asked");
  *blocks = resident;
  return answer("occupancy");
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3 blocks, dim3 threads, void** arguments,
                             size_t shared, cudaStream_t stream) {
  const cudaError_t error = answer("launch");
  if (error != cudaSuccess) return error;
  launched_on = stream;
  launched_blocks = blocks.x;
  expect(shared <= size_t(shared_of_a_block), "shared memory");
  emulate(blocks.x, threads.x, shared, [&] {
    const auto as = [&](auto example, int i) {
      return *static_cast<decltype(example)*>(arguments[i]);
    };
    if (kernel == reinterpret_cast<const void*>(&record_invalid)) {
      record_invalid(as(Pixels{}, 0), as(0, 1), as(0, 2), as(int64{}, 3), as(int64{}, 4),
                     as(static_cast<const uint64*>(nullptr), 5),
                     as(static_cast<uint64*>(nullptr), 6));
    } else {
      reinterpret_cast<void (*)(Pixels, uint64*, Counters)>(const_cast<void*>(kernel))(
          as(Pixels{}, 0), as(static_cast<uint64*>(nullptr), 1), as(Counters{}, 2));
    }
  });
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  last_error = false;
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t) { return "an error"; }

namespace {

template <typename Label>
struct Maps {
  static constexpr int64_t kSize = 2 * 30 * 50;
  std::vector<Label> prediction, target;
  explicit Maps(int classes) : prediction(kSize), target(kSize) {
    for (int64_t i = 0; i < kSize; ++i) {
      target[i] = static_cast<Label>(i / 17 % classes);
      prediction[i] = static_cast<Label>(i % 5 == 0 ? i % classes : target[i]);
    }
    for (int64_t i = 100; i < 150; ++i) target[i] = static_cast<Label>(101);  // ignored
  }
};

template <typename Label>
LabelType type_of() {
  return sizeof(Label) == 1   ? LabelType::kUInt8
         : sizeof(Label) == 2 ? LabelType::kInt16
         : sizeof(Label) == 4 ? LabelType::kInt32
                              : LabelType::kInt64;
}

cudaStream_t stream_number(uintptr_t i) { return reinterpret_cast<cudaStream_t>(i); }

template <typename Label>
int run(const Maps<Label>& maps, int classes, std::vector<int64_t>& matrix, int64_t* counters,
        bool detailed, int device) {
  calls.clear();
  return launch_confusion_matrix({maps.prediction.data(), type_of<Label>()},
                                 {maps.target.data(), type_of<Label>()}, maps.kSize, 50, classes,
                                 101, matrix.data(), counters, detailed, device, stream_number(7));
}

template <typename Label>
void check_counts(int classes, int device) {
  Maps<Label> maps(classes);
  const int bad = classes > 101 && sizeof(Label) == 1 ? 255 : 1 + std::max(classes, 101);
  maps.prediction[1777] = maps.target[2999] = static_cast<Label>(bad);
  std::vector<int64_t> expected(size_t(classes) * classes, 0);
  int64_t ignored = 0;
  for (int64_t i = 0; i < maps.kSize; ++i) {
    if (maps.target[i] == 101) {
      ++ignored;
    } else if (i != 1777 && i != 2999) {
      ++expected[maps.target[i] * classes + maps.prediction[i]];
    }
  }
  for (const bool detailed : {true, false}) {
    std::vector<int64_t> matrix(expected.size(), 0);
    int64_t counters[3] = {};
    expect(run(maps, classes, matrix, counters, detailed, device) == 0, "success");
    expect(matrix == expected, "matrix");
    expect(counters[0] == 2 && counters[1] == (detailed ? ignored : 0) &&
               counters[2] == (detailed ? ~int64_t{1777} : 0),
           "counters");
    expect(launched_on == stream_number(7), "stream");
    expect(launched_blocks <= unsigned(3 * resident), "blocks that run at a time");
    if (!detailed) continue;
    int64_t record[5] = {};
    const int error = launch_record_invalid({maps.prediction.data(), type_of<Label>()},
                                            {maps.target.data(), type_of<Label>()}, maps.kSize,
                                            classes, 30, 50, counters, record, stream_number(9));
    expect(error == 0 && launched_on == stream_number(9), "the record's launch");
    const std::vector<int64_t> wanted{2, bad, 1, 277 / 50, 277 % 50};
    expect(std::vector<int64_t>(record, record + 5) == wanted, "record");
  }
}

void check_questions() {
  const Maps<Label8> maps(5);
  std::vector<int64_t> matrix(150 * 150);
  int64_t counters[3] = {};
  const auto asked = [&](int classes, int device) {
    expect(run(maps, classes, matrix, counters, false, device) == 0, "success");
    return std::vector<long>{count_of("attribute"), count_of("opt in"), count_of("occupancy"),
                             count_of("launch")};
  };
  // Device 8 is new, then known; its kernel with other tables is new, and another kernel, which
  // wants more shared memory than without opting in.
  expect(asked(5, 8) == std::vector<long>{2, 0, 1, 1}, "first call");
  expect(asked(5, 8) == std::vector<long>{0, 0, 0, 1}, "second call");
  expect(asked(6, 8) == std::vector<long>{0, 0, 1, 1}, "more classes");
  expect(asked(150, 8) == std::vector<long>{0, 1, 1, 1}, "many classes");
  expect(asked(150, 8) == std::vector<long>{0, 0, 0, 1}, "many classes again");
  expect(asked(5, 9) == std::vector<long>{2, 0, 1, 1}, "another device");
  calls.clear();
  const LabelMap map{maps.target.data(), LabelType::kUInt8};
  expect(launch_confusion_matrix(map, map, 0, 50, 5, 101, matrix.data(), counters, false, 8,
                                 nullptr) == 0 &&
             launch_record_invalid(map, map, 0, 5, 30, 50, counters, matrix.data(), nullptr) == 0 &&
             calls.empty(),
         "nothing for no pixels");
}

void check_errors() {
  const Maps<Label8> maps(5);
  int64_t counters[3] = {};
  int device = 20;
  for (const char* call : {"attribute", "opt in", "occupancy", "launch"}) {
    std::vector<int64_t> matrix(150 * 150, 0);
    broken = call;
    ++device;
    expect(run(maps, 150, matrix, counters, false, device) == cudaErrorInvalidValue, call);
    expect(matrix == std::vector<int64_t>(matrix.size(), 0), "nothing counted after an error");
    expect(!last_error, "an error that was returned is not left behind");
    broken.clear();
    expect(run(maps, 150, matrix, counters, false, device) == 0, "no error is remembered");
    expect(count_of("launch") == 1, "launched after an error");
  }
}

}  // namespace

int main() {
  shared_of_a_block = 227 << 10;
  for (const int classes : {5, 28, 150, 300}) check_counts<Label64>(classes, 0);
  for (const int classes : {5, 150}) check_counts<Label8>(classes, 1);
  check_counts<Label16>(19, 0);
  check_counts<Label32>(19, 0);
  check_questions();
  check_errors();
  // A device whose blocks have less: 150 classes go to global memory, without asking for more.
  shared_of_a_block = 64 << 10;
  check_counts<Label16>(150, 2);
  std::printf("%d failures\n", failures);
  return failures != 0;
}
