// The CUDA kernels of the confusion matrix on the CPU, against a plain loop.
#include <cstdio>
#include <random>
#include <vector>

#include "confusion_matrix_kernel.cuh"
#include "launch_plan.h"

using namespace fcnseg;

namespace {

int failures = 0;

void expect(bool holds, const char* what) {
  if (!holds) {
    std::printf("FAIL %s\n", what);
    ++failures;
  }
}

template <typename Prediction, typename Target>
void check(int64 size, int classes, int64 ignore_index, int skip_prediction, int skip_target) {
  std::mt19937 random(static_cast<unsigned>(size + classes));
  std::vector<Prediction> predictions(size + skip_prediction);
  std::vector<Target> targets(size + skip_target);
  Prediction* prediction = predictions.data() + skip_prediction;
  Target* target = targets.data() + skip_target;
  int label = 0;
  for (int64 i = 0; i < size; ++i) {
    if (random() % 7 == 0) label = random() % classes;
    target[i] = static_cast<Target>(random() % 13 ? label : random() % 2 ? 255 : -100);
    prediction[i] = static_cast<Prediction>(random() % 11 ? label : random() % (classes + 1));
  }
  std::vector<uint64> expected(classes * classes, 5);
  uint64 invalid = 0, ignored = 0, first = 0;
  for (int64 i = size - 1; i >= 0; --i) {
    const int64 t = target[i], p = prediction[i];
    if (t == ignore_index) {
      ++ignored;
    } else if (t < 0 || t >= classes || p < 0 || p >= classes) {
      ++invalid;
      first = ~uint64(i);
    } else {
      ++expected[t * classes + p];
    }
  }
  const Pixels pixels{prediction, target, size, classes, ignore_index};
  const size_t table = size_t(classes) * classes * 4;
  for (int strategy = 0; strategy < 3; ++strategy) {
    std::vector<uint64> matrix(classes * classes, 5);
    uint64 counters[3] = {};
    const Counters fields{counters, counters + 1, counters + 2};
    emulate(2, 16,
            strategy == 0   ? table * kCopies
            : strategy == 1 ? table
                            : 0,
            [&] {
              if (strategy == 0)
                count_replicated<Prediction, Target>(pixels, matrix.data(), fields);
              if (strategy == 1) count_single<Prediction, Target>(pixels, matrix.data(), fields);
              if (strategy == 2) count_global<Prediction, Target>(pixels, matrix.data(), fields);
            });
    expect(matrix == expected, "matrix");
    expect(counters[0] == invalid && counters[1] == ignored && counters[2] == first, "counters");
    uint64 record[5] = {};
    emulate(1, 1, 0, [&] {
      record_invalid(pixels, sizeof(Prediction), sizeof(Target), 2, 3, counters, record);
    });
    expect(record[0] == invalid, "count of the record");
    if (invalid != 0) {
      expect((record[2] * 2 + record[3]) * 3 + record[4] == ~first, "place of the record");
    }
  }
}

template <typename Prediction, typename Target>
void check_sizes() {
  for (const int64 size : {1, 15, 17, 1031}) {
    check<Prediction, Target>(size, 19, 255, 0, 0);
    check<Prediction, Target>(size, 5, -100, 1, 0);
    check<Prediction, Target>(size, 5, 3, 1, 1);
  }
}

template <typename Prediction>
void check_targets() {
  check_sizes<Prediction, Label8>();
  check_sizes<Prediction, Label16>();
  check_sizes<Prediction, Label32>();
  check_sizes<Prediction, Label64>();
}

// Calls on several streams at once: each thread is one, with counters of its own.
void check_record_of_streams() {
  constexpr unsigned kStreams = 8;
  constexpr int64 kHeight = 4, kWidth = 5;
  std::vector<Label8> prediction(2 * kHeight * kWidth, 0);
  std::vector<Label64> target(prediction.size(), 1);
  uint64 counters[kStreams][3] = {};
  for (unsigned stream = 1; stream < kStreams; ++stream) {  // stream 0 met no bad label
    const unsigned position = 5 * stream - 1;
    target[position] = stream % 2 == 0 ? 1 : -3 - int64(stream);
    prediction[position] = static_cast<Label8>(100 + stream);
    counters[stream][0] = 1000 + stream;
    counters[stream][2] = ~uint64(position);
  }
  const Pixels pixels{prediction.data(), target.data(), int64(target.size()), 3, 255};
  for (int repeat = 0; repeat < 50; ++repeat) {
    uint64 record[5] = {};
    emulate(1, kStreams, 0, [&] {
      record_invalid(pixels, sizeof(Label8), sizeof(Label64), kHeight, kWidth,
                     counters[threadIdx.x], record);
    });
    expect(record[0] == 7 * 1000 + 28, "count of all streams");
    const uint64 position = (record[2] * kHeight + record[3]) * kWidth + record[4];
    const uint64 stream = (position + 1) / 5;
    expect(record[3] < kHeight && record[4] < kWidth && (position + 1) % 5 == 0 && stream > 0 &&
               stream < kStreams,
           "place of one stream");
    expect(int64(record[1]) == (stream % 2 == 0 ? 100 + int64(stream) : -3 - int64(stream)),
           "value at that place");
  }
}

void check_plan() {
  const Device device{132, 227 << 10, 228 << 10};
  for (const int64_t classes : {1, 19, 27, 28, 150, 241, 242, 4096}) {
    for (const int64_t pixels : {int64_t{1}, int64_t{1} << 22, int64_t{1} << 45}) {
      const LaunchPlan plan = launch_plan(pixels, classes, 16, 256, 1024, kCopies, device);
      expect(plan.shared <= device.shared_per_block, "shared memory of the plan");
      expect(plan.blocks >= 1 && (pixels - 1) / plan.blocks < (int64_t{1} << 31), "pixels a block");
      const Strategy strategy = classes <= 27    ? Strategy::kReplicated
                                : classes <= 241 ? Strategy::kSingle
                                                 : Strategy::kGlobal;
      expect(plan.strategy == strategy, "strategy");
    }
  }
}

}  // namespace

int main() {
  check_targets<Label8>();
  check_targets<Label16>();
  check_targets<Label32>();
  check_targets<Label64>();
  check_record_of_streams();
  check_plan();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
