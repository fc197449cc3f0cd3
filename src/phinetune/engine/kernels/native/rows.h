// Rows of float32 or bfloat16, read and written as vectors of float32.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>

namespace phinetune {

using torch::stable::Tensor;
using BFloat16 = c10::BFloat16;
using Vec = at::vec::Vectorized<float>;

constexpr int64_t LANES = Vec::size();
constexpr int64_t GRAIN = 1 << 14;  // elements that a thread takes at least: less would not pay for waking it

// LANES numbers of bfloat16, half a register, from memory and to it. Masked moves of a whole register would take longer,
// and the next read of the other half would wait for them.
inline Vec load_half(const BFloat16* from) {
#if defined(CPU_CAPABILITY_AVX512)
  __m512 value;
  at::vec::cvtbf16_fp32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), value);
  return value;
#elif defined(CPU_CAPABILITY_AVX2)
  __m256 value;
  at::vec::cvtbf16_fp32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), value);
  return value;
#else
  return at::vec::convert<float>(at::vec::Vectorized<BFloat16>::loadu(from, LANES));
#endif
}

inline void store_half(const Vec& value, BFloat16* to) {
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(value));
#elif defined(CPU_CAPABILITY_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), at::vec::cvtfp32_bf16(value));
#elif defined(CPU_CAPABILITY_AVX2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), at::vec::cvtfp32_bf16(value));
#else
  at::vec::convert<BFloat16>(value).store(to, LANES);
#endif
}

// The first `count` lanes from memory. What the others hold is of no use.
template <typename T>
inline Vec load(const T* from, int64_t count = LANES) {
  if constexpr (std::is_same_v<T, float>) {
    return count == LANES ? Vec::loadu(from) : Vec::loadu(from, count);
  } else {
    return count == LANES ? load_half(from) : at::vec::convert<float>(at::vec::Vectorized<T>::loadu(from, count));
  }
}

template <typename T>
inline void store(const Vec& value, T* to, int64_t count = LANES) {
  if constexpr (std::is_same_v<T, float>) {
    count == LANES ? value.store(to) : value.store(to, static_cast<int>(count));
  } else if (count == LANES) {
    store_half(value, to);
  } else {
    at::vec::convert<T>(value).store(to, static_cast<int>(count));
  }
}

// LANES numbers of one byte.
inline Vec load_bytes(const int8_t* from) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  float values[LANES];
  std::copy_n(from, LANES, values);
  return Vec::loadu(values);
#endif
}

inline float whole(c10::Half value) {
#if defined(__F16C__)
  return _cvtsh_ss(value.x);
#else
  return static_cast<float>(value);
#endif
}

inline void whole(const c10::Half* from, int64_t count, float* to) {
#if defined(CPU_CAPABILITY_AVX512)
  if (count == LANES) {
    return _mm512_storeu_ps(to, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
  }
#endif
  for (int64_t at = 0; at < count; ++at) {
    to[at] = whole(from[at]);
  }
}

// `value` as T holds it.
template <typename T>
inline Vec rounded(const Vec& value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else {
    return at::vec::convert<float>(at::vec::convert<T>(value));
  }
}

// Calls f(place, lanes in use) along a row. All calls but the last use all lanes, which the compiler then knows.
template <typename F>
inline void along(int64_t width, const F& f) {
  int64_t at = 0;
  for (; at + LANES <= width; at += LANES) {
    f(at, std::integral_constant<int64_t, LANES>());
  }
  if (at < width) {
    f(at, width - at);
  }
}

inline Vec plus(const Vec& a, const Vec& b) {
  return a + b;
}

inline Vec larger(const Vec& a, const Vec& b) {
  return at::vec::maximum(a, b);  // NaN where either is
}

// What `op` makes of f(place, lanes in use) along a row, from `start` on. Four partial results at a time, as each
// takes several cycles.
template <Vec (*op)(const Vec&, const Vec&), typename F>
inline float fold_along(int64_t width, float start, const F& f) {
  constexpr std::integral_constant<int64_t, LANES> all;
  Vec parts[4] = {Vec(start), Vec(start), Vec(start), Vec(start)};
  int64_t at = 0;
  for (; at + 4 * LANES <= width; at += 4 * LANES) {
    for (int i = 0; i < 4; ++i) {
      parts[i] = op(parts[i], f(at + i * LANES, all));
    }
  }
  for (; at + LANES <= width; at += LANES) {
    parts[0] = op(parts[0], f(at, all));
  }
  if (at < width) {
    parts[1] = Vec::set(parts[1], op(parts[1], f(at, width - at)), width - at);
  }
  return at::vec::vec_reduce_all<float>(op, op(op(parts[0], parts[1]), op(parts[2], parts[3])));
}

template <typename F>
inline float sum_along(int64_t width, const F& f) {
  return fold_along<plus>(width, 0.0f, f);
}

// A matrix whose rows lie in memory without gaps between their elements.
template <typename T>
struct Rows {
  T* start;
  int64_t stride;

  explicit Rows(const Tensor& x) : start(static_cast<T*>(x.data_ptr())), stride(x.stride(0)) {}
  T* operator[](int64_t row) const { return start + row * stride; }
};

// Refuses what would be read or written past its end. The Python side gives nothing of the kind.
inline void check_rows(const Tensor& x, int64_t rows, int64_t width) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == rows && x.size(1) == width, "phinetune: a tensor of another shape");
  STD_TORCH_CHECK(width < 2 || x.stride(1) == 1, "phinetune: the elements of a row have gaps between them");
}

inline void check_vector(const Tensor& x, int64_t size) {
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == size && x.is_contiguous(), "phinetune: a vector of another shape");
}

inline void check_type(const Tensor& x, torch::headeronly::ScalarType kind) {
  STD_TORCH_CHECK(x.scalar_type() == kind, "phinetune: a tensor of another dtype");
}

// Calls f.operator()<T>() with the type of x's elements.
template <typename F>
inline void by_type(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return f(float());
    case torch::headeronly::ScalarType::BFloat16:
      return f(BFloat16());
    default:
      STD_TORCH_CHECK(false, "phinetune: only float32 and bfloat16 have native kernels");
  }
}

// Calls f(row) for each row, rows of `width` elements shared out among torch's threads.
template <typename F>
inline void each_row(int64_t rows, int64_t width, const F& f) {
  const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, width));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      f(row);
    }
  });
}

}  // namespace phinetune
