// SwiGLU of gate and up side by side, and its gradient. The backward computes the sigmoid again.
#pragma once

#include "rows.h"

namespace phinetune {

inline Vec sigmoid(const Vec& x) {
  return Vec(1) / (Vec(1) + x.neg().exp_u20());
}

// out = gate * sigmoid(gate) * up. gate_up: (rows, 2 width), out: (rows, width).
void swiglu(const Tensor& gate_up, const Tensor& out) {
  const int64_t rows = out.size(0), width = out.size(1);
  check_rows(gate_up, rows, 2 * width);
  check_rows(out, rows, width);
  check_type(out, gate_up.scalar_type());
  by_type(out, [&](auto kind) {
    using T = decltype(kind);
    const Rows<T> from(gate_up), to(out);
    each_row(rows, width, [&](int64_t row) {
      const T *gates = from[row], *ups = gates + width;
      along(width, [&](int64_t at, auto n) {
        const Vec gate = load(gates + at, n);
        store(gate / (Vec(1) + gate.neg().exp_u20()) * load(ups + at, n), to[row] + at, n);
      });
    });
  });
}

// The gradients of gate and up, side by side as they are.
void swiglu_backward(const Tensor& grad, const Tensor& gate_up, const Tensor& out) {
  const int64_t rows = grad.size(0), width = grad.size(1);
  check_rows(grad, rows, width);
  check_rows(gate_up, rows, 2 * width);
  check_rows(out, rows, 2 * width);
  check_type(grad, gate_up.scalar_type());
  check_type(out, gate_up.scalar_type());
  by_type(grad, [&](auto kind) {
    using T = decltype(kind);
    const Rows<T> grads(grad), from(gate_up), to(out);
    each_row(rows, width, [&](int64_t row) {
      const T *gates = from[row], *ups = gates + width;
      T *d_gates = to[row], *d_ups = d_gates + width;
      along(width, [&](int64_t at, auto n) {
        const Vec gate = load(gates + at, n), part = sigmoid(gate), d = load(grads[row] + at, n) * part;
        store(d * load(ups + at, n) * (Vec(1) + gate * (Vec(1) - part)), d_gates + at, n);
        store(d * gate, d_ups + at, n);
      });
    });
  });
}

}  // namespace phinetune
