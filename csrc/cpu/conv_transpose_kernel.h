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
// has its own channel (depthwise), k is a tap alone and eq. 4 and 5 read d once; there the sum
// over q of eq. 5 is left in the lanes.

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

// ---- depthwise ----

// eq. 1
template <int P>
inline void depthwise_forward_phases(const Depthwise& g) {
  for (int64_t c = 0; c < g.C; ++c) {
    float* z = g.z + c * P * g.width;
    for (int t = 0; t < g.taps; t += 4) {
      const float* x[4];
      Float w[P][4];
      FCNSEG_UNROLL
      for (int i = 0; i < 4; ++i) {
        x[i] = g.tap[t + i].x + c * g.tap[t + i].x_pitch;
        FCNSEG_UNROLL
        for (int p = 0; p < P; ++p) w[p][i] = splat(g.weight[(c * P + p) * g.taps + t + i]);
      }
      const Float bias = splat(g.bias[c]);
      for (int64_t q = 0; q < g.width; q += kLanes) {
        const Float x0 = load(x[0] + q), x1 = load(x[1] + q), x2 = load(x[2] + q),
                    x3 = load(x[3] + q);
        FCNSEG_UNROLL
        for (int p = 0; p < P; ++p) {
          float* out = z + p * g.width + q;
          Float sum = t == 0 ? bias : load(out);
          sum = fma(w[p][0], x0, sum);
          sum = fma(w[p][1], x1, sum);
          sum = fma(w[p][2], x2, sum);
          store(out, fma(w[p][3], x3, sum));
        }
      }
    }
  }
}

// eq. 4 and 5
template <int P, bool kToInput, bool kToWeight>
inline void depthwise_backward_phases(const Depthwise& g) {
  for (int64_t c = 0; c < g.C; ++c) {
    const float* d = g.z + c * P * g.width;
    for (int pair = 0; pair < g.pairs; ++pair) {
      const DepthwiseTap &first = g.tap[2 * pair], &second = g.tap[2 * pair + 1];
      const float* x0 = first.x + c * first.x_pitch;
      const float* x1 = second.x + c * second.x_pitch;
      float* g0 = first.gradient + c * first.gradient_pitch;
      float* g1 = second.gradient + c * second.gradient_pitch;
      Float w0[P], w1[P], sum0[P], sum1[P];
      FCNSEG_UNROLL
      for (int p = 0; p < P; ++p) {
        const int64_t at = (c * P + p) * g.taps + 2 * pair;
        if constexpr (kToInput) {
          w0[p] = splat(g.weight[at]);
          w1[p] = splat(g.weight[at + 1]);
        }
        if constexpr (kToWeight) {
          sum0[p] = load(g.to_weight + at * kLanes);
          sum1[p] = load(g.to_weight + (at + 1) * kLanes);
        }
      }
      for (int64_t q = 0; q < g.width; q += kLanes) {
        const Float a0 = load(x0 + q), a1 = load(x1 + q);
        Float b0, b1;
        if constexpr (kToInput) {
          b0 = load(g0 + q);
          b1 = load(g1 + q);
        }
        FCNSEG_UNROLL
        for (int p = 0; p < P; ++p) {
          const Float value = load(d + p * g.width + q);
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
          store(g0 + q, b0);
          store(g1 + q, b1);
        }
      }
      if constexpr (kToWeight) {
        FCNSEG_UNROLL
        for (int p = 0; p < P; ++p) {
          const int64_t at = (c * P + p) * g.taps + 2 * pair;
          store(g.to_weight + at * kLanes, sum0[p]);
          store(g.to_weight + (at + 1) * kLanes, sum1[p]);
        }
      }
    }
  }
}

inline void depthwise_forward(const Depthwise& g) {
  switch (g.P) {
    case 1:
      return depthwise_forward_phases<1>(g);
    case 2:
      return depthwise_forward_phases<2>(g);
    case 3:
      return depthwise_forward_phases<3>(g);
    default:
      return depthwise_forward_phases<4>(g);
  }
}

template <int P>
inline void depthwise_backward_of(const Depthwise& g) {
  if (g.to_weight == nullptr) return depthwise_backward_phases<P, true, false>(g);
  if (!g.to_input) return depthwise_backward_phases<P, false, true>(g);
  depthwise_backward_phases<P, true, true>(g);
}

inline void depthwise_backward(const Depthwise& g) {
  switch (g.P) {
    case 1:
      return depthwise_backward_of<1>(g);
    case 2:
      return depthwise_backward_of<2>(g);
    case 3:
      return depthwise_backward_of<3>(g);
    default:
      return depthwise_backward_of<4>(g);
  }
}

// ---- softmax, loss, gradient of the logits ----

// eq. 2 and 3 for U vectors of pixels, z[c] at c * stride
template <int U, bool kGradient, bool kSmooth>
inline void softmax_pixels(SoftmaxTile<float>& g, float* z, int64_t stride, int64_t pixel,
                           Float& loss, Float& weight) {
  Float maximum[U], target[U], smoothed[U], s[U];
  Int label[U], lane;
  for (int j = 0; j < kLanes; ++j) lane[j] = j;
  const Int none = splat_int(static_cast<int32_t>(g.C));
  FCNSEG_UNROLL
  for (int u = 0; u < U; ++u) {
    maximum[u] = load(z + u * kLanes);
    smoothed[u] = s[u] = splat(0.f);
    label[u] = load_int(g.labels + pixel + u * kLanes);
    target[u] = gather(z + u * kLanes, label[u] * static_cast<int32_t>(stride) + lane);
  }
  for (int64_t c = 1; c < g.C; ++c) {
    const float* row = z + c * stride;
    FCNSEG_UNROLL
    for (int u = 0; u < U; ++u) maximum[u] = vmax(maximum[u], load(row + u * kLanes));
  }
  for (int64_t c = 0; c < g.C; ++c) {
    float* row = z + c * stride;
    FCNSEG_UNROLL
    for (int u = 0; u < U; ++u) {
      const Float t = (load(row + u * kLanes) - maximum[u]) * kLog2E;
      if constexpr (kSmooth) smoothed[u] = fma(splat(g.smoothing_weight[c]), t, smoothed[u]);
      // below 2^-100 nothing is left of it in a sum of at least 1
      const Float e = exp2(vmax(t, splat(-100.f)));
      if constexpr (kGradient) store(row + u * kLanes, e);
      s[u] += e;
    }
  }
  Float factor[U], shift[U];
  alignas(64) float one_hot[U][kLanes];
  FCNSEG_UNROLL
  for (int u = 0; u < U; ++u) {
    const Int ignored = label[u] == none;
    Float alpha, beta;
    if (g.softmax_weight != nullptr) {
      alpha = gather(g.softmax_weight, label[u]);
      beta = gather(g.one_hot_weight, label[u]);
    } else {
      alpha = beta = select(ignored, splat(0.f), splat(1.f));
    }
    if (g.class_weight != nullptr) {
      weight += gather(g.class_weight, label[u]);
    } else {
      weight += select(ignored, splat(0.f), splat(1.f));
    }
    const Float t = (target[u] - maximum[u]) * kLog2E;
    Float l = alpha * log2(s[u]) - beta * t;
    if constexpr (kSmooth) l -= smoothed[u];
    l = select(ignored, splat(0.f), l * kLn2);
    loss += l;
    g.valid += kLanes - __builtin_popcount(nonzero_bits(ignored));
    if (g.loss_map != nullptr) store(g.loss_map + pixel + u * kLanes, l);
    if constexpr (kGradient) {
      shift[u] = select(ignored, splat(0.f), splat(1.f));
      if (g.upstream != nullptr) {
        const Float upstream = load(g.upstream + pixel + u * kLanes);
        alpha = alpha * upstream;
        beta = beta * upstream;
        shift[u] = shift[u] * upstream;
      }
      factor[u] = alpha / s[u];
      store(one_hot[u], beta);
    }
  }
  if constexpr (kGradient) {
    for (int64_t c = 0; c < g.C; ++c) {
      float* row = z + c * stride;
      FCNSEG_UNROLL
      for (int u = 0; u < U; ++u) {
        Float d = load(row + u * kLanes) * factor[u];
        if constexpr (kSmooth) d -= splat(g.smoothing_weight[c]) * shift[u];
        store(row + u * kLanes, d);
      }
    }
    // Row C takes those of the ignored pixels, which are 0.
    FCNSEG_UNROLL
    for (int u = 0; u < U; ++u) {
      for (int j = 0; j < kLanes; ++j) {
        const int64_t at = g.labels[pixel + u * kLanes + j] * stride + u * kLanes + j;
        z[at] -= one_hot[u][j];
      }
    }
  }
}

template <bool kGradient, bool kSmooth>
inline void softmax_tile(SoftmaxTile<float>& g) {
  const int64_t stride = g.P * g.width;
  Float loss = splat(0.f), weight = splat(0.f);
  for (int p = 0; p < g.P; ++p) {
    float* z = g.z + p * g.width;
    int64_t q = 0;
    for (; q + 2 * kLanes <= g.width; q += 2 * kLanes) {
      softmax_pixels<2, kGradient, kSmooth>(g, z + q, stride, p * g.pitch + q, loss, weight);
    }
    if (q < g.width) {
      softmax_pixels<1, kGradient, kSmooth>(g, z + q, stride, p * g.pitch + q, loss, weight);
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

// ---- argmax and sums ----

inline void argmax(const float* z, int64_t C, int P, int64_t width, int32_t* labels,
                   int64_t pitch) {
  for (int p = 0; p < P; ++p) {
    for (int64_t q = 0; q < width; q += kLanes) {
      const float* at = z + p * width + q;
      Float best = load(at);
      Int id = splat_int(0);
      for (int64_t c = 1; c < C; ++c) {
        keep_greater(load(at + c * P * width), splat_int(static_cast<int32_t>(c)), best, id);
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

#undef FCNSEG_UNROLL

inline ConvTransposeKernel<float> kernel() {
  return {kLanes,   &multiply, &depthwise_forward, &depthwise_backward,
          &softmax, &argmax,   &add_sums,          &read_label_row};
}

}  // namespace conv_transpose
}  // namespace FCNSEG_ISA
}  // namespace fcnseg
