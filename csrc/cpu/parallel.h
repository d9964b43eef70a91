// How the kernels reach the caller's threads.
#pragma once

#include <cstdint>
#include <functional>

namespace fcnseg {

// Calls the function on disjoint ranges that cover [0, end), possibly from several threads.
using ParallelFor =
    std::function<void(int64_t end, const std::function<void(int64_t begin, int64_t end)>&)>;

}  // namespace fcnseg
