// How a confusion matrix is counted: which kernel, how many blocks, which pixels. Plain C++, so
// that it is tested without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fcnseg {

struct Device {
  int multiprocessors;
  int64_t shared_per_block;  // bytes, after opting in
};

enum class Strategy { kReplicated, kSingle, kGlobal };

// What a block counts into.
struct Tables {
  Strategy strategy;
  int64_t shared;  // bytes
};

struct LaunchPlan {
  int64_t blocks;
  int columns;   // a thread's next vector is so many vectors further on
  int64_t rows;  // vectors of a thread, at most
};

// Tables of more than this go one to a block; four such blocks fit the smallest multiprocessor.
constexpr int64_t kReplicatedShared = 24 << 10;
// What a block counts must fit 32 bits. A quarter of that leaves room for shares that are uneven:
// the busiest block has less than twice the mean.
constexpr int64_t kMaxPixelsPerBlock = int64_t{1} << 30;
constexpr int kStepsPerThread = 4;  // fewer blocks than this makes for small inputs
constexpr int kStripsOfThreads = 8;

// `extra_bins`: those that every table has besides its num_classes^2; `max_classes`: of a table.
inline Tables choose_tables(int64_t num_classes, int extra_bins, int copies, int64_t max_classes,
                            const Device& device) {
  const int64_t table = (num_classes * num_classes + extra_bins) * 4;
  if (num_classes <= max_classes) {
    if (table * copies <= kReplicatedShared) return {Strategy::kReplicated, table * copies};
    if (table <= device.shared_per_block) return {Strategy::kSingle, table};
  }
  return {Strategy::kGlobal, 0};
}

// `width`: pixels from one to that below it. `resident`: blocks of `threads` that run on one
// multiprocessor at a time, as the CUDA runtime says for the kernel and its shared memory.
inline LaunchPlan launch_plan(int64_t pixels, int64_t width, int pixels_per_vector, int threads,
                              int resident, const Device& device) {
  const auto divide_up = [](int64_t a, int64_t b) { return (a - 1) / b + 1; };
  const int64_t vectors = divide_up(pixels, pixels_per_vector);
  const int64_t useful = divide_up(vectors, int64_t{threads} * kStepsPerThread);
  const int64_t filling = int64_t{std::max(resident, 1)} * device.multiprocessors;
  LaunchPlan plan{};
  plan.blocks = std::max(std::min(useful, filling), divide_up(pixels, kMaxPixelsPerBlock));
  // Rows of vectors down a picture, if they leave few threads without work: those after the last
  // whole row of threads have none.
  const int64_t all = plan.blocks * threads;
  int64_t columns = (width + pixels_per_vector / 2) / pixels_per_vector;
  if (columns == 0 || columns > all / kStripsOfThreads) columns = all;
  plan.columns = static_cast<int>(columns);
  plan.rows = divide_up(divide_up(vectors, columns), all / columns);
  return plan;
}

}  // namespace fcnseg
