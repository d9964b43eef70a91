// Confusion matrix on the GPU: device code only. It also compiles under NVRTC and, with
// FCNSEG_HOST_EMULATION, as plain C++ (tests/host_emulation.h), so: no torch, no standard headers
// and no warp intrinsics.
//
//   matrix[t][p] += |{ i : target_i = t, prediction_i = p, target_i != ignore_index }|
//
// Who owns what. Every thread takes kVector neighbouring pixels per step, and the next step's lie
// one row of the picture below, so that they mostly hold the same labels. It adds up runs of equal
// pairs in registers. A block counts runs into tables in its shared memory, kCopies of them side by
// side for a few classes (lane l uses copy l mod kCopies, so neighbouring lanes rarely meet), and
// adds them to the int64 matrix once, at its end. A matrix that is too large for shared memory is
// counted with global atomics, one per run. Integer sums: the order of the atomics does not matter.
//
// Runs. With tables, C <= 256: labels that fit a byte are packed four to a word, whatever their
// type, and one comparison of words finds where either map changes. Work per run follows
// only there. Steps with a label that does not fit, say -100, go pixel by pixel.
#pragma once

#if defined(FCNSEG_HOST_EMULATION)
#include "host_emulation.h"
#else
#define FCNSEG_GLOBAL __global__
#define FCNSEG_DEVICE __device__ __forceinline__
#define FCNSEG_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define FCNSEG_UNROLL _Pragma("unroll")
#define FCNSEG_NO_UNROLL _Pragma("unroll 1")
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
// A table holds the bins of the matrix, row by row, then one of ignored and one of invalid pixels.
constexpr int kExtraBins = 2;
constexpr int kMaxTableClasses = 256;

// Two maps of `size` labels. Vectors of kVector pixels stand in rows of `columns`: a thread takes
// one column of `rows` rows, the next thread its neighbour (launch_plan.h).
struct Pixels {
  const void* prediction;
  const void* target;
  int64 size;
  int num_classes;
  int columns;
  int64 ignore_index;
  int64 rows;
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

  FCNSEG_DEVICE uint32 word(int i) const { return chunk[i / 4].word[i % 4]; }

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

// Pixels per step: a multiple of 16 bytes of the narrower label, 8 at least, so that little of the
// work is that of the step itself.
template <typename Prediction, typename Target>
struct VectorOf {
  static constexpr int kNarrow =
      sizeof(Prediction) < sizeof(Target) ? sizeof(Prediction) : sizeof(Target);
  static constexpr int kSize = kNarrow > 2 ? 8 : 16 / kNarrow;
};

// The labels as bytes, four to a word. Returns zero if all of them fit.
template <typename Label, int kVector>
FCNSEG_DEVICE uint32 pack(const Labels<Label, kVector>& labels, uint32 (&packed)[kVector / 4]) {
  uint32 low = 0;
  uint32 high = 0;
  FCNSEG_UNROLL
  for (int i = 0; i < kVector / 4; ++i) {
    if constexpr (sizeof(Label) == 1) {
      packed[i] = labels.word(i);
    } else if constexpr (sizeof(Label) == 2) {
      const uint32 a = labels.word(2 * i), b = labels.word(2 * i + 1);
      high |= (a | b) & 0xff00ff00;
      packed[i] = __byte_perm(a, b, 0x6420);
    } else {
      constexpr int kWords = sizeof(Label) / 4;
      uint32 label[4];
      FCNSEG_UNROLL
      for (int j = 0; j < 4; ++j) {
        label[j] = labels.word((4 * i + j) * kWords);
        low |= label[j];
        if (kWords == 2) high |= labels.word((4 * i + j) * kWords + 1);
      }
      packed[i] = __byte_perm(__byte_perm(label[0], label[1], 0x0040),
                              __byte_perm(label[2], label[3], 0x0040), 0x5410);
    }
  }
  return (low & 0xffffff00) | high;
}

// Label number i of packed ones, 0 <= i < 4 kWords.
template <int kWords>
FCNSEG_DEVICE uint32 packed_label(const uint32 (&packed)[kWords], uint32 i) {
  if constexpr (kWords == 1) return __byte_perm(packed[0], 0, 0x4440 + i);
  const uint32 low = kWords == 4 && i >= 8 ? packed[kWords - 2] : packed[0];
  const uint32 high = kWords == 4 && i >= 8 ? packed[kWords - 1] : packed[1 % kWords];
  return __byte_perm(low, high, i % 8) & 0xff;
}

// Bit i is set where pixel i has another pair of labels than the pixel before it; the one before
// the first is the last of the words `..._before`.
template <int kWords>
FCNSEG_DEVICE uint32 find_breaks(const uint32 (&prediction)[kWords], const uint32 (&target)[kWords],
                                 uint32 prediction_before, uint32 target_before) {
  uint32 breaks = 0;
  FCNSEG_UNROLL
  for (int k = kWords - 1; k >= 0; --k) {
    const uint32 p = prediction[k], t = target[k];
    const uint32 difference =
        (p ^ __byte_perm(k == 0 ? prediction_before : prediction[k - 1 + (k == 0)], p, 0x6543)) |
        (t ^ __byte_perm(k == 0 ? target_before : target[k - 1 + (k == 0)], t, 0x6543));
    // The top bit of each byte that is not zero. Masked first, so that no byte carries into the
    // next: beside 255, a usual ignore_index, it would, and break the next run too.
    const uint32 top = (((difference & 0x7f7f7f7f) + 0x7f7f7f7f) | difference) & 0x80808080;
    breaks = breaks << 4 | (top * 0x00204081) >> 28;  // bits 7, 15, 23, 31 to 28, 29, 30, 31
  }
  return breaks;
}

// Where the pairs of labels that a thread meets are counted, and the first invalid one's position.
// `Count` is uint32 in shared, uint64 in global memory; neighbouring bins lie `stride` apart.
template <typename Count, int kStride>
struct Bins {
  static constexpr int stride = kStride;
  Count* bins;
  int classes;
  int64 ignore_index;
  uint64 first = 0;

  FCNSEG_DEVICE Bins(Count* bins, const Pixels& pixels)
      : bins(bins), classes(pixels.num_classes), ignore_index(pixels.ignore_index) {}

  FCNSEG_DEVICE Count* at(uint32 prediction, uint32 target) const {
    return bins + (target * uint32(classes * stride) + prediction * stride);
  }

  FCNSEG_DEVICE Count* ignored() const { return bins + classes * classes * stride; }

  FCNSEG_DEVICE Count* invalid(int64 position) {
    first = first > ~uint64(position) ? first : ~uint64(position);
    return ignored() + stride;
  }

  FCNSEG_DEVICE Count* of(int64 prediction, int64 target, int64 position) {
    if (target == ignore_index) return ignored();
    if (uint64(target) < uint64(classes) && uint64(prediction) < uint64(classes)) {
      return at(uint32(prediction), uint32(target));
    }
    return invalid(position);
  }

  // Of labels below 256; `ignored_label` is ignore_index if that is such a label, else 256.
  template <typename Position>
  FCNSEG_DEVICE Count* of_bytes(uint32 prediction, uint32 target, uint32 ignored_label,
                                const Position& position) {
    const uint32 larger = prediction > target ? prediction : target;
    if (larger < uint32(classes) && target != ignored_label) return at(prediction, target);
    return target == ignored_label ? ignored() : invalid(position());
  }
};

// Pixels begin, begin + step, ... below end; `add(bin, length)` once per run.
template <typename Prediction, typename Target, typename Bins, typename Add>
FCNSEG_DEVICE void count_one_by_one(const Prediction* prediction, const Target* target, int64 begin,
                                    int64 end, int64 step, Bins& bins, const Add& add) {
  auto* bin = bins.ignored();
  uint32 length = 0;
  FCNSEG_NO_UNROLL
  for (int64 i = begin; i < end; i += step) {
    auto* const next = bins.of(prediction[i], target[i], i);
    if (next != bin) {
      if (length != 0) add(bin, length);
      bin = next;
      length = 0;
    }
    ++length;
  }
  if (length != 0) add(bin, length);
}

// Runs of pairs of labels that fit a byte, a vector at a time.
template <typename Prediction, typename Target, typename Bins, typename Add>
struct PackedRuns {
  static constexpr int kVector = VectorOf<Prediction, Target>::kSize;
  static constexpr int kWords = kVector / 4;

  const Prediction* prediction;
  const Target* target;
  Bins& bins;
  const Add& add;
  uint32 ignored_label;
  // A run of (0, 0), of length 0.
  uint32 last_prediction = 0;
  uint32 last_target = 0;
  int begin = 0;  // of the run, counted from the first pixel of the step
  decltype(bins.bins) bin;

  FCNSEG_DEVICE PackedRuns(const Prediction* prediction, const Target* target, Bins& bins,
                           const Add& add)
      : prediction(prediction),
        target(target),
        bins(bins),
        add(add),
        ignored_label(uint64(bins.ignore_index) < 256 ? uint32(bins.ignore_index) : 256),
        bin(ignored_label == 0 ? bins.ignored() : bins.at(0, 0)) {}

  // The vectors were loaded from these places.
  FCNSEG_DEVICE void step(const Labels<Prediction, kVector>& predictions,
                          const Labels<Target, kVector>& targets, const Prediction* here) {
    uint32 p[kWords];
    uint32 t[kWords];
    if ((pack(predictions, p) | pack(targets, t)) != 0) {
      const int64 position = here - prediction;
      count_one_by_one(prediction, target, position, position + kVector, 1, bins, add);
      return;
    }
    uint32 breaks = find_breaks(p, t, last_prediction, last_target);
    last_prediction = p[kWords - 1];
    last_target = t[kWords - 1];
    while (breaks != 0) {
      const uint32 i = __ffs(int(breaks)) - 1;
      breaks &= breaks - 1;
      add(bin, i - uint32(begin));
      begin = int(i);
      const uint32 predicted = packed_label(p, i), truth = packed_label(t, i);
      bin = bins.of_bytes(predicted, truth, ignored_label, [&] { return here - prediction + i; });
    }
    begin -= kVector;
  }

  FCNSEG_DEVICE void finish() { add(bin, uint32(-begin)); }
};

// Runs of pairs of labels of any size, pixel by pixel.
template <typename Prediction, typename Target, typename Bins, typename Add>
struct LabelRuns {
  static constexpr int kVector = VectorOf<Prediction, Target>::kSize;

  const Prediction* prediction;
  Bins& bins;
  const Add& add;
  // A run of (0, 0), of length 0.
  Prediction last_prediction = 0;
  Target last_target = 0;
  uint32 length = 0;
  decltype(bins.bins) bin;

  FCNSEG_DEVICE LabelRuns(const Prediction* prediction, const Target*, Bins& bins, const Add& add)
      : prediction(prediction),
        bins(bins),
        add(add),
        bin(bins.ignore_index == 0 ? bins.ignored() : bins.at(0, 0)) {}

  FCNSEG_DEVICE void step(const Labels<Prediction, kVector>& predictions,
                          const Labels<Target, kVector>& targets, const Prediction* here) {
    FCNSEG_UNROLL
    for (int i = 0; i < kVector; ++i) {
      if (predictions.label[i] != last_prediction || targets.label[i] != last_target) {
        finish();
        last_prediction = predictions.label[i];
        last_target = targets.label[i];
        length = 0;
        bin = bins.of(last_prediction, last_target, here - prediction + i);
      }
      ++length;
    }
  }

  FCNSEG_DEVICE void finish() {
    if (length != 0) add(bin, length);
  }
};

// Walks over this thread's pixels; `add(bin, length)` for every run. The lengths and their sums fit
// 32 bits: the launcher gives a block fewer than 2^32 pixels (launch_plan.h).
template <template <typename, typename, typename, typename> typename Runs, typename Prediction,
          typename Target, typename Bins, typename Add>
FCNSEG_DEVICE void count_pixels(const Pixels& pixels, Bins& bins, const Add& add) {
  constexpr int kVector = VectorOf<Prediction, Target>::kSize;
  const Prediction* prediction = static_cast<const Prediction*>(pixels.prediction);
  const Target* target = static_cast<const Target*>(pixels.target);
  const uint32 thread = blockIdx.x * blockDim.x + threadIdx.x;
  // The scalar head ends where the target's 16-byte loads begin; the prediction's may not.
  const uint64 misaligned = reinterpret_cast<uint64>(target) % sizeof(Chunk);
  int64 head = misaligned == 0 ? 0 : int64(sizeof(Chunk) - misaligned) / int64(sizeof(Target));
  head = head < pixels.size ? head : pixels.size;
  const bool aligned = reinterpret_cast<uint64>(prediction + head) % sizeof(Chunk) == 0;
  const int64 vectors = (pixels.size - head) / kVector;
  const int64 threads = int64(gridDim.x) * blockDim.x;
  count_one_by_one(prediction, target, thread, head, threads, bins, add);
  count_one_by_one(prediction, target, head + vectors * kVector + thread, pixels.size, threads,
                   bins, add);

  const uint32 columns = pixels.columns;
  const uint32 strip = thread / columns;
  const uint32 column = thread - strip * columns;
  const int64 first = strip * pixels.rows * columns + column;
  const int64 end = first + pixels.rows * columns;
  const Prediction* const stop = prediction + head + (end < vectors ? end : vectors) * kVector;
  const int64 across = int64(columns) * kVector;
  const Prediction* p_here = prediction + head + first * kVector;
  const Target* t_here = target + head + first * kVector;
  Labels<Prediction, kVector> p;
  Labels<Target, kVector> t;
  bins.bins += column % bins.stride;
  Runs<Prediction, Target, Bins, Add> runs(prediction, target, bins, add);
  FCNSEG_NO_UNROLL
  for (; p_here < stop; p_here += across, t_here += across) {
    p.load(p_here, aligned);
    t.load(t_here, true);
    runs.step(p, t, p_here);
  }
  runs.finish();
}

FCNSEG_DEVICE void report(const Counters& counters, uint64 invalid, uint64 ignored) {
  if (invalid != 0) atomicAdd(counters.invalid, invalid);
  if (ignored != 0 && counters.ignored != nullptr) atomicAdd(counters.ignored, ignored);
}

FCNSEG_DEVICE void report_first(const Counters& counters, uint64 first) {
  if (first != 0 && counters.first != nullptr) atomicMax(counters.first, first);
}

template <typename Prediction, typename Target, int kTables>
FCNSEG_DEVICE void count_in_shared(const Pixels& pixels, uint64* matrix, const Counters& counters) {
  FCNSEG_SHARED(uint32, tables);
  const int cells = pixels.num_classes * pixels.num_classes;
  const int size = cells + kExtraBins;
  for (int i = threadIdx.x; i < size * kTables; i += blockDim.x) tables[i] = 0;
  __syncthreads();
  Bins<uint32, kTables> bins(tables, pixels);
  count_pixels<PackedRuns, Prediction, Target>(
      pixels, bins, [](uint32* bin, uint32 length) { atomicAdd(bin, length); });
  report_first(counters, bins.first);
  __syncthreads();
  for (int bin = threadIdx.x; bin < size; bin += blockDim.x) {
    uint64 sum = 0;
    FCNSEG_UNROLL
    for (int copy = 0; copy < kTables; ++copy) sum += tables[bin * kTables + copy];
    if (bin < cells) {
      if (sum != 0) atomicAdd(matrix + bin, sum);
    } else {
      report(counters, bin == cells ? 0 : sum, bin == cells ? sum : 0);
    }
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
FCNSEG_GLOBAL void FCNSEG_BOUNDS(kThreads, 3)
    count_global(Pixels pixels, uint64* matrix, Counters counters) {
  Bins<uint64, 1> bins(matrix, pixels);
  uint64* const ignored_bin = bins.ignored();  // past the matrix, as that of invalid pixels
  uint32 invalid = 0;
  uint32 ignored = 0;
  const auto add = [&](uint64* bin, uint32 length) {
    if (bin < ignored_bin) {
      atomicAdd(bin, uint64(length));
    } else if (bin == ignored_bin) {
      ignored += length;
    } else {
      invalid += length;
    }
  };
  if constexpr (sizeof(Prediction) == 1 && sizeof(Target) == 1) {
    count_pixels<PackedRuns, Prediction, Target>(pixels, bins, add);
  } else {
    count_pixels<LabelRuns, Prediction, Target>(pixels, bins, add);
  }
  report_first(counters, bins.first);
  report(counters, invalid, ignored);
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
