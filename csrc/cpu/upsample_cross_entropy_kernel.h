// The arithmetic of upsample_cross_entropy for the fp32 vector path; compiled once per instruction
// set (for_each_isa.h).
//
// Maths. In a cell with corners z00 z01 / z10 z11 (bilinear.h), per class, at column lambda x and
// row y_r = y + r dy:
//   1. z(x, r) = a + y_r d,  a = z00 + x (z01 - z00),  d = (z10 - z00) + x (z11 - z10 - z01 + z00)
//   2. e_r = 2^z(x, r) = e q^r,          e = 2^(a + y d), q = 2^(dy d)      geometric down a column
//      and from column to column          e' = e u,        q' = q v
//   3. s_r = sum_c e_r;   l_r = alpha_r log s_r - beta_r z_target - gamma_r sum_c k_c z_c
//      alpha softmax weight, beta one-hot weight, gamma 1 or the upstream gradient, k smoothing
//   4. gradient moments over a tile's pixels, i_r = alpha_r / s_r:
//        A = sum e P(q),  P(q) = sum_r i_r q^r;    B = sum r-weighted = e q P'(q)
//      both by one Horner scheme; the same two weighted with x. No probability is stored.
//   5. one-hot moments of the labels n, sum x, sum r, sum x r per class: the sum of target logits
//   is
//      their inner product with the corners, and they are subtracted from eq. 4.
//   6. adjoint: with S, X, Y, XY the sums of 1, x, y, x y:
//        g00 = S - X - Y + XY, g01 = X - XY, g10 = Y - XY, g11 = XY
//
// A vector lane is one cell: L neighbouring cells at the same phase are contiguous loads. A tile is
// L cells x up to kMaxPhases columns x R rows.
//
// Numerics. Logits are shifted by each source pixel's maximum; interpolated, this is an upper bound
// of the pixel's maximum (convexity), so no maximum pass is needed while the tile's log2 range is
// at most kGeometricRange: the powers of eq. 4 then stay inside the float range. Beyond it `direct`
// computes every exponential against the pixel's true maximum. Progressions over columns restart
// every kRestart phases, which bounds the error of u and v. One-hot moments are counted in four
// 16-bit fields; kMaxRows x kMaxPhases pixels cannot overflow them.

#include "read_labels.h"

namespace fcnseg {
namespace FCNSEG_ISA {
namespace cross_entropy {

constexpr int kRestart = 4;
constexpr int kPhasesPerPass = kLanes == 16 ? 2 : 1;  // as many as the registers hold
constexpr int kField = kLanes;
constexpr int kRecord = 4 * kLanes;  // four fields of a class
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;

#if defined(__clang__)
#define FCNSEG_UNROLL _Pragma("unroll")
#else
#define FCNSEG_UNROLL _Pragma("GCC unroll 8")
#endif

// ---- rows of logits ----

inline bool shift_row(float* row, int64_t C, int64_t pitch, int64_t vectors, float* maximum,
                      float* lowest_of_vector) {
  // Lane w - 1 needs its right neighbour, so the copies behind the row are shifted as well.
  for (int64_t j = 0; j < pitch; j += kLanes) store(maximum + j, load(row + j));
  for (int64_t c = 1; c < C; ++c) {
    const float* plane = row + c * pitch;
    for (int64_t j = 0; j < pitch; j += kLanes) {
      store(maximum + j, vmax(load(plane + j), load(maximum + j)));
    }
  }
  Float total = splat(0.f);  // NaN where anything is not finite
  for (int64_t c = 0; c < C; ++c) {
    float* plane = row + c * pitch;
    for (int64_t j = 0; j < pitch; j += kLanes) {
      const Float shifted = (load(plane + j) - load(maximum + j)) * kLog2E;
      store(plane + j, shifted);
      total += shifted * 0.f;
    }
  }
  bool regular = !any(total != total);
  for (int64_t v = 0; v < vectors; ++v) {
    Float least = splat(0.f);
    for (int64_t c = 0; c < C; ++c) {
      const float* p = row + c * pitch + v * kLanes;
      least = vmin(least, vmin(load(p), load(p + 1)));
    }
    lowest_of_vector[v] = lowest(least);
    regular &= lowest_of_vector[v] >= -kExactRange;
  }
  return regular;
}

// ---- one tile ----

struct Tile {
  RowGroup& g;
  int64_t v;            // vector
  int64_t base;         // its first lane
  int k0, K;            // phases
  const float* lambda;  // [K][L]
  Float y, dy;
  int jump;       // phase, from k0 on, where the last lane leaps to the left margin; or -1
  bool plain;     // every pixel weighs `present`
  Float log_sum;  // sum of alpha log2 s

  const float* corner(int64_t c, int field) const {
    return g.corners + c * kRecord + field * kField;
  }
};

FCNSEG_INLINE bool bits_clear(const uint8_t* bits, int64_t begin, int count) {
  uint64_t word;
  __builtin_memcpy(&word, bits + (begin >> 3), 8);
  return ((word >> (begin & 7)) & ((uint64_t{1} << count) - 1)) == 0;
}

// Where labels change, for all columns of a row group.
inline void find_label_edges(RowGroup& g) {
  const Int none = splat_int(static_cast<int32_t>(g.C));
  for (int64_t x = 0; x < g.W; x += 16) {
    uint32_t vertical = 0, horizontal = 0, ignored = 0;
    for (int part = 0; part < 16; part += kLanes) {
      const int32_t* p = g.labels + x + part;
      const Int first = load_int(p);
      Int down = {}, across = {}, skip = {};
      for (int r = 0; r < g.rows; ++r, p += g.label_pitch) {
        const Int label = load_int(p);
        down |= label ^ first;
        across |= label ^ load_int(p + 1);
        skip |= label == none;
      }
      vertical |= nonzero_bits(down) << part;
      horizontal |= nonzero_bits(across) << part;
      ignored |= nonzero_bits(skip) << part;
    }
    const uint16_t words[3] = {static_cast<uint16_t>(vertical), static_cast<uint16_t>(horizontal),
                               static_cast<uint16_t>(ignored)};
    __builtin_memcpy(g.vertical + x / 8, words, 2);
    __builtin_memcpy(g.horizontal + x / 8, words + 1, 2);
    __builtin_memcpy(g.ignored + x / 8, words + 2, 2);
  }
}

// eq. 1
inline void load_corners(const Tile& t) {
  const RowGroup& g = t.g;
  float* out = g.corners;
  for (int64_t c = 0; c < g.C; ++c, out += kRecord) {
    const float* top = g.top + c * g.pitch + t.base;
    const float* bottom = g.bottom + c * g.pitch + t.base;
    const Float z00 = load(top), z10 = load(bottom);
    const Float across = load(top + 1) - z00;
    store(out, z00);
    store(out + kField, across);
    store(out + 2 * kField, z10 - z00);
    store(out + 3 * kField, (load(bottom + 1) - z10) - across);
  }
}

// u and v of eq. 2
inline void load_progression(const Tile& t) {
  const Float dx = load(t.g.step + t.base);
  const float* corner = t.g.corners;
  float* out = t.g.progress;
  for (int64_t c = 0; c < t.g.C; ++c, out += kRecord, corner += kRecord) {
    const Float twist = load(corner + 3 * kField);
    store(out + 2 * kField, exp2(dx * fma(t.y, twist, load(corner + kField))));
    store(out + 3 * kField, exp2(dx * (t.dy * twist)));
  }
}

// Packed one-hot moments: pixels, sum of p, sum of r, sum of p r; p is the column's index.
FCNSEG_INLINE uint64_t pack(int n, int p, int r, int pr) {
  return static_cast<uint64_t>(n) | static_cast<uint64_t>(p) << 16 |
         static_cast<uint64_t>(r) << 32 | static_cast<uint64_t>(pr) << 48;
}

// Labels of the last lane, whose columns are not contiguous: one pixel at a time.
inline bool count_last_lane(const Tile& t, int lane) {
  const RowGroup& g = t.g;
  bool valid = true;
  const int32_t* pixel = g.pixel + g.offset[t.v] + int64_t{t.k0} * kLanes + lane;
  for (int k = 0; k < t.K; ++k, pixel += kLanes) {
    if (*pixel == g.W) break;
    const int p = t.k0 + k >= g.right_margin;
    for (int r = 0; r < g.rows; ++r) {
      const int32_t label = g.labels[r * g.label_pitch + *pixel];
      valid &= label != g.C;
      g.one_hot[int64_t{label} * kLanes + lane] += pack(1, p, r, p * r);
    }
  }
  return valid;
}

// Adds the tile's labels to the one-hot moments; whether all its pixels are valid. Lanes with equal
// labels in a whole column, row or cell are counted in closed form.
inline bool count_labels(const Tile& t) {
  const RowGroup& g = t.g;
  const int R = g.rows, sum_r = R * (R - 1) / 2;
  bool valid = true;
  int mixed_lane[kLanes], mixed = 0, mixed_width = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t j = t.base + lane;
    if (j >= g.w) break;
    if (j == g.w - 1) {
      valid &= count_last_lane(t, lane);
      break;
    }
    const int left = g.count[j] - t.k0;
    const int n = left < t.K ? left : t.K;
    if (n <= 0) continue;
    const int64_t x = g.first[j] + t.k0;
    const int32_t* labels = g.labels + x;
    uint64_t* one_hot = g.one_hot + lane;
    const int sum_p = n * (n - 1) / 2;
    valid &= bits_clear(g.ignored, x, n);
    const bool columns_equal = bits_clear(g.vertical, x, n);
    const bool rows_equal = bits_clear(g.horizontal, x, n - 1);
    if (columns_equal & rows_equal) {
      one_hot[int64_t{labels[0]} * kLanes] += pack(n * R, sum_p * R, sum_r * n, sum_p * sum_r);
    } else if (columns_equal) {
      for (int p = 0; p < n; ++p) {
        one_hot[int64_t{labels[p]} * kLanes] += pack(R, p * R, sum_r, p * sum_r);
      }
    } else if (rows_equal) {
      for (int r = 0; r < R; ++r) {
        one_hot[int64_t{labels[r * g.label_pitch]} * kLanes] += pack(n, sum_p, r * n, r * sum_p);
      }
    } else {
      mixed_lane[mixed++] = lane;
      mixed_width = n > mixed_width ? n : mixed_width;
    }
  }
  // Lanes innermost: neighbouring updates then never wait for each other.
  if (mixed == 0) return valid;
  const int32_t* pixel = g.pixel + g.offset[t.v] + int64_t{t.k0} * kLanes;
  for (int p = 0; p < mixed_width; ++p, pixel += kLanes) {
    for (int r = 0; r < R; ++r) {
      const int32_t* labels = g.labels + r * g.label_pitch;
      const uint64_t one = pack(1, p, r, p * r);
      for (int i = 0; i < mixed; ++i) {
        const int lane = mixed_lane[i];
        g.one_hot[int64_t{labels[pixel[lane]]} * kLanes + lane] += one;
      }
    }
  }
  return valid;
}

// The same, every pixel weighted with its upstream gradient.
inline void count_weighted_labels(const Tile& t) {
  const RowGroup& g = t.g;
  using Moments = float __attribute__((vector_size(16)));
  const int32_t* pixel = g.pixel + g.offset[t.v] + int64_t{t.k0} * kLanes;
  const int64_t last = g.w - 1 - t.base;
  for (int k = 0; k < t.K; ++k, pixel += kLanes) {
    for (int r = 0; r < g.rows; ++r) {
      const int32_t* labels = g.labels + r * g.label_pitch;
      const float* upstream = g.upstream + r * g.label_pitch;
      for (int lane = 0; lane < kLanes; ++lane) {
        const int32_t x = pixel[lane];
        const float p = lane == last ? float(t.k0 + k >= g.right_margin) : float(k);
        const Moments unit = {1.f, p, float(r), p * float(r)};
        float* at = g.weighted_one_hot + (int64_t{labels[x]} * kLanes + lane) * 4;
        Moments sum;
        __builtin_memcpy(&sum, at, sizeof sum);
        sum += upstream[x] * unit;
        __builtin_memcpy(at, &sum, sizeof sum);
      }
    }
  }
}

// Takes class c's moments (n, sum p, sum r, sum p r) out of the table; false where there are none.
inline bool take_moments(const RowGroup& g, int64_t c, Float* out) {
  float fields[4][kLanes];
  if (g.upstream != nullptr) {
    float* record = g.weighted_one_hot + c * kLanes * 4;
    for (int j = 0; j < kLanes; ++j) {
      for (int f = 0; f < 4; ++f) fields[f][j] = record[4 * j + f];
    }
    __builtin_memset(record, 0, kLanes * 16);
  } else {
    uint64_t* record = g.one_hot + c * kLanes;
    uint64_t present = 0;
    for (int j = 0; j < kLanes; ++j) present |= record[j];
    if (present == 0) return false;
    for (int j = 0; j < kLanes; ++j) {
      const int32_t low = static_cast<int32_t>(record[j] & 0xffffffff);
      const int32_t high = static_cast<int32_t>(record[j] >> 32);
      fields[0][j] = static_cast<float>(low & 0xffff);
      fields[1][j] = static_cast<float>((low >> 16) & 0xffff);
      fields[2][j] = static_cast<float>(high & 0xffff);
      fields[3][j] = static_cast<float>((high >> 16) & 0xffff);
    }
    __builtin_memset(record, 0, kLanes * 8);
  }
  for (int f = 0; f < 4; ++f) out[f] = load(fields[f]);
  return true;
}

// eq. 5: the sum of target (and smoothed) logits; subtracts the one-hot part from the gradient.
inline Float subtract_one_hot(const Tile& t) {
  RowGroup& g = t.g;
  // lambda = start + p step
  alignas(64) float start[kLanes], step[kLanes];
  store(start, load(t.lambda));
  store(step, load(g.step + t.base));
  const int64_t last = g.w - 1 - t.base;
  if (last < kLanes) {
    start[last] = 0.f;
    step[last] = 1.f;
  }
  const Float x0 = load(start), dx = load(step);
  Float logits = splat(0.f), all[4] = {}, pixels = splat(0.f);
  double weight = 0;
  const auto apply = [&](int64_t c, const Float* m, Float scale) {
    const float* corner = t.corner(c, 0);
    const Float n = m[0] * scale, x = m[1] * scale, r = m[2] * scale, xr = m[3] * scale;
    logits = fma(load(corner), n, logits);
    logits = fma(load(corner + kField), x, logits);
    logits = fma(load(corner + 2 * kField), fma(t.dy, r, t.y * n), logits);
    logits = fma(load(corner + 3 * kField), fma(t.dy, xr, t.y * x), logits);
    if (g.gradient) {
      float* moment = g.moments + c * kRecord;
      store(moment, load(moment) - n);
      store(moment + kField, load(moment + kField) - x);
      store(moment + 2 * kField, load(moment + 2 * kField) - r);
      store(moment + 3 * kField, load(moment + 3 * kField) - xr);
    }
  };
  for (int64_t c = 0; c < g.C; ++c) {
    Float m[4];
    if (!take_moments(g, c, m)) continue;
    m[1] = fma(dx, m[1], x0 * m[0]);
    m[3] = fma(dx, m[3], x0 * m[2]);
    pixels += m[0];
    if (g.class_weight != nullptr) weight += double{g.class_weight[c]} * sum(m[0]);
    if (g.smoothing_weight != nullptr) {
      for (int f = 0; f < 4; ++f) all[f] += m[f];
    }
    apply(c, m, splat(g.one_hot_weight != nullptr ? g.one_hot_weight[c] : 1.f));
  }
  if (g.smoothing_weight != nullptr) {
    for (int64_t c = 0; c < g.C; ++c) apply(c, all, splat(g.smoothing_weight[c]));
  }
  if (g.upstream != nullptr) {
    __builtin_memset(g.weighted_one_hot + g.C * kRecord, 0, kRecord * sizeof(float));
  } else {
    __builtin_memset(g.one_hot + g.C * kLanes, 0, kLanes * sizeof(uint64_t));
    const double count = sum(pixels);
    g.valid += static_cast<int64_t>(count);
    g.weight += g.class_weight != nullptr ? weight : count;
  }
  return logits;
}

// ---- weights of the pixels ----

// alpha of eq. 3, [K][R][L]
inline void load_alpha(const Tile& t) {
  const RowGroup& g = t.g;
  const int32_t* pixel = g.pixel + g.offset[t.v] + int64_t{t.k0} * kLanes;
  const Int none = splat_int(static_cast<int32_t>(g.C));
  float* out = g.alpha;
  for (int k = 0; k < t.K; ++k, pixel += kLanes) {
    const Int x = load_int(pixel);
    for (int r = 0; r < g.rows; ++r, out += kLanes) {
      const Int label = gather_int(g.labels + r * g.label_pitch, x);
      Float alpha = g.softmax_weight != nullptr ? gather(g.softmax_weight, label)
                                                : select(label == none, splat(0.f), splat(1.f));
      if (g.upstream != nullptr) alpha = alpha * gather(g.upstream + r * g.label_pitch, x);
      store(out, alpha);
    }
  }
}

struct Alpha {
  const float* values;  // null: 1
  int stride;           // from row to row
};

FCNSEG_INLINE Alpha alpha_of(const Tile& t, int k) {
  if (!t.plain) return {t.g.alpha + int64_t{k} * t.g.rows * kLanes, kLanes};
  const int64_t row = t.g.offset[t.v] / kLanes + t.k0 + k;
  if (t.g.full[row]) return {nullptr, 0};
  return {t.g.present + row * kLanes, 0};
}

// inverse[r] = alpha_r / s_r; adds alpha log2 s to the tile's sum. `shift` (or null) is what was
// subtracted from z before the exponential.
template <int R>
FCNSEG_INLINE void finish_sums(Tile& t, Alpha alpha, const Float* s, const Float* shift,
                               Float* inverse) {
  // Weights 0 and 1: one logarithm of the product of all mantissas.
  const bool binary = t.g.softmax_weight == nullptr && t.g.upstream == nullptr;
  Float product = splat(1.f), exponents = splat(0.f);
  FCNSEG_UNROLL
  for (int r = 0; r < R; ++r) {
    Float x = s[r], a = splat(1.f);
    if (alpha.values != nullptr) {
      a = load(alpha.values + r * alpha.stride);
      x = select(a != 0.f, x, splat(1.f));
    }
    inverse[r] = alpha.values != nullptr ? a * reciprocal(x) : reciprocal(x);
    if (binary) {
      product = product * mantissa(x);
      exponents = exponents + exponent(x);
      if (shift != nullptr) exponents = fma(a, shift[r], exponents);
    } else {
      const Float log_s = shift != nullptr ? log2(x) + shift[r] : log2(x);
      exponents = fma(a, log_s, exponents);
    }
  }
  t.log_sum += binary ? exponents + log2(product) : exponents;
}

// ---- geometric path, eq. 2 and 4 ----

template <int R>
FCNSEG_INLINE void add_powers(Float e, Float q, Float* s) {
  Float even = e, odd = e * q;
  const Float q2 = q * q;
  s[0] += even;
  if constexpr (R > 1) s[1] += odd;
  FCNSEG_UNROLL
  for (int r = 2; r < R; ++r) {
    if (r & 1) {
      odd = odd * q2;
      s[r] += odd;
    } else {
      even = even * q2;
      s[r] += even;
    }
  }
}

// s[p][r] of P neighbouring phases. After it `progress` holds e and q of the first.
// kAdvance: the phases that the stored progression lags behind; 0 restarts it from the corners.
template <int R, int P, int kAdvance>
inline void geometric_sums(const Tile& t, Float x, Float (&s)[P][R]) {
  for (int p = 0; p < P; ++p) {
    for (int r = 0; r < R; ++r) s[p][r] = splat(0.f);
  }
  const float* corner = t.g.corners;
  float* progress = t.g.progress;
  const Float y = t.y, dy = t.dy;
  const int64_t C = t.g.C;
  for (int64_t c = 0; c < C; ++c, corner += kRecord, progress += kRecord) {
    Float e, q;
    if constexpr (kAdvance == 0) {
      const Float a = fma(x, load(corner + kField), load(corner));
      const Float d = fma(x, load(corner + 3 * kField), load(corner + 2 * kField));
      e = exp2(fma(y, d, a));
      q = exp2(dy * d);
    } else {
      const Float u = load(progress + 2 * kField), v = load(progress + 3 * kField);
      e = load(progress) * u;
      q = load(progress + kField) * v;
      if constexpr (kAdvance == 2) {
        e = e * u;
        q = q * v;
      }
    }
    store(progress, e);
    store(progress + kField, q);
    add_powers<R>(e, q, s[0]);
    if constexpr (P == 2) {
      add_powers<R>(e * load(progress + 2 * kField), q * load(progress + 3 * kField), s[1]);
    }
  }
}

template <int R, int P>
inline void geometric_gradient(const Tile& t, const Float* x, const Float (&inverse)[P][R]) {
  const float* progress = t.g.progress;
  float* moment = t.g.moments;
  const int64_t C = t.g.C;
  for (int64_t c = 0; c < C; ++c, progress += kRecord, moment += kRecord) {
    Float e = load(progress), q = load(progress + kField);
    Float m[4];
    for (int f = 0; f < 4; ++f) m[f] = load(moment + f * kField);
    FCNSEG_UNROLL
    for (int p = 0; p < P; ++p) {
      if (p > 0) {
        e = e * load(progress + 2 * kField);
        q = q * load(progress + 3 * kField);
      }
      Float value = inverse[p][R - 1], slope = splat(0.f);
      FCNSEG_UNROLL
      for (int r = R - 2; r >= 0; --r) {
        slope = r == R - 2 ? value : fma(slope, q, value);
        value = fma(value, q, inverse[p][r]);
      }
      value = value * e;
      m[0] += value;
      m[1] = fma(x[p], value, m[1]);
      if constexpr (R > 1) {
        slope = slope * (e * q);
        m[2] += slope;
        m[3] = fma(x[p], slope, m[3]);
      }
    }
    for (int f = 0; f < 4; ++f) store(moment + f * kField, m[f]);
  }
}

// ---- direct path: one exponential per pixel and class, against the pixel's maximum ----

template <int R>
inline void direct_sums(const Tile& t, Float x, Float* s, Float* maximum) {
  Float y[R];
  for (int r = 0; r < R; ++r) {
    y[r] = t.y + float(r) * t.dy;
    maximum[r] = splat(-3e38f);
    s[r] = splat(0.f);
  }
  const float* corner = t.g.corners;
  float* out = t.g.exponentials;
  for (int64_t c = 0; c < t.g.C; ++c, corner += kRecord, out += R * kLanes) {
    const Float a = fma(x, load(corner + kField), load(corner));
    const Float d = fma(x, load(corner + 3 * kField), load(corner + 2 * kField));
    FCNSEG_UNROLL
    for (int r = 0; r < R; ++r) {
      const Float z = fma(y[r], d, a);
      store(out + r * kLanes, z);
      maximum[r] = vmax(maximum[r], z);
    }
  }
  out = t.g.exponentials;
  for (int64_t c = 0; c < t.g.C; ++c, out += R * kLanes) {
    FCNSEG_UNROLL
    for (int r = 0; r < R; ++r) {
      // below 2^-100 nothing is left of it in a sum of at least 1
      const Float e = exp2(vmax(load(out + r * kLanes) - maximum[r], splat(-100.f)));
      store(out + r * kLanes, e);
      s[r] += e;
    }
  }
}

template <int R>
inline void direct_gradient(const Tile& t, Float x, const Float* inverse) {
  Float inverse_r[R];
  for (int r = 0; r < R; ++r) inverse_r[r] = inverse[r] * float(r);
  const float* e = t.g.exponentials;
  float* moment = t.g.moments;
  for (int64_t c = 0; c < t.g.C; ++c, e += R * kLanes, moment += kRecord) {
    Float value = splat(0.f), slope = splat(0.f);
    FCNSEG_UNROLL
    for (int r = 0; r < R; ++r) {
      const Float er = load(e + r * kLanes);
      value = fma(er, inverse[r], value);
      slope = fma(er, inverse_r[r], slope);
    }
    store(moment, load(moment) + value);
    store(moment + kField, fma(x, value, load(moment + kField)));
    store(moment + 2 * kField, load(moment + 2 * kField) + slope);
    store(moment + 3 * kField, fma(x, slope, load(moment + 3 * kField)));
  }
}

// ---- loss map ----

// Corners of sum_c k_c z_c, eq. 3.
inline void load_smoothed_corners(const Tile& t, Float* out) {
  for (int f = 0; f < 4; ++f) {
    out[f] = splat(0.f);
    for (int64_t c = 0; c < t.g.C; ++c) {
      out[f] = fma(load(t.corner(c, f)), splat(t.g.smoothing_weight[c]), out[f]);
    }
  }
}

// eq. 3 for R rows of one phase
template <int R>
inline void write_losses(const Tile& t, int k, const Float* smoothed, const Float* s,
                         const Float* shift) {
  const RowGroup& g = t.g;
  const int32_t* pixel = g.pixel + g.offset[t.v] + int64_t{t.k0 + k} * kLanes;
  const Int columns = load_int(pixel);
  const Float x = load(t.lambda + k * kLanes);
  Int lane;
  for (int j = 0; j < kLanes; ++j) lane[j] = j;
  const Int none = splat_int(static_cast<int32_t>(g.C));
  const auto interpolate = [&](Float z00, Float across, Float down, Float twist, Float y) {
    return fma(y, fma(x, twist, down), fma(x, across, z00));
  };
  for (int r = 0; r < R; ++r) {
    const Float y = t.y + float(r) * t.dy;
    const Int label = gather_int(g.labels + r * g.label_pitch, columns);
    const Int at = label * kRecord + lane;
    Float target =
        interpolate(gather(g.corners, at), gather(g.corners + kField, at),
                    gather(g.corners + 2 * kField, at), gather(g.corners + 3 * kField, at), y);
    Float log_s = log2(s[r]);
    if (shift != nullptr) log_s += shift[r];
    if (g.softmax_weight != nullptr) {
      log_s = log_s * gather(g.softmax_weight, label);
      target = target * gather(g.one_hot_weight, label);
    }
    Float loss = log_s - target;
    if (smoothed != nullptr) {
      loss -= interpolate(smoothed[0], smoothed[1], smoothed[2], smoothed[3], y);
    }
    alignas(64) float values[kLanes];
    store(values, select(label == none, splat(0.f), loss * kLn2));
    float* out = g.loss_map + r * g.loss_map_pitch;
    for (int j = 0; j < kLanes; ++j) {
      if (pixel[j] < g.W) out[pixel[j]] = values[j];
    }
  }
}

// ---- a tile, a row group ----

// eq. 6
inline void scatter(const Tile& t) {
  const RowGroup& g = t.g;
  const float* moment = g.moments;
  const auto add = [&](float* plane, int64_t c, Float value) {
    float* p = plane + c * g.pitch + t.base;
    store(p, load(p) + value);
  };
  for (int64_t c = 0; c < g.C; ++c, moment += kRecord) {
    const Float s = load(moment), x = load(moment + kField);
    const Float y = fma(t.dy, load(moment + 2 * kField), t.y * s);
    const Float xy = fma(t.dy, load(moment + 3 * kField), t.y * x);
    add(g.top_left, c, (s - x) - (y - xy));
    add(g.top_right, c, x - xy);
    add(g.bottom_left, c, y - xy);
    add(g.bottom_right, c, xy);
  }
}

template <int R, int P, int kAdvance>
FCNSEG_INLINE void geometric_pass(Tile& t, int k, const Float* smoothed) {
  Float x[P], s[P][R], inverse[P][R];
  for (int p = 0; p < P; ++p) x[p] = load(t.lambda + (k + p) * kLanes);
  geometric_sums<R, P, kAdvance>(t, x[0], s);
  if (t.g.loss_map != nullptr) {
    for (int p = 0; p < P; ++p) write_losses<R>(t, k + p, smoothed, s[p], nullptr);
    return;
  }
  for (int p = 0; p < P; ++p) finish_sums<R>(t, alpha_of(t, k + p), s[p], nullptr, inverse[p]);
  if (t.g.gradient) geometric_gradient<R, P>(t, x, inverse);
}

template <int R>
inline void geometric_tile(Tile& t, const Float* smoothed) {
  // The progression across columns leaves the cell by up to 3 steps in lanes that have run out of
  // pixels; with wide steps that could overflow.
  const bool progressive = t.g.step_x <= 0.25f && t.g.step_y <= 0.25f && t.K > 1;
  if (progressive) load_progression(t);
  int done = 0;  // phases since the last restart
  int advance = 0;
  for (int k = 0; k < t.K;) {
    if (!progressive || k == t.jump || done >= kRestart) done = 0;
    const int phases =
        kPhasesPerPass == 2 && progressive && k + 1 < t.K && k + 1 != t.jump && done + 2 <= kRestart
            ? 2
            : 1;
    const int lag = done == 0 ? 0 : advance;
    if constexpr (kPhasesPerPass == 2) {
      if (phases == 2) {
        if (lag == 0) geometric_pass<R, 2, 0>(t, k, smoothed);
        if (lag == 1) geometric_pass<R, 2, 1>(t, k, smoothed);
        if (lag == 2) geometric_pass<R, 2, 2>(t, k, smoothed);
      }
    }
    if (phases == 1) {
      if (lag == 0) geometric_pass<R, 1, 0>(t, k, smoothed);
      if (lag == 1) geometric_pass<R, 1, 1>(t, k, smoothed);
      if (kPhasesPerPass == 2 && lag == 2) geometric_pass<R, 1, 2>(t, k, smoothed);
    }
    advance = phases;
    done += phases;
    k += phases;
  }
}

template <int R>
inline void direct_tile(Tile& t, const Float* smoothed) {
  for (int k = 0; k < t.K; ++k) {
    const Float x = load(t.lambda + k * kLanes);
    Float s[R], maximum[R], inverse[R];
    direct_sums<R>(t, x, s, maximum);
    if (t.g.loss_map != nullptr) {
      write_losses<R>(t, k, smoothed, s, maximum);
      continue;
    }
    finish_sums<R>(t, alpha_of(t, k), s, maximum, inverse);
    if (t.g.gradient) direct_gradient<R>(t, x, inverse);
  }
}

template <int R>
inline void process_tile(Tile& t) {
  RowGroup& g = t.g;
  load_corners(t);
  const float top = g.lowest_top[t.v], bottom = g.lowest_bottom[t.v];
  const bool direct = (top < bottom ? top : bottom) < -kGeometricRange;
  g.tiles += 1;
  g.direct_tiles += direct;
  Float smoothed[4];
  const bool map = g.loss_map != nullptr;
  if (map && g.smoothing_weight != nullptr) load_smoothed_corners(t, smoothed);
  if (!map) {
    bool valid = false;
    if (g.upstream != nullptr) {
      count_weighted_labels(t);
    } else {
      valid = count_labels(t);
    }
    t.plain = valid && g.softmax_weight == nullptr;
    if (!t.plain) load_alpha(t);
    if (g.gradient) __builtin_memset(g.moments, 0, g.C * kRecord * sizeof(float));
  }
  const Float* extra = map && g.smoothing_weight != nullptr ? smoothed : nullptr;
  if (direct) {
    direct_tile<R>(t, extra);
  } else {
    geometric_tile<R>(t, extra);
  }
  if (map) return;
  g.loss += sum(t.log_sum) - sum(subtract_one_hot(t));
  if (g.gradient) scatter(t);
}

template <int R>
inline void process_rows(RowGroup& g) {
  for (int64_t v = 0; v < g.vectors; ++v) {
    for (int k0 = 0; k0 < g.phases[v]; k0 += kMaxPhases) {
      const int left = g.phases[v] - k0;
      Tile t{g,
             v,
             v * kLanes,
             k0,
             left < kMaxPhases ? left : kMaxPhases,
             g.lambda + g.offset[v] + int64_t{k0} * kLanes,
             splat(g.lambda_y),
             splat(g.step_y),
             v == g.vectors - 1 ? g.right_margin - k0 : -1,
             false,
             splat(0.f)};
      process_tile<R>(t);
    }
  }
}

inline void process(RowGroup& g) {
  if (g.loss_map == nullptr && g.upstream == nullptr) find_label_edges(g);
  switch (g.rows) {
    case 1:
      return process_rows<1>(g);
    case 2:
      return process_rows<2>(g);
    case 3:
      return process_rows<3>(g);
    case 4:
      return process_rows<4>(g);
    case 5:
      return process_rows<5>(g);
    case 6:
      return process_rows<6>(g);
    case 7:
      return process_rows<7>(g);
    default:
      return process_rows<8>(g);
  }
}

#undef FCNSEG_UNROLL

inline RowKernel kernel(const char* name) {
  return {name, kLanes, &shift_row, &process, &read_label_row};
}

}  // namespace cross_entropy
}  // namespace FCNSEG_ISA
}  // namespace fcnseg
