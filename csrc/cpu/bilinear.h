// Geometry of bilinear interpolation, as torch.nn.functional.interpolate has it, in double.
//
//   1. source(x) = (x + 1/2) step - 1/2, at least 0        step = 1 / scale, or in / out
//      source(x) = x (in - 1) / (out - 1)                  with align_corners
//   2. i0 = min(floor(source), in - 1), i1 = min(i0 + 1, in - 1), lambda = source - i0 (at most 1)
//   3. z = (1 - lambda) x[i0] + lambda x[i1]
//
// With in == out it is the identity, whatever the scale: i1 = i0, lambda = 0.
//
// All outputs between two neighbouring inputs form a cell. Cell 0 is the margin before the first
// input (source < 0 in eq. 1), cell i + 1 lies between inputs i and i + 1, cell `in` is the margin
// behind the last. In a margin z is constant.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fcnseg {

struct Axis {
  int64_t in;
  int64_t out;
  bool align_corners;
  double step;

  // scale <= 0: the ratio of the sizes.
  Axis(int64_t in, int64_t out, bool align_corners, double scale)
      : in(in), out(out), align_corners(align_corners) {
    if (in == out) {
      step = 1.0;
    } else if (align_corners) {
      step = out > 1 ? static_cast<double>(in - 1) / static_cast<double>(out - 1) : 0.0;
    } else {
      step = scale > 0 ? 1.0 / scale : static_cast<double>(in) / static_cast<double>(out);
    }
  }

  struct Source {
    int64_t i0, i1;
    double lambda;
    int64_t cell;
  };
  Source source(int64_t x) const {
    const double exact = align_corners ? x * step : (x + 0.5) * step - 0.5;
    const double clamped = exact < 0 ? 0 : exact;
    Source s;
    s.i0 = static_cast<int64_t>(std::min(clamped, static_cast<double>(in - 1)));
    s.i1 = in == out ? s.i0 : std::min(s.i0 + 1, in - 1);
    s.lambda = std::min(clamped - static_cast<double>(s.i0), 1.0);
    s.cell = exact < 0 ? 0 : s.i0 + 1;
    return s;
  }

  // begin[cell] .. begin[cell + 1] are the outputs of a cell.
  std::vector<int64_t> cell_begin() const {
    std::vector<int64_t> begin(in + 2, out);
    int64_t next = 0;
    for (int64_t x = 0; x < out; ++x) {
      for (const int64_t cell = source(x).cell; next <= cell; ++next) begin[next] = x;
    }
    return begin;
  }
};

// The columns' cells, dealt to vector lanes: lane j holds cell j + 1, between columns j and j + 1.
// The last lane, w - 1, holds both margins: it lies between column w - 1 and a copy of column 0,
// the right margin at lambda 0, then the left margin at lambda 1. Phase k is the k-th output of
// every lane's cell; a lane with fewer outputs has the label of the padding column W there.
struct Columns {
  int64_t w;
  int64_t W;
  int lanes;  // in a vector
  int64_t vectors;
  std::vector<int32_t> phases;  // [vectors]
  std::vector<int64_t> offset;  // [vectors] of the tables' first row
  std::vector<int32_t> pixel;   // [sum of phases][lanes] output column, W where there is none
  std::vector<float> lambda;    // [sum of phases][lanes]
  std::vector<float> present;   // [sum of phases][lanes] 1 or 0
  std::vector<uint8_t> full;    // [sum of phases] all lanes present
  std::vector<float> step;      // [vectors * lanes] of lambda from phase to phase
  std::vector<int32_t> first;   // [vectors * lanes] first output column
  std::vector<int32_t> count;   // [vectors * lanes] outputs in the cell
  int32_t right_margin = 0;     // outputs behind the last column

  Columns(const Axis& axis, int lanes)
      : w(axis.in), W(axis.out), lanes(lanes), vectors((axis.in + lanes - 1) / lanes) {
    const std::vector<int64_t> begin = axis.cell_begin();
    const int64_t padded = vectors * lanes;
    step.assign(padded, 0.f);
    first.assign(padded, static_cast<int32_t>(W));
    count.assign(padded, 0);
    for (int64_t j = 0; j < w; ++j) {
      first[j] = static_cast<int32_t>(begin[j + 1]);
      count[j] = static_cast<int32_t>(begin[j + 2 <= w + 1 ? j + 2 : w + 1] - begin[j + 1]);
      if (j < w - 1) step[j] = static_cast<float>(axis.step);
    }
    count[w - 1] = static_cast<int32_t>(W - begin[w]);
    right_margin = count[w - 1];
    count[w - 1] += static_cast<int32_t>(begin[1]);
    int64_t rows = 0;
    for (int64_t v = 0; v < vectors; ++v) {
      const auto* counts = count.data() + v * lanes;
      phases.push_back(*std::max_element(counts, counts + lanes));
      offset.push_back(rows * lanes);
      rows += phases.back();
    }
    pixel.assign(rows * lanes, static_cast<int32_t>(W));
    lambda.assign(rows * lanes, 0.f);
    present.assign(rows * lanes, 0.f);
    full.assign(rows, 1);
    for (int64_t v = 0; v < vectors; ++v) {
      for (int k = 0; k < phases[v]; ++k) {
        const int64_t row = offset[v] / lanes + k;
        for (int l = 0; l < lanes; ++l) fill(axis, v * lanes + l, k, row * lanes + l);
        for (int l = 0; l < lanes; ++l) full[row] &= present[row * lanes + l] != 0;
      }
    }
  }

 private:
  void fill(const Axis& axis, int64_t lane, int k, int64_t at) {
    if (k < count[lane]) {
      const bool left = lane == w - 1 && k >= right_margin;
      pixel[at] = left ? k - right_margin : first[lane] + k;
      present[at] = 1.f;
      lambda[at] = left            ? 1.f
                   : lane == w - 1 ? 0.f
                                   : static_cast<float>(axis.source(pixel[at]).lambda);
    } else if (lane == w - 1) {
      lambda[at] = 1.f;
    } else if (lane < w - 1) {
      const double start = count[lane] > 0 ? axis.source(first[lane]).lambda : 0.0;
      lambda[at] = static_cast<float>(std::min(1.0, start + k * axis.step));
    }
  }
};

}  // namespace fcnseg
