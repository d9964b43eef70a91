// Logits of any dtype and strides, read a row at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <tuple>

namespace fcnseg {

enum class DType { kFloat, kDouble, kHalf, kBFloat16 };

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float to_real(float x) { return x; }
inline double to_real(double x) { return x; }
inline float to_real(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float to_real(Half x) {
  // Move exponent and mantissa into place; the product corrects the bias, of subnormals as well.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  float y;
  std::memcpy(&y, &magnitude, 4);
  y *= 5.192296858534828e33f;  // 2^112
  uint32_t bits;
  std::memcpy(&bits, &y, 4);
  if ((x.bits & 0x7c00) == 0x7c00) bits = magnitude | 0x7f800000;
  bits |= static_cast<uint32_t>(x.bits & 0x8000) << 16;
  std::memcpy(&y, &bits, 4);
  return y;
}

struct Logits {
  const void* data;
  DType dtype;
  int64_t N, C, h, w;
  int64_t stride_n, stride_c, stride_h, stride_w;
};

template <typename T, typename Real>
void read_row(const T* row, const Logits& z, Real* out, int64_t out_c, int64_t out_w) {
  constexpr int64_t kBlock = 16;  // classes at a time where one of the two sides is transposed
  if (z.stride_w == 1 && out_w == 1) {
    for (int64_t c = 0; c < z.C; ++c) {
      for (int64_t j = 0; j < z.w; ++j) {
        out[c * out_c + j] = static_cast<Real>(to_real(row[c * z.stride_c + j]));
      }
    }
    return;
  }
  for (int64_t c0 = 0; c0 < z.C; c0 += kBlock) {
    const int64_t c1 = std::min(z.C, c0 + kBlock);
    for (int64_t j = 0; j < z.w; ++j) {
      for (int64_t c = c0; c < c1; ++c) {
        out[c * out_c + j * out_w] =
            static_cast<Real>(to_real(row[c * z.stride_c + j * z.stride_w]));
      }
    }
  }
}

// Row (n, y) into out[c * out_c + x * out_w].
template <typename Real>
void read_row(const Logits& z, int64_t n, int64_t y, Real* out, int64_t out_c, int64_t out_w) {
  const int64_t at = n * z.stride_n + y * z.stride_h;
  switch (z.dtype) {
    case DType::kFloat:
      return read_row(static_cast<const float*>(z.data) + at, z, out, out_c, out_w);
    case DType::kDouble:
      return read_row(static_cast<const double*>(z.data) + at, z, out, out_c, out_w);
    case DType::kHalf:
      return read_row(static_cast<const Half*>(z.data) + at, z, out, out_c, out_w);
    case DType::kBFloat16:
      return read_row(static_cast<const BFloat16*>(z.data) + at, z, out, out_c, out_w);
  }
}

enum class LabelType { kUInt8, kInt32, kInt64 };

// A label map [N, H, W], contiguous.
struct Labels {
  const void* data;
  LabelType type;
  int64_t H, W;

  int64_t at(int64_t n, int64_t y, int64_t x) const {
    const int64_t i = (n * H + y) * W + x;
    switch (type) {
      case LabelType::kUInt8:
        return static_cast<const uint8_t*>(data)[i];
      case LabelType::kInt32:
        return static_cast<const int32_t*>(data)[i];
      default:
        return static_cast<const int64_t*>(data)[i];
    }
  }

  // Asks for row `row` of all N * H.
  void prefetch_row(int64_t row) const {
    const int64_t bytes = W * (type == LabelType::kUInt8 ? 1 : type == LabelType::kInt32 ? 4 : 8);
    const char* const begin = static_cast<const char*>(data) + row * bytes;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(begin + i, 0, 2);
  }
};

// The first label, in memory order, that is neither a class nor ignored.
struct BadLabel {
  int64_t count = 0, value = 0, n = 0, y = 0, x = 0;

  // `other` covers other pixels.
  void merge(const BadLabel& other) {
    if (other.count == 0) return;
    const bool first = count == 0 || std::tie(other.n, other.y, other.x) < std::tie(n, y, x);
    const int64_t both = count + other.count;
    if (first) *this = other;
    count = both;
  }
  // Row (n, y) holds `found` > 0 bad labels.
  static BadLabel in_row(const Labels& labels, int64_t C, int64_t ignore, int64_t found, int64_t n,
                         int64_t y) {
    BadLabel row{found, 0, n, y, 0};
    for (;; ++row.x) {
      row.value = labels.at(n, y, row.x);
      if (row.value != ignore && (row.value < 0 || row.value >= C)) return row;
    }
  }
};

}  // namespace fcnseg
