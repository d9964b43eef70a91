// Between the launcher (compiled by nvcc, knows CUDA) and the binding (compiled by the host's
// compiler, knows torch). Nothing here allocates or waits.
#pragma once

#include <cstdint>

namespace fcnseg {

enum class LabelType { kUInt8, kInt16, kInt32, kInt64 };

struct LabelMap {
  const void* data;
  LabelType type;
};

// Returns a cudaError_t. `width`: pixels from one to that below it, a matter of speed. `counters`:
// int64 (invalid) or, with `detailed`, (invalid, ignored, ~first). `device` is the current one.
int launch_confusion_matrix(LabelMap prediction, LabelMap target, int64_t size, int64_t width,
                            int num_classes, int64_t ignore_index, int64_t* matrix,
                            int64_t* counters, bool detailed, int device, void* stream);

// Adds detailed counters to a record (count, value, n, y, x). Returns a cudaError_t.
int launch_record_invalid(LabelMap prediction, LabelMap target, int64_t size, int num_classes,
                          int64_t height, int64_t width, const int64_t* counters, int64_t* record,
                          void* stream);

const char* cuda_error_string(int error);

}  // namespace fcnseg
