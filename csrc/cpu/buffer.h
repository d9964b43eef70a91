// Scratch memory of the kernels.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace fcnseg {

// Zeroed memory, aligned for any vector.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : memory_(size == 0 ? nullptr : std::calloc(size * sizeof(T) + 64, 1)) {
    if (size != 0 && memory_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(memory_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const {
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_) + 63) & ~uintptr_t{63});
  }

 private:
  void* memory_;
};

}  // namespace fcnseg
