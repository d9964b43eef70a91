// The schedule of upsample_cross_entropy: work items, rows, labels, halo rows; and the exact path.
// The arithmetic of the vector path is in upsample_cross_entropy_kernel.h.
//
// Who owns what. A band is all output rows between two neighbouring source rows (a cell of the
// vertical axis, bilinear.h). A work item is a run of bands of one image; the split depends on the
// shape alone. An item writes the gradient of its source rows, except the first, which it shares
// with the item above: that one goes to a halo row of its own, added at the end in a fixed order.
// So the result does not depend on the number of threads. Per thread, two source rows with their
// gradients and tables of a few vectors per class are held; nothing has the size of the output.
//
// The exact path takes double logits, and bands with a row that is not finite or whose range is
// extreme. It evaluates eager's formulas pixel by pixel in double, so that NaN and infinities come
// out as they do there: also 0 * inf = NaN from a corner of weight zero.

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "bilinear.h"
#include "buffer.h"
#include "cpu_capability.h"
#include "upsample_cross_entropy.h"
#include "upsample_cross_entropy_rows.h"

#define FCNSEG_KERNEL "upsample_cross_entropy_kernel.h"
#include "for_each_isa.h"
#undef FCNSEG_KERNEL

namespace fcnseg {
namespace {

RowKernel row_kernel(Capability capability) {
#if defined(__x86_64__)
  if (capability == Capability::kAvx512) return avx512::cross_entropy::kernel("avx512");
  if (capability == Capability::kAvx2) return avx2::cross_entropy::kernel("avx2");
#endif
  return portable::cross_entropy::kernel("default");
}

constexpr int kItemsPerImage = 16;

// What all items share.
struct Plan {
  const UpsampleCrossEntropy& p;
  int64_t N, C, h, w, H, W;
  RowKernel kernel;
  Axis rows, columns_axis;
  Columns columns;
  std::vector<int64_t> band_begin;
  int64_t bands_per_item, items_per_image, items;
  bool vector_path;
  LossWeights<float> weights;  // eq. 3 of the kernel header

  explicit Plan(const UpsampleCrossEntropy& problem)
      : p(problem),
        N(p.logits.N),
        C(p.logits.C),
        h(p.logits.h),
        w(p.logits.w),
        H(p.target.H),
        W(p.target.W),
        kernel(row_kernel(cpu_capability())),
        rows(h, H, p.align_corners, p.scale_h),
        columns_axis(w, W, p.align_corners, p.scale_w),
        columns(columns_axis, kernel.lanes),
        band_begin(rows.cell_begin()),
        bands_per_item((h + kItemsPerImage - 1) / kItemsPerImage),
        items_per_image((h + bands_per_item - 1) / bands_per_item),
        items(N * items_per_image),
        // One class has exactly zero loss and gradient, which progressions only come near to.
        vector_path(p.logits.dtype != DType::kDouble && C > 1),
        weights(p.weight, C, p.label_smoothing) {}
};

struct Totals {
  double loss = 0;  // natural logarithm
  double weight = 0;
  int64_t valid = 0;
  UpsampleCrossEntropyReport report;
};

// Two neighbouring source rows and all scratch; one per thread. Real: the outputs' type.
template <typename Real>
class Worker {
 public:
  explicit Worker(const Plan& plan)
      : plan_(plan),
        p_(plan.p),
        gradient_(p_.gradient != nullptr),
        pitch_((plan.columns.vectors + 1) * plan.kernel.lanes),
        plane_(plan.vector_path ? plan.C * pitch_ : 0),
        label_pitch_((plan.W + 127) / 64 * 64),
        values_(2 * plane_),
        left_(gradient_ ? 2 * plane_ : 0),
        right_(gradient_ ? 2 * plane_ : 0),
        lowest_(2 * plan.columns.vectors),
        maximum_(pitch_),
        labels_(kMaxRows * label_pitch_),
        upstream_(p_.upstream != nullptr ? kMaxRows * label_pitch_ : 0),
        edges_(3 * (label_pitch_ / 8 + 8)),
        tables_(plan.vector_path ? table_size() : 0) {
    std::fill(labels_.data(), labels_.data() + kMaxRows * label_pitch_,
              static_cast<int32_t>(plan.C));
    if (plan.vector_path) set_up_group();
  }

  // `halo` [C][w] takes the gradient of the item's first row where another item owns that row.
  void run_item(int64_t item, Real* halo, Totals& totals) {
    n_ = item / plan_.items_per_image;
    const int64_t part = item % plan_.items_per_image;
    // The top margin, band 0, goes with band 1: eager's gradient reaches row 1 from there too.
    const int64_t begin = part == 0 ? 0 : part * plan_.bands_per_item + 1;
    const int64_t end = std::min(plan_.h, (part + 1) * plan_.bands_per_item) + 1;
    totals_ = &totals;
    row_of_[0] = row_of_[1] = -1;
    for (int64_t band = begin; band < end; ++band) {
      const int64_t top = std::max<int64_t>(band - 1, 0);
      if (row_of_[0] != top) {
        if (row_of_[1] == top && band > begin) {
          finish_row(0, part > 0 && row_of_[0] == begin - 1 ? halo : nullptr);
          swap_rows();
        }
        load_row(0, top);
      }
      // Eager reads the row below with weight 0 in a top margin: only its NaN would show.
      load_row(1, std::min(top + 1, plan_.h - 1));
      const bool margin = band == 0 || band == plan_.h;
      run_band(band, margin);
    }
    const int64_t last = std::min(end - 1, plan_.h - 1);
    if (row_of_[0] != last) {
      finish_row(0, part > 0 && row_of_[0] == begin - 1 ? halo : nullptr);
      swap_rows();
    }
    finish_row(0, part > 0 && last == begin - 1 ? halo : nullptr);
  }

 private:
  int64_t table_size() const {
    const int64_t record = 4 * plan_.kernel.lanes;
    const int64_t C = plan_.C;
    return (C + 1) * record + 2 * C * record + C * kMaxRows * plan_.kernel.lanes +
           (C + 1) * record + kMaxPhases * kMaxRows * plan_.kernel.lanes;
  }

  void set_up_group() {
    const Columns& columns = plan_.columns;
    group_ = {};
    group_.C = plan_.C;
    group_.w = plan_.w;
    group_.W = plan_.W;
    group_.vectors = columns.vectors;
    group_.phases = columns.phases.data();
    group_.offset = columns.offset.data();
    group_.pixel = columns.pixel.data();
    group_.lambda = columns.lambda.data();
    group_.present = columns.present.data();
    group_.full = columns.full.data();
    group_.step = columns.step.data();
    group_.first = columns.first.data();
    group_.count = columns.count.data();
    group_.right_margin = columns.right_margin;
    group_.step_x = static_cast<float>(plan_.columns_axis.step);
    group_.pitch = pitch_;
    group_.label_pitch = label_pitch_;
    group_.labels = labels_.data();
    if constexpr (std::is_same_v<Real, float>) {
      if (p_.upstream != nullptr) group_.upstream = upstream_.data();
    }
    const auto pointer = [](const std::vector<float>& v) { return v.empty() ? nullptr : v.data(); };
    group_.softmax_weight = pointer(plan_.weights.softmax_r);
    group_.one_hot_weight = pointer(plan_.weights.one_hot_r);
    group_.smoothing_weight = pointer(plan_.weights.smoothing_r);
    group_.class_weight = pointer(plan_.weights.class_weight_r);
    group_.gradient = gradient_;
    group_.loss_map_pitch = plan_.W;
    const int64_t record = 4 * plan_.kernel.lanes;
    const int64_t C = plan_.C;
    float* next = tables_.data();
    const auto take = [&next](int64_t size) {
      float* const start = next;
      next += size;
      return start;
    };
    group_.corners = take((C + 1) * record);
    group_.progress = take(C * record);
    group_.moments = take(C * record);
    group_.exponentials = take(C * kMaxRows * plan_.kernel.lanes);
    // One or the other is used: packed (8 bytes a lane) or weighted (16 bytes).
    group_.weighted_one_hot = take((C + 1) * record);
    group_.one_hot = reinterpret_cast<uint64_t*>(group_.weighted_one_hot);
    group_.alpha = take(kMaxPhases * kMaxRows * plan_.kernel.lanes);
    const int64_t bytes = label_pitch_ / 8 + 8;
    group_.vertical = edges_.data();
    group_.horizontal = edges_.data() + bytes;
    group_.ignored = edges_.data() + 2 * bytes;
  }

  void swap_rows() {
    std::swap(row_of_[0], row_of_[1]);
    std::swap(slot_[0], slot_[1]);
    std::swap(regular_[0], regular_[1]);
    exact_values_[0].swap(exact_values_[1]);
    exact_gradient_[0].swap(exact_gradient_[1]);
  }

  float* plane(const Buffer<float>& buffer, int row) const {
    return buffer.data() + slot_[row] * plane_;
  }
  float* lowest(int row) const { return lowest_.data() + slot_[row] * plan_.columns.vectors; }

  void load_row(int row, int64_t y) {
    if (row_of_[row] == y) return;
    row_of_[row] = y;
    exact_values_[row].clear();
    if (!plan_.vector_path) return;
    float* values = plane(values_, row);
    read_row(p_.logits, n_, y, values, pitch_, 1);
    for (int64_t c = 0; c < plan_.C; ++c) {
      float* q = values + c * pitch_;
      q[plan_.w] = q[0];  // the last lane lies between the last and the first column
      std::fill(q + plan_.w + 1, q + pitch_, 0.f);
    }
    regular_[row] = plan_.kernel.shift_row(values, plan_.C, pitch_, plan_.columns.vectors,
                                           maximum_.data(), lowest(row));
  }

  const std::vector<double>& exact_row(int row) {
    std::vector<double>& values = exact_values_[row];
    if (values.empty()) {
      values.resize(plan_.w * plan_.C);
      read_row(p_.logits, n_, row_of_[row], values.data(), 1, plan_.C);
    }
    if (gradient_) exact_gradient_[row].resize(plan_.w * plan_.C, 0.0);
    return values;
  }

  // Labels of R rows, and their upstream gradients.
  void load_labels(int64_t y, int R) {
    for (int r = 0; r < R; ++r) {
      int32_t* out = labels_.data() + r * label_pitch_;
      const Labels& target = p_.target;
      const int64_t bad =
          plan_.kernel.labels(target, n_ * plan_.H + y + r, plan_.C, p_.ignore_index, out);
      if (bad != 0) {
        totals_->report.bad.merge(
            BadLabel::in_row(target, plan_.C, p_.ignore_index, bad, n_, y + r));
      }
      if (p_.upstream != nullptr) {
        Real* upstream = upstream_.data() + r * label_pitch_;
        const Real* in =
            static_cast<const Real*>(p_.upstream) + n_ * p_.upstream_n + (y + r) * p_.upstream_h;
        for (int64_t x = 0; x < plan_.W; ++x) {
          upstream[x] = out[x] == plan_.C ? Real{0} : in[x * p_.upstream_w];
        }
      }
    }
  }

  void run_band(int64_t band, bool margin) {
    const bool vector = plan_.vector_path && regular_[0] && regular_[1];
    for (int64_t y = plan_.band_begin[band]; y < plan_.band_begin[band + 1];) {
      const int R = static_cast<int>(std::min<int64_t>(kMaxRows, plan_.band_begin[band + 1] - y));
      load_labels(y, R);
      if (vector) {
        run_vector_rows(y, R, margin);
      } else {
        totals_->report.exact_rows += R;
        for (int r = 0; r < R; ++r) run_exact_row(y + r, r);
      }
      y += R;
    }
  }

  void run_vector_rows(int64_t y, int R, bool margin) {
    if constexpr (std::is_same_v<Real, float>) {
      const int below = margin ? 0 : 1;
      group_.rows = R;
      group_.lambda_y = margin ? 0.f : static_cast<float>(plan_.rows.source(y).lambda);
      group_.step_y = margin ? 0.f : static_cast<float>(plan_.rows.step);
      group_.top = plane(values_, 0);
      group_.bottom = plane(values_, below);
      group_.lowest_top = lowest(0);
      group_.lowest_bottom = lowest(below);
      if (gradient_) {
        group_.top_left = plane(left_, 0);
        group_.top_right = plane(right_, 0);
        group_.bottom_left = plane(left_, below);
        group_.bottom_right = plane(right_, below);
      }
      group_.loss_map = loss_map_row(y);
      group_.loss = group_.weight = 0;
      group_.valid = group_.tiles = group_.direct_tiles = 0;
      plan_.kernel.process(group_);
      totals_->loss += group_.loss * 0.693147180559945309417;
      totals_->weight += group_.weight;
      totals_->valid += group_.valid;
      totals_->report.tiles += group_.tiles;
      totals_->report.direct_tiles += group_.direct_tiles;
    }
  }

  Real* loss_map_row(int64_t y) const {
    if (p_.reduction != Reduction::kNone || p_.loss == nullptr) return nullptr;
    return static_cast<Real*>(p_.loss) + (n_ * plan_.H + y) * plan_.W;
  }

  // The formulas of eager, in double. r: the row's place in labels_.
  void run_exact_row(int64_t y, int r) {
    const int64_t C = plan_.C;
    const Axis::Source sy = plan_.rows.source(y);
    const double* top = exact_row(0).data();
    const double* bottom = sy.i1 == sy.i0 ? top : exact_row(1).data();
    std::vector<double>& z = pixel_;
    z.resize(2 * C);
    double* const probability = z.data() + C;
    Real* const map = loss_map_row(y);
    for (int64_t x = 0; x < plan_.W; ++x) {
      const Axis::Source sx = plan_.columns_axis.source(x);
      const double y1 = sy.lambda, y0 = 1 - y1, x1 = sx.lambda, x0 = 1 - x1;
      const int64_t left = sx.i0 * C, right = sx.i1 * C;
      double maximum = -std::numeric_limits<double>::infinity();
      for (int64_t c = 0; c < C; ++c) {
        z[c] = y0 * (x0 * top[left + c] + x1 * top[right + c]) +
               y1 * (x0 * bottom[left + c] + x1 * bottom[right + c]);
        maximum = std::max(maximum, z[c]);
      }
      double total = 0;
      for (int64_t c = 0; c < C; ++c) {
        probability[c] = std::exp(z[c] - maximum);
        total += probability[c];
      }
      const double log_sum = maximum + std::log(total);
      const int64_t label = labels_.data()[r * label_pitch_ + x];
      const bool valid = label != C;
      double loss = 0;
      if (valid) {
        loss = plan_.weights.one_hot[label] * (log_sum - z[label]);
        if (plan_.weights.label_smoothing != 0) {
          for (int64_t c = 0; c < C; ++c) loss += plan_.weights.smoothing[c] * (log_sum - z[c]);
        }
        totals_->loss += loss;
        totals_->weight += p_.weight != nullptr ? p_.weight[label] : 1.0;
        totals_->valid += 1;
      }
      if (map != nullptr) map[x] = static_cast<Real>(loss);
      if (!gradient_) continue;
      const double upstream =
          p_.upstream != nullptr ? static_cast<double>(upstream_.data()[r * label_pitch_ + x]) : 1;
      double* const top_gradient = exact_gradient_[0].data();
      double* const bottom_gradient = exact_gradient_[sy.i1 == sy.i0 ? 0 : 1].data();
      for (int64_t c = 0; c < C; ++c) {
        double d = plan_.weights.softmax[label] * (probability[c] / total);
        if (valid) d -= plan_.weights.smoothing[c];
        if (c == label) d -= plan_.weights.one_hot[label];
        d *= upstream;
        top_gradient[left + c] += y0 * x0 * d;
        top_gradient[right + c] += y0 * x1 * d;
        bottom_gradient[left + c] += y1 * x0 * d;
        bottom_gradient[right + c] += y1 * x1 * d;
      }
    }
  }

  // Writes the row's gradient to its place, or to `halo`, and clears it.
  void finish_row(int row, Real* halo) {
    if (!gradient_) return;
    const int64_t C = plan_.C, w = plan_.w;
    Real* out = static_cast<Real*>(p_.gradient) + n_ * p_.gradient_n + row_of_[row] * p_.gradient_h;
    int64_t stride_c = p_.gradient_c, stride_w = p_.gradient_w;
    if (halo != nullptr) {
      out = halo;
      stride_c = w;
      stride_w = 1;
    }
    std::vector<double>& exact = exact_gradient_[row];
    for (int64_t c = 0; c < C; ++c) {
      Real* const plane_out = out + c * stride_c;
      if (plan_.vector_path) {
        const float* left = plane(left_, row) + c * pitch_;
        const float* right = plane(right_, row) + c * pitch_;
        plane_out[0] = static_cast<Real>(left[0] + right[w - 1]);
        for (int64_t j = 1; j < w; ++j) {
          plane_out[j * stride_w] = static_cast<Real>(left[j] + right[j - 1]);
        }
      } else {
        for (int64_t j = 0; j < w; ++j) plane_out[j * stride_w] = 0;
      }
      if (!exact.empty()) {
        for (int64_t j = 0; j < w; ++j) {
          plane_out[j * stride_w] += static_cast<Real>(exact[j * C + c]);
        }
      }
    }
    exact.clear();
    if (plan_.vector_path) {
      std::memset(plane(left_, row), 0, plane_ * sizeof(float));
      std::memset(plane(right_, row), 0, plane_ * sizeof(float));
    }
  }

  const Plan& plan_;
  const UpsampleCrossEntropy& p_;
  const bool gradient_;
  const int64_t pitch_, plane_, label_pitch_;
  Buffer<float> values_, left_, right_, lowest_, maximum_;
  Buffer<int32_t> labels_;
  Buffer<Real> upstream_;
  Buffer<uint8_t> edges_;
  Buffer<float> tables_;
  std::vector<double> exact_values_[2], exact_gradient_[2], pixel_;
  RowGroup group_;
  int64_t n_ = 0;
  int64_t row_of_[2] = {-1, -1};
  int slot_[2] = {0, 1};
  bool regular_[2] = {false, false};
  Totals* totals_ = nullptr;
};

// Adds the halo rows of image n, and scales its gradient.
template <typename Real>
void finish_image(const Plan& plan, int64_t n, const Real* halos, double scale) {
  const UpsampleCrossEntropy& p = plan.p;
  Real* const gradient = static_cast<Real*>(p.gradient);
  for (int64_t part = 1; part < plan.items_per_image; ++part) {
    const Real* halo = halos + (n * plan.items_per_image + part) * plan.C * plan.w;
    Real* out = gradient + n * p.gradient_n + part * plan.bands_per_item * p.gradient_h;
    for (int64_t c = 0; c < plan.C; ++c) {
      for (int64_t j = 0; j < plan.w; ++j) {
        out[c * p.gradient_c + j * p.gradient_w] += halo[c * plan.w + j];
      }
    }
  }
  if (scale == 1.0) return;
  // The gradient is dense: image n is one block, in whatever order.
  const int64_t size = plan.C * plan.h * plan.w;
  for (int64_t i = n * size; i < (n + 1) * size; ++i) gradient[i] *= static_cast<Real>(scale);
}

template <typename Real>
UpsampleCrossEntropyReport run(const Plan& plan, const ParallelFor& parallel_for) {
  const UpsampleCrossEntropy& p = plan.p;
  std::vector<Totals> totals(plan.items);
  const int64_t row = plan.C * plan.w;
  const bool gradient = p.gradient != nullptr;
  std::vector<Real> halos(gradient && plan.items_per_image > 1 ? plan.items * row : 0);
  parallel_for(plan.items, [&](int64_t begin, int64_t end) {
    Worker<Real> worker(plan);
    for (int64_t item = begin; item < end; ++item) {
      worker.run_item(item, halos.empty() ? nullptr : halos.data() + item * row, totals[item]);
    }
  });
  Totals all;
  for (const Totals& part : totals) {
    all.loss += part.loss;
    all.weight += part.weight;
    all.valid += part.valid;
    all.report.bad.merge(part.report.bad);
    all.report.tiles += part.report.tiles;
    all.report.direct_tiles += part.report.direct_tiles;
    all.report.exact_rows += part.report.exact_rows;
  }
  if (all.report.bad.count != 0) return all.report;
  const bool mean = p.reduction == Reduction::kMean;
  const double denominator = mean_denominator(all.weight);
  if (p.reduction != Reduction::kNone) {
    *static_cast<Real*>(p.loss) = static_cast<Real>(mean ? all.loss / denominator : all.loss);
  }
  if (gradient) {
    // No valid pixel: the mean is NaN, but the gradient is 0.
    const double scale = mean && all.valid > 0 ? 1.0 / denominator : 1.0;
    parallel_for(plan.N, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) finish_image(plan, n, halos.data(), scale);
    });
  }
  return all.report;
}

}  // namespace

UpsampleCrossEntropyReport upsample_cross_entropy(const UpsampleCrossEntropy& problem,
                                                  const ParallelFor& parallel_for) {
  const Plan plan(problem);
  return problem.logits.dtype == DType::kDouble ? run<double>(plan, parallel_for)
                                                : run<float>(plan, parallel_for);
}

}  // namespace fcnseg
