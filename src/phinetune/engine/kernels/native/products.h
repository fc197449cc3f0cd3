// Small matrix products, and how their factors lie in memory. The products are torch's own, of oneDNN (`brgemm`), which
// know AVX512, its bfloat16 and AMX.
#pragma once

#include "rows.h"

#include <ATen/native/CPUBlas.h>

#include <cstring>
#include <exception>
#include <type_traits>

namespace phinetune {

constexpr int64_t TILE = 16;  // rows, features and queries come in whole tiles, padded by zeros

inline int64_t padded(int64_t count, int64_t to = TILE) {
  return (count + to - 1) / to * to;
}

// How many numbers of T, one below the other, lie side by side in the right factor of a product.
template <typename T>
constexpr int64_t PAIR = 4 / sizeof(T);

// C = A B, or C + A B. A's rows are `lda` elements apart; B holds PAIR rows interleaved, each `ldb` columns wide.
template <typename T>
inline void product(
    int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, PAIR<T> > 1);
}

// Whether the processor has instructions for `product` in bfloat16. Without them torch refuses it by an exception.
inline bool multiplies_bfloat16() {
  const BFloat16 pair[2 * TILE] = {};
  float c[TILE];
  try {
    product<BFloat16>(1, TILE, 2, pair, 2, pair, TILE, c, TILE, false);
    at::native::cpublas::brgemm_release();
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

// Tiles of 4-byte elements: to[column][row] = from[row][column].
inline void transpose(const float* from, int64_t ld_from, int64_t rows, int64_t columns, float* to, int64_t ld_to) {
  for (int64_t row = 0; row < rows; row += TILE) {
    for (int64_t column = 0; column < columns; column += TILE) {
      at::vec::transpose_mxn<float, TILE, TILE>(
          from + row * ld_from + column, ld_from, to + column * ld_to + row, ld_to);
    }
  }
}

inline void transpose(const BFloat16* from, int64_t ld_from, int64_t rows, int64_t columns, BFloat16* to, int64_t ld_to) {
  for (int64_t row = 0; row < rows; row += TILE) {
    for (int64_t column = 0; column < columns; column += TILE) {
      at::vec::transpose_mxn<BFloat16, TILE, TILE>(
          from + row * ld_from + column, ld_from, to + column * ld_to + row, ld_to);
    }
  }
}

// Rows as the right factor of A rows^T: features below each other, in pairs, queries side by side.
template <typename T>
inline void lay_across(const T* rows, int64_t count, int64_t width, T* to) {
  transpose(
      reinterpret_cast<const float*>(rows), width / PAIR<T>, count, width / PAIR<T>, reinterpret_cast<float*>(to), count);
}

// LANES numbers of two rows in turn.
inline void interleave(const BFloat16* above, const BFloat16* below, BFloat16* to) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(above)));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(below)));
  _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#else
  for (int64_t i = 0; i < LANES; ++i) {
    to[2 * i] = above[i];
    to[2 * i + 1] = below[i];
  }
#endif
}

// Rows as the right factor of A rows: queries below each other, in pairs, features side by side.
template <typename T>
inline void lay_in_pairs(const T* rows, int64_t count, int64_t width, T* to) {
  if constexpr (PAIR<T> == 1) {
    std::memcpy(to, rows, count * width * sizeof(T));
  } else {
    for (int64_t row = 0; row < count; row += 2, rows += 2 * width, to += 2 * width) {
      for (int64_t i = 0; i < width; i += LANES) {
        interleave(rows + i, rows + width + i, to + 2 * i);
      }
    }
  }
}

// exp, as exactly as T needs it. The fast form is off by some 20 units in the last place, and has no NaN.
template <typename T>
inline Vec exponential(const Vec& x) {
  if constexpr (std::is_same_v<T, float>) {
    return x.exp();
  } else {
    return x.exp_u20();
  }
}

// Two neighbouring rows of a right factor with `columns` columns.
inline void store_pair(const Vec& above, const Vec& below, float* to, int64_t columns) {
  above.store(to);
  below.store(to + columns);
}

inline void store_pair(const Vec& above, const Vec& below, BFloat16* to, int64_t) {
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(above));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(below));
  _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#else
  BFloat16 both[2][LANES];
  store(above, both[0]);
  store(below, both[1]);
  for (int64_t i = 0; i < LANES; ++i) {
    to[2 * i] = both[0][i];
    to[2 * i + 1] = both[1][i];
  }
#endif
}

}  // namespace phinetune
