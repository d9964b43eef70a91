// What the driver (upsample_cross_entropy_core.cpp) hands to a kernel
// (upsample_cross_entropy_kernel.h): up to eight output rows of one band of cells, whole width.
#pragma once

#include <cstdint>

#include "logits.h"

namespace fcnseg {

constexpr int kMaxRows = 8;     // output rows in one call
constexpr int kMaxPhases = 32;  // output columns of a cell in one tile
// Widest log2 range of shifted logits in a tile for the progressions (numerics, kernel header).
constexpr float kGeometricRange = 60.f;
// A row whose range is wider, or that is not finite, goes to the exact path.
constexpr float kExactRange = 4096.f;

struct RowGroup {
  int64_t C;
  int rows;        // R
  float lambda_y;  // of the first row
  float step_y;    // from row to row; 0 in a margin

  // the columns' plan (bilinear.h)
  int64_t w, W, vectors;
  const int32_t* phases;
  const int64_t* offset;
  const int32_t* pixel;
  const float* lambda;
  const float* present;
  const uint8_t* full;
  const float* step;
  const int32_t* first;
  const int32_t* count;
  int32_t right_margin;
  float step_x;

  // source rows: [C][pitch], shifted by each pixel's maximum, in log2 units
  int64_t pitch;
  const float* top;
  const float* bottom;
  const float* lowest_top;     // [vectors]
  const float* lowest_bottom;  // [vectors]
  // their gradients, the part of the cell's left and right corners: [C][pitch]
  float* top_left;
  float* top_right;
  float* bottom_left;
  float* bottom_right;

  // [R][label_pitch]: C where ignored or padding
  int64_t label_pitch;
  const int32_t* labels;
  const float* upstream;  // [R][label_pitch], 0 where ignored; null: 1

  const float* softmax_weight;    // [C + 1], (1 - e) w_y + (e / C) sum w; null: 1
  const float* one_hot_weight;    // [C + 1], (1 - e) w_y; null: 1
  const float* smoothing_weight;  // [C], (e / C) w_c; null: no smoothing
  const float* class_weight;      // [C], w_c; null: 1
  bool gradient;
  float* loss_map;  // [R][W]: wanted instead of sums; null otherwise
  int64_t loss_map_pitch;

  // scratch, each 64-byte aligned; L lanes
  float* corners;           // [C + 1][4][L], zero in the last class
  float* progress;          // [C][4][L]
  float* moments;           // [C][4][L]
  float* exponentials;      // [C][8][L]
  uint64_t* one_hot;        // [C + 1][L], zero
  float* weighted_one_hot;  // [C + 1][L][4], zero; used with upstream
  float* alpha;             // [kMaxPhases][8][L]
  uint8_t* vertical;        // bit x: not all rows have the same label in column x
  uint8_t* horizontal;      // bit x: some row's labels differ between columns x and x + 1
  uint8_t* ignored;         // bit x: some row's label is ignored

  // sums over all calls
  double loss;    // in log2 units
  double weight;  // of class_weight over valid pixels
  int64_t valid;
  int64_t tiles;
  int64_t direct_tiles;
};

struct RowKernel {
  const char* name;
  int lanes;
  // Shifts a padded row [C][pitch] by each pixel's maximum and scales it to log2 units; false where
  // the exact path must take it. `maximum`: scratch [pitch].
  bool (*shift_row)(float* row, int64_t C, int64_t pitch, int64_t vectors, float* maximum,
                    float* lowest);
  void (*process)(RowGroup& group);
  // Labels of a row as int32, C where ignored or bad; returns the number of bad ones.
  int64_t (*labels)(const Labels&, int64_t row, int64_t C, int64_t ignore, int32_t* out);
};

}  // namespace fcnseg
