// fcnseg_cpu::cpu_capability: the instruction set that the kernels run on.

#include "cpu_capability.h"

#include <torch/csrc/stable/library.h>

namespace {

std::string cpu_capability() { return fcnseg::name(fcnseg::cpu_capability()); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fcnseg_cpu, m) { m.def("cpu_capability() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(fcnseg_cpu, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}
