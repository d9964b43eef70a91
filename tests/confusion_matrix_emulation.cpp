// The CUDA kernels of the confusion matrix on the CPU, against a plain loop.
#include <cstdint>
#include <cstdio>
#include <iterator>
#include <new>
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

constexpr int kThreadsEmulated = 16;  // of a block; each is a thread of the host

// What the maps look like.
enum class Map {
  kRuns,     // of 7 pixels or so, here and there an ignored or a bad one
  kNoise,    // no two neighbours alike
  kUniform,  // one pair of labels everywhere
  kWide,     // as runs, with labels that do not fit a byte: negative ones, 2^32 + k, 2^16 + k
};

struct Case {
  int64 size;
  int classes;
  int64 ignore_index;
  int skip_prediction;  // elements from a 16-byte border to the first one
  int skip_target;
  Map map;
  int blocks;
  int64 width;
};

// Storage that begins at a 16-byte border and ends with the last element, so that the sanitizer
// sees an access beyond either end.
template <typename Label>
struct Storage {
  explicit Storage(int64 size, int skip)
      : bytes(size_t(size + skip) * sizeof(Label)),
        memory(static_cast<unsigned char*>(operator new(bytes, std::align_val_t{16}))),
        labels(reinterpret_cast<Label*>(memory) + skip) {}
  ~Storage() { operator delete(memory, std::align_val_t{16}); }
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;

  size_t bytes;
  unsigned char* memory;
  Label* labels;
};

template <typename Prediction, typename Target>
void fill(const Case& c, Prediction* prediction, Target* target) {
  std::mt19937 random(static_cast<unsigned>(c.size + c.classes));
  const int64 odd[] = {-1,
                       -100,
                       (int64{1} << 32) + c.classes / 2,
                       (int64{1} << 16) + c.classes / 2,
                       -(int64{1} << 32),
                       int64{1} << 8,
                       255,
                       INT64_MIN};
  int label = 0;
  for (int64 i = 0; i < c.size; ++i) {
    if (c.map == Map::kUniform) {
      target[i] = prediction[i] = static_cast<Target>(c.classes - 1);
      continue;
    }
    if (c.map == Map::kNoise || random() % 7 == 0) label = random() % c.classes;
    target[i] = static_cast<Target>(label);
    prediction[i] = static_cast<Prediction>(c.map == Map::kNoise ? random() % c.classes : label);
    if (random() % 13 == 0) target[i] = static_cast<Target>(random() % 2 ? 255 : -100);
    if (random() % 11 == 0) prediction[i] = static_cast<Prediction>(random() % (c.classes + 1));
    if (c.map == Map::kWide && random() % 17 == 0) {
      target[i] = static_cast<Target>(odd[random() % std::size(odd)]);
    }
    if (c.map == Map::kWide && random() % 17 == 0) {
      prediction[i] = static_cast<Prediction>(odd[random() % std::size(odd)]);
    }
  }
}

template <typename Prediction, typename Target>
void check(const Case& c) {
  const Storage<Prediction> predictions(c.size, c.skip_prediction);
  const Storage<Target> targets(c.size, c.skip_target);
  Prediction* const prediction = predictions.labels;
  Target* const target = targets.labels;
  fill(c, prediction, target);
  const int classes = c.classes;
  std::vector<uint64> expected(size_t(classes) * classes, 5);
  uint64 invalid = 0, ignored = 0, first = 0;
  for (int64 i = c.size - 1; i >= 0; --i) {
    const int64 t = target[i], p = prediction[i];
    if (t == c.ignore_index) {
      ++ignored;
    } else if (t < 0 || t >= classes || p < 0 || p >= classes) {
      ++invalid;
      first = ~uint64(i);
    } else {
      ++expected[t * classes + p];
    }
  }
  const LaunchPlan plan = launch_plan(c.size, c.width, VectorOf<Prediction, Target>::kSize,
                                      kThreadsEmulated, c.blocks, Device{1, 227 << 10});
  const Pixels pixels{prediction, target, c.size, classes, plan.columns, c.ignore_index, plan.rows};
  const size_t table = (size_t(classes) * classes + kExtraBins) * 4;
  for (const Strategy strategy : {Strategy::kReplicated, Strategy::kSingle, Strategy::kGlobal}) {
    if (strategy != Strategy::kGlobal && classes > kMaxTableClasses) continue;
    for (const bool detailed : {true, false}) {
      std::vector<uint64> matrix(expected.size(), 5);
      uint64 counters[3] = {};
      const Counters fields{counters, detailed ? counters + 1 : nullptr,
                            detailed ? counters + 2 : nullptr};
      const size_t shared = strategy == Strategy::kReplicated ? table * kCopies
                            : strategy == Strategy::kSingle   ? table
                                                              : 0;
      emulate(unsigned(plan.blocks), kThreadsEmulated, shared, [&] {
        if (strategy == Strategy::kReplicated) {
          count_replicated<Prediction, Target>(pixels, matrix.data(), fields);
        } else if (strategy == Strategy::kSingle) {
          count_single<Prediction, Target>(pixels, matrix.data(), fields);
        } else {
          count_global<Prediction, Target>(pixels, matrix.data(), fields);
        }
      });
      expect(matrix == expected, "matrix");
      expect(counters[0] == invalid, "number of invalid pixels");
      expect(counters[1] == (detailed ? ignored : 0), "number of ignored pixels");
      expect(counters[2] == (detailed ? first : 0), "first invalid pixel");
      if (!detailed) continue;
      uint64 record[5] = {};
      emulate(1, 1, 0, [&] {
        record_invalid(pixels, sizeof(Prediction), sizeof(Target), 2, 3, counters, record);
      });
      expect(record[0] == invalid, "count of the record");
      if (invalid != 0) {
        const int64 place = int64(~first);
        const int64 t = target[place], p = prediction[place];
        expect((record[2] * 2 + record[3]) * 3 + record[4] == uint64(place), "place of the record");
        expect(int64(record[1]) == (t < 0 || t >= classes ? t : p), "value of the record");
      }
    }
  }
}

// Sizes around those of a vector, a warp's step and a head and tail without a vector between.
template <typename Prediction, typename Target>
void check_pair() {
  constexpr int kVector = VectorOf<Prediction, Target>::kSize;
  for (const int64 size : {1, 7, kVector, kVector + 1, 3 * kVector - 1}) {
    check<Prediction, Target>({size, 5, -100, 1, 3, Map::kRuns, 1, 2});
  }
  check<Prediction, Target>({1031, 19, 255, 0, 0, Map::kRuns, 2, 1031});
  check<Prediction, Target>({1031, 19, -100, 0, 0, Map::kWide, 2, 2 * kVector});
  check<Prediction, Target>({1027, 19, 255, 1, 0, Map::kWide, 1, 33});
  check<Prediction, Target>({1027, 5, 3, 1, 1, Map::kRuns, 2, 0});
  check<Prediction, Target>({1027, 5, 0, 0, 2, Map::kNoise, 1, kVector});
  check<Prediction, Target>({1040, 3, 255, 0, 0, Map::kUniform, 1, 4 * kVector});
  check<Prediction, Target>({1040, 3, 2, 2, 1, Map::kUniform, 2, 3 * kVector});
  check<Prediction, Target>({999, 1, -100, 0, 0, Map::kWide, 1, 3 * kVector});
}

// A byte holds 256 labels; more classes than that have none in shared memory.
template <typename Prediction, typename Target>
void check_many_classes() {
  for (const int classes : {127, 128, 129, 255, 256, 257, 300}) {
    check<Prediction, Target>({700, classes, 255, 0, 1, Map::kNoise, 1, 64});
    check<Prediction, Target>({700, classes, -100, 0, 0, Map::kWide, 1, 64});
  }
}

template <typename Prediction>
void check_targets() {
  check_pair<Prediction, Label8>();
  check_pair<Prediction, Label16>();
  check_pair<Prediction, Label32>();
  check_pair<Prediction, Label64>();
}

// A label of 2^32 + 3 is not 3, nor is one of 2^31 + 3, alone in a map that is otherwise good.
void check_high_words() {
  for (const int64 bad : {(int64{1} << 32) + 3, (int64{1} << 31) + 3, int64{259}, int64{-253},
                          -(int64{1} << 32) + 3, int64{-1}, int64{INT64_MIN} + 3}) {
    for (const int place : {0, 1, 7, 8, 30, 31}) {
      for (const bool in_target : {true, false}) {
        Label64 labels[2][32];
        for (auto& map : labels) std::fill(std::begin(map), std::end(map), Label64{3});
        labels[in_target ? 1 : 0][place] = bad;
        const Pixels pixels{labels[0], labels[1], 32, 5, kThreadsEmulated, -100, 1};
        for (const bool global : {false, true}) {
          uint64 matrix[25] = {};
          uint64 counters[3] = {};
          emulate(1, kThreadsEmulated, 27 * 4, [&] {
            const Counters fields{counters, counters + 1, counters + 2};
            global ? count_global<Label64, Label64>(pixels, matrix, fields)
                   : count_single<Label64, Label64>(pixels, matrix, fields);
          });
          expect(matrix[3 * 5 + 3] == 31, "good pixels around a bad one");
          expect(counters[0] == 1 && counters[1] == 0 && counters[2] == ~uint64(place),
                 "a label that is bad in its high bits alone");
        }
      }
    }
  }
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
  const Pixels pixels{prediction.data(), target.data(), int64(target.size()), 3, 1, 255, 1};
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

void check_tables() {
  for (const int64_t shared : {int64_t{48} << 10, int64_t{96} << 10, int64_t{227} << 10}) {
    for (int64_t classes = 1; classes < 400; ++classes) {
      const Tables tables =
          choose_tables(classes, kExtraBins, kCopies, kMaxTableClasses, Device{132, shared});
      const int64_t table = (classes * classes + kExtraBins) * 4;
      const Strategy strategy = classes <= 27     ? Strategy::kReplicated
                                : table <= shared ? Strategy::kSingle
                                                  : Strategy::kGlobal;
      const int64_t wanted = strategy == Strategy::kReplicated ? kCopies * table
                             : strategy == Strategy::kSingle   ? table
                                                               : 0;
      expect(tables.strategy == strategy && tables.shared == wanted, "tables");
    }
  }
  // However much shared memory there may be one day, labels of a table fit a byte.
  const Tables tables =
      choose_tables(257, kExtraBins, kCopies, kMaxTableClasses, Device{132, 1 << 20});
  expect(tables.strategy == Strategy::kGlobal, "classes of a table");
}

// The walk of count_pixels, replayed: every vector has one thread, blocks have few enough.
void check_plan() {
  for (const int resident : {0, 1, 2, 5}) {
    const Device device{3, 227 << 10};
    for (const int64_t vectors : {1, 31, 32, 1000, 4096, 5001}) {
      for (const int64_t width : {0, 1, 8, 17, 100, 2048, 100000}) {
        const LaunchPlan plan = launch_plan(vectors * 8, width, 8, 32, resident, device);
        expect(plan.blocks >= 1 && plan.blocks <= 3 * std::max(resident, 1), "blocks");
        expect(plan.blocks == 1 || plan.blocks * 32 * (kStepsPerThread - 1) < vectors,
               "blocks without work");
        std::vector<int> seen(vectors, 0);
        for (int64_t thread = 0; thread < plan.blocks * 32; ++thread) {
          const int64_t strip = thread / plan.columns;
          int64_t vector = strip * plan.rows * plan.columns + thread % plan.columns;
          for (int64_t row = 0; row < plan.rows && vector < vectors; ++row) {
            ++seen[vector];
            vector += plan.columns;
          }
        }
        expect(seen == std::vector<int>(vectors, 1), "every vector once");
      }
    }
  }
  const Device device{132, 227 << 10};
  for (const int64_t pixels : {int64_t{1} << 22, int64_t{1} << 36, int64_t{1} << 45}) {
    for (const int64_t width : {0, 1, 2048, 1 << 30}) {
      const LaunchPlan plan = launch_plan(pixels, width, 16, 1024, 2, device);
      expect(plan.rows * 1024 * 16 < (int64_t{1} << 32), "pixels of a block");
      expect(plan.blocks * 1024 < (int64_t{1} << 31), "threads");
    }
  }
  // One picture row of 2048 bytes is 128 vectors: a thread's next vector lies below.
  const LaunchPlan plan = launch_plan(8 * 1024 * 2048, 2048, 16, 256, 5, device);
  expect(plan.blocks == 132 * 5 && plan.columns == 128, "rows of a picture");
}

}  // namespace

int main() {
  check_targets<Label8>();
  check_targets<Label16>();
  check_targets<Label32>();
  check_targets<Label64>();
  check_many_classes<Label8, Label8>();
  check_many_classes<Label16, Label8>();
  check_many_classes<Label64, Label64>();
  check_high_words();
  check_record_of_streams();
  check_tables();
  check_plan();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
