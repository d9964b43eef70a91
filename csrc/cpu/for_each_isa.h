// Compiles the header named by FCNSEG_KERNEL once per instruction set: into fcnseg::portable, and
// on x86-64 also into fcnseg::avx2 and fcnseg::avx512, with simd.h before it.
//
// A kernel header must not include a standard header (a standard inline function, compiled here
// with wider instructions, could be the copy that the linker keeps for everybody) and must keep
// everything inside its namespace. No include guard: one translation unit may compile several.

#if defined(__GNUC__) && !defined(__clang__)
// GCC's own AVX-512 header starts some intrinsics from an undefined register, and is warned of it.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#if defined(__clang__)
#define FCNSEG_BEGIN_AVX512                                                             \
  _Pragma(                                                                              \
      "clang attribute "                                                                \
      "push(__attribute__((target(\"avx512f,avx512dq,avx512bw,avx512vl,avx2,fma\"))), " \
      "apply_to=function)")
#define FCNSEG_BEGIN_AVX2 \
  _Pragma("clang attribute push(__attribute__((target(\"avx2,fma\"))), apply_to=function)")
#define FCNSEG_END _Pragma("clang attribute pop")
#else
#define FCNSEG_BEGIN_AVX512            \
  _Pragma("GCC push_options") _Pragma( \
      "GCC target(\"avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,prefer-vector-width=512\")")
#define FCNSEG_BEGIN_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma\")")
#define FCNSEG_END _Pragma("GCC pop_options")
#endif

#define FCNSEG_ISA portable
#define FCNSEG_ISA_LEVEL 0
#include "simd.h"
#include FCNSEG_KERNEL
#undef FCNSEG_ISA
#undef FCNSEG_ISA_LEVEL

#if defined(__x86_64__)
FCNSEG_BEGIN_AVX2
#define FCNSEG_ISA avx2
#define FCNSEG_ISA_LEVEL 1
#include "simd.h"
#include FCNSEG_KERNEL
#undef FCNSEG_ISA
#undef FCNSEG_ISA_LEVEL
FCNSEG_END

FCNSEG_BEGIN_AVX512
#define FCNSEG_ISA avx512
#define FCNSEG_ISA_LEVEL 2
#include "simd.h"
#include FCNSEG_KERNEL
#undef FCNSEG_ISA
#undef FCNSEG_ISA_LEVEL
FCNSEG_END
#endif

#undef FCNSEG_BEGIN_AVX512
#undef FCNSEG_BEGIN_AVX2
#undef FCNSEG_END
