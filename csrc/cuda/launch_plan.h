// How a confusion matrix is counted: which kernel, how many blocks. Plain C++, so that it is tested
// without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fcnseg {

struct Device {
  int multiprocessors;
  int64_t shared_per_block;           // bytes, after opting in
  int64_t shared_per_multiprocessor;  // bytes
};

enum class Strategy { kReplicated, kSingle, kGlobal };

struct LaunchPlan {
  Strategy strategy;
  int64_t blocks;
  int64_t shared;  // bytes
};

// What a block counts must fit 32 bits; half of that leaves room for uneven shares.
constexpr int64_t kMaxPixelsPerBlock = int64_t{1} << 31;
constexpr int64_t kReplicatedShared = 24 << 10;  // four blocks fit the smallest multiprocessor
constexpr int64_t kReservedShared = 1 << 10;     // the driver's, per block
constexpr int kStepsPerThread = 4;               // fewer blocks than this makes for small inputs

inline LaunchPlan launch_plan(int64_t pixels, int64_t num_classes, int pixels_per_step, int threads,
                              int threads_large, int copies, const Device& device) {
  const int64_t table = num_classes * num_classes * 4;
  LaunchPlan plan{};
  int64_t resident;  // blocks per multiprocessor
  if (table * copies <= kReplicatedShared) {
    plan = {Strategy::kReplicated, 0, table * copies};
    resident = 4;
  } else if (table <= device.shared_per_block) {
    plan = {Strategy::kSingle, 0, table};
    resident = device.shared_per_multiprocessor >= 2 * (table + kReservedShared) ? 2 : 1;
    threads = threads_large;
  } else {
    plan = {Strategy::kGlobal, 0, 0};
    resident = 8;
  }
  const auto blocks_of = [pixels](int64_t share) { return (pixels - 1) / share + 1; };
  const int64_t useful = blocks_of(int64_t{threads} * pixels_per_step * kStepsPerThread);
  const int64_t filling = resident * device.multiprocessors;
  plan.blocks = std::max(std::min(useful, filling), blocks_of(kMaxPixelsPerBlock));
  return plan;
}

}  // namespace fcnseg
