// What adapters add to a layer's output, each to the tokens that it answers, in one call for all of them.
#pragma once

#include "rows.h"

#include <vector>

namespace phinetune {

// The tokens [start, stop) of one adapter, and its matrices: A of shape (rank, in), B transposed, of shape (rank, out).
template <typename T>
struct Update {
  int64_t start, stop, rank;
  Rows<const T> a, b;
  float scaling;
};

// hidden = scaling x A^T in float32, shape (tokens, most). A thread computes a row of A for all tokens of an adapter.
template <typename T>
inline void project(
    const std::vector<Update<T>>& updates, int64_t most, int64_t width, const Rows<T>& x, float* hidden) {
  const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, width));
  torch::stable::parallel_for(0, static_cast<int64_t>(updates.size()) * most, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const Update<T>& update = updates[task / most];
      const int64_t r = task % most;
      for (int64_t token = update.start; r < update.rank && token < update.stop; ++token) {
        const T *values = x[token], *factors = update.a[r];
        hidden[token * most + r] = update.scaling *
            sum_along(width, [&](int64_t at, auto n) { return load(values + at, n) * load(factors + at, n); });
      }
    }
  });
}

// out += hidden B^T; one thread computes neighbouring features for all tokens.
template <typename T>
inline void expand(
    const std::vector<Update<T>>& updates, int64_t most, const float* hidden, const Rows<T>& out, int64_t features) {
  const int64_t blocks = (features + LANES - 1) / LANES;
  torch::stable::parallel_for(0, blocks, std::max<int64_t>(1, GRAIN / (LANES * most)), [&](int64_t begin, int64_t end) {
    for (const Update<T>& update : updates) {
      for (int64_t token = update.start; token < update.stop; ++token) {
        const float* factors = hidden + token * most;
        T* to = out[token] + begin * LANES;
        along(std::min(end * LANES, features) - begin * LANES, [&](int64_t at, auto n) {
          Vec sum = load(to + at, n);
          for (int64_t r = 0; r < update.rank; ++r) {
            sum = at::vec::fmadd(Vec(factors[r]), load(update.b[r] + begin * LANES + at, n), sum);
          }
          store(sum, to + at, n);
        });
      }
    }
  });
}

// out[start:stop] += scaling (x[start:stop] a^T) b for each adapter; b is B transposed. All tensors are of one dtype.
void add_low_rank_(
    const Tensor& out, const Tensor& x, std::vector<Tensor> a, std::vector<Tensor> b, std::vector<double> scalings,
    std::vector<int64_t> starts, std::vector<int64_t> stops) {
  const int64_t tokens = x.size(0), width = x.size(1), features = out.size(1), count = a.size();
  check_rows(x, tokens, width);
  check_rows(out, tokens, features);
  check_type(x, out.scalar_type());
  STD_TORCH_CHECK(
      b.size() == a.size() && scalings.size() == a.size() && starts.size() == a.size() && stops.size() == a.size(),
      "phinetune: adapters without a matrix, a factor or tokens");
  by_type(out, [&](auto kind) {
    using T = decltype(kind);
    std::vector<Update<T>> updates;
    int64_t most = 1;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t rank = a[i].size(0), start = starts[i], stop = stops[i];
      check_rows(a[i], rank, width);
      check_rows(b[i], rank, features);
      check_type(a[i], out.scalar_type());
      check_type(b[i], out.scalar_type());
      STD_TORCH_CHECK(0 <= start && start <= stop && stop <= tokens, "phinetune: tokens that are not there");
      updates.push_back({start, stop, rank, Rows<const T>(a[i]), Rows<const T>(b[i]), static_cast<float>(scalings[i])});
      most = std::max(most, rank);
    }
    std::vector<float> hidden(tokens * most);
    project<T>(updates, most, width, Rows<T>(x), hidden.data());
    expand<T>(updates, most, hidden.data(), Rows<T>(out), features);
  });
}

}  // namespace phinetune
