// The schedule of conv_transpose_cross_entropy and conv_transpose_argmax: geometry, passes, work
// items, rows, sums; and the arithmetic in double. That of the fp32 path, with the equations, is in
// conv_transpose_kernel.h.
//
// Who owns what. All target rows of one phase f_y see the same weights, 1 / stride of them. A pass
// is such a phase (where the weights are small, a few; where they are large, part of its columns'
// phases): it packs its weights, runs all work items, and adds up their sums of the weight
// gradient. A work item is a run of rows of cells of one image. It adds to the gradient of the
// input rows that it owns; the rows below, which belong to the next item, go to halo rows of its
// own, added at the end in a fixed order. A unit is a run of items with one sum of the weight
// gradient. Items, units and passes depend on the shape alone, so the result does not depend on the
// number of threads. Per thread, the few input rows that a row of cells sees are held, with their
// gradients, and one tile of logits; nothing has the size of the output.
//
// The double path takes float64 input, and everything where a value is not finite or is extreme. It
// runs the same schedule with eager's formulas in double, so that NaN and infinities come out.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "conv_transpose.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "buffer.h"
#include "conv_transpose_tile.h"
#include "cpu_capability.h"

#define FCNSEG_KERNEL "conv_transpose_kernel.h"
#include "for_each_isa.h"
#undef FCNSEG_KERNEL

namespace fcnseg {
namespace {

// ---- the kernels ----

ConvTransposeKernel<float> kernel_of(Capability capability, float) {
#if defined(__x86_64__)
  if (capability == Capability::kAvx512) return avx512::conv_transpose::kernel();
  if (capability == Capability::kAvx2) return avx2::conv_transpose::kernel();
#endif
  return portable::conv_transpose::kernel();
}

namespace exact {

void multiply(const Product<double>& g) {
  for (int64_t m = 0; m < g.rows; ++m) {
    double* out = g.c[m];
    if (g.start != nullptr) std::fill(out, out + g.columns, g.start[m]);
    for (int64_t k = 0; k < g.inner; ++k) {
      const double factor = g.a[m * g.a_row + k * g.a_inner];
      const double* x = g.b[k];
      for (int64_t n = 0; n < g.columns; ++n) out[n] += factor * x[n];
    }
  }
}

// eq. 2 and 3 as eager has them: a NaN reaches every class of its pixel.
void softmax(SoftmaxTile<double>& g) {
  const int64_t stride = g.stride;
  for (int64_t i = 0; i < g.P * g.width; ++i) {
    const int64_t pixel = i / g.width * g.pitch + i % g.width;
    double* z = g.z + i;
    double maximum = -std::numeric_limits<double>::infinity(), total = 0;
    for (int64_t c = 0; c < g.C; ++c) maximum = std::max(maximum, z[c * stride]);
    for (int64_t c = 0; c < g.C; ++c) total += std::exp(z[c * stride] - maximum);
    const double log_sum = maximum + std::log(total);
    const int64_t label = g.labels[pixel];
    const bool valid = label != g.C;
    const double hot = g.one_hot_weight != nullptr ? g.one_hot_weight[label] : valid;
    const double alpha = g.softmax_weight != nullptr ? g.softmax_weight[label] : valid;
    double loss = 0;
    if (valid) {
      loss = hot * (log_sum - z[label * stride]);
      for (int64_t c = 0; g.smoothing_weight != nullptr && c < g.C; ++c) {
        loss += g.smoothing_weight[c] * (log_sum - z[c * stride]);
      }
      g.loss += loss;
      g.weight += g.class_weight != nullptr ? g.class_weight[label] : 1.0;
      g.valid += 1;
    }
    if (g.loss_map != nullptr) g.loss_map[pixel] = loss;
    if (!g.gradient) continue;
    const double upstream = g.upstream != nullptr ? g.upstream[pixel] : 1.0;
    for (int64_t c = 0; c < g.C; ++c) {
      // An ignored pixel gives 0 times the softmax: eager's NaN shows there too.
      double d = alpha * (std::exp(z[c * stride] - maximum) / total);
      if (c == label) d -= hot;
      if (valid && g.smoothing_weight != nullptr) d -= g.smoothing_weight[c];
      z[c * stride] = upstream * d;
    }
  }
}

// As torch.argmax: NaN is greatest, the first one wins.
void argmax(const double* z, int64_t C, int P, int64_t width, int64_t stride, int32_t* labels,
            int64_t pitch) {
  for (int64_t i = 0; i < P * width; ++i) {
    double best = z[i];
    int32_t id = 0;
    for (int64_t c = 1; c < C; ++c) {
      const double value = z[c * stride + i];
      if (value > best || (std::isnan(value) && !std::isnan(best))) {
        best = value;
        id = static_cast<int32_t>(c);
      }
    }
    labels[i / width * pitch + i % width] = id;
  }
}

void add_sums(const double* z, int64_t C, int64_t size, double* sums) {
  for (int64_t i = 0; i < C * size; ++i) sums[i / size] += z[i];
}

}  // namespace exact

ConvTransposeKernel<double> kernel_of(Capability capability, double) {
  return {1,
          &exact::multiply,
          nullptr,
          nullptr,
          nullptr,
          &exact::softmax,
          &exact::argmax,
          &exact::add_sums,
          nullptr,
          kernel_of(capability, 0.f).labels};
}

// ---- geometry ----

// One axis. Phase f of cell j is the target's pixel j * stride + f.
struct ConvAxis {
  struct Tap {
    int64_t kernel, offset;  // kernel index; input index minus cell
  };
  int64_t in, out, stride, cells;
  std::vector<std::vector<Tap>> phases;  // those taps that read inside the input at some cell
  int64_t first = 0, last = 0;           // least and greatest offset

  ConvAxis(int64_t in, int64_t kernel, int64_t out, int64_t stride, int64_t padding,
           int64_t dilation, int64_t crop)
      : in(in),
        out(out),
        stride(stride),
        cells((out + stride - 1) / stride),
        phases(std::min(stride, out)) {
    bool any = false;
    for (int64_t f = 0; f < count(); ++f) {
      for (int64_t k = 0; k < kernel; ++k) {
        const int64_t at = f + crop + padding - dilation * k;
        if (at % stride != 0) continue;
        const int64_t offset = at / stride;
        if (offset >= in || offset + (out - 1 - f) / stride < 0) continue;
        phases[f].push_back({k, offset});
        first = any ? std::min(first, offset) : offset;
        last = any ? std::max(last, offset) : offset;
        any = true;
      }
    }
  }
  int64_t count() const { return static_cast<int64_t>(phases.size()); }
  bool same_offsets(int64_t f, int64_t g) const {
    return std::equal(phases[f].begin(), phases[f].end(), phases[g].begin(), phases[g].end(),
                      [](const Tap& a, const Tap& b) { return a.offset == b.offset; });
  }
};

// Neighbouring phases of the columns with the same offsets.
struct Chunk {
  int64_t first;  // phase
  int P;
};

template <typename F>
void with_type(DType dtype, F call) {
  switch (dtype) {
    case DType::kFloat:
      return call(float{});
    case DType::kDouble:
      return call(double{});
    case DType::kHalf:
      return call(Half{});
    case DType::kBFloat16:
      return call(BFloat16{});
  }
}

constexpr int64_t kItemsPerImage = 16;
constexpr int64_t kMostUnits = 64;
constexpr int64_t kSumsBytes = 8 << 20;    // of all units, in a pass
constexpr int64_t kPassBytes = 256 << 10;  // of a pass of several phases: sums and weights
constexpr int64_t kTileBytes = 128 << 10;  // of logits
constexpr int64_t kDepthwiseTileBytes = 48 << 10;
constexpr int64_t kTileCells = 128;
constexpr double kLog2E = 1.44269504088896341;
constexpr double kPowersRange = 124;  // log2 of sums of powers, and of the factor of eq. 6

// A tap of a chunk at the rows' phase of a pass: its places in phases[f] of the two axes.
struct TapOf {
  int64_t row, column;  // row -1: padding
};

// What all passes share. Real: the type of the arithmetic.
template <typename Real>
struct Plan {
  const ConvTranspose& p;
  const ConvTransposeCrossEntropy* loss;  // null: argmax
  ConvTransposeKernel<Real> kernel;
  int64_t N, C, C_in, M, I;  // classes and channels; the same per group
  ConvAxis rows, columns;
  bool depthwise;
  bool powers = false;  // see Depthwise
  double unit = 1;      // what logits are multiplied by
  bool to_input = false, to_weight = false, to_bias = false;
  std::vector<Chunk> chunks;
  int64_t column_first;  // input column of the row buffers' first column
  int64_t width;         // cells, a multiple of the lanes
  int64_t pitch;         // of the row buffers
  int64_t slots;         // input rows that a row of cells may see
  int64_t cells_per_item, items_per_image, items, items_per_unit, units;
  int64_t chunks_per_pass, rows_per_pass;  // phases of the rows
  std::vector<Real> bias;

  Plan(const ConvTranspose& conv, const ConvTransposeCrossEntropy* loss, double input_range)
      : p(conv),
        loss(loss),
        kernel(kernel_of(cpu_capability(), Real{})),
        N(p.input.N),
        C(p.C),
        C_in(p.input.C),
        M(C / p.groups),
        I(C_in / p.groups),
        rows(p.input.h, p.kernel_h, p.H, p.stride_h, p.padding_h, p.dilation_h, p.crop_h),
        columns(p.input.w, p.kernel_w, p.W, p.stride_w, p.padding_w, p.dilation_w, p.crop_w),
        depthwise(kernel.depthwise_forward != nullptr && M == 1 && I == 1),
        column_first(columns.first),
        width(round_up(columns.cells)),
        pitch(width + round_up(columns.last - columns.first)),
        slots(rows.last - rows.first + 1),
        bias(C) {
    if (loss != nullptr) {
      to_input = loss->to_input != nullptr;
      to_weight = loss->to_weight != nullptr;
      to_bias = loss->to_bias != nullptr;
    }
    cut_columns();
    // Of at least as many rows of cells as there are halo rows, which so stay fewer than the
    // input's.
    cells_per_item = std::max((rows.cells + kItemsPerImage - 1) / kItemsPerImage, slots - 1);
    cells_per_item = std::max<int64_t>(cells_per_item, 1);
    items_per_image = (rows.cells + cells_per_item - 1) / cells_per_item;
    items = N * items_per_image;
    cut_passes();
    powers = find_powers(input_range);
    if (powers) unit = kLog2E;
    if (p.bias != nullptr) {
      with_type(p.input.dtype, [&](auto type) {
        const auto* values = static_cast<const decltype(type)*>(p.bias);
        for (int64_t c = 0; c < C; ++c) {
          bias[c] = static_cast<Real>(to_real(values[c * p.bias_stride]) * unit);
        }
      });
    }
  }

  int64_t round_up(int64_t n) const { return (n + kernel.lanes - 1) / kernel.lanes * kernel.lanes; }

  bool gradient() const { return to_input || to_weight || to_bias; }

  // Cells of a tile with P phases.
  int64_t block(int P) const {
    const int64_t bytes = depthwise ? kDepthwiseTileBytes : kTileBytes;
    const int64_t most = std::min(bytes / static_cast<int64_t>(C * P * sizeof(Real)), kTileCells);
    const int64_t least = depthwise ? 1 : 4;  // vectors
    const int64_t vectors = std::max(most / kernel.lanes, least), all = width / kernel.lanes;
    const int64_t blocks = (all + vectors - 1) / vectors;
    return (all + blocks - 1) / blocks * kernel.lanes;
  }

  // From class to class of a tile. Depthwise, a vector more, so that not all classes meet in a few
  // sets of the cache.
  int64_t stride(int P, int64_t width) const { return P * width + (depthwise ? kernel.lanes : 0); }

  // All taps of a chunk, in the order of the packed weights.
  std::vector<TapOf> taps(int64_t fy, const Chunk& chunk) const {
    const int64_t down = rows.phases[fy].size(), across = columns.phases[chunk.first].size();
    std::vector<TapOf> result;
    for (int64_t column = 0; column < across; ++column) {
      for (int64_t row = 0; row < down; ++row) result.push_back({row, column});
      if (depthwise && down % 2 != 0) result.push_back({-1, column});
    }
    while (depthwise && (result.empty() || result.size() % 4 != 0)) result.push_back({-1, 0});
    return result;
  }
  // Length of a row of packed weights.
  int64_t inner_pitch(int64_t taps) const { return depthwise ? taps : round_up(taps * I); }

 private:
  bool find_powers(double input_range) const {
    // The loss of one class is exactly 0; an upstream gradient may be of any size.
    if (!depthwise || C == 1 || loss == nullptr || loss->upstream != nullptr) return false;
    if (loss->label_smoothing != 0) return false;
    double greatest = 0;  // logit
    double most = C;      // of what multiplies a power or its inverse
    with_type(p.input.dtype, [&](auto type) {
      const auto* weight = static_cast<const decltype(type)*>(p.weight);
      const auto* values = static_cast<const decltype(type)*>(p.bias);
      for (int64_t i = 0; i < C * rows.count() * columns.count(); ++i) {
        const int64_t c = i / (rows.count() * columns.count());
        double total = 0;
        for (const auto& row : rows.phases[i / columns.count() % rows.count()]) {
          for (const auto& column : columns.phases[i % columns.count()]) {
            const int64_t at = c * p.weight_stride[0] + row.kernel * p.weight_stride[2] +
                               column.kernel * p.weight_stride[3];
            total += std::abs(static_cast<double>(to_real(weight[at])));
          }
        }
        total *= input_range;
        if (values != nullptr) {
          total += std::abs(static_cast<double>(to_real(values[c * p.bias_stride])));
        }
        greatest = std::max(greatest, total);
      }
    });
    for (int64_t c = 0; loss->class_weight != nullptr && c < C; ++c) {
      // eq. 6 divides it by a sum of C powers; neither overflow nor a denormal
      const double weight = std::abs(loss->class_weight[c]);
      if (weight > 0) most = std::max({most, weight, C / weight});
    }
    return greatest * kLog2E + std::log2(most) <= kPowersRange;
  }

  void cut_columns() {
    const int64_t most = depthwise ? kMaxDepthwisePhases : std::clamp<int64_t>(96 / C, 1, 8);
    for (int64_t f = 0; f < columns.count();) {
      int64_t end = f + 1;
      while (end < columns.count() && columns.same_offsets(f, end)) ++end;
      while (f < end) {
        const int64_t pieces = (end - f + most - 1) / most;
        const int64_t P = (end - f + pieces - 1) / pieces;
        chunks.push_back({f, static_cast<int>(P)});
        f += P;
      }
    }
  }

  void cut_passes() {
    items_per_unit = std::max<int64_t>(1, (items + kMostUnits - 1) / kMostUnits);
    chunks_per_pass = static_cast<int64_t>(chunks.size());
    int64_t most = 1, most_of_row = 1;  // bytes of the weights of one chunk, of one phase
    for (int64_t fy = 0; fy < rows.count(); ++fy) {
      int64_t of_row = 0;
      for (const Chunk& chunk : chunks) {
        const int64_t inner = inner_pitch(taps(fy, chunk).size());
        const int64_t bytes = C * chunk.P * inner * sizeof(Real);
        most = std::max<int64_t>(most, bytes);
        of_row += bytes;
      }
      most_of_row = std::max(most_of_row, of_row);
    }
    if (to_weight) {
      const auto unit_count = [&] { return (items + items_per_unit - 1) / items_per_unit; };
      while (unit_count() > 1 && unit_count() * most > kSumsBytes) ++items_per_unit;
      const int64_t fit = kSumsBytes / (most * std::max<int64_t>(unit_count(), 1));
      chunks_per_pass = std::clamp<int64_t>(fit, 1, chunks_per_pass);
    }
    units = (items + items_per_unit - 1) / items_per_unit;
    const int64_t fit = kPassBytes / (most_of_row * (to_weight ? units + 1 : 1));
    const int64_t passes = fit > 0 ? (rows.count() + fit - 1) / fit : rows.count();
    rows_per_pass = (rows.count() + passes - 1) / passes;
  }
};

// One phase of the rows and one chunk of the columns. Packed weights are [c][p][k], depthwise
// [c][k / 4][p][4].
template <typename Real>
struct Part {
  int64_t fy;
  Chunk chunk;
  std::vector<TapOf> taps;
  int64_t inner, offset;    // length of a row, place in the weights of the pass
  std::vector<Real> start;  // the bias of each row [c][p]; empty where depthwise

  // Of tap t of class c and phase q, in the weights of the pass.
  int64_t place(const Plan<Real>& plan, int64_t c, int q, int64_t t) const {
    const int64_t at = plan.depthwise ? (t / 4 * chunk.P + q) * 4 + t % 4 : q * inner + t * plan.I;
    return offset + c * chunk.P * inner + at;
  }
};

// Some phases of the rows, some chunks of the columns.
template <typename Real>
struct Pass {
  int64_t fy_begin, fy_end, begin, end;  // phases of the rows, chunks
  std::vector<Part<Real>> parts;         // [fy][chunk]
  int64_t size = 0;
  Buffer<Real> weight;

  Pass(const Plan<Real>& plan, int64_t fy_begin, int64_t begin, const ParallelFor& parallel_for)
      : fy_begin(fy_begin),
        fy_end(std::min(plan.rows.count(), fy_begin + plan.rows_per_pass)),
        begin(begin),
        end(std::min<int64_t>(plan.chunks.size(), begin + plan.chunks_per_pass)),
        weight(add_parts(plan)) {
    with_type(plan.p.input.dtype, [&](auto type) {
      const auto* source = static_cast<const decltype(type)*>(plan.p.weight);
      parallel_for(plan.C, [&](int64_t first, int64_t last) {
        for (int64_t c = first; c < last; ++c) {
          for_each_weight(plan, c, plan.p.weight_stride, [&](int64_t packed, int64_t at) {
            weight.data()[packed] = static_cast<Real>(to_real(source[at]) * plan.unit);
          });
        }
      });
    });
  }

  const Part<Real>* row_parts(int64_t fy) const {
    return parts.data() + (fy - fy_begin) * (end - begin);
  }

  // Calls with the packed place of each weight of class c, and its place in a tensor of `strides`.
  template <typename F>
  void for_each_weight(const Plan<Real>& plan, int64_t c, const int64_t* strides, F call) const {
    const int64_t start = c / plan.M * plan.I * strides[0] + c % plan.M * strides[1];
    for (const Part<Real>& part : parts) {
      for (int q = 0; q < part.chunk.P; ++q) {
        for (size_t t = 0; t < part.taps.size(); ++t) {
          const TapOf& tap = part.taps[t];
          if (tap.row < 0) continue;
          int64_t packed = part.place(plan, c, q, t);
          const auto& column = plan.columns.phases[part.chunk.first + q][tap.column];
          const int64_t at = start + plan.rows.phases[part.fy][tap.row].kernel * strides[2] +
                             column.kernel * strides[3];
          for (int64_t i_in = 0; i_in < plan.I; ++i_in) call(packed++, at + i_in * strides[0]);
        }
      }
    }
  }

 private:
  int64_t add_parts(const Plan<Real>& plan) {
    for (int64_t fy = fy_begin; fy < fy_end; ++fy) {
      for (int64_t i = begin; i < end; ++i) {
        const Chunk& chunk = plan.chunks[i];
        Part<Real> part{fy, chunk, plan.taps(fy, chunk), 0, size, {}};
        part.inner = plan.inner_pitch(part.taps.size());
        for (int64_t r = 0; !plan.depthwise && r < plan.C * chunk.P; ++r) {
          part.start.push_back(plan.bias[r / chunk.P]);
        }
        size += plan.C * chunk.P * part.inner;
        parts.push_back(std::move(part));
      }
    }
    return size;
  }
};

// ---- work ----

struct Totals {
  double loss = 0, weight = 0;
  int64_t valid = 0;
  BadLabel bad;
  std::vector<double> bias;
};

// All scratch of one thread in one pass. Out: the type of the outputs.
template <typename Real, typename Out>
class Worker {
 public:
  Worker(const Plan<Real>& plan, const Pass<Real>& pass, const LossWeights<Real>* weights,
         LabelSink* sink)
      : plan_(plan),
        pass_(pass),
        loss_(plan.loss),
        weights_(weights),
        sink_(sink),
        transposed_(plan.to_weight && !plan.depthwise),
        base_(plan.chunks[pass.begin].first),
        phases_(plan.chunks[pass.end - 1].first + plan.chunks[pass.end - 1].P - base_),
        row_of_(plan.slots, -1),
        touched_(plan.slots, 0),
        x_(plan.slots * plan.C_in * plan.pitch),
        x_transposed_(transposed_ ? plan.slots * plan.C_in * plan.pitch : 0),
        gradient_(plan.to_input ? plan.slots * plan.C_in * plan.pitch : 0),
        zero_(plan.pitch),
        unused_(plan.pitch + 1),  // a pair of columns adds to the next one too
        lane_sums_(plan.depthwise && plan.to_weight ? pass.size * plan.kernel.lanes : 0),
        lane_bias_(plan.depthwise && plan.to_bias ? plan.C * plan.kernel.lanes : 0),
        row_labels_(plan.p.W),
        labels_(phases_ * plan.width),
        upstream_(loss_ != nullptr && loss_->upstream != nullptr ? phases_ * plan.width : 0),
        loss_map_(wants_map() ? phases_ * plan.width : 0),
        z_(tile_size()) {
    if (transposed_) {
      int64_t most = 0;
      for (const Part<Real>& part : pass.parts) {
        most = std::max(most, plan.block(part.chunk.P) * part.inner);
      }
      columns_ = std::make_unique<Buffer<Real>>(most);
    }
  }

  // The items of a unit. `sums`: packed, its sum of the weights' gradient. `halos`: of all items.
  void run_unit(int64_t unit, Real* sums, Out* halos, Totals& totals) {
    totals_ = &totals;
    totals.bias.resize(plan_.C);
    sums_ = sums;
    const int64_t end = std::min(plan_.items, (unit + 1) * plan_.items_per_unit);
    for (int64_t item = unit * plan_.items_per_unit; item < end; ++item) {
      Out* const halo = halos + item * (plan_.slots - 1) * plan_.C_in * plan_.p.input.w;
      run_item(item, halo);
    }
    if constexpr (std::is_same_v<Real, float>) {
      if (!plan_.depthwise) return;
      if (plan_.to_weight) plan_.kernel.take_lanes(lane_sums_.data(), pass_.size, sums);
      if (!plan_.to_bias) return;
      std::vector<float> bias(plan_.C);
      plan_.kernel.take_lanes(lane_bias_.data(), plan_.C, bias.data());
      for (int64_t c = 0; c < plan_.C; ++c) totals.bias[c] += bias[c];
    }
  }

 private:
  bool wants_map() const {
    return loss_ != nullptr && loss_->reduction == Reduction::kNone && loss_->loss != nullptr;
  }
  int64_t tile_size() const {
    int64_t most = 0;
    for (int64_t i = pass_.begin; i < pass_.end; ++i) {
      const int P = plan_.chunks[i].P;
      most = std::max(most, (plan_.C + 1) * plan_.stride(P, plan_.block(P)));
    }
    return most;
  }

  void run_item(int64_t item, Out* halo) {
    n_ = item / plan_.items_per_image;
    const int64_t part = item % plan_.items_per_image;
    const int64_t begin = part * plan_.cells_per_item;
    const int64_t end = std::min(plan_.rows.cells, begin + plan_.cells_per_item);
    const bool last = part == plan_.items_per_image - 1;
    owned_end_ = last ? plan_.p.input.h : end + plan_.rows.first;
    halo_ = halo;
    for (int64_t j = begin; j < end; ++j) {
      for (int64_t slot = 0; slot < plan_.slots; ++slot) {
        if (row_of_[slot] < j + plan_.rows.first) finish_row(slot);
      }
      for (int64_t fy = pass_.fy_begin; fy < pass_.fy_end; ++fy) {
        const int64_t y = j * plan_.rows.stride + fy;
        if (y >= plan_.p.H) break;
        for (const auto& tap : plan_.rows.phases[fy]) {
          if (inside(j + tap.offset)) load_row(j + tap.offset);
        }
        run_row(j, fy, y);
      }
    }
    for (int64_t slot = 0; slot < plan_.slots; ++slot) finish_row(slot);
  }

  bool inside(int64_t row) const { return row >= 0 && row < plan_.p.input.h; }

  // The columns that the row buffers hold.
  int64_t first_column() const { return std::max<int64_t>(0, plan_.column_first); }
  int64_t end_column() const {
    return std::max(first_column(), std::min(plan_.p.input.w, plan_.column_first + plan_.pitch));
  }

  void load_row(int64_t i) {
    const int64_t slot = i % plan_.slots;
    if (row_of_[slot] == i) return;
    row_of_[slot] = i;
    Logits view = plan_.p.input;
    view.w = end_column() - first_column();
    with_type(view.dtype, [&](auto type) {
      view.data = static_cast<const decltype(type)*>(view.data) + first_column() * view.stride_w;
    });
    const int64_t at = first_column() - plan_.column_first;
    Real* const x = x_.data() + slot * plan_.C_in * plan_.pitch;
    read_row(view, n_, i, x + at, plan_.pitch, 1);
    if (transposed_) {
      Real* const out = x_transposed_.data() + slot * plan_.C_in * plan_.pitch;
      read_row(view, n_, i, out + at * plan_.C_in, 1, plan_.C_in);
    }
  }

  // Adds the row's gradient to its place and clears it.
  void finish_row(int64_t slot) {
    const int64_t i = row_of_[slot];
    row_of_[slot] = -1;
    if (i < 0 || !touched_[slot]) return;
    touched_[slot] = 0;
    Real* const gradient = gradient_.data() + slot * plan_.C_in * plan_.pitch;
    Out* out = static_cast<Out*>(loss_->to_input) + n_ * loss_->to_input_n + i * loss_->to_input_h;
    int64_t stride_c = loss_->to_input_c, stride_w = loss_->to_input_w;
    if (i >= owned_end_) {
      const int64_t w = plan_.p.input.w;
      out = halo_ + (i - owned_end_) * plan_.C_in * w;
      stride_c = w;
      stride_w = 1;
    }
    const int64_t first = first_column(), end = end_column();
    if (stride_w == 1) {
      for (int64_t c = 0; c < plan_.C_in; ++c) {
        const Real* row = gradient + c * plan_.pitch - plan_.column_first;
        Out* const to = out + c * stride_c;
        for (int64_t x = first; x < end; ++x) to[x] += static_cast<Out>(row[x]);
      }
    } else {
      for (int64_t x = first; x < end; ++x) {
        for (int64_t c = 0; c < plan_.C_in; ++c) {
          out[c * stride_c + x * stride_w] +=
              static_cast<Out>(gradient[c * plan_.pitch + x - plan_.column_first]);
        }
      }
    }
    std::memset(gradient, 0, plan_.C_in * plan_.pitch * sizeof(Real));
  }

  // Labels and upstream gradients of row y, phase by phase.
  void load_labels(int64_t y) {
    const ConvTransposeCrossEntropy& loss = *loss_;
    const int64_t bad = plan_.kernel.labels(loss.target, n_ * plan_.p.H + y, plan_.C,
                                            loss.ignore_index, row_labels_.data());
    if (bad != 0 && pass_.begin == 0) {
      totals_->bad.merge(BadLabel::in_row(loss.target, plan_.C, loss.ignore_index, bad, n_, y));
    }
    const int32_t none = static_cast<int32_t>(plan_.C);
    for (int64_t f = 0; f < phases_; ++f) {
      int32_t* const out = labels_.data() + f * plan_.width;
      const int32_t* const in = row_labels_.data() + base_ + f;
      const int64_t cells = cells_of(f);
      for (int64_t q = 0; q < cells; ++q) out[q] = in[q * plan_.columns.stride];
      std::fill(out + cells, out + plan_.width, none);
    }
    if (loss.upstream == nullptr) return;
    const Out* in =
        static_cast<const Out*>(loss.upstream) + n_ * loss.upstream_n + y * loss.upstream_h;
    for (int64_t f = 0; f < phases_; ++f) {
      for (int64_t q = 0; q < cells_of(f); ++q) {
        const int64_t at = f * plan_.width + q, x = q * plan_.columns.stride + base_ + f;
        upstream_.data()[at] =
            labels_.data()[at] == none ? Real{0} : static_cast<Real>(in[x * loss.upstream_w]);
      }
    }
  }
  // Cells that have the phase base_ + f.
  int64_t cells_of(int64_t f) const {
    return (plan_.p.W - 1 - (base_ + f)) / plan_.columns.stride + 1;
  }
  // Row y from values [phase][cell].
  template <typename To, typename From>
  void write_row(const From* values, To* out) const {
    for (int64_t f = 0; f < phases_; ++f) {
      for (int64_t q = 0; q < cells_of(f); ++q) {
        out[q * plan_.columns.stride + base_ + f] = static_cast<To>(values[f * plan_.width + q]);
      }
    }
  }

  void run_row(int64_t j, int64_t fy, int64_t y) {
    if (loss_ != nullptr) {
      load_labels(y);
      // The next row of this item, or one that is read soon after.
      const int64_t skip = fy + 1 < pass_.fy_end ? 1 : plan_.rows.stride - (fy - pass_.fy_begin);
      if (y + skip < plan_.p.H) loss_->target.prefetch_row(n_ * plan_.p.H + y + skip);
    }
    const Part<Real>* const parts = pass_.row_parts(fy);
    for (int64_t i = 0; i < pass_.end - pass_.begin; ++i) {
      const int64_t block = plan_.block(parts[i].chunk.P);
      for (int64_t q = 0; q < plan_.width; q += block) {
        run_tile(j, parts[i], q, std::min(block, plan_.width - q));
      }
    }
    if (plan_.to_input) {
      for (const auto& tap : plan_.rows.phases[fy]) {
        if (inside(j + tap.offset)) touched_[(j + tap.offset) % plan_.slots] = 1;
      }
    }
    if (wants_map()) {
      write_row(loss_map_.data(),
                static_cast<Out*>(loss_->loss) + (n_ * plan_.p.H + y) * plan_.p.W);
    }
    if (sink_ != nullptr) {
      write_row(labels_.data(), row_labels_.data());
      sink_->take_row(n_, y, row_labels_.data());
    }
  }

  // Cells q .. q + width.
  void run_tile(int64_t j, const Part<Real>& part, int64_t q, int64_t width) {
    const Chunk& chunk = part.chunk;
    const int64_t at = (chunk.first - base_) * plan_.width + q;
    if (plan_.depthwise) {
      if constexpr (std::is_same_v<Real, float>) prepare_depthwise(j, part, q, width);
    } else {
      z_rows_.resize(plan_.C * chunk.P);
      for (size_t r = 0; r < z_rows_.size(); ++r) z_rows_[r] = z_.data() + r * width;
      for (int64_t group = 0; group < plan_.p.groups; ++group) forward(j, part, q, width, group);
    }
    const int64_t stride = plan_.stride(chunk.P, width);
    if (loss_ == nullptr) {
      if (plan_.depthwise) plan_.kernel.depthwise_forward(depthwise_);
      plan_.kernel.argmax(z_.data(), plan_.C, chunk.P, width, stride, labels_.data() + at,
                          plan_.width);
      return;
    }
    const auto pointer = [](const std::vector<Real>& v) { return v.empty() ? nullptr : v.data(); };
    SoftmaxTile<Real> tile{};
    tile.C = plan_.C;
    tile.width = width;
    tile.stride = stride;
    tile.P = chunk.P;
    tile.z = z_.data();
    tile.pitch = plan_.width;
    tile.labels = labels_.data() + at;
    tile.upstream = loss_->upstream != nullptr ? upstream_.data() + at : nullptr;
    tile.softmax_weight = pointer(weights_->softmax_r);
    tile.one_hot_weight = pointer(weights_->one_hot_r);
    tile.smoothing_weight = pointer(weights_->smoothing_r);
    tile.class_weight = pointer(weights_->class_weight_r);
    tile.gradient = plan_.gradient();
    tile.loss_map = wants_map() ? loss_map_.data() + at : nullptr;
    if constexpr (std::is_same_v<Real, float>) {
      plan_.depthwise ? plan_.kernel.depthwise_softmax(depthwise_, tile)
                      : plan_.kernel.softmax(tile);
    } else {
      plan_.kernel.softmax(tile);
    }
    if (std::is_same_v<Real, double>) clear_missing(chunk, q, width);
    totals_->loss += tile.loss;
    totals_->weight += tile.weight;
    totals_->valid += tile.valid;
    if (plan_.depthwise) {
      if (plan_.gradient()) plan_.kernel.depthwise_backward(depthwise_);
      return;
    }
    if (plan_.to_bias) {
      plan_.kernel.add_sums(z_.data(), plan_.C, chunk.P * width, totals_->bias.data());
    }
    if (!plan_.to_input && !plan_.to_weight) return;
    for (int64_t group = 0; group < plan_.p.groups; ++group) backward(j, part, q, width, group);
  }

  // Where a phase has no cell the gradient is 0, also of a logit that is NaN.
  void clear_missing(const Chunk& chunk, int64_t q, int64_t width) {
    for (int p = 0; p < chunk.P; ++p) {
      const int64_t cells = std::clamp<int64_t>(cells_of(chunk.first - base_ + p) - q, 0, width);
      for (int64_t c = 0; c < plan_.C; ++c) {
        Real* const z = z_.data() + (c * chunk.P + p) * width;
        std::fill(z + cells, z + width, Real{0});
      }
    }
  }

  // Slot and column (of a row buffer, of cell 0) of a tap; slot -1: zeros.
  struct Place {
    int64_t slot, column;
  };
  Place place(int64_t j, const Part<Real>& part, const TapOf& tap) const {
    if (tap.row < 0) return {-1, 0};
    const int64_t column = plan_.columns.phases[part.chunk.first][tap.column].offset;
    const int64_t row = j + plan_.rows.phases[part.fy][tap.row].offset;
    return {inside(row) ? row % plan_.slots : -1, column - plan_.column_first};
  }

  void prepare_depthwise(int64_t j, const Part<Real>& part, int64_t q, int64_t width) {
    depthwise_taps_.clear();
    depthwise_ = {};
    for (const TapOf& tap : part.taps) {
      const Place at = place(j, part, tap);
      if (at.slot < 0) {
        depthwise_taps_.push_back({zero_.data(), 0, unused_.data(), 0});
      } else {
        const int64_t offset = at.slot * plan_.C * plan_.pitch + at.column + q;
        float* const gradient = plan_.to_input ? gradient_.data() + offset : unused_.data();
        depthwise_taps_.push_back(
            {x_.data() + offset, plan_.pitch, gradient, plan_.to_input ? plan_.pitch : 0});
      }
      if (tap.row >= 0) depthwise_.pairs = static_cast<int>((depthwise_taps_.size() + 1) / 2);
    }
    depthwise_.C = plan_.C;
    depthwise_.width = width;
    depthwise_.stride = plan_.stride(part.chunk.P, width);
    depthwise_.P = part.chunk.P;
    depthwise_.taps = static_cast<int>(part.taps.size());
    depthwise_.tap = depthwise_taps_.data();
    depthwise_.weight = pass_.weight.data() + part.offset;
    depthwise_.bias = plan_.bias.data();
    depthwise_.z = z_.data();
    depthwise_.powers = plan_.powers;
    depthwise_.to_input = plan_.to_input;
    if (plan_.to_weight) {
      depthwise_.to_weight = lane_sums_.data() + part.offset * plan_.kernel.lanes;
    }
    depthwise_.to_bias = lane_bias_.data();
  }

  // eq. 1 of one group
  void forward(int64_t j, const Part<Real>& part, int64_t q, int64_t width, int64_t group) {
    x_rows_.clear();
    for (const TapOf& tap : part.taps) {
      const Place at = place(j, part, tap);
      for (int64_t channel = group * plan_.I; channel < (group + 1) * plan_.I; ++channel) {
        x_rows_.push_back(at.slot < 0 ? zero_.data()
                                      : x_.data() + (at.slot * plan_.C_in + channel) * plan_.pitch +
                                            at.column + q);
      }
    }
    const int64_t rows = plan_.M * part.chunk.P, inner = part.inner;
    plan_.kernel.multiply({rows, width, static_cast<int64_t>(x_rows_.size()),
                           pass_.weight.data() + part.offset + group * rows * inner, inner, 1,
                           x_rows_.data(), z_rows_.data() + group * rows,
                           part.start.data() + group * rows});
  }

  // eq. 4 and 5 of one group
  void backward(int64_t j, const Part<Real>& part, int64_t q, int64_t width, int64_t group) {
    const int64_t rows = plan_.M * part.chunk.P, inner = part.inner;
    const int64_t at = part.offset + group * rows * inner;
    const std::vector<TapOf>& taps = part.taps;
    if (plan_.to_input) {
      to_rows_.clear();
      for (const TapOf& tap : taps) {
        const Place to = place(j, part, tap);
        for (int64_t channel = group * plan_.I; channel < (group + 1) * plan_.I; ++channel) {
          to_rows_.push_back(to.slot < 0 ? unused_.data()
                                         : gradient_.data() +
                                               (to.slot * plan_.C_in + channel) * plan_.pitch +
                                               to.column + q);
        }
      }
      plan_.kernel.multiply({static_cast<int64_t>(to_rows_.size()), width, rows,
                             pass_.weight.data() + at, 1, inner, z_rows_.data() + group * rows,
                             to_rows_.data(), nullptr});
    }
    if (plan_.to_weight) {
      const int64_t cells = std::min(width, plan_.columns.cells - q);
      if (cells <= 0 || taps.empty()) return;
      column_rows_.clear();
      for (int64_t cell = 0; cell < cells; ++cell) {
        column_rows_.push_back(columns_->data() + cell * inner);
      }
      for (size_t t = 0; t < taps.size(); ++t) {
        const Place from = place(j, part, taps[t]);
        for (int64_t cell = 0; cell < cells; ++cell) {
          Real* const out = columns_->data() + cell * inner + t * plan_.I;
          if (from.slot < 0) {
            std::memset(out, 0, plan_.I * sizeof(Real));
          } else {
            const Real* in = x_transposed_.data() +
                             (from.slot * plan_.pitch + from.column + q + cell) * plan_.C_in +
                             group * plan_.I;
            std::copy(in, in + plan_.I, out);
          }
        }
      }
      const int64_t used = taps.size() * plan_.I;
      for (int64_t cell = 0; used < inner && cell < cells; ++cell) {
        std::fill(column_rows_[cell] + used, column_rows_[cell] + inner, Real{0});
      }
      sum_rows_.clear();
      for (int64_t r = 0; r < rows; ++r) sum_rows_.push_back(sums_ + at + r * inner);
      plan_.kernel.multiply({rows, inner, cells, z_.data() + group * rows * width, width, 1,
                             column_rows_.data(), sum_rows_.data(), nullptr});
    }
  }

  const Plan<Real>& plan_;
  const Pass<Real>& pass_;
  const ConvTransposeCrossEntropy* const loss_;
  const LossWeights<Real>* const weights_;
  LabelSink* const sink_;
  const bool transposed_;
  const int64_t base_, phases_;          // of the columns, in this pass
  std::vector<int64_t> row_of_;          // [slots] input row, or -1
  std::vector<char> touched_;            // [slots] its gradient is not zero
  Buffer<Real> x_;                       // [slots][C_in][pitch]
  Buffer<Real> x_transposed_;            // [slots][pitch][C_in]
  Buffer<Real> gradient_;                // [slots][C_in][pitch]
  Buffer<Real> zero_, unused_;           // rows outside the input
  Buffer<Real> lane_sums_;               // [size][lanes] of the depthwise weights
  Buffer<Real> lane_bias_;               // [C][lanes] of the depthwise bias
  Buffer<int32_t> row_labels_, labels_;  // [W], [phases][width]
  Buffer<Real> upstream_, loss_map_;     // [phases][width]
  Buffer<Real> z_;
  std::unique_ptr<Buffer<Real>> columns_;  // [cells][inner], X of eq. 5
  std::vector<Real*> z_rows_, x_rows_, to_rows_, column_rows_, sum_rows_;
  std::vector<DepthwiseTap> depthwise_taps_;
  Depthwise depthwise_{};
  int64_t n_ = 0, owned_end_ = 0;
  Real* sums_ = nullptr;
  Out* halo_ = nullptr;
  Totals* totals_ = nullptr;
};

// ---- all of it ----

// The greatest |x|; infinite or NaN where one is.
float greatest(const Logits& x, const ParallelFor& parallel_for) {
  std::vector<int32_t> found(x.N * x.h, 0);  // as bits, whose order is that of the magnitudes
  parallel_for(x.N * x.h, [&](int64_t begin, int64_t end) {
    std::vector<float> row(x.C * x.w);
    for (int64_t i = begin; i < end; ++i) {
      read_row(x, i / x.h, i % x.h, row.data(), x.w, 1);
      int32_t most = 0;
      for (const float value : row) {
        int32_t bits;
        std::memcpy(&bits, &value, 4);
        most = std::max(most, bits & 0x7fffffff);
      }
      found[i] = most;
    }
  });
  const int32_t most = found.empty() ? 0 : *std::max_element(found.begin(), found.end());
  float value;
  std::memcpy(&value, &most, 4);
  return value;
}

// The greatest |x| of the input where the fp32 path takes it: all values, and so all logits, are
// finite. Elsewhere infinity.
double fp32_range(const ConvTranspose& p, const ParallelFor& parallel_for) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  if (p.input.dtype == DType::kDouble) return kInfinity;
  const int64_t I = p.input.C / p.groups;
  const int64_t* stride = p.weight_stride;
  const Logits weight{p.weight,   p.input.dtype, p.input.C, p.C / p.groups, p.kernel_h,
                      p.kernel_w, stride[0],     stride[1], stride[2],      stride[3]};
  const double range = greatest(p.input, parallel_for);
  double bound =
      static_cast<double>(I * p.kernel_h * p.kernel_w) * range * greatest(weight, parallel_for);
  if (p.bias != nullptr) {
    bound += greatest({p.bias, p.input.dtype, 1, p.C, 1, 1, 0, p.bias_stride, 0, 0}, parallel_for);
  }
  return bound <= 1e37 ? range : kInfinity;
}

template <typename Real, typename F>
void for_each_pass(const Plan<Real>& plan, const ParallelFor& parallel_for, F run_pass) {
  const int64_t chunks = static_cast<int64_t>(plan.chunks.size());
  for (int64_t fy = 0; fy < plan.rows.count(); fy += plan.rows_per_pass) {
    for (int64_t begin = 0; begin < chunks; begin += plan.chunks_per_pass) {
      const Pass<Real> pass(plan, fy, begin, parallel_for);
      run_pass(pass);
    }
  }
}

// Adds up the units' sums of a pass into the gradient of the weight.
template <typename Real, typename Out>
void write_weight_gradient(const Plan<Real>& plan, const Pass<Real>& pass, const Real* sums,
                           const ParallelFor& parallel_for) {
  const ConvTranspose& p = plan.p;
  Out* const out = static_cast<Out*>(plan.loss->to_weight);
  const int64_t area = p.kernel_h * p.kernel_w;
  const int64_t strides[4] = {plan.M * area, area, p.kernel_w, 1};
  parallel_for(plan.C, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      pass.for_each_weight(plan, c, strides, [&](int64_t packed, int64_t at) {
        double total = 0;
        for (int64_t unit = 0; unit < plan.units; ++unit) total += sums[unit * pass.size + packed];
        out[at] = static_cast<Out>(total);
      });
    }
  });
}

// Adds the halo rows of the items to the gradient of the input.
template <typename Real, typename Out>
void add_halos(const Plan<Real>& plan, const std::vector<Out>& halos,
               const ParallelFor& parallel_for) {
  const ConvTransposeCrossEntropy& loss = *plan.loss;
  const int64_t w = plan.p.input.w, h = plan.p.input.h, rows = plan.slots - 1;
  parallel_for(plan.N * plan.C_in, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / plan.C_in, c = i % plan.C_in;
      Out* const to = static_cast<Out*>(loss.to_input) + n * loss.to_input_n + c * loss.to_input_c;
      for (int64_t part = 0; part + 1 < plan.items_per_image; ++part) {
        const int64_t first = (part + 1) * plan.cells_per_item + plan.rows.first;
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t y = first + r;
          if (y < 0 || y >= h) continue;
          const Out* halo =
              halos.data() + (((n * plan.items_per_image + part) * rows + r) * plan.C_in + c) * w;
          for (int64_t x = 0; x < w; ++x) to[y * loss.to_input_h + x * loss.to_input_w] += halo[x];
        }
      }
    }
  });
}

// The double path's gradients of pixels that the target does not cover: eager multiplies them by
// 0, so that what is not finite gives NaN.
template <typename Out>
void add_zero_times(const Plan<double>& plan) {
  const ConvTranspose& p = plan.p;
  const ConvTransposeCrossEntropy& loss = *plan.loss;
  const int64_t h = p.input.h, w = p.input.w, size = plan.M * p.kernel_h * p.kernel_w;
  std::vector<double> x(plan.C_in, 0), row(plan.C_in * w), weight(plan.C_in, 0);
  for (int64_t i = 0; i < plan.N * h; ++i) {
    read_row(p.input, i / h, i % h, row.data(), w, 1);
    for (int64_t c = 0; c < plan.C_in * w; ++c) x[c / w] += row[c] * 0;
  }
  with_type(p.input.dtype, [&](auto type) {
    const auto* values = static_cast<const decltype(type)*>(p.weight);
    for (int64_t i = 0; i < plan.C_in * size; ++i) {
      const int64_t area = p.kernel_h * p.kernel_w, k = i % area;
      const int64_t at = i / size * p.weight_stride[0] + i / area % plan.M * p.weight_stride[1] +
                         k / p.kernel_w * p.weight_stride[2] + k % p.kernel_w * p.weight_stride[3];
      weight[i / size] += static_cast<double>(to_real(values[at])) * 0;
    }
  });
  for (int64_t c = 0; c < plan.C_in; ++c) {
    if (loss.to_weight != nullptr && x[c] != 0) {
      std::fill_n(static_cast<Out*>(loss.to_weight) + c * size, size, static_cast<Out>(x[c]));
    }
    for (int64_t i = 0; loss.to_input != nullptr && weight[c] != 0 && i < plan.N * h * w; ++i) {
      static_cast<Out*>(loss.to_input)[i / (h * w) * loss.to_input_n + c * loss.to_input_c +
                                       i / w % h * loss.to_input_h + i % w * loss.to_input_w] =
          static_cast<Out>(weight[c]);
    }
  }
}

template <typename Out>
void scale(void* data, int64_t size, double factor, const ParallelFor& parallel_for) {
  constexpr int64_t kBlock = 1 << 16;
  if (data == nullptr || factor == 1.0) return;
  Out* const values = static_cast<Out*>(data);
  parallel_for((size + kBlock - 1) / kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kBlock; i < std::min(size, end * kBlock); ++i) {
      values[i] *= static_cast<Out>(factor);
    }
  });
}

template <typename Real, typename Out>
BadLabel run(const ConvTransposeCrossEntropy& problem, double input_range,
             const ParallelFor& parallel_for) {
  const Plan<Real> plan(problem.conv, &problem, input_range);
  const LossWeights<Real> weights(problem.class_weight, plan.C, problem.label_smoothing);
  const int64_t input_size = plan.N * plan.C_in * plan.p.input.h * plan.p.input.w;
  const int64_t weight_size = plan.C_in * plan.M * plan.p.kernel_h * plan.p.kernel_w;
  if (plan.to_input) std::fill_n(static_cast<Out*>(problem.to_input), input_size, Out{0});
  if (plan.to_weight) std::fill_n(static_cast<Out*>(problem.to_weight), weight_size, Out{0});
  const int64_t halo_rows = plan.to_input ? plan.items * (plan.slots - 1) : 0;
  std::vector<Out> halos(halo_rows * plan.C_in * plan.p.input.w);
  std::vector<Totals> totals(plan.units);
  for_each_pass(plan, parallel_for, [&](const Pass<Real>& pass) {
    const Buffer<Real> sums(plan.to_weight ? plan.units * pass.size : 0);
    parallel_for(plan.units, [&](int64_t begin, int64_t end) {
      Worker<Real, Out> worker(plan, pass, &weights, nullptr);
      for (int64_t unit = begin; unit < end; ++unit) {
        Real* const own = plan.to_weight ? sums.data() + unit * pass.size : nullptr;
        worker.run_unit(unit, own, halos.data(), totals[unit]);
      }
    });
    if (plan.to_weight) {
      write_weight_gradient<Real, Out>(plan, pass, sums.data(), parallel_for);
    }
  });
  Totals all;
  all.bias.resize(plan.C);
  for (const Totals& part : totals) {
    all.loss += part.loss;
    all.weight += part.weight;
    all.valid += part.valid;
    all.bad.merge(part.bad);
    for (size_t c = 0; c < part.bias.size(); ++c) all.bias[c] += part.bias[c];
  }
  if (all.bad.count != 0) return all.bad;
  const bool mean = problem.reduction == Reduction::kMean;
  const double denominator = mean_denominator(all.weight);
  if (problem.reduction != Reduction::kNone) {
    *static_cast<Out*>(problem.loss) = static_cast<Out>(mean ? all.loss / denominator : all.loss);
  }
  if (!halos.empty()) add_halos(plan, halos, parallel_for);
  // No valid pixel: the mean is NaN, but the gradient is 0.
  const double factor = mean && all.valid > 0 ? 1.0 / denominator : 1.0;
  scale<Out>(problem.to_input, input_size, factor / plan.unit, parallel_for);
  scale<Out>(problem.to_weight, weight_size, factor, parallel_for);
  for (int64_t c = 0; plan.to_bias && c < plan.C; ++c) {
    static_cast<Out*>(problem.to_bias)[c] = static_cast<Out>(all.bias[c] * factor);
  }
  if constexpr (std::is_same_v<Real, double>) add_zero_times<Out>(plan);
  return all.bad;
}

template <typename Real>
void run_argmax(const ConvTranspose& problem, double input_range, const ParallelFor& parallel_for,
                const std::function<std::unique_ptr<LabelSink>()>& make_sink) {
  const Plan<Real> plan(problem, nullptr, input_range);
  for_each_pass(plan, parallel_for, [&](const Pass<Real>& pass) {
    parallel_for(plan.units, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<LabelSink> sink = make_sink();
      Worker<Real, Real> worker(plan, pass, nullptr, sink.get());
      Totals unused;
      for (int64_t unit = begin; unit < end; ++unit) {
        worker.run_unit(unit, nullptr, nullptr, unused);
      }
    });
  });
}

}  // namespace

BadLabel conv_transpose_cross_entropy(const ConvTransposeCrossEntropy& problem,
                                      const ParallelFor& parallel_for) {
  const double range = fp32_range(problem.conv, parallel_for);
  if (std::isfinite(range)) return run<float, float>(problem, range, parallel_for);
  if (problem.conv.input.dtype == DType::kDouble) {
    return run<double, double>(problem, range, parallel_for);
  }
  return run<double, float>(problem, range, parallel_for);
}

void conv_transpose_argmax(const ConvTranspose& problem, const ParallelFor& parallel_for,
                           const std::function<std::unique_ptr<LabelSink>()>& make_sink) {
  const double range = fp32_range(problem, parallel_for);
  if (std::isfinite(range)) {
    run_argmax<float>(problem, range, parallel_for, make_sink);
  } else {
    run_argmax<double>(problem, range, parallel_for, make_sink);
  }
}

}  // namespace fcnseg
