// The confusion matrix of maps that mostly agree, on CPUs with AVX-512 VBMI2 (Ice Lake, Zen 4 and
// later). A part of confusion_matrix.h, which includes it.
//
//   1  R[t] = |{ i : t_i = t }|                      by runs of the target
//   2  W[t][p] = |{ i : t_i = t, p_i = p, p != t }|  pixel by pixel
//   3  M[t][p] = W[t][p] for p != t,  M[t][t] = R[t] - sum_p W[t][p]
//
// 64 pixels at a time, as bytes. A pixel that agrees with its target costs nothing of its own: a
// run of the target costs one addition where it ends, and the pixels that disagree are compressed
// into a buffer, which is counted 64 pixels at a time like noise. Where the target changes too
// often for that, the 64 pixels are counted one by one into tables of their own, which eq. 3 does
// not see.
#pragma once

#include <immintrin.h>

#define FCNSEG_VBMI2 \
  __attribute__((    \
      target("avx512f,avx512dq,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,bmi,bmi2,popcnt")))

#if !defined(__clang__)
// GCC's own AVX-512 header starts some intrinsics from an undefined register, and is warned of it.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace fcnseg {

inline bool has_vbmi2() {
  static const bool has = cpu_capability() == Capability::kAvx512 &&
                          __builtin_cpu_supports("avx512vbmi") &&
                          __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("bmi2") &&
                          __builtin_cpu_supports("popcnt");
  return has;
}

// What count_agreement adds to, all zero at first; `pairs` and `wrong` are kTables tables each.
struct AgreementTables {
  uint32_t* pairs;  // of the pixels that were counted one by one
  uint32_t* wrong;  // eq. 2
  uint32_t* rows;   // eq. 1, [256]
};

FCNSEG_VBMI2 inline __m512i load_vector(const void* data, int index) {
  return _mm512_loadu_si512(static_cast<const char*>(data) + 64 * index);
}

// 64 labels as bytes, saturated as unsigned numbers: 255 stands for what does not fit.
template <typename Label>
FCNSEG_VBMI2 inline __m512i load_bytes(const Label* labels) {
  if constexpr (sizeof(Label) == 1) {
    return load_vector(labels, 0);
  } else if constexpr (sizeof(Label) == 2) {
    const __m256i low = _mm512_cvtusepi16_epi8(load_vector(labels, 0));
    const __m256i high = _mm512_cvtusepi16_epi8(load_vector(labels, 1));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  } else {
    __m128i quarter[4];
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(Label) == 4) {
        quarter[i] = _mm512_cvtusepi32_epi8(load_vector(labels, i));
      } else {
        quarter[i] = _mm_unpacklo_epi64(_mm512_cvtusepi64_epi8(load_vector(labels, 2 * i)),
                                        _mm512_cvtusepi64_epi8(load_vector(labels, 2 * i + 1)));
      }
    }
    __m512i bytes = _mm512_castsi128_si512(quarter[0]);
    bytes = _mm512_inserti32x4(bytes, quarter[1], 1);
    bytes = _mm512_inserti32x4(bytes, quarter[2], 2);
    return _mm512_inserti32x4(bytes, quarter[3], 3);
  }
}

// Adds 64 pixels to kTables tables, one by one.
FCNSEG_VBMI2 inline void count_pairs(__m512i truth, __m512i predicted, int classes,
                                     uint32_t* tables) {
  alignas(64) uint16_t bin[kBlock];
  const __m512i limit = _mm512_set1_epi8(static_cast<char>(classes));
  const __m512i width = _mm512_set1_epi16(static_cast<int16_t>(classes + 1));
  truth = _mm512_min_epu8(truth, limit);
  predicted = _mm512_min_epu8(predicted, limit);
  const __m512i low = _mm512_add_epi16(
      _mm512_mullo_epi16(_mm512_cvtepu8_epi16(_mm512_castsi512_si256(truth)), width),
      _mm512_cvtepu8_epi16(_mm512_castsi512_si256(predicted)));
  const __m512i high = _mm512_add_epi16(
      _mm512_mullo_epi16(_mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(truth, 1)), width),
      _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(predicted, 1)));
  _mm512_store_si512(bin, low);
  _mm512_store_si512(bin + kBlock / 2, high);
  count_bins(bin, (classes + 1) * (classes + 1), tables);
}

// Adds whole blocks, of labels of any width. Returns whether a target is bad.
template <typename Prediction, typename Target>
FCNSEG_VBMI2 bool count_agreement(const Prediction* prediction, const Target* target,
                                  int64_t blocks, int classes, Target ignored,
                                  const AgreementTables& tables) {
  constexpr int kBuffer = 512;
  constexpr int kMaxStarts = 12;          // of runs in a block; for more, one by one is cheaper,
  constexpr int64_t kBlocksOfNoise = 16;  // as probably for the next blocks
  const int width = classes + 1;
  const __m512i limit = _mm512_set1_epi8(static_cast<char>(classes));
  alignas(64) uint8_t lane_before[kBlock];  // lane 63 of the block before, then lanes 0 to 62
  for (int i = 0; i < kBlock; ++i) lane_before[i] = static_cast<uint8_t>(63 + i);
  const __m512i before = _mm512_load_si512(lane_before);

  alignas(64) uint8_t label[kBlock];
  alignas(64) uint8_t wrong_truth[kBuffer + kBlock];
  alignas(64) uint8_t wrong_predicted[kBuffer + kBlock];
  int waiting = 0;  // in these two
  bool bad = false;
  int64_t block = 0;
  while (block < blocks) {
    __m512i next_truth = load_bytes(target + block * kBlock);
    __m512i next_predicted = load_bytes(prediction + block * kBlock);
    // The run that is not counted yet: its label and its first pixel.
    int open = _mm_cvtsi128_si32(_mm512_castsi512_si128(next_truth)) & 255;
    int64_t start = block * kBlock;
    __m512i last = _mm512_set1_epi8(static_cast<char>(open));
    bool noise = false;
    for (; block < blocks; ++block) {
      const int64_t position = block * kBlock;
      const __m512i truth = next_truth;
      const __m512i predicted = next_predicted;
      if (block + 1 < blocks) {  // ahead, so that what follows hides the latency of memory
        next_truth = load_bytes(target + position + kBlock);
        next_predicted = load_bytes(prediction + position + kBlock);
      }
      uint64_t starts =
          _mm512_cmpneq_epu8_mask(truth, _mm512_permutex2var_epi8(last, before, truth));
      noise = __builtin_popcountll(starts) > kMaxStarts;
      if (noise) break;
      last = truth;
      const __mmask64 valid = _mm512_cmplt_epu8_mask(truth, limit);
      const __mmask64 differ = _mm512_mask_cmpneq_epu8_mask(valid, truth, predicted);
      if (~valid != 0 && !bad) bad = has_bad_label(target + position, classes, ignored);
      if (starts != 0) {
        _mm512_store_si512(label, truth);
        do {
          const int lane = __builtin_ctzll(starts);
          tables.rows[open] += static_cast<uint32_t>(position + lane - start);
          start = position + lane;
          open = label[lane];
          starts &= starts - 1;
        } while (starts != 0);
      } else if (~differ == 0) {  // perhaps a region that is taken for another
        const int taken = _mm_cvtsi128_si32(_mm512_castsi512_si128(predicted)) & 255;
        const __m512i same = _mm512_set1_epi8(static_cast<char>(taken));
        if (_mm512_cmpneq_epu8_mask(predicted, same) == 0) {
          tables.wrong[open * width + std::min(taken, classes)] += kBlock;
          continue;
        }
      }
      _mm512_storeu_si512(wrong_truth + waiting, _mm512_maskz_compress_epi8(differ, truth));
      _mm512_storeu_si512(wrong_predicted + waiting, _mm512_maskz_compress_epi8(differ, predicted));
      waiting += static_cast<int>(__builtin_popcountll(differ));
      if (waiting >= kBuffer) {
        for (int i = 0; i < kBuffer; i += kBlock) {
          count_pairs(_mm512_load_si512(wrong_truth + i), _mm512_load_si512(wrong_predicted + i),
                      classes, tables.wrong);
        }
        waiting -= kBuffer;
        _mm512_store_si512(wrong_truth, _mm512_load_si512(wrong_truth + kBuffer));
        _mm512_store_si512(wrong_predicted, _mm512_load_si512(wrong_predicted + kBuffer));
      }
    }
    tables.rows[open] += static_cast<uint32_t>(block * kBlock - start);
    if (noise) {
      const int64_t many = std::min(kBlocksOfNoise, blocks - block);
      bad |= count_blocks_avx2(prediction + block * kBlock, target + block * kBlock, many, classes,
                               ignored, tables.pairs);
      block += many;
    }
  }
  for (int i = 0; i < waiting; ++i) {
    ++tables.wrong[wrong_truth[i] * width + std::min<int>(wrong_predicted[i], classes)];
  }
  return bad;
}

}  // namespace fcnseg

#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif
