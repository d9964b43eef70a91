// What the driver (conv_transpose_core.cpp) hands to a kernel (conv_transpose_kernel.h): a tile of
// logits z[c][p][q], class c at phase p of cell q, classes `stride` apart, and the matrices around
// it.
#pragma once

#include <cstdint>

#include "logits.h"

namespace fcnseg {

// c[m][n] (+)= sum_k a[m][k] b[k][n]; rows of b and c by pointer, n a multiple of the lanes.
// Rows that are added to may overlap.
template <typename Real>
struct Product {
  int64_t rows, columns, inner;
  const Real* a;
  int64_t a_row, a_inner;  // strides
  const Real* const* b;    // [inner]
  Real* const* c;          // [rows]
  const Real* start;       // [rows] what each row starts from; null: adds to c
};

// One class, a few taps, pixel by pixel; taps come in pairs of one column offset, in fours overall.
constexpr int kMaxDepthwisePhases = 4;
struct DepthwiseTap {
  const float* x;  // class 0, first cell; then `pitch` from class to class
  int64_t x_pitch;
  float* gradient;  // of padding and of rows outside: one row for all, pitch 0
  int64_t gradient_pitch;
};
struct Depthwise {
  int64_t C, width, stride;  // width: cells, a multiple of the lanes
  int P, taps;               // taps: a multiple of 4
  int pairs;                 // of taps that are not all padding
  const DepthwiseTap* tap;
  const float* weight;  // [C][taps / 4][P][4]
  const float* bias;    // [C]
  float* z;             // [C + 1][P][width]
  bool powers;          // 2^z and 2^-z are in range, and so are their sums
  bool to_input;
  float* to_weight;  // [C][taps / 4][P][4][lanes], added to; null where not wanted
  float* to_bias;    // [C][lanes], the same
};

template <typename Real>
struct SoftmaxTile {
  int64_t C, width, stride;  // width: cells, a multiple of the lanes
  int P;
  Real* z;  // [C + 1][P][width], anything in the last class; the gradient afterwards
  int64_t pitch;
  const int32_t* labels;       // [P][pitch]: C where ignored or padding
  const Real* upstream;        // [P][pitch], 0 where ignored; null: 1
  const Real* softmax_weight;  // [C + 1]; null: 1 (cross_entropy.h)
  const Real* one_hot_weight;
  const Real* smoothing_weight;
  const Real* class_weight;
  bool gradient;
  Real* loss_map;  // [P][pitch]; null where not wanted

  // sums over all calls
  double loss;
  double weight;  // of class_weight over valid pixels
  int64_t valid;
};

template <typename Real>
struct ConvTransposeKernel {
  int lanes;
  // c, or rows of it, in blocks that stay in registers
  void (*multiply)(const Product<Real>&);
  void (*depthwise_forward)(const Depthwise&);  // null in double, as are the next two
  void (*depthwise_softmax)(const Depthwise&, SoftmaxTile<float>&);  // forward and softmax
  void (*depthwise_backward)(const Depthwise&);                      // of what that left in z
  void (*softmax)(SoftmaxTile<Real>&);
  // Labels [P][pitch] of a tile z [C][P][width].
  void (*argmax)(const Real* z, int64_t C, int P, int64_t width, int64_t stride, int32_t* labels,
                 int64_t pitch);
  // sums[c] += the sum of z[c][0 .. size)
  void (*add_sums)(const Real* z, int64_t C, int64_t size, double* sums);
  // sums[i] = the sum of lanes[i][0 .. lanes), which is cleared; null in double
  void (*take_lanes)(float* lanes, int64_t size, float* sums);
  int64_t (*labels)(const Labels&, int64_t row, int64_t C, int64_t ignore, int32_t* out);
};

}  // namespace fcnseg
