// The CPU's counting of confusion matrices against a plain loop: maps that agree in long runs, in
// none, or with whole regions wrong, ignored, or bad.
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "confusion_matrix.h"

namespace {

int failures = 0;

// Stretches of `length` pixels or so that are runs or noise of either map.
template <typename Prediction, typename Target>
void check(int64_t size, int classes, int64_t ignore_index, int length, bool with_bad) {
  std::mt19937 random(static_cast<unsigned>(size + 1000 * classes + length));
  // One element more than needed in front: the vectors start unaligned.
  std::vector<Prediction> predictions(size + 1);
  std::vector<Target> targets(size + 1);
  Prediction* const prediction = predictions.data() + 1;
  Target* const target = targets.data() + 1;
  for (int64_t i = 0; i < size;) {
    const unsigned kind = random() % 6;
    int64_t truth = random() % classes;
    int64_t predicted = random() % classes;
    for (int64_t end = std::min<int64_t>(size, i + 1 + random() % (2 * length)); i < end; ++i) {
      if (kind == 0) truth = random() % classes;                     // noise
      if (kind <= 1) predicted = random() % classes;                 // under a constant truth
      if (kind == 2) predicted = random() % 10 ? truth : predicted;  // speckles
      if (kind == 3) predicted = truth;
      if (kind == 4) truth = ignore_index;
      target[i] = static_cast<Target>(truth);
      prediction[i] = static_cast<Prediction>(predicted);
    }
  }
  if (with_bad) {
    prediction[random() % size] = static_cast<Prediction>(classes);
    target[random() % size] = static_cast<Target>(-3);
  }
  std::vector<int64_t> expected(classes * classes, 7);
  int64_t count = 0, position = 0, value = 0, in_prediction = 0;
  for (int64_t i = size - 1; i >= 0; --i) {
    const int64_t t = target[i], p = prediction[i];
    if (t == ignore_index) continue;
    const bool bad_target = t < 0 || t >= classes;
    if (bad_target || p < 0 || p >= classes) {
      ++count;
      position = i;
      value = bad_target ? t : p;
      in_prediction = !bad_target;
    } else {
      ++expected[t * classes + p];
    }
  }
  std::vector<int64_t> matrix(classes * classes, 7);
  fcnseg::BadLabels bad;
  fcnseg::count_range(prediction, target, 0, size, classes, ignore_index, matrix.data(), bad);
  // With a bad label the caller drops the matrix.
  const bool right = bad.count == count && (count != 0 || matrix == expected) &&
                     (count == 0 || (bad.position == position && bad.value == value &&
                                     bad.in_prediction == in_prediction));
  if (!right) {
    std::printf("FAIL %d and %d bytes, size %lld, %d classes, ignoring %lld, stretches of %d\n",
                int(sizeof(Prediction)), int(sizeof(Target)), static_cast<long long>(size), classes,
                static_cast<long long>(ignore_index), length);
    ++failures;
  }
}

template <typename Prediction, typename Target>
void check_all() {
  for (const int64_t size : {1, 63, 64, 4096 + 17, 60001}) {
    for (const int length : {3, 40, 700}) {
      for (const int classes : {1, 5, 34}) {
        for (const int64_t ignore_index : {int64_t{-100}, int64_t{255}, int64_t{0}}) {
          check<Prediction, Target>(size, classes, ignore_index, length, false);
          check<Prediction, Target>(size, classes, ignore_index, length, true);
        }
      }
    }
  }
  // The most classes that go block by block; one more; too many for a byte.
  for (const int classes : {254, 255, 256}) {
    if (sizeof(Prediction) == 1 || sizeof(Target) == 1) break;
    check<Prediction, Target>(300000, classes, 255, 40, false);
    check<Prediction, Target>(300000, classes, -100, 40, true);
  }
}

}  // namespace

int main() {
  check_all<uint8_t, uint8_t>();
  check_all<int16_t, int16_t>();
  check_all<int32_t, uint8_t>();
  check_all<uint8_t, int32_t>();
  check_all<int64_t, int64_t>();
  std::printf("%s: %d failures\n", fcnseg::name(fcnseg::cpu_capability()), failures);
  return failures != 0;
}
