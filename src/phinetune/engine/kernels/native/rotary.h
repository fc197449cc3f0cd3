// Rotation of the first 2 m features of every head, in place.
#pragma once

#include "rows.h"

namespace phinetune {

// states: (tokens, heads, features), elements of a head without gaps; cos, sin: (tokens, m), in states' dtype.
// sign: 1, or -1 for the transposed rotation.
void rotate_(const Tensor& states, const Tensor& cos, const Tensor& sin, double sign) {
  STD_TORCH_CHECK(states.dim() == 3, "phinetune: states of another shape");
  const int64_t tokens = states.size(0), heads = states.size(1), half = cos.size(1);
  STD_TORCH_CHECK(2 * half <= states.size(2) && states.stride(2) == 1, "phinetune: states of another shape");
  for (const Tensor* each : {&cos, &sin}) {
    check_rows(*each, tokens, half);
    check_type(*each, states.scalar_type());
  }
  by_type(states, [&](auto kind) {
    using T = decltype(kind);
    const Rows<T> rows(states), cosines(cos), sines(sin);
    const int64_t apart = states.stride(1);
    const Vec by(static_cast<float>(sign));
    each_row(tokens, heads * half, [&](int64_t token) {
      along(half, [&](int64_t at, auto n) {
        const Vec c = load(cosines[token] + at, n), s = load(sines[token] + at, n) * by;
        for (int64_t head = 0; head < heads; ++head) {
          T *first = rows[token] + head * apart + at, *second = first + half;
          const Vec a = load(first, n), b = load(second, n);
          store(a * c - b * s, first, n);
          store(b * c + a * s, second, n);
        }
      });
    });
  });
}

}  // namespace phinetune
