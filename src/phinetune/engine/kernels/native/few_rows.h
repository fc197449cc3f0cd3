// The product of a few rows with a weight, as each step of an answer has it: the weight is read once, from beginning to
// end, at memory's speed. Sums are in float32; they are rounded once.
#pragma once

#include "rows.h"

#include <utility>
#include <vector>

namespace phinetune {

// A tile has this many rows of x and of the weight. Its sums fit the registers, with the weight's vectors beside them.
// While the last rows of x are multiplied, the weight's next rows come from memory.
constexpr int64_t TILE_ROWS = LANES == 16 ? 8 : 4;
constexpr int64_t TILE_WEIGHTS = 3;

// The loops over a tile are unrolled, so that its sums stay in registers.
#define PHINETUNE_UNROLLED _Pragma("GCC unroll 8")

// out[m][n] = the sum of x[m][k] * weight[n][k] over k, for M rows of x and N of the weight, which is held as W.
template <int64_t M, int64_t N, typename T, typename W>
inline void few_tile(
    int64_t width, const float* x, Rows<const W> weight, int64_t first, Rows<T> out, int64_t row, int64_t ahead) {
  Vec sums[M][N], factors[N];
  PHINETUNE_UNROLLED for (int64_t m = 0; m < M; ++m) {
    PHINETUNE_UNROLLED for (int64_t n = 0; n < N; ++n) {
      sums[m][n] = Vec(0);
    }
  }
  const W* w[N];
  PHINETUNE_UNROLLED for (int64_t n = 0; n < N; ++n) {
    w[n] = weight[first + n];
  }
  int64_t at = 0;
  for (; at + LANES <= width; at += LANES) {
    PHINETUNE_UNROLLED for (int64_t n = 0; n < N; ++n) {
      factors[n] = load(w[n] + at, LANES);
      __builtin_prefetch(w[n] + at + ahead);
    }
    PHINETUNE_UNROLLED for (int64_t m = 0; m < M; ++m) {
      const Vec value = Vec::loadu(x + m * width + at);
      PHINETUNE_UNROLLED for (int64_t n = 0; n < N; ++n) {
        sums[m][n] = at::vec::fmadd(value, factors[n], sums[m][n]);
      }
    }
  }
  PHINETUNE_UNROLLED for (int64_t m = 0; m < M; ++m) {
    PHINETUNE_UNROLLED for (int64_t n = 0; n < N; ++n) {
      float sum = at::vec::vec_reduce_all<float>(plus, sums[m][n]);
      for (int64_t k = at; k < width; ++k) {
        sum += x[m * width + k] * static_cast<float>(w[n][k]);
      }
      out[row + m][first + n] = static_cast<T>(sum);
    }
  }
}

template <int64_t N, typename T, typename W, int64_t... M>
inline void few_tile_of(
    int64_t rows, std::integer_sequence<int64_t, M...>, int64_t width, const float* x, Rows<const W> weight,
    int64_t first, Rows<T> out, int64_t row, int64_t ahead) {
  ((rows == M + 1 ? few_tile<M + 1, N>(width, x, weight, first, out, row, ahead) : void()), ...);
}

template <typename T, typename W>
inline void few_rows_as(const Tensor& x, const Tensor& weight, const Tensor& out) {
  const int64_t rows = x.size(0), width = x.size(1), features = weight.size(0);
  const Rows<T> given(x), to(out);
  const Rows<const W> factors(weight);
  std::vector<float> values(rows * width);
  for (int64_t row = 0; row < rows; ++row) {
    along(width, [&](int64_t at, auto n) { store(load(given[row] + at, n), values.data() + row * width + at, n); });
  }
  // Rows of x in groups of nearly the same size.
  const int64_t groups = (rows + TILE_ROWS - 1) / TILE_ROWS;
  const auto start = [&](int64_t group) { return group * rows / groups; };
  const auto all = std::make_integer_sequence<int64_t, TILE_ROWS>();
  const int64_t blocks = (features + TILE_WEIGHTS - 1) / TILE_WEIGHTS;
  const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, TILE_WEIGHTS * width));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * TILE_WEIGHTS; first < std::min(end * TILE_WEIGHTS, features); first += TILE_WEIGHTS) {
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t row = start(group), count = start(group + 1) - row;
        const float* seen = values.data() + row * width;
        const int64_t ahead = group + 1 == groups ? TILE_WEIGHTS * factors.stride : 0;
        if (first + TILE_WEIGHTS <= features) {
          few_tile_of<TILE_WEIGHTS>(count, all, width, seen, factors, first, to, row, ahead);
        } else {
          for (int64_t one = first; one < features; ++one) {
            few_tile_of<1>(count, all, width, seen, factors, one, to, row, 0);
          }
        }
      }
    }
  });
}

// out = x weight^T. x: (rows, width), weight: (features, width), out: (rows, features). x and out are of one dtype; the
// weight is of the same, or of bfloat16 where they are of float32.
void few_rows(const Tensor& x, const Tensor& weight, const Tensor& out) {
  const int64_t rows = x.size(0), width = x.size(1), features = weight.size(0);
  check_rows(x, rows, width);
  check_rows(weight, features, width);
  check_rows(out, rows, features);
  check_type(out, x.scalar_type());
  by_type(x, [&](auto kind) {
    by_type(weight, [&](auto held) {
      using T = decltype(kind);
      using W = decltype(held);
      if constexpr (std::is_same_v<T, W> || std::is_same_v<T, float>) {
        few_rows_as<T, W>(x, weight, out);
      } else {
        STD_TORCH_CHECK(false, "phinetune: a weight of another dtype");
      }
    });
  });
}

}  // namespace phinetune
