// Confusion matrix of two label maps on the CPU. No torch headers: the dispatcher's operator
// (confusion_matrix.cpp) and the NumPy entry point (../pybind.cpp) share this routine.
//
//   M[t][p] += |{ i : target_i = t, prediction_i = p, target_i != ignore_index }|
//
// Who owns what: [0, size) is cut into fixed blocks; each call of `count_range` fills a private
// int64 table, and tables are added. The sums are integers, so the result does not depend on the
// number of threads or on the order. Neighbouring pixels mostly agree, so equal pairs are counted
// in a register and the table is touched once per run.
// A label is compared in 64 bits: 2^32 + 3 is not 3.
#pragma once

#include <cstdint>

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
void count_range(const Prediction* prediction, const Target* target, int64_t begin, int64_t end,
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

}  // namespace fcnseg
