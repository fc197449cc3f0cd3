// RMSNorm, with the residual sum before it and the gradient's sum after it in the same pass.
#pragma once

#include "rows.h"

#include <cmath>

namespace phinetune {

// Weights are float32 whatever the rest is: a norm that trains may be kept so.

// total = x + residual (where given), scale = 1 / sqrt(mean(total^2) + eps), out = round(total * scale) * weight.
void rms_norm(
    const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight, double eps, const Tensor& out,
    const Tensor& scale, const std::optional<Tensor>& total) {
  const int64_t rows = x.size(0), width = x.size(1);
  for (const Tensor* each : {&x, &out, residual ? &*residual : &x, total ? &*total : &x}) {
    check_rows(*each, rows, width);
    check_type(*each, x.scalar_type());
  }
  STD_TORCH_CHECK(residual.has_value() == total.has_value(), "phinetune: a residual without a place for the sum");
  check_vector(weight, width);
  check_type(weight, torch::headeronly::ScalarType::Float);
  check_vector(scale, rows);
  check_type(scale, torch::headeronly::ScalarType::Float);
  by_type(x, [&](auto kind) {
    using T = decltype(kind);
    const Rows<T> from(x), to(out), added(residual ? *residual : x), sums(total ? *total : x);
    const float* w = static_cast<const float*>(weight.data_ptr());
    float* scales = static_cast<float*>(scale.data_ptr());
    const bool adds = residual.has_value();
    each_row(rows, width, [&](int64_t row) {
      const T* seen = sums[row];
      const float squares = adds
          ? sum_along(width, [&](int64_t at, auto n) {
              const Vec sum = load(from[row] + at, n) + load(added[row] + at, n);
              store(sum, sums[row] + at, n);
              const Vec kept = rounded<T>(sum);
              return kept * kept;
            })
          : sum_along(width, [&](int64_t at, auto n) {
              const Vec value = load(seen + at, n);
              return value * value;
            });
      const float by = 1.0f / std::sqrt(squares / width + static_cast<float>(eps));
      scales[row] = by;
      along(width, [&](int64_t at, auto n) {
        store(rounded<T>(load(seen + at, n) * Vec(by)) * load(w + at, n), to[row] + at, n);
      });
    });
  });
}

// dx = scale * (g - x * scale^2 * mean(g * x)) + beside (where given), with g = grad * weight.
void rms_norm_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& scale,
    const std::optional<Tensor>& beside, const Tensor& dx) {
  const int64_t rows = x.size(0), width = x.size(1);
  for (const Tensor* each : {&grad, &x, &dx, beside ? &*beside : &x}) {
    check_rows(*each, rows, width);
    check_type(*each, x.scalar_type());
  }
  check_vector(weight, width);
  check_type(weight, torch::headeronly::ScalarType::Float);
  check_vector(scale, rows);
  check_type(scale, torch::headeronly::ScalarType::Float);
  by_type(x, [&](auto kind) {
    using T = decltype(kind);
    const Rows<T> grads(grad), from(x), to(dx), added(beside ? *beside : x);
    const float* w = static_cast<const float*>(weight.data_ptr());
    const float* scales = static_cast<const float*>(scale.data_ptr());
    const bool adds = beside.has_value();
    each_row(rows, width, [&](int64_t row) {
      const T *g = grads[row], *seen = from[row];
      const float dot = sum_along(width, [&](int64_t at, auto n) {
        return load(g + at, n) * load(w + at, n) * load(seen + at, n);
      });
      const Vec by(scales[row]), share(dot * scales[row] * scales[row] / width);
      const auto slope = [&](int64_t at, auto n) {
        return by * (load(g + at, n) * load(w + at, n) - load(seen + at, n) * share);
      };
      if (adds) {
        along(width, [&](int64_t at, auto n) { store(slope(at, n) + load(added[row] + at, n), to[row] + at, n); });
      } else {
        along(width, [&](int64_t at, auto n) { store(slope(at, n), to[row] + at, n); });
      }
    });
  });
}

}  // namespace phinetune
