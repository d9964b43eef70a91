// Which instruction set the CPU kernels run on: the widest one that this machine has, or the one
// that the environment variable FCNSEG_CPU_CAPABILITY (avx512, avx2, default) forces.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fcnseg {

enum class Capability { kDefault, kAvx2, kAvx512 };

inline const char* name(Capability capability) {
  return capability == Capability::kAvx512 ? "avx512"
         : capability == Capability::kAvx2 ? "avx2"
                                           : "default";
}

inline Capability widest_capability() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("fma")) {
    return Capability::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Capability::kAvx2;
#endif
  return Capability::kDefault;
}

inline Capability choose_capability() {
  const char* forced = std::getenv("FCNSEG_CPU_CAPABILITY");
  const Capability widest = widest_capability();
  if (forced == nullptr || *forced == '\0') return widest;
  for (const Capability each : {Capability::kDefault, Capability::kAvx2, Capability::kAvx512}) {
    if (std::string(forced) != name(each)) continue;
    if (each <= widest) return each;
    throw std::runtime_error(std::string("FCNSEG_CPU_CAPABILITY=") + forced +
                             ", but this machine has only " + name(widest));
  }
  throw std::runtime_error(
      std::string("FCNSEG_CPU_CAPABILITY must be avx512, avx2 or default, got ") + forced);
}

// Read once. Throws std::runtime_error where the variable is wrong.
inline Capability cpu_capability() {
  static const Capability chosen = choose_capability();
  return chosen;
}

}  // namespace fcnseg
