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

constexpr int64_t Q8_BLOCK = 32;  // numbers that share a scale

// The loops over a tile are unrolled, so that its sums stay in registers.
#define PHINETUNE_UNROLLED _Pragma("GCC unroll 8")

// How a weight is held, row by row, and what a row of it gives: vectors of float32. A span is what is read at a time.
template <typename W>
struct Plain {
  static constexpr int64_t SPAN = LANES;
  using Row = const W*;

  Rows<const W> rows;

  Row operator[](int64_t row) const { return rows[row]; }
  int64_t stride() const { return rows.stride; }
  static const W* place(Row row, int64_t at) { return row + at; }
  static Vec numbers(Row row, int64_t at) { return load(row + at, LANES); }
  static float one(Row row, int64_t at) { return static_cast<float>(row[at]); }
};

// Eight bits for each number, and a scale for each 32 of them, a span: llama.cpp's q8_0, with the scales apart.
struct Q8 {
  static constexpr int64_t SPAN = Q8_BLOCK;
  struct Row {
    const int8_t* values;
    const c10::Half* scales;
    int64_t blocks;
  };

  Rows<const int8_t> values;
  Rows<const c10::Half> scales;
  int64_t blocks;

  Row operator[](int64_t row) const { return {values[row], scales[row], blocks}; }
  int64_t stride() const { return values.stride; }
  static const int8_t* place(Row row, int64_t at) { return row.values + at; }
  static Vec numbers(Row row, int64_t at) { return load_bytes(row.values + at); }
  static float one(Row row, int64_t at) { return whole(row.scales[at / Q8_BLOCK]) * row.values[at]; }
};

// The scales of a row's spans, which are asked for one after another, from the first on.
template <typename W>
struct Scales {
  static constexpr bool ANY = false;
};

template <>
struct Scales<Q8> {
  static constexpr bool ANY = true;
  static constexpr int64_t AHEAD = 16;  // are made float32 together

  float next[AHEAD];

  Vec of(const Q8::Row& row, int64_t at) {
    const int64_t block = at / Q8_BLOCK, place = block % AHEAD;
    if (place == 0) {
      whole(row.scales + block, std::min(AHEAD, row.blocks - block), next);
    }
    return Vec(next[place]);
  }
};

// out[m][n] = the sum of x[m][k] * weight[n][k] over k, for M rows of x and N of the weight, which is held as W.
template <int64_t M, int64_t N, typename T, typename W>
inline void few_tile(
    int64_t width, const float* x, const W& weight, int64_t first, Rows<T> out, int64_t row, int64_t ahead) {
  // With few rows of x it takes less to scale each span's sums than its numbers.
  constexpr bool SCALES_SUMS = Scales<W>::ANY && M <= 2;
  Vec sums[M][N], parts[M][N], factors[N], scales[N];
  Scales<W> scales_of[N];
  PHINETUNE_UNROLLED for (int64_t m = 0; m < M; ++m) {
    PHINETUNE_UNROLLED for (int64_t n = 0; n < N; ++n) {
      sums[m][n] = Vec(0);
    }
  }
  typename W::Row w[N];
  PHINETUNE_UNROLLED for (int64_t n = 0; n < N; ++n) {
    w[n] = weight[first + n];
  }
  int64_t at = 0;
  for (; at + W::SPAN <= width; at += W::SPAN) {
    PHINETUNE_UNROLLED for (int64_t n = 0; n < N; ++n) {
      if constexpr (Scales<W>::ANY) {
        scales[n] = scales_of[n].of(w[n], at);
      }
      __builtin_prefetch(W::place(w[n], at + ahead));
    }
    PHINETUNE_UNROLLED for (int64_t in = 0; in < W::SPAN; in += LANES) {
      PHINETUNE_UNROLLED for (int64_t n = 0; n < N; ++n) {
        factors[n] = W::numbers(w[n], at + in);
        if constexpr (Scales<W>::ANY && !SCALES_SUMS) {
          factors[n] = factors[n] * scales[n];
        }
      }
      PHINETUNE_UNROLLED for (int64_t m = 0; m < M; ++m) {
        const Vec value = Vec::loadu(x + m * width + at + in);
        PHINETUNE_UNROLLED for (int64_t n = 0; n < N; ++n) {
          if constexpr (!SCALES_SUMS) {
            sums[m][n] = at::vec::fmadd(value, factors[n], sums[m][n]);
          } else {
            parts[m][n] = in == 0 ? value * factors[n] : at::vec::fmadd(value, factors[n], parts[m][n]);
          }
        }
      }
    }
    if constexpr (SCALES_SUMS) {
      PHINETUNE_UNROLLED for (int64_t m = 0; m < M; ++m) {
        PHINETUNE_UNROLLED for (int64_t n = 0; n < N; ++n) {
          sums[m][n] = at::vec::fmadd(parts[m][n], scales[n], sums[m][n]);
        }
      }
    }
  }
  PHINETUNE_UNROLLED for (int64_t m = 0; m < M; ++m) {
    PHINETUNE_UNROLLED for (int64_t n = 0; n < N; ++n) {
      float sum = at::vec::vec_reduce_all<float>(plus, sums[m][n]);
      for (int64_t k = at; k < width; ++k) {
        sum += x[m * width + k] * W::one(w[n], k);
      }
      out[row + m][first + n] = static_cast<T>(sum);
    }
  }
}

template <int64_t N, typename T, typename W, int64_t... M>
inline void few_tile_of(
    int64_t rows, std::integer_sequence<int64_t, M...>, int64_t width, const float* x, const W& weight,
    int64_t first, Rows<T> out, int64_t row, int64_t ahead) {
  ((rows == M + 1 ? few_tile<M + 1, N>(width, x, weight, first, out, row, ahead) : void()), ...);
}

template <typename T, typename W>
inline void few_rows_as(const Tensor& x, const W& factors, const Tensor& out) {
  const int64_t rows = x.size(0), width = x.size(1), features = out.size(1);
  const Rows<T> given(x), to(out);
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
        const int64_t ahead = group + 1 == groups ? TILE_WEIGHTS * factors.stride() : 0;
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
        few_rows_as<T>(x, Plain<W>{Rows<const W>(weight)}, out);
      } else {
        STD_TORCH_CHECK(false, "phinetune: a weight of another dtype");
      }
    });
  });
}

inline Q8 held_in_q8(const Tensor& weight, const Tensor& scales) {
  check_rows(scales, weight.size(0), (weight.size(1) + Q8_BLOCK - 1) / Q8_BLOCK);
  check_type(weight, torch::headeronly::ScalarType::Char);
  check_type(scales, torch::headeronly::ScalarType::Half);
  return {Rows<const int8_t>(weight), Rows<const c10::Half>(scales), scales.size(1)};
}

// The same for a weight in q8_0. weight: (features, width) of int8, scales: (features, blocks) of float16.
void few_rows_of_q8(const Tensor& x, const Tensor& weight, const Tensor& scales, const Tensor& out) {
  const int64_t rows = x.size(0), width = x.size(1), features = weight.size(0);
  check_rows(x, rows, width);
  check_rows(weight, features, width);
  check_rows(out, rows, features);
  check_type(out, x.scalar_type());
  by_type(x, [&](auto kind) { few_rows_as<decltype(kind)>(x, held_in_q8(weight, scales), out); });
}

// out = a weight in q8_0 as float32 or bfloat16.
void expand_q8(const Tensor& out, const Tensor& weight, const Tensor& scales) {
  const int64_t rows = weight.size(0), width = weight.size(1);
  check_rows(weight, rows, width);
  check_rows(out, rows, width);
  const Q8 held = held_in_q8(weight, scales);
  by_type(out, [&](auto kind) {
    using T = decltype(kind);
    const Rows<T> to(out);
    each_row(rows, width, [&](int64_t row) {
      const Q8::Row from = held[row];
      Scales<Q8> scales_of;
      int64_t at = 0;
      for (; at + Q8_BLOCK <= width; at += Q8_BLOCK) {
        const Vec scale = scales_of.of(from, at);
        PHINETUNE_UNROLLED for (int64_t in = 0; in < Q8_BLOCK; in += LANES) {
          store(Q8::numbers(from, at + in) * scale, to[row] + at + in);
        }
      }
      for (; at < width; ++at) {
        to[row][at] = static_cast<T>(Q8::one(from, at));
      }
    });
  });
}

}  // namespace phinetune
