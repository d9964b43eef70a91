// upsample_argmax on the CPU, on plain pointers: rows of labels go to a sink, which writes them
// (upsample_argmax.cpp) or counts them (upsample_confusion_matrix.cpp). No torch headers.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "logits.h"
#include "parallel.h"

namespace fcnseg {

struct UpsampleArgmax {
  Logits logits;
  int64_t H, W;
  bool align_corners;
  double scale_h, scale_w;  // 0: the ratio of the sizes
};

// Used by one thread at a time. Takes `labels` [W] of the output row (n, y).
class LabelSink {
 public:
  virtual ~LabelSink() = default;
  virtual void take_row(int64_t n, int64_t y, const int32_t* labels) = 0;
};

// Into a label map [N, H, W], contiguous.
template <typename Label>
class LabelWriter : public LabelSink {
 public:
  LabelWriter(Label* out, int64_t H, int64_t W) : out_(out), H_(H), W_(W) {}
  void take_row(int64_t n, int64_t y, const int32_t* labels) override {
    Label* const row = out_ + (n * H_ + y) * W_;
    for (int64_t x = 0; x < W_; ++x) row[x] = static_cast<Label>(labels[x]);
  }

 private:
  Label* out_;
  int64_t H_, W_;
};

// `make_sink` is called once per range of work, possibly from several threads.
void upsample_argmax(const UpsampleArgmax& problem, const ParallelFor& parallel_for,
                     const std::function<std::unique_ptr<LabelSink>()>& make_sink);

}  // namespace fcnseg
