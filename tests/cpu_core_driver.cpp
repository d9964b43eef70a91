// Runs the CPU kernels without torch: a reduced set of problems, compared between two threads and
// one, and (loss and gradient) with a plain double implementation. For sanitizers and emulators.
//
//     g++ -std=c++17 -I csrc/cpu tests/cpu_core_driver.cpp csrc/cpu/*_core.cpp -pthread
//
// Prints the instruction set and the number of problems; returns 1 where one is wrong.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "bilinear.h"
#include "cpu_capability.h"
#include "upsample_argmax.h"
#include "upsample_cross_entropy.h"

namespace {

using namespace fcnseg;

struct Shape {
  int64_t N, C, h, w, H, W;
};

struct Options {
  bool align_corners, weighted;
  double smoothing;
  Reduction reduction;
  DType dtype;
};

ParallelFor threads(int count) {
  return [count](int64_t end, const std::function<void(int64_t, int64_t)>& run) {
    std::vector<std::thread> pool;
    const int64_t size = std::max<int64_t>(1, (end + count - 1) / count);
    for (int64_t begin = 0; begin < end; begin += size) {
      pool.emplace_back([&run, begin, stop = std::min(end, begin + size)] { run(begin, stop); });
    }
    for (std::thread& each : pool) each.join();
  };
}

// Exactly sized, so that a read or write behind the end is seen.
struct Problem {
  Shape s;
  Options o;
  std::vector<float> logits;
  std::vector<uint16_t> halves;
  std::vector<double> doubles;
  std::vector<int32_t> target;
  std::vector<double> weight;
  std::vector<float> upstream;
  double largest = 0;  // logit

  Problem(const Shape& shape, const Options& options, int seed) : s(shape), o(options) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0.f, seed % 3 == 0 ? 30.f : 3.f);
    for (int64_t i = 0; i < s.N * s.C * s.h * s.w; ++i) {
      float x = normal(random);
      if (o.dtype == DType::kBFloat16) {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        bits &= 0xffff0000;
        std::memcpy(&x, &bits, 4);
        halves.push_back(static_cast<uint16_t>(bits >> 16));
      }
      logits.push_back(x);
      doubles.push_back(x);
      largest = std::max<double>(largest, std::abs(x));
    }
    for (int64_t i = 0; i < s.N * s.H * s.W; ++i) {
      target.push_back(random() % 7 == 0 ? 255 : static_cast<int32_t>(random() % s.C));
      upstream.push_back(static_cast<float>(random() % 100) / 50.f);
    }
    for (int64_t c = 0; c < s.C; ++c) weight.push_back(o.weighted ? 0.5 + 0.1 * (c % 7) : 1.0);
  }

  Logits view() const {
    const void* data = o.dtype == DType::kDouble     ? static_cast<const void*>(doubles.data())
                       : o.dtype == DType::kBFloat16 ? static_cast<const void*>(halves.data())
                                                     : static_cast<const void*>(logits.data());
    return {data, o.dtype, s.N, s.C, s.h, s.w, s.C * s.h * s.w, s.h * s.w, s.w, 1};
  }

  UpsampleCrossEntropy problem() const {
    UpsampleCrossEntropy p{};
    p.logits = view();
    p.target = {target.data(), LabelType::kInt32, s.H, s.W};
    p.weight = o.weighted ? weight.data() : nullptr;
    p.ignore_index = 255;
    p.reduction = o.reduction;
    p.label_smoothing = o.smoothing;
    p.align_corners = o.align_corners;
    p.gradient_n = s.C * s.h * s.w;
    p.gradient_c = s.h * s.w;
    p.gradient_h = s.w;
    p.gradient_w = 1;
    return p;
  }
};

struct Result {
  std::vector<double> loss, gradient;
  std::vector<int32_t> labels;
};

class Collect : public LabelSink {
 public:
  Collect(const Shape& s, std::vector<int32_t>& out) : s_(s), out_(out) {}
  void take_row(int64_t n, int64_t y, const int32_t* labels) override {
    std::copy(labels, labels + s_.W, out_.begin() + (n * s_.H + y) * s_.W);
  }

 private:
  const Shape& s_;
  std::vector<int32_t>& out_;
};

template <typename Real>
Result run(const Problem& problem, int count) {
  const Shape& s = problem.s;
  const bool map = problem.o.reduction == Reduction::kNone;
  std::vector<Real> loss(map ? s.N * s.H * s.W : 1), gradient(s.N * s.C * s.h * s.w);
  std::vector<Real> upstream(problem.upstream.begin(), problem.upstream.end());
  UpsampleCrossEntropy p = problem.problem();
  p.loss = loss.data();
  if (!map) p.gradient = gradient.data();
  upsample_cross_entropy(p, threads(count));
  if (map) {
    p.loss = nullptr;
    p.gradient = gradient.data();
    p.upstream = upstream.data();
    p.upstream_n = s.H * s.W;
    p.upstream_h = s.W;
    p.upstream_w = 1;
    upsample_cross_entropy(p, threads(count));
  }
  Result result{{loss.begin(), loss.end()}, {gradient.begin(), gradient.end()}, {}};
  result.labels.resize(s.N * s.H * s.W);
  upsample_argmax({problem.view(), s.H, s.W, problem.o.align_corners, 0, 0}, threads(count),
                  [&] { return std::make_unique<Collect>(s, result.labels); });
  return result;
}

// eq. 1 to 4 of the kernels, in double, pixel by pixel. A label in `found` may be any of those
// whose logits are nearly the greatest.
Result expected(const Problem& problem, const std::vector<int32_t>& found) {
  const Shape& s = problem.s;
  const Options& o = problem.o;
  const Axis rows(s.h, s.H, o.align_corners, 0), columns(s.w, s.W, o.align_corners, 0);
  const bool map = o.reduction == Reduction::kNone;
  Result result;
  result.gradient.assign(s.N * s.C * s.h * s.w, 0);
  double total_weight = 0, total_loss = 0;
  std::vector<double> z(s.C);
  for (int64_t i = 0; i < s.N * s.H * s.W; ++i) {
    const int64_t n = i / (s.H * s.W);
    const Axis::Source y = rows.source(i / s.W % s.H), x = columns.source(i % s.W);
    const int64_t at[4] = {y.i0 * s.w + x.i0, y.i0 * s.w + x.i1, y.i1 * s.w + x.i0,
                           y.i1 * s.w + x.i1};
    const double share[4] = {(1 - y.lambda) * (1 - x.lambda), (1 - y.lambda) * x.lambda,
                             y.lambda * (1 - x.lambda), y.lambda * x.lambda};
    double maximum = -1e300, sum = 0;
    int32_t best = 0;
    for (int64_t c = 0; c < s.C; ++c) {
      z[c] = 0;
      for (int k = 0; k < 4; ++k) {
        z[c] += share[k] * problem.doubles[(n * s.C + c) * s.h * s.w + at[k]];
      }
      if (z[c] > maximum) best = static_cast<int32_t>(c);
      maximum = std::max(maximum, z[c]);
    }
    const bool near = maximum - z[found[i]] <= 1e-5 * problem.largest;
    result.labels.push_back(near ? found[i] : best);
    for (int64_t c = 0; c < s.C; ++c) sum += std::exp(z[c] - maximum);
    const double log_sum = maximum + std::log(sum);
    const int32_t label = problem.target[i];
    double loss = 0;
    if (label != 255) {
      double all = 0;
      for (int64_t c = 0; c < s.C; ++c) all += problem.weight[c];
      const double hot = (1 - o.smoothing) * problem.weight[label];
      loss = hot * (log_sum - z[label]);
      for (int64_t c = 0; c < s.C; ++c) {
        const double smooth = o.smoothing / s.C * problem.weight[c];
        loss += smooth * (log_sum - z[c]);
        double d = (hot + o.smoothing / s.C * all) * std::exp(z[c] - log_sum) - smooth;
        if (c == label) d -= hot;
        if (map) d *= problem.upstream[i];
        for (int k = 0; k < 4; ++k) {
          result.gradient[(n * s.C + c) * s.h * s.w + at[k]] += share[k] * d;
        }
      }
      total_weight += problem.weight[label];
      total_loss += loss;
    }
    if (map) result.loss.push_back(loss);
  }
  if (!map) {
    const double divisor = o.reduction == Reduction::kMean ? total_weight : 1;
    result.loss = {total_loss / divisor};
    for (double& g : result.gradient) g /= divisor;
  }
  return result;
}

bool close(const std::vector<double>& found, const std::vector<double>& exact) {
  double scale = 1e-30, error = 0;
  for (const double x : exact) scale = std::max(scale, std::abs(x));
  for (size_t i = 0; i < exact.size(); ++i) error = std::max(error, std::abs(found[i] - exact[i]));
  return error <= 2e-5 * scale;
}

}  // namespace

int main() {
  const Shape shapes[] = {{1, 2, 1, 1, 5, 70},   {2, 5, 4, 6, 13, 17}, {1, 19, 5, 17, 40, 136},
                          {1, 3, 9, 11, 4, 5},   {1, 3, 5, 4, 5, 4},   {1, 17, 2, 33, 20, 67},
                          {1, 1, 3, 3, 9, 9},    {3, 4, 3, 2, 50, 7},  {1, 2, 2, 2, 3, 300},
                          {1, 150, 3, 5, 17, 21}};
  const Reduction reductions[] = {Reduction::kMean, Reduction::kSum, Reduction::kNone};
  const DType dtypes[] = {DType::kFloat, DType::kBFloat16, DType::kDouble};
  int problems = 0, wrong = 0;
  for (const Shape& shape : shapes) {
    for (int i = 0; i < 12; ++i) {
      const Options options{(i & 1) != 0, (i & 2) != 0, i % 4 == 3 ? 0.1 : 0.0, reductions[i % 3],
                            dtypes[i / 4]};
      const Problem problem(shape, options, problems++);
      const bool real = options.dtype == DType::kDouble;
      const Result one = real ? run<double>(problem, 1) : run<float>(problem, 1);
      const Result two = real ? run<double>(problem, 2) : run<float>(problem, 2);
      const Result exact = expected(problem, one.labels);
      const bool right = one.loss == two.loss && one.gradient == two.gradient &&
                         one.labels == two.labels && close(one.loss, exact.loss) &&
                         (shape.C == 1 || close(one.gradient, exact.gradient)) &&
                         one.labels == exact.labels;
      if (!right) std::printf("wrong: problem %d\n", problems - 1);
      wrong += !right;
    }
  }
  std::printf("%s: %d problems, %d wrong\n", name(cpu_capability()), problems, wrong);
  return wrong != 0;
}
