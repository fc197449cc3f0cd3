// The forward of attention within trees of segments.
#pragma once

#include "attention.h"

namespace phinetune {

// Attention of the queries of a part of a tree that share a key head.
template <typename T>
struct Attend {
  struct Tensors {
    Rows<T> qkv, out;
    const Rows<float>* log_sums;  // shape (tokens, heads), or none
  };

  const Heads& heads;
  const Tree& tree;
  int64_t slots, width, most;
  T *keys, *values;  // of the tree; the values transposed
  T *rows, *queries, *weights;  // of a block: queries as they are, and as right factor; the keys' weights
  float *scores, *out, *turned;  // out: weighted values, shape (width, count)
  float *largest, *sum, *factor;  // of each query: the largest score, sum of exp(score - largest), change of weights

  Attend(Memory& memory, const Heads& heads, const Part& part)
      : heads(heads), tree(part.tree), slots(tree.rows()), width(heads.width()), most(most_rows(heads)) {
    keys = memory.take<T>(slots * width);
    values = memory.take<T>((slots + TILE) * width);
    rows = memory.take<T>(std::max(most, slots) * width);
    queries = memory.take<T>(most * width);
    weights = memory.take<T>(KEYS * most);
    scores = memory.take<float>(KEYS * (most + TILE));
    out = memory.take<float>(most * width);
    turned = memory.take<float>(most * width);
    largest = memory.take<float>(most);
    sum = memory.take<float>(most);
    factor = memory.take<float>(most);
  }

  void run(const Tensors& tensors, int64_t kv_head) {
    copy_keys(tensors.qkv, tree, heads, kv_head, 0, keys);
    copy_keys(tensors.qkv, tree, heads, kv_head, 1, rows);
    transpose(rows, width, slots, width, values, slots + TILE);
    each_query_block(tree, heads, kv_head, [&](const QueryBlock& block) {
      copy_queries(tensors.qkv, block, rows);
      lay_across(rows, block.count, width, queries);
      std::fill_n(largest, block.count, NO_SCORE);
      std::fill_n(sum, block.count, 0.0f);
      bool first = true;
      each_key_block(tree, block, [&](const KeyBlock& seen) {
        add(block, seen, first);
        first = false;
      });
      finish(block, tensors);
    });
  }

  // Adds what a block of queries takes from a block of keys.
  void add(const QueryBlock& block, const KeyBlock& seen, bool first) {
    const int64_t count = block.count, from = seen.from, right = from * PAIR<T>;
    product(seen.count(), count - from, width, keys + seen.slot * width, width, queries + right, count,
            scores + from, block.stride(), false);
    hide(block, seen);
    const bool changes = weigh(block, seen);
    for (int64_t feature = 0; feature < width && changes && !first; ++feature) {
      float* row = out + feature * count;
      for (int64_t at = from; at < count; at += LANES) {
        (Vec::loadu(row + at) * Vec::loadu(factor + at)).store(row + at);
      }
    }
    product(width, count - from, seen.count(), values + seen.slot, slots + TILE, weights + right, count, out + from,
            count, !first);
  }

  // Sets the scores of what is not seen to minus infinity.
  void hide(const QueryBlock& block, const KeyBlock& seen) {
    for (int64_t key = 0; key < seen.count(); ++key) {
      const Seen by = seen.seen(block, key);
      if (by.all(seen.from, block.count)) {
        continue;
      }
      float* score = scores + key * block.stride();
      for (int64_t at = seen.from; at < block.count; at += LANES) {
        by.only(Vec::loadu(score + at), at, -std::numeric_limits<float>::infinity()).store(score + at);
      }
    }
  }

  // Turns scores into weights, and brings `largest`, `sum` and `factor` up to them. Returns whether a factor is not 1.
  [[gnu::flatten]] bool weigh(const QueryBlock& block, const KeyBlock& seen) {
    const Vec scaling(heads.scaling);
    bool changes = false;
    for (int64_t at = seen.from; at < block.count; at += LANES) {
      Vec top[2] = {Vec(NO_SCORE), Vec(NO_SCORE)};
      for (int64_t key = 0; key < seen.count(); ++key) {
        top[key % 2] = larger(top[key % 2], Vec::loadu(scores + key * block.stride() + at));
      }
      const Vec before = Vec::loadu(largest + at), after = larger(before, larger(top[0], top[1]) * scaling);
      const Vec change = exponential<T>(before - after);
      Vec total[2] = {Vec::loadu(sum + at) * change, Vec(0.0f)};
      for (int64_t key = 0; key < seen.count(); key += 2) {
        const float* score = scores + key * block.stride() + at;
        const Vec above = exponential<T>(at::vec::fmsub(Vec::loadu(score), scaling, after));
        const Vec below = exponential<T>(at::vec::fmsub(Vec::loadu(score + block.stride()), scaling, after));
        total[0] = total[0] + above;
        total[1] = total[1] + below;
        store_pair(above, below, weights + key * block.count + at * PAIR<T>, block.count);
      }
      after.store(largest + at);
      (total[0] + total[1]).store(sum + at);
      change.store(factor + at);
      changes = changes || (change != Vec(1.0f)).zero_mask() != (1 << LANES) - 1;
    }
    return changes;
  }

  // Divides by the sums, and writes the block's rows.
  void finish(const QueryBlock& block, const Tensors& tensors) {
    for (int64_t at = 0; at < block.count; at += LANES) {
      const Vec top = Vec::loadu(largest + at);
      (Vec(1.0f) / Vec::loadu(sum + at) + (top - top)).store(factor + at);  // NaN stays NaN, which the fast exp loses
    }
    for (int64_t feature = 0; feature < width; ++feature) {
      float* row = out + feature * block.count;
      for (int64_t at = 0; at < block.count; at += LANES) {
        (Vec::loadu(row + at) * Vec::loadu(factor + at)).store(row + at);
      }
    }
    store_queries(out, 1.0f, block, turned, tensors.out);
    for (int64_t i = 0; i < block.rows && tensors.log_sums; ++i) {
      (*tensors.log_sums)[block.token(i)][block.head(i)] = largest[i] + std::log(sum[i]);
    }
  }
};

// out: what every query takes from the values it sees, shape (tokens, heads * size). log_sums: log of the sum of
// exp(scaled score), shape (tokens, heads), which the backward needs; where given.
void attend(
    const Tensor& qkv, const Tensor& segments, int64_t heads, int64_t kv_heads, int64_t size, double scaling,
    int64_t window, const Tensor& out, const std::optional<Tensor>& log_sums) {
  const Heads shape = read_heads(qkv, heads, kv_heads, size, scaling, window);
  check_rows(out, qkv.size(0), heads * size);
  check_type(out, qkv.scalar_type());
  std::optional<Rows<float>> sums;
  if (log_sums) {
    check_rows(*log_sums, qkv.size(0), heads);
    check_type(*log_sums, torch::headeronly::ScalarType::Float);
    sums.emplace(*log_sums);
  }
  const std::vector<Part> parts = share_out(read_trees(segments, qkv.size(0)), shape);
  by_type(qkv, [&](auto kind) {
    using T = decltype(kind);
    each_task<Attend<T>>(parts, shape, {Rows<T>(qkv), Rows<T>(out), sums ? &*sums : nullptr});
  });
}

}  // namespace phinetune
