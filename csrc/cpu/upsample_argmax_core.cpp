// The schedule of upsample_argmax. A work item is a band of one image: all output rows between two
// neighbouring source rows. Per thread, two source rows and up to eight rows of labels are held.
//
// Bands with a row that is not finite, and float64 logits, go pixel by pixel in double, with
// eager's order of operations and torch.argmax's rule: NaN is greatest, the first one wins.

#include <cmath>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "bilinear.h"
#include "buffer.h"
#include "cpu_capability.h"
#include "upsample_argmax.h"

namespace fcnseg {

constexpr int kMaxArgmaxRows = 8;

// Up to eight output rows of one band.
struct ArgmaxRows {
  int64_t C, W, vectors, pitch, label_pitch;
  int rows;
  float lambda_y[kMaxArgmaxRows];
  const int32_t* phases;  // the columns' plan (bilinear.h)
  const int64_t* offset;
  const int32_t* pixel;
  const float* lambda;
  const float* top;  // source rows [C][pitch]
  const float* bottom;
  int32_t* labels;      // [rows][label_pitch]
  int32_t* candidates;  // scratch [C + 1]
  float* corners;       // scratch [C][4][lanes]
  int32_t* staged;      // scratch [8][lanes]
};

struct ArgmaxKernel {
  int lanes;
  bool (*regular_row)(const float* row, int64_t size);
  void (*process)(const ArgmaxRows& rows);
};

}  // namespace fcnseg

#define FCNSEG_KERNEL "upsample_argmax_kernel.h"
#include "for_each_isa.h"
#undef FCNSEG_KERNEL

namespace fcnseg {
namespace {

ArgmaxKernel argmax_kernel(Capability capability) {
#if defined(__x86_64__)
  if (capability == Capability::kAvx512) return avx512::argmax::kernel();
  if (capability == Capability::kAvx2) return avx2::argmax::kernel();
#endif
  return portable::argmax::kernel();
}

struct ArgmaxPlan {
  const UpsampleArgmax& p;
  ArgmaxKernel kernel;
  Axis rows, columns_axis;
  Columns columns;
  std::vector<int64_t> band_begin;

  explicit ArgmaxPlan(const UpsampleArgmax& problem)
      : p(problem),
        kernel(argmax_kernel(cpu_capability())),
        rows(p.logits.h, p.H, p.align_corners, p.scale_h),
        columns_axis(p.logits.w, p.W, p.align_corners, p.scale_w),
        columns(columns_axis, kernel.lanes),
        band_begin(rows.cell_begin()) {}
};

class ArgmaxWorker {
 public:
  ArgmaxWorker(const ArgmaxPlan& plan, LabelSink& sink)
      : plan_(plan),
        z_(plan.p.logits),
        sink_(sink),
        vector_path_(z_.dtype != DType::kDouble),
        pitch_((plan.columns.vectors + 1) * plan.kernel.lanes),
        label_pitch_((plan.p.W + 64) / 64 * 64),
        values_(vector_path_ ? 2 * z_.C * pitch_ : 0),
        corners_(vector_path_ ? z_.C * 4 * plan.kernel.lanes : 0),
        labels_(kMaxArgmaxRows * label_pitch_),
        candidates_(z_.C + 1),
        staged_(kMaxArgmaxRows * plan.kernel.lanes) {
    rows_ = {};
    rows_.C = z_.C;
    rows_.W = plan.p.W;
    rows_.vectors = plan.columns.vectors;
    rows_.pitch = pitch_;
    rows_.label_pitch = label_pitch_;
    rows_.phases = plan.columns.phases.data();
    rows_.offset = plan.columns.offset.data();
    rows_.pixel = plan.columns.pixel.data();
    rows_.lambda = plan.columns.lambda.data();
    rows_.labels = labels_.data();
    rows_.candidates = candidates_.data();
    rows_.corners = corners_.data();
    rows_.staged = staged_.data();
  }

  void run_band(int64_t n, int64_t band) {
    const int64_t begin = plan_.band_begin[band], end = plan_.band_begin[band + 1];
    if (begin == end) return;
    const int64_t top = std::max<int64_t>(band - 1, 0);
    // Eager reads the row below a top margin with weight 0: its NaN shows.
    const int64_t bottom = std::min(top + 1, z_.h - 1);
    const int top_slot = load_row(n, top, -1);
    const int bottom_slot = load_row(n, bottom, top_slot);
    const bool vector = vector_path_ && regular_[top_slot] && regular_[bottom_slot];
    const bool margin = band == 0 || band == z_.h;
    for (int64_t y = begin; y < end; y += kMaxArgmaxRows) {
      rows_.rows = static_cast<int>(std::min<int64_t>(kMaxArgmaxRows, end - y));
      if (vector) {
        rows_.top = values_.data() + top_slot * z_.C * pitch_;
        rows_.bottom = values_.data() + (margin ? top_slot : bottom_slot) * z_.C * pitch_;
        for (int r = 0; r < rows_.rows; ++r) {
          rows_.lambda_y[r] = margin ? 0.f : static_cast<float>(plan_.rows.source(y + r).lambda);
        }
        plan_.kernel.process(rows_);
      } else {
        exact_top_.resize(z_.w * z_.C);
        exact_bottom_.resize(z_.w * z_.C);
        read_row(z_, n, top, exact_top_.data(), 1, z_.C);
        read_row(z_, n, bottom, exact_bottom_.data(), 1, z_.C);
        for (int r = 0; r < rows_.rows; ++r) run_exact_row(y + r, r);
      }
      for (int r = 0; r < rows_.rows; ++r) {
        sink_.take_row(n, y + r, labels_.data() + r * label_pitch_);
      }
    }
  }

 private:
  // The slot that holds source row (n, y), loaded into the one that is not `keep` if need be.
  int load_row(int64_t n, int64_t y, int keep) {
    for (int slot = 0; slot < 2; ++slot) {
      if (image_[slot] == n && row_[slot] == y) return slot;
    }
    const int slot = keep >= 0 ? 1 - keep : (row_[0] <= row_[1] ? 0 : 1);
    image_[slot] = n;
    row_[slot] = y;
    if (!vector_path_) return slot;
    float* values = values_.data() + slot * z_.C * pitch_;
    read_row(z_, n, y, values, pitch_, 1);
    for (int64_t c = 0; c < z_.C; ++c) {
      float* q = values + c * pitch_;
      // The last lane lies between the last and the first column; lanes behind it win nothing new.
      std::fill(q + z_.w, q + pitch_, q[0]);
    }
    regular_[slot] = plan_.kernel.regular_row(values, z_.C * pitch_);
    return slot;
  }

  void run_exact_row(int64_t y, int r) {
    const Axis::Source sy = plan_.rows.source(y);
    const double* const top = exact_top_.data();
    const double* const bottom = sy.i1 == sy.i0 ? top : exact_bottom_.data();
    int32_t* const labels = labels_.data() + r * label_pitch_;
    for (int64_t x = 0; x < plan_.p.W; ++x) {
      const Axis::Source sx = plan_.columns_axis.source(x);
      const double y1 = sy.lambda, y0 = 1 - y1, x1 = sx.lambda, x0 = 1 - x1;
      const int64_t left = sx.i0 * z_.C, right = sx.i1 * z_.C;
      double best = 0;
      for (int64_t c = 0; c < z_.C; ++c) {
        const double z = y0 * (x0 * top[left + c] + x1 * top[right + c]) +
                         y1 * (x0 * bottom[left + c] + x1 * bottom[right + c]);
        if (c == 0 || z > best || (std::isnan(z) && !std::isnan(best))) {
          best = z;
          labels[x] = static_cast<int32_t>(c);
        }
      }
    }
  }

  const ArgmaxPlan& plan_;
  const Logits& z_;
  LabelSink& sink_;
  const bool vector_path_;
  const int64_t pitch_, label_pitch_;
  Buffer<float> values_, corners_;
  Buffer<int32_t> labels_, candidates_, staged_;
  std::vector<double> exact_top_, exact_bottom_;
  int64_t image_[2] = {-1, -1}, row_[2] = {-1, -1};
  bool regular_[2] = {false, false};
  ArgmaxRows rows_;
};

}  // namespace

void upsample_argmax(const UpsampleArgmax& problem, const ParallelFor& parallel_for,
                     const std::function<std::unique_ptr<LabelSink>()>& make_sink) {
  const ArgmaxPlan plan(problem);
  const int64_t bands = problem.logits.h + 1;
  parallel_for(problem.logits.N * bands, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<LabelSink> sink = make_sink();
    ArgmaxWorker worker(plan, *sink);
    for (int64_t item = begin; item < end; ++item) worker.run_band(item / bands, item % bands);
  });
}

}  // namespace fcnseg
