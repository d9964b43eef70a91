// What the two losses share: the reduction, and the weights that their options give each class.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

namespace fcnseg {

enum class Reduction { kNone, kMean, kSum };

// The sum of the pixels' weights; NaN where it is 0: eager divides a 0 by it.
inline double mean_denominator(double weight) {
  return weight != 0 ? weight : std::numeric_limits<double>::quiet_NaN();
}

// With e the smoothing, w the class weights (1 where null), s the softmax, y the label:
//   l = softmax_y lse(z) - one_hot_y z_y - sum_c smoothing_c z_c
//   dl/dz_c = softmax_y s_c - one_hot_y [c = y] - smoothing_c
// Entry C, of ignored pixels, is 0. The copies in `Real` are empty where they are trivial.
template <typename Real>
struct LossWeights {
  double label_smoothing;                           // 0 for one class, whose loss is exactly zero
  std::vector<double> softmax, one_hot, smoothing;  // [C + 1]
  std::vector<Real> softmax_r, one_hot_r, smoothing_r, class_weight_r;

  LossWeights(const double* weight, int64_t C, double smoothing_option)
      : label_smoothing(C > 1 ? smoothing_option : 0.0) {
    const double share = label_smoothing / static_cast<double>(C);
    double total = 0;
    for (int64_t c = 0; c < C; ++c) total += weight != nullptr ? weight[c] : 1.0;
    for (int64_t c = 0; c < C; ++c) {
      const double w = weight != nullptr ? weight[c] : 1.0;
      one_hot.push_back((1 - label_smoothing) * w);
      smoothing.push_back(share * w);
      softmax.push_back(one_hot.back() + share * total);
      if (weight != nullptr) class_weight_r.push_back(static_cast<Real>(w));
    }
    one_hot.push_back(0);
    smoothing.push_back(0);
    softmax.push_back(0);
    if (weight != nullptr) class_weight_r.push_back(0);
    if (weight != nullptr || label_smoothing != 0) {
      one_hot_r.assign(one_hot.begin(), one_hot.end());
      softmax_r.assign(softmax.begin(), softmax.end());
    }
    if (label_smoothing != 0) smoothing_r.assign(smoothing.begin(), smoothing.end());
  }
};

}  // namespace fcnseg
