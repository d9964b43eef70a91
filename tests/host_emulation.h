// Runs CUDA kernels as plain C++: a std::thread per CUDA thread of a block, a std::barrier for
// __syncthreads, relaxed atomics; blocks one after another.
#pragma once

#include <barrier>
#include <cstddef>
#include <thread>
#include <vector>

#define FCNSEG_GLOBAL
#define FCNSEG_DEVICE inline
#define FCNSEG_BOUNDS(threads, blocks)
#define FCNSEG_UNROLL
#define FCNSEG_NO_UNROLL
#define FCNSEG_SHARED(type, name) type* name = reinterpret_cast<type*>(emulated_shared)

struct EmulatedIndex {
  unsigned x;
};
inline thread_local EmulatedIndex threadIdx, blockIdx;
inline EmulatedIndex blockDim, gridDim;
inline unsigned char* emulated_shared;
inline std::barrier<>* emulated_barrier;

inline void __syncthreads() { emulated_barrier->arrive_and_wait(); }

inline int __ffs(int word) { return __builtin_ffs(word); }

// Byte i of the result is the byte of b:a that nibble i of the selector names.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long both = static_cast<unsigned long long>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  }
  return result;
}

template <typename T>
T atomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

template <typename T>
T atomicMax(T* address, T value) {
  T seen = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (seen < value && !__atomic_compare_exchange_n(address, &seen, value, true, __ATOMIC_RELAXED,
                                                      __ATOMIC_RELAXED)) {
  }
  return seen;
}

template <typename Body>
void emulate(unsigned blocks, unsigned threads, size_t shared, const Body& body) {
  gridDim.x = blocks;
  blockDim.x = threads;
  for (unsigned block = 0; block < blocks; ++block) {
    // Exactly as large as asked for, so that the sanitizer sees an overrun; not zeroed.
    std::vector<unsigned long long> memory((shared + 7) / 8, 0xabababababababab);
    emulated_shared = reinterpret_cast<unsigned char*>(memory.data());
    std::barrier<> barrier(threads);
    emulated_barrier = &barrier;
    std::vector<std::thread> running;
    for (unsigned thread = 0; thread < threads; ++thread) {
      running.emplace_back([&body, thread, block] {
        threadIdx.x = thread;
        blockIdx.x = block;
        body();
      });
    }
    for (std::thread& each : running) each.join();
  }
}
