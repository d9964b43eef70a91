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
#include "conv_transpose.h"
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

// Normal random numbers in the dtypes. Exactly sized, so that a read behind the end is seen.
struct Values {
  std::vector<float> floats;
  std::vector<uint16_t> halves;
  std::vector<double> doubles;
  double largest = 0;

  // The first one is `first`, if that is not 0.
  Values(int64_t size, DType dtype, float deviation, std::mt19937& random, float first = 0) {
    std::normal_distribution<float> normal(0.f, deviation);
    for (int64_t i = 0; i < size; ++i) {
      float x = normal(random);
      if (i == 0 && first != 0) x = first;
      if (dtype == DType::kBFloat16) {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        bits &= 0xffff0000;
        std::memcpy(&x, &bits, 4);
        halves.push_back(static_cast<uint16_t>(bits >> 16));
      }
      floats.push_back(x);
      doubles.push_back(x);
      largest = std::max<double>(largest, std::abs(x));
    }
  }
  const void* data(DType dtype) const {
    return dtype == DType::kDouble     ? static_cast<const void*>(doubles.data())
           : dtype == DType::kBFloat16 ? static_cast<const void*>(halves.data())
                                       : static_cast<const void*>(floats.data());
  }
};

struct Problem {
  Shape s;
  Options o;
  std::mt19937 random;
  Values logits;
  std::vector<int32_t> target;
  std::vector<double> weight;
  std::vector<float> upstream;

  Problem(const Shape& shape, const Options& options, int seed)
      : s(shape),
        o(options),
        random(seed),
        logits(s.N * s.C * s.h * s.w, o.dtype, seed % 3 == 0 ? 30.f : 3.f, random) {
    for (int64_t i = 0; i < s.N * s.H * s.W; ++i) {
      target.push_back(random() % 7 == 0 ? 255 : static_cast<int32_t>(random() % s.C));
      upstream.push_back(static_cast<float>(random() % 100) / 50.f);
    }
    for (int64_t c = 0; c < s.C; ++c) weight.push_back(o.weighted ? 0.5 + 0.1 * (c % 7) : 1.0);
  }

  Logits view() const {
    return {logits.data(o.dtype), o.dtype, s.N, s.C, s.h, s.w, s.C * s.h * s.w, s.h * s.w, s.w, 1};
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

// The loss and its gradient in double, pixel by pixel. `logits(i, z)` fills z [C] and returns the
// largest magnitude behind it; `add(i, c, d)` adds the adjoint of dl/dz_c to `gradient`. A label in
// `found` may be any of those whose logits are nearly the greatest.
template <typename Logits, typename Add>
Result softmax_result(const Options& o, const std::vector<int32_t>& target,
                      const std::vector<double>& weight, const std::vector<float>& upstream,
                      int64_t C, int64_t pixels, const std::vector<int32_t>& found,
                      std::vector<double>& gradient, Logits logits, Add add) {
  const bool map = o.reduction == Reduction::kNone;
  Result result;
  double total_weight = 0, total_loss = 0;
  std::vector<double> z(C);
  for (int64_t i = 0; i < pixels; ++i) {
    const double largest = logits(i, z);
    double sum = 0;
    const auto best = static_cast<int32_t>(std::max_element(z.begin(), z.end()) - z.begin());
    const double maximum = z[best];
    const bool near = maximum - z[found[i]] <= 1e-5 * largest;
    result.labels.push_back(near ? found[i] : best);
    for (int64_t c = 0; c < C; ++c) sum += std::exp(z[c] - maximum);
    const double log_sum = maximum + std::log(sum);
    const int32_t label = target[i];
    double loss = 0;
    if (label != 255) {
      double all = 0;
      for (int64_t c = 0; c < C; ++c) all += weight[c];
      const double hot = (1 - o.smoothing) * weight[label];
      loss = hot * (log_sum - z[label]);
      for (int64_t c = 0; c < C; ++c) {
        const double smooth = o.smoothing / C * weight[c];
        loss += smooth * (log_sum - z[c]);
        double d = (hot + o.smoothing / C * all) * std::exp(z[c] - log_sum) - smooth;
        if (c == label) d -= hot;
        add(i, c, map ? d * upstream[i] : d);
      }
      total_weight += weight[label];
      total_loss += loss;
    }
    if (map) result.loss.push_back(loss);
  }
  if (!map) {
    const double divisor = o.reduction == Reduction::kMean ? total_weight : 1;
    result.loss = {total_loss / divisor};
    for (double& g : gradient) g /= divisor;
  }
  result.gradient = gradient;
  return result;
}

Result expected(const Problem& problem, const std::vector<int32_t>& found) {
  const Shape& s = problem.s;
  const Options& o = problem.o;
  const Axis rows(s.h, s.H, o.align_corners, 0), columns(s.w, s.W, o.align_corners, 0);
  std::vector<double> gradient(s.N * s.C * s.h * s.w);
  int64_t at[4];
  double share[4];
  return softmax_result(
      o, problem.target, problem.weight, problem.upstream, s.C, s.N * s.H * s.W, found, gradient,
      [&](int64_t i, std::vector<double>& z) {
        const int64_t n = i / (s.H * s.W);
        const Axis::Source y = rows.source(i / s.W % s.H), x = columns.source(i % s.W);
        for (int k = 0; k < 4; ++k) {
          at[k] = n * s.C * s.h * s.w + (k / 2 ? y.i1 : y.i0) * s.w + (k % 2 ? x.i1 : x.i0);
          share[k] = (k / 2 ? y.lambda : 1 - y.lambda) * (k % 2 ? x.lambda : 1 - x.lambda);
        }
        for (int64_t c = 0; c < s.C; ++c) {
          z[c] = 0;
          for (int k = 0; k < 4; ++k)
            z[c] += share[k] * problem.logits.doubles[at[k] + c * s.h * s.w];
        }
        return problem.logits.largest;
      },
      [&](int64_t, int64_t c, double d) {
        for (int k = 0; k < 4; ++k) gradient[at[k] + c * s.h * s.w] += share[k] * d;
      });
}

// ---- transposed convolution ----

struct ConvShape {
  int64_t N, C_in, C, groups, h, w, kernel[2], stride[2], padding[2], dilation[2], crop[2], H, W;
};

struct ConvProblem {
  ConvShape s;
  Options o;
  std::mt19937 random;
  Values weight, input, bias;
  std::vector<int32_t> target;
  std::vector<double> class_weight;
  std::vector<float> upstream;

  ConvProblem(const ConvShape& shape, const Options& options, int seed)
      : s(shape),
        o(options),
        random(seed),
        weight(s.C_in * s.C / s.groups * s.kernel[0] * s.kernel[1], o.dtype, 1.f, random),
        // every fifth time out of the fp32 path's range
        input(s.N * s.C_in * s.h * s.w, o.dtype, 2.f, random,
              seed % 5 == 0 ? 2e37f / static_cast<float>(s.C_in * s.kernel[0] * s.kernel[1]) : 0.f),
        bias(s.C, o.dtype, 1.f, random) {
    for (int64_t i = 0; i < s.N * s.H * s.W; ++i) {
      target.push_back(random() % 7 == 0 ? 255 : static_cast<int32_t>(random() % s.C));
      upstream.push_back(static_cast<float>(random() % 100) / 50.f);
    }
    for (int64_t c = 0; c < s.C; ++c)
      class_weight.push_back(o.weighted ? 0.5 + 0.1 * (c % 7) : 1.0);
  }

  ConvTranspose conv() const {
    const int64_t plane = s.h * s.w, area = s.kernel[0] * s.kernel[1], M = s.C / s.groups;
    ConvTranspose p{};
    p.input = {input.data(o.dtype), o.dtype, s.N, s.C_in, s.h, s.w, s.C_in * plane, plane, s.w, 1};
    p.weight = weight.data(o.dtype);
    const int64_t strides[4] = {M * area, area, s.kernel[1], 1};
    std::copy(strides, strides + 4, p.weight_stride);
    p.bias = bias.data(o.dtype);
    p.bias_stride = 1;
    p.C = s.C;
    p.groups = s.groups;
    p.kernel_h = s.kernel[0], p.kernel_w = s.kernel[1];
    p.stride_h = s.stride[0], p.stride_w = s.stride[1];
    p.padding_h = s.padding[0], p.padding_w = s.padding[1];
    p.dilation_h = s.dilation[0], p.dilation_w = s.dilation[1];
    p.crop_h = s.crop[0], p.crop_w = s.crop[1];
    p.H = s.H, p.W = s.W;
    return p;
  }
};

// Loss; the gradients one after the other; labels.
template <typename Real>
Result run(const ConvProblem& problem, int count) {
  const ConvShape& s = problem.s;
  const bool map = problem.o.reduction == Reduction::kNone;
  std::vector<Real> loss(map ? s.N * s.H * s.W : 1), to_input(problem.input.floats.size()),
      to_weight(problem.weight.floats.size()), to_bias(s.C);
  const std::vector<Real> upstream(problem.upstream.begin(), problem.upstream.end());
  ConvTransposeCrossEntropy p{};
  p.conv = problem.conv();
  p.target = {problem.target.data(), LabelType::kInt32, s.H, s.W};
  p.class_weight = problem.o.weighted ? problem.class_weight.data() : nullptr;
  p.ignore_index = 255;
  p.reduction = problem.o.reduction;
  p.label_smoothing = problem.o.smoothing;
  p.loss = loss.data();
  if (map) {
    conv_transpose_cross_entropy(p, threads(count));
    p.loss = nullptr;
    p.upstream = upstream.data();
    p.upstream_n = s.H * s.W, p.upstream_h = s.W, p.upstream_w = 1;
  }
  p.to_input = to_input.data(), p.to_weight = to_weight.data(), p.to_bias = to_bias.data();
  p.to_input_n = s.C_in * s.h * s.w, p.to_input_c = s.h * s.w, p.to_input_h = s.w, p.to_input_w = 1;
  conv_transpose_cross_entropy(p, threads(count));
  Result result{{loss.begin(), loss.end()}, {to_input.begin(), to_input.end()}, {}};
  result.gradient.insert(result.gradient.end(), to_weight.begin(), to_weight.end());
  result.gradient.insert(result.gradient.end(), to_bias.begin(), to_bias.end());
  result.labels.resize(s.N * s.H * s.W);
  const Shape out{s.N, s.C, s.h, s.w, s.H, s.W};
  conv_transpose_argmax(p.conv, threads(count),
                        [&] { return std::make_unique<Collect>(out, result.labels); });
  return result;
}

// Calls with each product that makes the logit (n, c, y, x): the places of its input and weight.
template <typename F>
void for_each_tap(const ConvShape& s, int64_t n, int64_t c, int64_t y, int64_t x, F call) {
  const int64_t I = s.C_in / s.groups, M = s.C / s.groups;
  for (int64_t ky = 0; ky < s.kernel[0]; ++ky) {
    for (int64_t kx = 0; kx < s.kernel[1]; ++kx) {
      const int64_t down = y + s.crop[0] + s.padding[0] - s.dilation[0] * ky;
      const int64_t across = x + s.crop[1] + s.padding[1] - s.dilation[1] * kx;
      if (down < 0 || down % s.stride[0] != 0 || down / s.stride[0] >= s.h) continue;
      if (across < 0 || across % s.stride[1] != 0 || across / s.stride[1] >= s.w) continue;
      for (int64_t ci = c / M * I; ci < (c / M + 1) * I; ++ci) {
        call(((n * s.C_in + ci) * s.h + down / s.stride[0]) * s.w + across / s.stride[1],
             ((ci * M + c % M) * s.kernel[0] + ky) * s.kernel[1] + kx);
      }
    }
  }
}

Result expected(const ConvProblem& problem, const std::vector<int32_t>& found) {
  const ConvShape& s = problem.s;
  const std::vector<double>&x = problem.input.doubles, &w = problem.weight.doubles;
  const size_t weights = x.size(), biases = x.size() + w.size();  // in the gradient
  std::vector<double> gradient(biases + s.C);
  double largest = 0;
  return softmax_result(
      problem.o, problem.target, problem.class_weight, problem.upstream, s.C, s.N * s.H * s.W,
      found, gradient,
      [&](int64_t i, std::vector<double>& z) {
        for (int64_t c = 0; c < s.C; ++c) {
          z[c] = problem.bias.doubles[c];
          for_each_tap(s, i / (s.H * s.W), c, i / s.W % s.H, i % s.W,
                       [&](int64_t a, int64_t b) { z[c] += x[a] * w[b]; });
          largest = std::max(largest, std::abs(z[c]));
        }
        return largest;
      },
      [&](int64_t i, int64_t c, double d) {
        for_each_tap(s, i / (s.H * s.W), c, i / s.W % s.H, i % s.W, [&](int64_t a, int64_t b) {
          gradient[a] += d * w[b];
          gradient[weights + b] += d * x[a];
        });
        gradient[biases + c] += d;
      });
}

bool close(const std::vector<double>& found, const std::vector<double>& exact) {
  double scale = 1e-30, error = 0;
  for (const double x : exact) scale = std::max(scale, std::abs(x));
  for (size_t i = 0; i < exact.size(); ++i) error = std::max(error, std::abs(found[i] - exact[i]));
  return error <= 2e-5 * scale;
}

// Two threads as one, and both as the plain version. The gradient of one class is exactly 0.
template <typename Problem>
bool right(const Problem& problem, int number, bool compare_gradient) {
  const bool real = problem.o.dtype == DType::kDouble;
  const Result one = real ? run<double>(problem, 1) : run<float>(problem, 1);
  const Result two = real ? run<double>(problem, 2) : run<float>(problem, 2);
  const Result exact = expected(problem, one.labels);
  const bool same = one.loss == two.loss && one.gradient == two.gradient &&
                    one.labels == two.labels && close(one.loss, exact.loss) &&
                    (!compare_gradient || close(one.gradient, exact.gradient)) &&
                    one.labels == exact.labels;
  if (!same) std::printf("wrong: problem %d\n", number);
  return same;
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
      wrong += !right(problem, problems - 1, shape.C > 1);
    }
  }
  const ConvShape conv_shapes[] = {
      {1, 5, 5, 5, 4, 9, {4, 4}, {2, 2}, {1, 1}, {1, 1}, {0, 0}, 8, 18},
      {2, 19, 19, 19, 3, 17, {16, 16}, {8, 8}, {4, 4}, {1, 1}, {1, 2}, 22, 130},
      {1, 4, 19, 1, 3, 5, {16, 16}, {8, 8}, {4, 4}, {1, 1}, {0, 0}, 24, 40},
      {1, 3, 3, 3, 5, 7, {5, 3}, {3, 2}, {2, 0}, {1, 3}, {2, 1}, 9, 11},
      {1, 6, 4, 2, 4, 6, {3, 3}, {1, 2}, {1, 1}, {2, 1}, {0, 3}, 5, 7},
      {2, 2, 2, 2, 3, 3, {2, 2}, {5, 5}, {0, 0}, {1, 1}, {0, 0}, 12, 12},
      {1, 1, 1, 1, 2, 2, {2, 2}, {2, 2}, {0, 0}, {1, 1}, {0, 0}, 4, 4},
      {1, 2, 150, 1, 2, 9, {4, 4}, {2, 2}, {1, 1}, {1, 1}, {0, 0}, 4, 18},
  };
  for (const ConvShape& shape : conv_shapes) {
    for (int i = 0; i < 6; ++i) {
      const Options options{false, i % 2 != 0, i % 4 == 3 ? 0.1 : 0.0, reductions[i % 3],
                            dtypes[i / 2]};
      const ConvProblem problem(shape, options, problems++);
      wrong += !right(problem, problems - 1, shape.C > 1);
    }
  }
  std::printf("%s: %d problems, %d wrong\n", name(cpu_capability()), problems, wrong);
  return wrong != 0;
}
