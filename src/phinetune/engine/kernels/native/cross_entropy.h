// Cross-entropy of a chunk of logits: each row is read from memory once, and its gradient is written over it.
#pragma once

#include "rows.h"

#include <cmath>
#include <initializer_list>

namespace phinetune {

constexpr float LOWEST = -std::numeric_limits<float>::infinity();
constexpr int64_t BLOCK = 2048;  // logits that are looked at twice while the fastest cache holds them

// The maximum of some logits and the sum of exp(logit - maximum), as they are found block by block.
struct Softmax {
  float top = LOWEST;
  float total = 0;

  template <typename T>
  void add(const T* logits, int64_t count) {
    const float high = fold_along<larger>(count, LOWEST, [&](int64_t at, auto n) { return load(logits + at, n); });
    if (high == LOWEST) {
      return;  // these have no share
    }
    if (high > top) {
      total *= std::exp(top - high);
      top = high;
    }
    const Vec from(top);
    total += sum_along(count, [&](int64_t at, auto n) { return (load(logits + at, n) - from).exp_u20(); });
  }
};

// Refuses what is no vector of `rows` float32 numbers.
inline void check_numbers(std::initializer_list<const Tensor*> vectors, int64_t rows) {
  for (const Tensor* each : vectors) {
    check_vector(*each, rows);
    check_type(*each, torch::headeronly::ScalarType::Float);
  }
}

// The labels, each of which has a logit.
inline const int64_t* checked_labels(const Tensor& labels, int64_t rows, int64_t width) {
  check_vector(labels, rows);
  check_type(labels, torch::headeronly::ScalarType::Long);
  const int64_t* wanted = static_cast<const int64_t*>(labels.data_ptr());
  for (int64_t row = 0; row < rows; ++row) {
    STD_TORCH_CHECK(wanted[row] >= 0 && wanted[row] < width, "phinetune: the label ", wanted[row], " has no logit");
  }
  return wanted;
}

// logits: (rows, vocabulary); labels: int64; log_probs: the label's log-probability; first: 1 where the label is the
// first of the largest logits, else 0. With weights, logits become weight * (softmax - one-hot).
void cross_entropy_(
    const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& weights, const Tensor& log_probs,
    const Tensor& first) {
  STD_TORCH_CHECK(logits.dim() == 2, "phinetune: logits of another shape");
  const int64_t rows = logits.size(0), width = logits.size(1);
  check_rows(logits, rows, width);
  check_numbers({&log_probs, &first, weights ? &*weights : &first}, rows);
  const int64_t* wanted = checked_labels(labels, rows, width);
  by_type(logits, [&](auto kind) {
    using T = decltype(kind);
    const Rows<T> all(logits);
    const float* w = weights ? static_cast<const float*>(weights->data_ptr()) : nullptr;
    float* found = static_cast<float*>(log_probs.data_ptr());
    float* is_first = static_cast<float*>(first.data_ptr());
    each_row(rows, width, [&](int64_t row) {
      T* seen = all[row];
      const int64_t label = wanted[row];
      Softmax softmax;
      for (int64_t at = 0; at < width; at += BLOCK) {
        softmax.add(seen + at, std::min(BLOCK, width - at));
      }
      const float own = static_cast<float>(seen[label]);
      found[row] = own - softmax.top - std::log(softmax.total);
      // Only for a label with the largest logit it matters whether an earlier one is as large.
      is_first[row] = own == softmax.top && std::find(seen, seen + label, seen[label]) == seen + label;
      if (w) {
        const Vec top(softmax.top), by(w[row] / softmax.total);
        along(width, [&](int64_t at, auto n) {
          store((load(seen + at, n) - top).exp_u20() * by, seen + at, n);
        });
        const float p = std::exp(own - softmax.top) / softmax.total;
        seen[label] = static_cast<T>(w[row] * (p - 1.0f));
      }
    });
  });
}

// logits, labels, log_probs: as above. entropy: of softmax(logits), in nats; mean: the mean logit.
void spread(
    const Tensor& logits, const Tensor& labels, const Tensor& log_probs, const Tensor& entropy, const Tensor& mean) {
  STD_TORCH_CHECK(logits.dim() == 2, "phinetune: logits of another shape");
  const int64_t rows = logits.size(0), width = logits.size(1);
  check_rows(logits, rows, width);
  check_numbers({&log_probs, &entropy, &mean}, rows);
  const int64_t* wanted = checked_labels(labels, rows, width);
  by_type(logits, [&](auto kind) {
    using T = decltype(kind);
    const Rows<T> all(logits);
    const float* found = static_cast<const float*>(log_probs.data_ptr());
    float* nats = static_cast<float*>(entropy.data_ptr());
    float* middle = static_cast<float*>(mean.data_ptr());
    each_row(rows, width, [&](int64_t row) {
      const T* seen = all[row];
      const Vec log_z(static_cast<float>(seen[wanted[row]]) - found[row]);
      float total = 0, expected = 0;
      for (int64_t at = 0; at < width; at += BLOCK) {
        const T* block = seen + at;
        const int64_t count = std::min(BLOCK, width - at);
        total += sum_along(count, [&](int64_t place, auto n) { return load(block + place, n); });
        expected += sum_along(count, [&](int64_t place, auto n) {
          const Vec log_p = load(block + place, n) - log_z;
          return log_p.exp_u20() * log_p;
        });
      }
      nats[row] = -expected;
      middle[row] = total / static_cast<float>(width);
    });
  });
}

}  // namespace phinetune
