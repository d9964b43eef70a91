// Labels of one row as int32, C where ignored or bad; compiled once per instruction set by the
// kernels that use it (for_each_isa.h).

namespace fcnseg {
namespace FCNSEG_ISA {

// Returns the number of bad labels.
template <typename Label>
inline int64_t read_labels(const Label* labels, int64_t W, int64_t C, int64_t ignore,
                           int32_t* out) {
  int64_t bad = 0;
  const int32_t none = static_cast<int32_t>(C);
  for (int64_t x = 0; x < W; ++x) {
    const int64_t label = static_cast<int64_t>(labels[x]);
    const bool inside = static_cast<uint64_t>(label) < static_cast<uint64_t>(C);
    const bool skip = label == ignore;
    out[x] = inside & !skip ? static_cast<int32_t>(label) : none;
    bad += !inside & !skip;
  }
  return bad;
}

inline int64_t read_label_row(const Labels& labels, int64_t row, int64_t C, int64_t ignore,
                              int32_t* out) {
  const int64_t at = row * labels.W;
  switch (labels.type) {
    case LabelType::kUInt8:
      return read_labels(static_cast<const uint8_t*>(labels.data) + at, labels.W, C, ignore, out);
    case LabelType::kInt32:
      return read_labels(static_cast<const int32_t*>(labels.data) + at, labels.W, C, ignore, out);
    default:
      return read_labels(static_cast<const int64_t*>(labels.data) + at, labels.W, C, ignore, out);
  }
}

}  // namespace FCNSEG_ISA
}  // namespace fcnseg
