// The backward of attention within trees of segments.
#pragma once

#include "attention.h"

namespace phinetune {

// The gradient of a tree's queries that share a key head, and of its keys and values.
template <typename T>
struct AttendBackward {
  struct Tensors {
    Rows<T> grad, qkv, out;
    Rows<float> log_sums;
    Rows<T> d_qkv;
  };

  // Rows of a block, and the same as both kinds of right factor.
  struct Block {
    T *rows, *across, *pairs;

    Block(Memory& memory, int64_t count)
        : rows(memory.take<T>(count)), across(memory.take<T>(count)), pairs(memory.take<T>(count)) {}
    void lay(int64_t count, int64_t width) {
      lay_across(rows, count, width, across);
      lay_in_pairs(rows, count, width, pairs);
    }
  };

  const Heads& heads;
  const Tree& tree;
  int64_t slots, width, most;
  Block queries, grads;  // grads: of the block's output
  T *keys, *values, *turned_keys;
  T *weights, *slopes, *slopes_right;  // of a block's queries and keys; slopes: the gradient of the scores
  float *scores, *d_weights, *d_queries, *turned;  // d_queries: shape (width, count)
  float *d_keys, *d_values;
  float *log_sums, *dots;  // of each query; dots: of its output with the gradient of its output

  AttendBackward(Memory& memory, const Heads& heads, const Tree& tree)
      : heads(heads), tree(tree), slots(tree.rows()), width(heads.width()), most(most_rows(heads)),
        queries(memory, most * width), grads(memory, most * width) {
    keys = memory.take<T>(slots * width);
    values = memory.take<T>(slots * width);
    turned_keys = memory.take<T>((slots + TILE) * width);
    for (T** each : {&weights, &slopes, &slopes_right}) {
      *each = memory.take<T>(KEYS * most);
    }
    for (float** each : {&scores, &d_weights}) {
      *each = memory.take<float>(KEYS * (most + TILE));
    }
    d_queries = memory.take<float>(most * width);
    turned = memory.take<float>(most * width);
    d_keys = memory.take<float>(slots * width);
    d_values = memory.take<float>(slots * width);
    log_sums = memory.take<float>(most);
    dots = memory.take<float>(most);
  }

  void run(const Tensors& tensors, int64_t kv_head) {
    copy_keys(tensors.qkv, tree, heads, kv_head, 0, keys);
    copy_keys(tensors.qkv, tree, heads, kv_head, 1, values);
    transpose(keys, width, slots, width, turned_keys, slots + TILE);
    std::fill_n(d_keys, slots * width, 0.0f);
    std::fill_n(d_values, slots * width, 0.0f);
    each_query_block(tree, heads, kv_head, [&](const QueryBlock& block) {
      begin(block, tensors);
      bool first = true;
      each_key_block(tree, block, [&](const KeyBlock& seen) {
        add(block, seen, first);
        first = false;
      });
      store_queries(d_queries, heads.scaling, block, turned, tensors.d_qkv);
    });
    store_keys(d_keys, heads.scaling, kv_head, 0, tensors.d_qkv);
    store_keys(d_values, 1.0f, kv_head, 1, tensors.d_qkv);
  }

  // Brings what belongs to a block of queries.
  void begin(const QueryBlock& block, const Tensors& tensors) {
    copy_queries(tensors.qkv, block, queries.rows);
    queries.lay(block.count, width);
    copy_queries(tensors.grad, block, grads.rows);
    grads.lay(block.count, width);
    for (int64_t i = 0; i < block.rows; ++i) {
      const T *grad = grads.rows + i * width, *out = tensors.out[block.token(i)] + block.head(i) * heads.size;
      dots[i] = sum_along(heads.size, [&](int64_t at, auto n) { return load(grad + at, n) * load(out + at, n); });
      log_sums[i] = tensors.log_sums[block.token(i)][block.head(i)];
    }
    std::fill(dots + block.rows, dots + block.count, 0.0f);
    std::fill(log_sums + block.rows, log_sums + block.count, 0.0f);
  }

  // Adds the gradients that come from a block of queries and a block of keys.
  void add(const QueryBlock& block, const KeyBlock& seen, bool first) {
    const int64_t count = block.count, from = seen.from, right = from * PAIR<T>, slot = seen.slot * width;
    product(seen.count(), count - from, width, keys + slot, width, queries.across + right, count, scores + from,
            block.stride(), false);
    product(seen.count(), count - from, width, values + slot, width, grads.across + right, count, d_weights + from,
            block.stride(), false);
    seen.whole ? slope<true>(block, seen) : slope<false>(block, seen);
    product(seen.count(), width, count - from, weights + from, count, grads.pairs + from * width, width,
            d_values + slot, width, true);
    product(seen.count(), width, count - from, slopes + from, count, queries.pairs + from * width, width,
            d_keys + slot, width, true);
    product(width, count - from, seen.count(), turned_keys + seen.slot, slots + TILE, slopes_right + right, count,
            d_queries + from, count, !first);
  }

  // weights = exp(scaled score - log_sum), slopes = weights * (d_weights - dot), but for the scaling.
  template <bool whole>
  void slope(const QueryBlock& block, const KeyBlock& seen) {
    const int64_t count = block.count, stride = block.stride();
    const Vec scaling(heads.scaling);
    for (int64_t key = 0; key < seen.count(); key += 2) {
      const Seen by[2] = {seen.seen(block, key), seen.seen(block, key + 1)};
      for (int64_t at = seen.from; at < count; at += LANES) {
        const Vec log_sum = Vec::loadu(log_sums + at), dot = Vec::loadu(dots + at);
        Vec slopes_of[2];
        for (int64_t i = 0; i < 2; ++i) {
          const int64_t score = (key + i) * stride + at, to = (key + i) * count + at;
          Vec weight = exponential<T>(at::vec::fmsub(Vec::loadu(scores + score), scaling, log_sum));
          Vec slope = weight * (Vec::loadu(d_weights + score) - dot);
          if constexpr (!whole) {
            weight = by[i].only(weight, at, 0.0f);
            slope = by[i].only(slope, at, 0.0f);
          }
          store(weight, weights + to);
          store(slope, slopes + to);
          slopes_of[i] = slope;
        }
        store_pair(slopes_of[0], slopes_of[1], slopes_right + key * count + at * PAIR<T>, count);
      }
    }
  }

  // Writes the gradient of the tree's keys (which: 0) or values (which: 1).
  void store_keys(const float* from, float factor, int64_t kv_head, int64_t which, const Rows<T>& to) {
    const int64_t column = (heads.heads + which * heads.kv_heads + kv_head) * heads.size;
    for (const Segment& of : tree.segments) {
      for (int64_t i = 0; i < of.length(); ++i) {
        const float* row = from + (of.slot + i) * width;
        along(heads.size, [&](int64_t at, auto n) {
          store(load(row + at, n) * Vec(factor), to[of.start + i] + column + at, n);
        });
      }
    }
  }
};

// d_qkv: the gradient of qkv, given that of `out`, and what the forward wrote.
void attend_backward(
    const Tensor& grad, const Tensor& qkv, const Tensor& segments, int64_t heads, int64_t kv_heads, int64_t size,
    double scaling, int64_t window, const Tensor& out, const Tensor& log_sums, const Tensor& d_qkv) {
  const Heads shape = read_heads(qkv, heads, kv_heads, size, scaling, window);
  check_rows(d_qkv, qkv.size(0), qkv.size(1));
  check_type(d_qkv, qkv.scalar_type());
  for (const Tensor* each : {&grad, &out}) {
    check_rows(*each, qkv.size(0), heads * size);
    check_type(*each, qkv.scalar_type());
  }
  check_rows(log_sums, qkv.size(0), heads);
  check_type(log_sums, torch::headeronly::ScalarType::Float);
  const std::vector<Tree> trees = read_trees(segments, qkv.size(0));
  by_type(qkv, [&](auto kind) {
    using T = decltype(kind);
    each_task<AttendBackward<T>>(
        trees, shape, {Rows<T>(grad), Rows<T>(qkv), Rows<T>(out), Rows<float>(log_sums), Rows<T>(d_qkv)});
  });
}

}  // namespace phinetune
