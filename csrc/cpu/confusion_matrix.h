// Confusion matrix of two label maps on the CPU. No torch headers: the dispatcher's operator
// (confusion_matrix.cpp) and the NumPy entry point (../pybind.cpp) share this routine.
//
//   M[t][p] += |{ i : target_i = t, prediction_i = p, target_i != ignore_index }|
//
// Who owns what: the caller cuts the pixels into ranges; `count_range` counts one range into tables
// of its own and adds them to the caller's. The sums are integers, so the result depends neither on
// the number of threads nor on the order.
//
// Up to kMaxBlockClasses classes go block by block: vector instructions turn 64 label pairs into
// bin numbers; where all are equal that is one addition, else the pixels are counted one by one,
// into four tables in turn, so that equal neighbours do not wait for each other's store. Labels
// past the last class share one more row and one more column, which are dropped; where they hold a
// bad label, the pixels are looked at again, to say which. More classes, and few pixels, are
// counted run by run without tables of their own. A label is compared in its own width or in 64
// bits: 2^32 + 3 is not 3.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu_capability.h"

#if defined(__GNUC__)
#define FCNSEG_INLINE inline __attribute__((always_inline))
#else
#define FCNSEG_INLINE inline
#endif

namespace fcnseg {

// The first pixel, in memory order, that holds a label outside [0, num_classes).
struct BadLabels {
  int64_t count = 0;
  int64_t position = 0;
  int64_t value = 0;
  int64_t in_prediction = 0;  // 1 where the target at `position` is fine

  void add(int64_t where, int64_t label, bool prediction) {
    if (count++ == 0) {
      position = where;
      value = label;
      in_prediction = prediction;
    }
  }
  // `later` covers pixels behind those of *this.
  void append(const BadLabels& later) {
    if (count == 0) {
      *this = later;
    } else {
      count += later.count;
    }
  }
};

// Adds pixels [begin, end) to `table` [num_classes, num_classes]; bad pixels only go to `bad`.
template <typename Prediction, typename Target>
void count_runs(const Prediction* prediction, const Target* target, int64_t begin, int64_t end,
                int64_t num_classes, int64_t ignore_index, int64_t* table, BadLabels& bad) {
  const auto outside = [num_classes](int64_t label) {
    return static_cast<uint64_t>(label) >= static_cast<uint64_t>(num_classes);
  };
  for (int64_t i = begin; i < end;) {
    const Prediction p = prediction[i];
    const Target t = target[i];
    const int64_t start = i;
    do {
      ++i;
    } while (i < end && prediction[i] == p && target[i] == t);
    const int64_t truth = static_cast<int64_t>(t);
    const int64_t predicted = static_cast<int64_t>(p);
    if (truth == ignore_index) continue;
    if (outside(truth) || outside(predicted)) {
      const bool in_prediction = !outside(truth);
      for (int64_t k = start; k < i; ++k) {
        bad.add(k, in_prediction ? predicted : truth, in_prediction);
      }
      continue;
    }
    table[truth * num_classes + predicted] += i - start;
  }
}

constexpr int kBlock = 64;                 // pixels
constexpr int kTables = 4;                 // used in turn
constexpr int64_t kMaxBlockClasses = 255;  // (classes + 1)^2 bin numbers fit 16 bits
constexpr int64_t kMaxPixels = 1 << 30;    // that a 32-bit table counts before it is added up
constexpr int64_t kPixelsPerBin = 4;       // fewer than that are not worth the tables

// No branches in these loops, constant bounds: the compiler makes vector instructions of them.

// min(label, classes) in 16 bits, where a negative label is a large one. Returns whether a label
// is past the last class and not `ignored`.
template <typename Label>
FCNSEG_INLINE bool clamp_labels(const Label* labels, int classes, Label ignored, uint16_t* out) {
  using Unsigned = std::make_unsigned_t<Label>;
  const Unsigned limit = static_cast<Unsigned>(classes);
  Unsigned bad = 0;
  for (int i = 0; i < kBlock; ++i) {
    const Unsigned label = static_cast<Unsigned>(labels[i]);
    bad |= static_cast<Unsigned>((label >= limit) & (labels[i] != ignored));
    out[i] = static_cast<uint16_t>(label < limit ? label : limit);
  }
  return bad != 0;
}

FCNSEG_INLINE bool all_equal(const uint16_t* bin) {
  uint16_t difference = 0;
  for (int i = 0; i < kBlock; ++i) difference |= bin[i] ^ bin[0];
  return difference == 0;
}

// Adds kBlock pixels to kTables tables of `bins` each.
FCNSEG_INLINE void count_bins(const uint16_t* bin, int bins, uint32_t* tables) {
  uint32_t* const second = tables + bins;
  uint32_t* const third = second + bins;
  uint32_t* const fourth = third + bins;
  for (int i = 0; i < kBlock; i += kTables) {
    uint64_t four;  // one load instead of four; which end comes first does not matter
    std::memcpy(&four, bin + i, sizeof four);
    ++tables[four & 0xffff];
    ++second[four >> 16 & 0xffff];
    ++third[four >> 32 & 0xffff];
    ++fourth[four >> 48];
  }
}

// Adds whole blocks to kTables tables of (classes + 1)^2. Returns whether a target is bad.
template <typename Prediction, typename Target>
FCNSEG_INLINE bool count_blocks(const Prediction* prediction, const Target* target, int64_t blocks,
                                int classes, Target ignored, uint32_t* tables) {
  const int width = classes + 1;
  alignas(64) uint16_t truth[kBlock];
  alignas(64) uint16_t bin[kBlock];
  bool bad = false;
  for (int64_t block = 0; block < blocks; ++block) {
    bad |= clamp_labels<Target>(target + block * kBlock, classes, ignored, truth);
    clamp_labels<Prediction>(prediction + block * kBlock, classes, 0, bin);
    for (int i = 0; i < kBlock; ++i) bin[i] = static_cast<uint16_t>(bin[i] + truth[i] * width);
    if (all_equal(bin)) {
      tables[bin[0]] += kBlock;
      continue;
    }
    count_bins(bin, width * width, tables);
  }
  return bad;
}

#if defined(__GNUC__) && defined(__x86_64__)
template <typename Prediction, typename Target>
__attribute__((target("avx2"))) bool count_blocks_avx2(const Prediction* prediction,
                                                       const Target* target, int64_t blocks,
                                                       int classes, Target ignored,
                                                       uint32_t* tables) {
  return count_blocks(prediction, target, blocks, classes, ignored, tables);
}
#endif

// Whether one of kBlock labels is past the last class and not `ignored`.
template <typename Label>
FCNSEG_INLINE bool has_bad_label(const Label* labels, int classes, Label ignored) {
  uint16_t clamped[kBlock];
  return clamp_labels(labels, classes, ignored, clamped);
}

}  // namespace fcnseg

#if defined(__GNUC__) && defined(__x86_64__)
#include "confusion_matrix_agreement.h"
#endif

namespace fcnseg {

// Tables of a range of pixels and their sum. Labels past the last class have a row and a column.
class BlockTables {
 public:
  explicit BlockTables(int64_t classes)
      : classes_(classes), bins_((classes + 1) * (classes + 1)), memory_(kTables * bins_) {
#if defined(__GNUC__) && defined(__x86_64__)
    if (has_vbmi2()) memory_.resize(2 * kTables * bins_ + 256);
#endif
  }

  // Counts blocks, no more than kMaxPixels; returns whether a target is bad.
  template <typename Prediction, typename Target>
  bool count(const Prediction* prediction, const Target* target, int64_t blocks, Target ignored) {
    std::fill(memory_.begin(), memory_.end(), 0);
    const int classes = static_cast<int>(classes_);
    uint32_t* const pairs = memory_.data();
#if defined(__GNUC__) && defined(__x86_64__)
    if (has_vbmi2()) {
      uint32_t* const wrong = pairs + kTables * bins_;
      return count_agreement(prediction, target, blocks, classes, ignored,
                             {pairs, wrong, wrong + kTables * bins_});
    }
    if (cpu_capability() >= Capability::kAvx2) {
      return count_blocks_avx2(prediction, target, blocks, classes, ignored, pairs);
    }
#endif
    return count_blocks(prediction, target, blocks, classes, ignored, pairs);
  }

  // Adds the row of `truth` [classes] to `row`; returns whether a prediction is bad.
  bool add_row(int64_t truth, int64_t* row) const {
    const int64_t width = classes_ + 1;
    const bool agreement = memory_.size() > kTables * static_cast<size_t>(bins_);
    const uint32_t* const table = memory_.data() + truth * width;
    int64_t wrong = 0;
    int64_t bad = 0;
    for (int64_t predicted = 0; predicted < width; ++predicted) {
      int64_t sum = 0;
      for (int k = 0; k < kTables; ++k) sum += table[k * bins_ + predicted];
      if (agreement) {
        int64_t differ = 0;
        for (int k = kTables; k < 2 * kTables; ++k) differ += table[k * bins_ + predicted];
        wrong += differ;
        sum += differ;
      }
      (predicted < classes_ ? row[predicted] : bad) += sum;
    }
    if (agreement) row[truth] += memory_[2 * kTables * bins_ + truth] - wrong;
    return bad != 0;
  }

 private:
  const int64_t classes_, bins_;
  std::vector<uint32_t> memory_;
};

// Adds pixels [begin, end) to `table` [num_classes, num_classes]; bad pixels only go to `bad`.
template <typename Prediction, typename Target>
void count_range(const Prediction* prediction, const Target* target, int64_t begin, int64_t end,
                 int64_t num_classes, int64_t ignore_index, int64_t* table, BadLabels& bad) {
  const int64_t width = num_classes + 1;
  if (num_classes > kMaxBlockClasses || end - begin < kPixelsPerBin * width * width) {
    count_runs(prediction, target, begin, end, num_classes, ignore_index, table, bad);
    return;
  }
  // An ignore_index that the target's type cannot hold ignores nothing; class 0 is never bad.
  const bool holds = ignore_index >= std::numeric_limits<Target>::min() &&
                     ignore_index <= std::numeric_limits<Target>::max();
  const Target ignored = holds ? static_cast<Target>(ignore_index) : Target{0};
  BlockTables tables(num_classes);
  while (end - begin >= kBlock) {
    const int64_t blocks = std::min(end - begin, kMaxPixels) / kBlock;
    bool found_bad = tables.count(prediction + begin, target + begin, blocks, ignored);
    for (int64_t truth = 0; truth < num_classes; ++truth) {
      if (truth == ignore_index) continue;
      found_bad |= tables.add_row(truth, table + truth * num_classes);
    }
    const int64_t stop = begin + blocks * kBlock;
    if (found_bad) {
      std::vector<int64_t> again(num_classes * num_classes);
      count_runs(prediction, target, begin, stop, num_classes, ignore_index, again.data(), bad);
    }
    begin = stop;
  }
  count_runs(prediction, target, begin, end, num_classes, ignore_index, table, bad);
}

}  // namespace fcnseg
