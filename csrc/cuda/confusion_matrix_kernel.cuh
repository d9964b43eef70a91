// Confusion matrix on the GPU: device code only. It also compiles under NVRTC and, with
// FCNSEG_HOST_EMULATION, as plain C++ (tests/host_emulation.h), so: no torch, no standard headers
// and no warp intrinsics.
//
//   matrix[t][p] += |{ i : target_i = t, prediction_i = p, target_i != ignore_index }|
//
// Every thread takes kVector neighbouring pixels per step and adds up equal neighbours in
// registers. Who owns what: a block counts into tables in its shared memory, kCopies of them side
// by side for a few classes (lane l uses copy l mod kCopies, so neighbouring lanes rarely meet),
// and adds them to the int64 matrix once, at its end. A matrix that is too large for shared memory
// is counted with global atomics, one per run. Integer sums: the order of the atomics does not
// matter.
#pragma once

#if defined(FCNSEG_HOST_EMULATION)
#include "host_emulation.h"
#else
#define FCNSEG_GLOBAL __global__
#define FCNSEG_DEVICE __device__ __forceinline__
#define FCNSEG_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define FCNSEG_UNROLL _Pragma("unroll")
#define FCNSEG_SHARED(type, name) extern __shared__ type name[]
#endif

namespace fcnseg {

typedef unsigned char Label8;
typedef short Label16;
typedef int Label32;
typedef long long Label64;
typedef unsigned int uint32;
typedef long long int64;
typedef unsigned long long uint64;

constexpr int kThreads = 256;        // of a block with replicated tables, or without a table
constexpr int kThreadsLarge = 1024;  // of a block whose one table fills the multiprocessor
constexpr int kCopies = 8;
constexpr int kIgnored = -1;
constexpr int kInvalid = -2;

struct Pixels {
  const void* prediction;
  const void* target;
  int64 size;
  int num_classes;
  int64 ignore_index;
};

// What happened to the pixels that are not in the matrix; int64, all zero at first. `ignored` and
// `first` are null where the caller wants the number of invalid pixels alone.
struct Counters {
  uint64* invalid;
  uint64* ignored;
  uint64* first;  // the largest ~position of an invalid pixel, so that zero means none
};

struct alignas(16) Chunk {
  uint32 word[4];
};

// Read once: past the caches' favour.
FCNSEG_DEVICE Chunk load_chunk(const Chunk* source) {
#if defined(FCNSEG_HOST_EMULATION)
  return *source;
#else
  const uint4 loaded = __ldcs(reinterpret_cast<const uint4*>(source));
  return {{loaded.x, loaded.y, loaded.z, loaded.w}};
#endif
}

template <typename Label, int kVector>
struct alignas(16) Labels {
  static_assert(sizeof(Label) * kVector % sizeof(Chunk) == 0, "whole 16-byte loads");
  union {
    Label label[kVector];
    Chunk chunk[sizeof(Label) * kVector / sizeof(Chunk)];
  };

  // `aligned` is the same for all threads.
  FCNSEG_DEVICE void load(const Label* source, bool aligned) {
    if (aligned) {
      FCNSEG_UNROLL
      for (int i = 0; i < int(sizeof(Label) * kVector / sizeof(Chunk)); ++i) {
        chunk[i] = load_chunk(reinterpret_cast<const Chunk*>(source) + i);
      }
    } else {
      FCNSEG_UNROLL
      for (int i = 0; i < kVector; ++i) label[i] = source[i];
    }
  }
};

// Pixels per step: a multiple of 16 bytes of the narrower label, 4 at least for longer runs.
template <typename Prediction, typename Target>
struct VectorOf {
  static constexpr int kNarrow =
      sizeof(Prediction) < sizeof(Target) ? sizeof(Prediction) : sizeof(Target);
  static constexpr int kSize = kNarrow > 4 ? 4 : 16 / kNarrow;
};

template <typename Prediction, typename Target>
FCNSEG_DEVICE int bin_of(Prediction prediction, Target target, const Pixels& pixels) {
  const int64 predicted = int64(prediction);
  const int64 truth = int64(target);
  if (truth == pixels.ignore_index) return kIgnored;
  const uint64 classes = uint64(pixels.num_classes);
  if (uint64(truth) >= classes || uint64(predicted) >= classes) return kInvalid;
  return int(truth) * pixels.num_classes + int(predicted);
}

// Runs of equal bins in the order in which a thread meets its pixels, positions ascending.
struct Runs {
  int bin = kIgnored;
  uint32 length = 0;
  uint32 invalid = 0;
  uint32 ignored = 0;
  uint64 first = 0;

  template <typename Add>
  FCNSEG_DEVICE void push(int next, int64 position, const Add& add) {
    if (next == bin) {
      ++length;
      return;
    }
    finish(add);
    if (next == kInvalid && first == 0) first = ~uint64(position);
    bin = next;
    length = 1;
  }
  template <typename Add>
  FCNSEG_DEVICE void finish(const Add& add) {
    if (bin >= 0) {
      add(bin, length);
    } else if (bin == kInvalid) {
      invalid += length;
    } else {
      ignored += length;
    }
  }
};

// Walks over this thread's pixels; `add(bin, length)` once per run. The sums fit 32 bits: the
// launcher gives a block fewer than 2^32 pixels (launch_plan.h).
template <typename Prediction, typename Target, typename Add>
FCNSEG_DEVICE Runs count_pixels(const Pixels& pixels, const Add& add) {
  constexpr int kVector = VectorOf<Prediction, Target>::kSize;
  const Prediction* prediction = static_cast<const Prediction*>(pixels.prediction);
  const Target* target = static_cast<const Target*>(pixels.target);
  const int64 thread = int64(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64 threads = int64(gridDim.x) * blockDim.x;
  // The scalar head ends where the target's 16-byte loads begin; the prediction's may not.
  const uint64 misaligned = reinterpret_cast<uint64>(target) % sizeof(Chunk);
  int64 head = misaligned == 0 ? 0 : int64(sizeof(Chunk) - misaligned) / int64(sizeof(Target));
  head = head < pixels.size ? head : pixels.size;
  const bool aligned = reinterpret_cast<uint64>(prediction + head) % sizeof(Chunk) == 0;
  const int64 vectors = (pixels.size - head) / kVector;

  Runs runs;
  const auto push = [&](Prediction p, Target t, int64 position) {
    runs.push(bin_of(p, t, pixels), position, add);
  };
  for (int64 i = thread; i < head; i += threads) push(prediction[i], target[i], i);
  for (int64 vector = thread; vector < vectors; vector += threads) {
    const int64 start = head + vector * kVector;
    Labels<Prediction, kVector> p;
    Labels<Target, kVector> t;
    p.load(prediction + start, aligned);
    t.load(target + start, true);
    FCNSEG_UNROLL
    for (int i = 0; i < kVector; ++i) push(p.label[i], t.label[i], start + i);
  }
  for (int64 i = head + vectors * kVector + thread; i < pixels.size; i += threads) {
    push(prediction[i], target[i], i);
  }
  runs.finish(add);
  return runs;
}

FCNSEG_DEVICE void report(const Runs& runs, const Counters& counters) {
  if (runs.invalid != 0) {
    atomicAdd(counters.invalid, uint64(runs.invalid));
    if (counters.first != nullptr) atomicMax(counters.first, runs.first);
  }
  if (runs.ignored != 0 && counters.ignored != nullptr) {
    atomicAdd(counters.ignored, uint64(runs.ignored));
  }
}

template <typename Prediction, typename Target, int kTables>
FCNSEG_DEVICE void count_in_shared(const Pixels& pixels, uint64* matrix, const Counters& counters) {
  FCNSEG_SHARED(uint32, tables);
  const int bins = pixels.num_classes * pixels.num_classes;
  for (int i = threadIdx.x; i < bins * kTables; i += blockDim.x) tables[i] = 0;
  __syncthreads();
  uint32* mine = tables + threadIdx.x % kTables;
  report(count_pixels<Prediction, Target>(
             pixels, [mine](int bin, uint32 length) { atomicAdd(mine + bin * kTables, length); }),
         counters);
  __syncthreads();
  for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) {
    uint64 sum = 0;
    FCNSEG_UNROLL
    for (int copy = 0; copy < kTables; ++copy) sum += tables[bin * kTables + copy];
    if (sum != 0) atomicAdd(matrix + bin, sum);
  }
}

template <typename Prediction, typename Target>
FCNSEG_GLOBAL void FCNSEG_BOUNDS(kThreads, 4)
    count_replicated(Pixels pixels, uint64* matrix, Counters counters) {
  count_in_shared<Prediction, Target, kCopies>(pixels, matrix, counters);
}

template <typename Prediction, typename Target>
FCNSEG_GLOBAL void FCNSEG_BOUNDS(kThreadsLarge, 1)
    count_single(Pixels pixels, uint64* matrix, Counters counters) {
  count_in_shared<Prediction, Target, 1>(pixels, matrix, counters);
}

template <typename Prediction, typename Target>
FCNSEG_GLOBAL void FCNSEG_BOUNDS(kThreads, 4)
    count_global(Pixels pixels, uint64* matrix, Counters counters) {
  report(count_pixels<Prediction, Target>(
             pixels, [matrix](int bin, uint32 length) { atomicAdd(matrix + bin, uint64(length)); }),
         counters);
}

FCNSEG_DEVICE int64 label_at(const void* labels, int bytes, int64 position) {
  switch (bytes) {
    case 1:
      return static_cast<const Label8*>(labels)[position];
    case 2:
      return static_cast<const Label16*>(labels)[position];
    case 4:
      return static_cast<const Label32*>(labels)[position];
    default:
      return static_cast<const Label64*>(labels)[position];
  }
}

// One thread: adds the counters of a call to the record of fcnseg/_labels.py, (count, value, n, y,
// x) of the first bad label. The pixels are laid out as [size / (height * width), height, width].
// Calls on several streams share the record: the count is added by an atomic, and the call that
// moves it away from 0 owns the other fields.
FCNSEG_GLOBAL void record_invalid(Pixels pixels, int prediction_bytes, int target_bytes,
                                  int64 height, int64 width, const uint64* counters,
                                  uint64* record) {
  const uint64 invalid = counters[0];
  if (invalid == 0 || atomicAdd(record, invalid) != 0) return;
  const int64 position = int64(~counters[2]);
  const int64 truth = label_at(pixels.target, target_bytes, position);
  const bool in_target = uint64(truth) >= uint64(pixels.num_classes);
  const int64 row = position / width;
  record[1] = in_target ? truth : label_at(pixels.prediction, prediction_bytes, position);
  record[2] = row / height;
  record[3] = row % height;
  record[4] = position - row * width;
}

}  // namespace fcnseg
