// The arithmetic of conv_transpose_cross_entropy and conv_transpose_argmax in fp32; compiled once
// per instruction set (for_each_isa.h).
//
// Maths. The target's pixel (y, x) is phase (f_y, f_x) = (y, x) mod stride of cell (j, q). The taps
// of a phase, kernel index k with (f + crop + padding - dilation k) divisible by the stride, read
// input i = cell + o, o = (f + crop + padding - dilation k) / stride. With r = (class, phase) and
// k = (tap, input channel), at one row of cells:
//   1. z[r][q] = bias[r] + sum_k A[r][k] X[k][q]          A the weights of a row of phases
//   2. t_c = (z_c - max z) log2 e,  e_c = 2^t_c,  s = sum e_c
//      l = ln 2 (alpha log2 s - beta t_y - sum_c k_c t_c)
//   3. d_c = u (alpha e_c / s - beta [c = y] - k_c)       u the upstream gradient, or 1
//      alpha softmax weight, beta one-hot weight, k smoothing weight (cross_entropy.h)
//   4. dX[k][q] += sum_r A[r][k] d[r][q]
//   5. dA[r][k] += sum_q d[r][q] X[k][q]
// The label of argmax is the lowest c with the greatest z_c.
//
// In eq. 1 to 4 a lane is a cell. Eq. 5 has k in the lanes, from a transposed X. Where every class
// has its own channel (depthwise), k is a tap alone, eq. 4 and 5 read d once, and the sums over q
// of eq. 5 and of d (the bias) are left in the lanes. There the tile holds, where nothing is
// smoothed and so alpha = beta,
//   6. e_c - s [c = y],  and in row C the factor u alpha / s that makes it d_c
// and where a bound of |z| allows it (powers), A and bias carry the log2 e of eq. 2, and e_c is
// 2^z_c: max z is not subtracted.

#include "read_labels.h"

namespace fcnseg {
namespace FCNSEG_ISA {
namespace conv_transpose {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
// Rows and vectors of a block of a product: its sums stay in registers.
constexpr int kRows = 6;
constexpr int kVectors = kLanes == 16 ? 4 : 2;
// Terms in a row of a sum: longer ones lose accuracy, and cache.
constexpr int64_t kInner = 128;

#if defined(__clang__)
#define FCNSEG_UNROLL _Pragma("unroll")
#else
#define FCNSEG_UNROLL _Pragma("GCC unroll 8")
#endif

// ---- products ----

template <int M, int V>
inline void multiply_block(const Product<float>& g, int64_t row, int64_t column) {
  Float sum[M][V];
  FCNSEG_UNROLL
  for (int m = 0; m < M; ++m) {
    FCNSEG_UNROLL
    for (int v = 0; v < V; ++v) sum[m][v] = splat(g.start != nullptr ? g.start[row + m] : 0.f);
  }
  const float* a[M];
  for (int m = 0; m < M; ++m) a[m] = g.a + (row + m) * g.a_row;
  for (int64_t k = 0, at = 0; k < g.inner; ++k, at += g.a_inner) {
    const float* b = g.b[k] + column;
    Float x[V];
    FCNSEG_UNROLL
    for (int v = 0; v < V; ++v) x[v] = load(b + v * kLanes);
    FCNSEG_UNROLL
    for (int m = 0; m < M; ++m) {
      const Float factor = splat(a[m][at]);
      FCNSEG_UNROLL
      for (int v = 0; v < V; ++v) sum[m][v] = fma(factor, x[v], sum[m][v]);
    }
  }
  FCNSEG_UNROLL
  for (int m = 0; m < M; ++m) {  // one after the other: rows may overlap
    float* c = g.c[row + m] + column;
    FCNSEG_UNROLL
    for (int v = 0; v < V; ++v) {
      store(c + v * kLanes, g.start != nullptr ? sum[m][v] : load(c + v * kLanes) + sum[m][v]);
    }
  }
}

// Size of the next of the blocks, as equal as can be, that `left` is cut into.
FCNSEG_INLINE int64_t next_block(int64_t left, int64_t largest) {
  const int64_t blocks = (left + largest - 1) / largest;
  return (left + blocks - 1) / blocks;
}

template <int V>
inline void multiply_columns(const Product<float>& g, int64_t column) {
  for (int64_t row = 0; row < g.rows;) {
    const int64_t M = next_block(g.rows - row, kRows);
    switch (M) {
      case 1:
        multiply_block<1, V>(g, row, column);
        break;
      case 2:
        multiply_block<2, V>(g, row, column);
        break;
      case 3:
        multiply_block<3, V>(g, row, column);
        break;
      case 4:
        multiply_block<4, V>(g, row, column);
        break;
      case 5:
        multiply_block<5, V>(g, row, column);
        break;
      default:
        multiply_block<6, V>(g, row, column);
        break;
    }
    row += M;
  }
}

inline void multiply_inner(const Product<float>& g) {
  for (int64_t column = 0; column < g.columns;) {
    const int64_t V = next_block((g.columns - column) / kLanes, kVectors);
    switch (V) {
      case 1:
        multiply_columns<1>(g, column);
        break;
      case 2:
        multiply_columns<2>(g, column);
        break;
#if FCNSEG_ISA_LEVEL == 2
      case 3:
        multiply_columns<3>(g, column);
        break;
      default:
        multiply_columns<4>(g, column);
        break;
#endif
    }
    column += V * kLanes;
  }
}

inline void multiply(const Product<float>& g) {
  Product<float> part = g;
  for (int64_t k = 0; k == 0 || k < g.inner; k += kInner) {
    part.inner = g.inner - k < kInner ? g.inner - k : kInner;
    part.a = g.a + k * g.a_inner;
    part.b = g.b + k;
    if (k > 0) part.start = nullptr;
    multiply_inner(part);
  }
}

// ---- softmax, loss, gradient of the logits ----

// U vectors of pixels: vector u has the logits z[u * z_step + c * stride], and the label at
// pixel + u * pixel_step.
template <int U>
FCNSEG_INLINE void gather_targets(const SoftmaxTile<float>& g, const float* z, int64_t z_step,
                                  int64_t pixel, int64_t pixel_step, Float (&target)[U]) {
  Int lane;
  for (int j = 0; j < kLanes; ++j) lane[j] = j;
  FCNSEG_UNROLL
  for (int u = 0; u < U; ++u) {
    const Int label = load_int(g.labels + pixel + u * pixel_step);
    target[u] = gather(z + u * z_step, label * static_cast<int32_t>(g.stride) + lane);
  }
}

// The end of eq. 2, with log2(inside) for log2 s, and eq. 3, whose e_c are in z. kFactor: as eq. 6.
template <int U, bool kGradient, bool kSmooth, bool kFactor>
FCNSEG_INLINE void finish_pixels(SoftmaxTile<float>& g, float* z, int64_t z_step, int64_t pixel,
                                 int64_t pixel_step, const Float (&s)[U], const Float (&inside)[U],
                                 const Float (&target)[U], const Float (&smoothed)[U], Float& loss,
                                 Float& weight) {
  constexpr bool kScale = kSmooth || !kFactor;
  const Int none = splat_int(static_cast<int32_t>(g.C));
  Float factor[U], shift[U];
  float* const last = z + g.C * g.stride;
  FCNSEG_UNROLL
  for (int u = 0; u < U; ++u) {
    const Int label = load_int(g.labels + pixel + u * pixel_step);
    const Int ignored = label == none;
    Float alpha, beta;
    if (g.softmax_weight != nullptr) {
      alpha = gather(g.softmax_weight, label);
      beta = gather(g.one_hot_weight, label);
    } else {
      alpha = beta = select(ignored, splat(0.f), splat(1.f));
    }
    if (g.class_weight != nullptr) {
      weight += gather(g.class_weight, label);
    } else {
      weight += select(ignored, splat(0.f), splat(1.f));
    }
    Float l = alpha * log2(inside[u]) - beta * target[u];
    if constexpr (kSmooth) l -= smoothed[u];
    l = select(ignored, splat(0.f), l * kLn2);
    loss += l;
    g.valid += kLanes - __builtin_popcount(nonzero_bits(ignored));
    if (g.loss_map != nullptr) store(g.loss_map + pixel + u * pixel_step, l);
    if constexpr (kGradient) {
      shift[u] = select(ignored, splat(0.f), splat(1.f));
      if (g.upstream != nullptr) {
        const Float upstream = load(g.upstream + pixel + u * pixel_step);
        alpha = alpha * upstream;
        beta = beta * upstream;
        shift[u] = shift[u] * upstream;
      }
      factor[u] = alpha / s[u];
      store(last + u * z_step, kScale ? beta : s[u]);
    }
  }
  if constexpr (kGradient && kScale) {
    for (int64_t c = 0; c < g.C; ++c) {
      float* row = z + c * g.stride;
      FCNSEG_UNROLL
      for (int u = 0; u < U; ++u) {
        Float d = load(row + u * z_step) * factor[u];
        if constexpr (kSmooth) d -= splat(g.smoothing_weight[c]) * shift[u];
        store(row + u * z_step, d);
      }
    }
  }
  if constexpr (kGradient) {
    // From row C, which also takes those of the ignored pixels.
    FCNSEG_UNROLL
    for (int u = 0; u < U; ++u) {
      for (int j = 0; j < kLanes; ++j) {
        const int64_t at = u * z_step + j;
        z[g.labels[pixel + u * pixel_step + j] * g.stride + at] -= last[at];
      }
    }
  }
  if constexpr (kGradient && kFactor) {
    FCNSEG_UNROLL
    for (int u = 0; u < U; ++u) {
      store(last + u * z_step, kScale ? splat(1.f) : factor[u]);
    }
  }
}

// eq. 2 and 3 given the greatest logits.
template <int U, bool kGradient, bool kSmooth, bool kDepthwise>
FCNSEG_INLINE void softmax_pixels(SoftmaxTile<float>& g, float* z, int64_t z_step, int64_t pixel,
                                  int64_t pixel_step, const Float (&maximum)[U], Float& loss,
                                  Float& weight) {
  Float target[U], smoothed[U], s[U];
  gather_targets(g, z, z_step, pixel, pixel_step, target);
  FCNSEG_UNROLL
  for (int u = 0; u < U; ++u) {
    target[u] = (target[u] - maximum[u]) * kLog2E;
    smoothed[u] = s[u] = splat(0.f);
  }
  for (int64_t c = 0; c < g.C; ++c) {
    float* row = z + c * g.stride;
    FCNSEG_UNROLL
    for (int u = 0; u < U; ++u) {
      const Float t = (load(row + u * z_step) - maximum[u]) * kLog2E;
      if constexpr (kSmooth) smoothed[u] = fma(splat(g.smoothing_weight[c]), t, smoothed[u]);
      // below 2^-100 nothing is left of it in a sum of at least 1
      const Float e = exp2<5>(vmax(t, splat(-100.f)));
      if constexpr (kGradient) store(row + u * z_step, e);
      s[u] += e;
    }
  }
  finish_pixels<U, kGradient, kSmooth, kDepthwise>(g, z, z_step, pixel, pixel_step, s, s, target,
                                                   smoothed, loss, weight);
}

template <int U, bool kGradient, bool kSmooth>
inline void softmax_columns(SoftmaxTile<float>& g, float* z, int64_t pixel, Float& loss,
                            Float& weight) {
  Float maximum[U];
  FCNSEG_UNROLL
  for (int u = 0; u < U; ++u) maximum[u] = load(z + u * kLanes);
  for (int64_t c = 1; c < g.C; ++c) {
    const float* row = z + c * g.stride;
    FCNSEG_UNROLL
    for (int u = 0; u < U; ++u) maximum[u] = vmax(maximum[u], load(row + u * kLanes));
  }
  softmax_pixels<U, kGradient, kSmooth, false>(g, z, kLanes, pixel, kLanes, maximum, loss, weight);
}

template <bool kGradient, bool kSmooth>
inline void softmax_tile(SoftmaxTile<float>& g) {
  Float loss = splat(0.f), weight = splat(0.f);
  for (int p = 0; p < g.P; ++p) {
    float* z = g.z + p * g.width;
    int64_t q = 0;
    for (; q + 2 * kLanes <= g.width; q += 2 * kLanes) {
      softmax_columns<2, kGradient, kSmooth>(g, z + q, p * g.pitch + q, loss, weight);
    }
    if (q < g.width) {
      softmax_columns<1, kGradient, kSmooth>(g, z + q, p * g.pitch + q, loss, weight);
    }
  }
  g.loss += sum(loss);
  g.weight += sum(weight);
}

inline void softmax(SoftmaxTile<float>& g) {
  const bool smooth = g.smoothing_weight != nullptr;
  if (g.gradient) return smooth ? softmax_tile<true, true>(g) : softmax_tile<true, false>(g);
  smooth ? softmax_tile<false, true>(g) : softmax_tile<false, false>(g);
}

// ---- depthwise ----

template <int N>
struct Number {
  static constexpr int value = N;
};
template <typename F>
inline void with_phases(int P, F call) {
  switch (P) {
    case 1:
      return call(Number<1>{});
    case 2:
      return call(Number<2>{});
    case 3:
      return call(Number<3>{});
    default:
      return call(Number<4>{});
  }
}

// eq. 1 of a vector of cells; `result`: the greatest logits. kPowers: 2^z in their place, and their
// sums.
template <int P, bool kPowers>
FCNSEG_INLINE void depthwise_cells(const Depthwise& g, int64_t q, Float (&result)[P]) {
  const float* w = g.weight;
  const float* x[4];
  for (int i = 0; i < 4; ++i) x[i] = g.tap[i].x + q;
  float* z = g.z + q;
  FCNSEG_UNROLL
  for (int p = 0; p < P; ++p) result[p] = splat(kPowers ? 0.f : -__FLT_MAX__);
  for (int64_t c = 0; c < g.C; ++c, z += g.stride) {
    Float sum[P];
    FCNSEG_UNROLL
    for (int p = 0; p < P; ++p) sum[p] = splat(g.bias[c]);
    FCNSEG_UNROLL
    for (int i = 0; i < 4; ++i) {
      const Float value = load(x[i]);
      x[i] += g.tap[i].x_pitch;
      FCNSEG_UNROLL
      for (int p = 0; p < P; ++p) sum[p] = fma(splat(w[4 * p + i]), value, sum[p]);
    }
    w += 4 * P;
    for (int t = 4; t < g.taps; t += 4, w += 4 * P) {
      FCNSEG_UNROLL
      for (int i = 0; i < 4; ++i) {
        const Float value = load(g.tap[t + i].x + c * g.tap[t + i].x_pitch + q);
        FCNSEG_UNROLL
        for (int p = 0; p < P; ++p) sum[p] = fma(splat(w[4 * p + i]), value, sum[p]);
      }
    }
    FCNSEG_UNROLL
    for (int p = 0; p < P; ++p) {
      if constexpr (kPowers) sum[p] = exp2<5>(sum[p]);
      store(z + p * g.width, sum[p]);
      result[p] = kPowers ? result[p] + sum[p] : vmax(result[p], sum[p]);
    }
  }
}

inline void depthwise_forward(const Depthwise& g) {
  with_phases(g.P, [&](auto P) {
    Float maximum[P.value];
    for (int64_t q = 0; q < g.width; q += kLanes) depthwise_cells<P.value, false>(g, q, maximum);
  });
}

template <int P, bool kGradient, bool kSmooth, bool kPowers>
inline void depthwise_softmax_tile(const Depthwise& d, SoftmaxTile<float>& g) {
  Float loss = splat(0.f), weight = splat(0.f);
  for (int64_t q = 0; q < g.width; q += kLanes) {
    float* z = g.z + q;
    Float result[P];
    depthwise_cells<P, kPowers>(d, q, result);
    if constexpr (kPowers) {
      // alpha = beta: log2 s - log2 e_y is one logarithm, of a quotient of mantissas.
      Float power[P], inside[P], target[P];
      gather_targets(g, z, g.width, q, g.pitch, power);
      FCNSEG_UNROLL
      for (int p = 0; p < P; ++p) {
        inside[p] = mantissa(result[p]) * reciprocal(mantissa(power[p]));
        target[p] = exponent(power[p]) - exponent(result[p]);
      }
      finish_pixels<P, kGradient, false, true>(g, z, g.width, q, g.pitch, result, inside, target,
                                               target, loss, weight);
    } else {
      softmax_pixels<P, kGradient, kSmooth, true>(g, z, g.width, q, g.pitch, result, loss, weight);
    }
  }
  g.loss += sum(loss);
  g.weight += sum(weight);
}

template <int P, bool kGradient>
inline void depthwise_softmax_of(const Depthwise& d, SoftmaxTile<float>& g) {
  if (g.smoothing_weight != nullptr) {
    depthwise_softmax_tile<P, kGradient, true, false>(d, g);
  } else if (d.powers) {
    depthwise_softmax_tile<P, kGradient, false, true>(d, g);
  } else {
    depthwise_softmax_tile<P, kGradient, false, false>(d, g);
  }
}

inline void depthwise_softmax(const Depthwise& d, SoftmaxTile<float>& g) {
  with_phases(g.P, [&](auto P) {
    g.gradient ? depthwise_softmax_of<P.value, true>(d, g)
               : depthwise_softmax_of<P.value, false>(d, g);
  });
}

// eq. 4 to 6 of the pair of taps from `first` on
template <int P, bool kToInput, bool kToWeight>
inline void depthwise_backward_pair(const Depthwise& g, int first) {
  const DepthwiseTap &tap0 = g.tap[first], &tap1 = g.tap[first + 1];
  const float* factor = g.z + g.C * g.stride;
  for (int64_t c = 0; c < g.C; ++c) {
    const float* d = g.z + c * g.stride;
    const int64_t at = (c * g.taps + first / 4 * 4) * P + first % 4;  // of phase p: 4 p behind
    const float* x0 = tap0.x + c * tap0.x_pitch;
    const float* x1 = tap1.x + c * tap1.x_pitch;
    float* to0 = tap0.gradient + c * tap0.gradient_pitch;
    float* to1 = tap1.gradient + c * tap1.gradient_pitch;
    Float w0[P], w1[P], sum0[P], sum1[P], bias = splat(0.f);
    FCNSEG_UNROLL
    for (int p = 0; p < P; ++p) {
      w0[p] = splat(g.weight[at + 4 * p]);
      w1[p] = splat(g.weight[at + 4 * p + 1]);
      if constexpr (kToWeight) {
        sum0[p] = load(g.to_weight + (at + 4 * p) * kLanes);
        sum1[p] = load(g.to_weight + (at + 4 * p + 1) * kLanes);
      }
    }
    for (int64_t q = 0; q < g.width; q += kLanes) {
      const Float a0 = load(x0 + q), a1 = load(x1 + q);
      Float b0, b1;
      if constexpr (kToInput) {
        b0 = load(to0 + q);
        b1 = load(to1 + q);
      }
      FCNSEG_UNROLL
      for (int p = 0; p < P; ++p) {
        const Float value = load(d + p * g.width + q) * load(factor + p * g.width + q);
        bias += value;
        if constexpr (kToInput) {
          b0 = fma(w0[p], value, b0);
          b1 = fma(w1[p], value, b1);
        }
        if constexpr (kToWeight) {
          sum0[p] = fma(a0, value, sum0[p]);
          sum1[p] = fma(a1, value, sum1[p]);
        }
      }
      if constexpr (kToInput) {
        store(to0 + q, b0);
        store(to1 + q, b1);
      }
    }
    FCNSEG_UNROLL
    for (int p = 0; kToWeight && p < P; ++p) {
      store(g.to_weight + (at + 4 * p) * kLanes, sum0[p]);
      store(g.to_weight + (at + 4 * p + 1) * kLanes, sum1[p]);
    }
    if (first == 0 && g.to_bias != nullptr) {
      store(g.to_bias + c * kLanes, load(g.to_bias + c * kLanes) + bias);
    }
  }
}

#if FCNSEG_ISA_LEVEL == 2
// The same of a four whose first pair is the second one a column further on, so that a cell's
// gradient of the second and its left neighbour's of the first are added to one place.
template <int P, bool kToInput, bool kToWeight>
inline void depthwise_backward_four(const Depthwise& g, int first) {
  const DepthwiseTap* tap = g.tap + first;
  const float* factor = g.z + g.C * g.stride;
  for (int64_t c = 0; c < g.C; ++c) {
    const float* d = g.z + c * g.stride;
    const float* w = g.weight + (c * g.taps + first) * P;
    float* const to_weight = kToWeight ? g.to_weight + (c * g.taps + first) * P * kLanes : nullptr;
    const float* x[4];
    float* to[2];
    Float sums[P][4], carry[2], bias = splat(0.f);
    FCNSEG_UNROLL
    for (int i = 0; i < 4; ++i) {
      x[i] = tap[i].x + c * tap[i].x_pitch;
      FCNSEG_UNROLL
      for (int p = 0; kToWeight && p < P; ++p) sums[p][i] = load(to_weight + (4 * p + i) * kLanes);
    }
    FCNSEG_UNROLL
    for (int i = 0; i < 2; ++i) {
      to[i] = tap[i + 2].gradient + c * tap[i + 2].gradient_pitch;
      carry[i] = splat(0.f);
    }
    for (int64_t q = 0; q < g.width; q += kLanes) {
      Float a[4], b[4];
      FCNSEG_UNROLL
      for (int i = 0; i < 4; ++i) {
        if constexpr (kToWeight) a[i] = load(x[i] + q);
        b[i] = splat(0.f);
      }
      FCNSEG_UNROLL
      for (int p = 0; p < P; ++p) {
        const Float value = load(d + p * g.width + q) * load(factor + p * g.width + q);
        bias += value;
        FCNSEG_UNROLL
        for (int i = 0; i < 4; ++i) {
          if constexpr (kToInput) b[i] = fma(splat(w[4 * p + i]), value, b[i]);
          if constexpr (kToWeight) sums[p][i] = fma(a[i], value, sums[p][i]);
        }
      }
      FCNSEG_UNROLL
      for (int i = 0; kToInput && i < 2; ++i) {
        store(to[i] + q, load(to[i] + q) + (b[i + 2] + shift_in(carry[i], b[i])));
        carry[i] = b[i];
      }
    }
    FCNSEG_UNROLL
    for (int i = 0; kToInput && i < 2; ++i) to[i][g.width] += carry[i][kLanes - 1];
    FCNSEG_UNROLL
    for (int i = 0; kToWeight && i < 4; ++i) {
      FCNSEG_UNROLL
      for (int p = 0; p < P; ++p) store(to_weight + (4 * p + i) * kLanes, sums[p][i]);
    }
    if (first == 0 && g.to_bias != nullptr) {
      store(g.to_bias + c * kLanes, load(g.to_bias + c * kLanes) + bias);
    }
  }
}

FCNSEG_INLINE bool adjacent(const DepthwiseTap* tap) {
  bool result = true;
  for (int i = 0; i < 2; ++i) {
    result &= tap[i].gradient == tap[i + 2].gradient + (tap[i].gradient_pitch != 0);
  }
  return result;
}
#endif

template <int P, bool kToInput, bool kToWeight>
inline void depthwise_backward_tile(const Depthwise& g) {
  int first = 0;
  do {
#if FCNSEG_ISA_LEVEL == 2
    if (first % 4 == 0 && first + 2 < 2 * g.pairs && adjacent(g.tap + first)) {
      depthwise_backward_four<P, kToInput, kToWeight>(g, first);
      first += 4;
      continue;
    }
#endif
    depthwise_backward_pair<P, kToInput, kToWeight>(g, first);
    first += 2;
  } while (first < 2 * g.pairs);
}

inline void depthwise_backward(const Depthwise& g) {
  with_phases(g.P, [&](auto P) {
    if (g.to_weight == nullptr) {
      g.to_input ? depthwise_backward_tile<P.value, true, false>(g)
                 : depthwise_backward_tile<P.value, false, false>(g);
    } else {
      g.to_input ? depthwise_backward_tile<P.value, true, true>(g)
                 : depthwise_backward_tile<P.value, false, true>(g);
    }
  });
}

// ---- argmax and sums ----

inline void argmax(const float* z, int64_t C, int P, int64_t width, int64_t stride, int32_t* labels,
                   int64_t pitch) {
  for (int p = 0; p < P; ++p) {
    for (int64_t q = 0; q < width; q += kLanes) {
      const float* at = z + p * width + q;
      Float best = load(at);
      Int id = splat_int(0);
      for (int64_t c = 1; c < C; ++c) {
        keep_greater(load(at + c * stride), splat_int(static_cast<int32_t>(c)), best, id);
      }
      store_int(labels + p * pitch + q, id);
    }
  }
}

inline void add_sums(const float* z, int64_t C, int64_t size, double* sums) {
  for (int64_t c = 0; c < C; ++c, z += size) {
    Float total = splat(0.f);
    for (int64_t i = 0; i < size; i += kLanes) total += load(z + i);
    sums[c] += sum(total);
  }
}

inline void take_lanes(float* lanes, int64_t size, float* sums) {
  for (int64_t i = 0; i < size; ++i) {
    sums[i] = static_cast<float>(sum(load(lanes + i * kLanes)));
    store(lanes + i * kLanes, splat(0.f));
  }
}

#undef FCNSEG_UNROLL

inline ConvTransposeKernel<float> kernel() {
  return {kLanes,   &multiply, &depthwise_forward, &depthwise_softmax, &depthwise_backward,
          &softmax, &argmax,   &add_sums,          &take_lanes,        &read_label_row};
}

}  // namespace conv_transpose
}  // namespace FCNSEG_ISA
}  // namespace fcnseg
