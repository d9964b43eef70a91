// The arithmetic of upsample_argmax; compiled once per instruction set (for_each_isa.h).
//
//   1. z_c(x, r) = a + y_r d, as eq. 1 of upsample_cross_entropy_kernel.h
//   2. label = the lowest c with the greatest z_c
//   3. a bilinear value lies between its corners' least and greatest: class c cannot win in a cell
//      where max(corners of c) < max_b min(corners of b)
//
// A vector lane is one cell. Classes that eq. 3 rules out in all lanes are skipped; the comparison
// with `>`, in class order, gives the lowest index among ties.

namespace fcnseg {
namespace FCNSEG_ISA {
namespace argmax {

#if defined(__clang__)
#define FCNSEG_UNROLL _Pragma("unroll")
#else
#define FCNSEG_UNROLL _Pragma("GCC unroll 8")
#endif

// Whether all values are finite, and small enough for their differences.
inline bool regular_row(const float* row, int64_t size) {
  Float greatest = splat(0.f), total = splat(0.f);
  for (int64_t i = 0; i < size; i += kLanes) {
    const Float x = load(row + i);
    greatest = vmax(vmax(x, -x), greatest);
    total += x * 0.f;  // NaN where x is not finite
  }
  return !any(greatest > 1e37f) && !any(total != total);
}

// Fills g.candidates with the classes that may win in one of the cells of vector v; their number.
inline int64_t find_candidates(const ArgmaxRows& g, int64_t v) {
  const float* top = g.top + v * kLanes;
  const float* bottom = g.bottom + v * kLanes;
  Float bound = splat(-3e38f);
  for (int64_t c = 0, at = 0; c < g.C; ++c, at += g.pitch) {
    const Float least = vmin(vmin(load(top + at), load(top + at + 1)),
                             vmin(load(bottom + at), load(bottom + at + 1)));
    bound = vmax(least, bound);
  }
  int64_t found = 0;
  for (int64_t c = 0, at = 0; c < g.C; ++c, at += g.pitch) {
    const Float greatest = vmax(vmax(load(top + at), load(top + at + 1)),
                                vmax(load(bottom + at), load(bottom + at + 1)));
    g.candidates[found] = static_cast<int32_t>(c);
    found += any(greatest >= bound);
  }
  float* corner = g.corners;
  for (int64_t i = 0; i < found; ++i, corner += 4 * kLanes) {
    const int64_t at = g.candidates[i] * g.pitch;
    const Float z00 = load(top + at), z10 = load(bottom + at);
    const Float across = load(top + at + 1) - z00;
    store(corner, z00);
    store(corner + kLanes, across);
    store(corner + 2 * kLanes, z10 - z00);
    store(corner + 3 * kLanes, (load(bottom + at + 1) - z10) - across);
  }
  return found;
}

// Labels of R rows at one phase into g.staged[r][lane].
template <int R>
inline void compare(const ArgmaxRows& g, int64_t candidates, Float x) {
  Float best[R];
  Int id[R];
  FCNSEG_UNROLL
  for (int r = 0; r < R; ++r) {
    best[r] = splat(-3e38f);
    id[r] = splat_int(g.candidates[0]);
  }
  const float* corner = g.corners;
  for (int64_t i = 0; i < candidates; ++i, corner += 4 * kLanes) {
    const Float a = fma(x, load(corner + kLanes), load(corner));
    const Float d = fma(x, load(corner + 3 * kLanes), load(corner + 2 * kLanes));
    const Int c = splat_int(g.candidates[i]);
    FCNSEG_UNROLL
    for (int r = 0; r < R; ++r) {
      keep_greater(fma(splat(g.lambda_y[r]), d, a), c, best[r], id[r]);
    }
  }
  FCNSEG_UNROLL
  for (int r = 0; r < R; ++r) store_int(g.staged + r * kLanes, id[r]);
}

template <int R>
inline void process_vector(const ArgmaxRows& g, int64_t v) {
  const int64_t candidates = find_candidates(g, v);
  for (int k = 0; k < g.phases[v]; ++k) {
    const int64_t at = g.offset[v] + int64_t{k} * kLanes;
    if (candidates > 1) {
      compare<R>(g, candidates, load(g.lambda + at));
    } else if (k == 0) {
      for (int r = 0; r < R; ++r) store_int(g.staged + r * kLanes, splat_int(g.candidates[0]));
    }
    const int32_t* pixel = g.pixel + at;
    for (int r = 0; r < R; ++r) {
      // Column W is padding: written as well, so that there is no branch.
      int32_t* out = g.labels + r * g.label_pitch;
      const int32_t* staged = g.staged + r * kLanes;
      for (int lane = 0; lane < kLanes; ++lane) out[pixel[lane]] = staged[lane];
    }
  }
}

inline void process(const ArgmaxRows& g) {
  for (int64_t v = 0; v < g.vectors; ++v) {
    switch (g.rows) {
      case 1:
        process_vector<1>(g, v);
        break;
      case 2:
        process_vector<2>(g, v);
        break;
      case 3:
        process_vector<3>(g, v);
        break;
      case 4:
        process_vector<4>(g, v);
        break;
      case 5:
        process_vector<5>(g, v);
        break;
      case 6:
        process_vector<6>(g, v);
        break;
      case 7:
        process_vector<7>(g, v);
        break;
      default:
        process_vector<8>(g, v);
        break;
    }
  }
}

#undef FCNSEG_UNROLL

inline ArgmaxKernel kernel() { return {kLanes, &regular_row, &process}; }

}  // namespace argmax
}  // namespace FCNSEG_ISA
}  // namespace fcnseg
