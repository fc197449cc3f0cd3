// The backward of attention within trees of segments.
#pragma once

#include "attention.h"

#include <map>

namespace phinetune {

// Gradients of a tree's keys and values for one key head, that of the values behind that of the keys, from each of its
// parts. Who finishes the last part adds them up, always in the same order.
struct Joint {
  std::vector<std::unique_ptr<float[]>> found;
  std::vector<const Part*> parts;
  std::atomic<int64_t> missing = 0;
};

// The gradient of the queries of a part of a tree that share a key head, and of the keys and values they see.
template <typename T>
struct AttendBackward {
  struct Tensors {
    Rows<T> grad, qkv, out;
    Rows<float> log_sums;
    Rows<T> d_qkv;
    std::vector<Joint>& joints;  // for each tree and key head
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
  const Part& part;
  const Tree& tree;
  int64_t slots, width, most;
  Block queries, grads;  // grads: of the block's output
  T *keys, *values, *turned_keys;
  T *weights, *slopes, *slopes_right;  // of a block's queries and keys; slopes: the gradient of the scores
  float *scores, *d_weights, *d_queries, *turned;  // d_queries: shape (width, count)
  float *d_keys, *d_values;
  float *log_sums, *dots;  // of each query; dots: of its output with the gradient of its output

  AttendBackward(Memory& memory, const Heads& heads, const Part& part)
      : heads(heads), part(part), tree(part.tree), slots(tree.rows()), width(heads.width()), most(most_rows(heads)),
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
    d_keys = part.parts == 1 ? memory.take<float>(2 * slots * width) : nullptr;
    log_sums = memory.take<float>(most);
    dots = memory.take<float>(most);
  }

  void run(const Tensors& tensors, int64_t kv_head) {
    Joint& joint = tensors.joints[part.of * heads.kv_heads + kv_head];
    if (part.parts > 1) {
      joint.found[part.number].reset(d_keys = new float[2 * slots * width]);
    }
    d_values = d_keys + slots * width;
    copy_keys(tensors.qkv, tree, heads, kv_head, 0, keys);
    copy_keys(tensors.qkv, tree, heads, kv_head, 1, values);
    transpose(keys, width, slots, width, turned_keys, slots + TILE);
    std::fill_n(d_keys, 2 * slots * width, 0.0f);
    each_query_block(tree, heads, kv_head, [&](const QueryBlock& block) {
      begin(block, tensors);
      bool first = true;
      each_key_block(tree, block, [&](const KeyBlock& seen) {
        add(block, seen, first);
        first = false;
      });
      store_queries(d_queries, heads.scaling, block, turned, tensors.d_qkv);
    });
    if (part.parts == 1) {
      store_keys({&part}, {d_keys}, kv_head, tensors.d_qkv);
    } else if (--joint.missing == 0) {
      std::vector<const float*> found;
      for (const auto& each : joint.found) {
        found.push_back(each.get());
      }
      store_keys(joint.parts, found, kv_head, tensors.d_qkv);
      joint.found.clear();
    }
  }

  // Brings what belongs to a block of queries.
  void begin(const QueryBlock& block, const Tensors& tensors) {
    copy_queries(tensors.qkv, block, queries.rows);
    queries.lay(block.count, width);
    copy_queries(tensors.grad, block, grads.rows);
    grads.lay(block.count, width);
    const auto out_row = [&](int64_t i) { return tensors.out[block.token(i)] + block.head(i) * heads.size; };
    for (int64_t i = 0; i < block.rows; ++i) {
      fetch(out_row(std::min(i + AHEAD, block.rows - 1)), heads.size);
      const T *grad = grads.rows + i * width, *out = out_row(i);
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
    slope(block, seen);
    product(seen.count(), width, count - from, weights + from, count, grads.pairs + from * width, width,
            d_values + slot, width, true);
    product(seen.count(), width, count - from, slopes + from, count, queries.pairs + from * width, width,
            d_keys + slot, width, true);
    product(width, count - from, seen.count(), turned_keys + seen.slot, slots + TILE, slopes_right + right, count,
            d_queries + from, count, !first);
  }

  void slope(const QueryBlock& block, const KeyBlock& seen) {
    for (int64_t key = 0; key < seen.count(); key += 2) {
      const Seen by[2] = {seen.seen(block, key), seen.seen(block, key + 1)};
      const bool all = by[0].all(seen.from, block.count) && by[1].all(seen.from, block.count);
      all ? slope_of<true>(block, seen, key, by) : slope_of<false>(block, seen, key, by);
    }
  }

  // Of two keys: weights = exp(scaled score - log_sum), slopes = weights * (d_weights - dot), but for the scaling.
  template <bool all>
  [[gnu::flatten]] void slope_of(const QueryBlock& block, const KeyBlock& seen, int64_t key, const Seen (&by)[2]) {
    const int64_t count = block.count, stride = block.stride();
    const Vec scaling(heads.scaling);
    for (int64_t at = seen.from; at < count; at += LANES) {
      const Vec log_sum = Vec::loadu(log_sums + at), dot = Vec::loadu(dots + at);
      Vec slope[2];
      for (int64_t i = 0; i < 2; ++i) {
        const int64_t score = (key + i) * stride + at, to = (key + i) * count + at;
        Vec weight = exponential<T>(at::vec::fmsub(Vec::loadu(scores + score), scaling, log_sum));
        slope[i] = weight * (Vec::loadu(d_weights + score) - dot);
        if constexpr (!all) {
          weight = by[i].only(weight, at, 0.0f);
          slope[i] = by[i].only(slope[i], at, 0.0f);
        }
        store(weight, weights + to);
        store(slope[i], slopes + to);
      }
      store_pair(slope[0], slope[1], slopes_right + key * count + at * PAIR<T>, count);
    }
  }

  // Gradients of a segment's keys and values that one part found.
  struct Found {
    const float *d_keys, *d_values;
    int64_t length;
  };

  // Writes the gradient of a tree's keys and values: the sum of what its parts found.
  void store_keys(
      const std::vector<const Part*>& parts, const std::vector<const float*>& found, int64_t kv_head,
      const Rows<T>& to) {
    std::map<int64_t, std::vector<Found>> by_start;
    for (size_t i = 0; i < parts.size(); ++i) {
      const float *d_keys = found[i], *d_values = d_keys + parts[i]->tree.rows() * width;
      for (const Segment& of : parts[i]->tree.segments) {
        by_start[of.start].push_back({d_keys + of.slot * width, d_values + of.slot * width, of.length()});
      }
    }
    for (const auto& [start, of] : by_start) {
      store_sums(start, of, &Found::d_keys, heads.scaling, heads.heads + kv_head, to);
      store_sums(start, of, &Found::d_values, 1.0f, heads.heads + heads.kv_heads + kv_head, to);
    }
  }

  // Writes the rows of a segment that starts at the token `start`, in one head of qkv's gradient.
  void store_sums(
      int64_t start, const std::vector<Found>& of, const float* Found::* rows, float factor, int64_t head,
      const Rows<T>& to) {
    int64_t length = 0;
    for (const Found& each : of) {
      length = std::max(length, each.length);
    }
    for (int64_t i = 0; i < length; ++i) {
      along(heads.size, [&](int64_t at, auto n) {
        Vec sum(0.0f);
        for (const Found& each : of) {
          sum = i < each.length ? sum + load(each.*rows + i * width + at, n) : sum;
        }
        store(sum * Vec(factor), to[start + i] + head * heads.size + at, n);
      });
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
  const std::vector<Part> parts = share_out(trees, shape);
  std::vector<Joint> joints(trees.size() * kv_heads);
  for (const Part& part : parts) {
    for (int64_t head = 0; head < kv_heads; ++head) {
      Joint& joint = joints[part.of * kv_heads + head];
      joint.found.resize(part.parts);
      joint.parts.resize(part.parts);
      joint.parts[part.number] = &part;
      joint.missing = part.parts;
    }
  }
  by_type(qkv, [&](auto kind) {
    using T = decltype(kind);
    each_task<AttendBackward<T>>(
        parts, shape, {Rows<T>(grad), Rows<T>(qkv), Rows<T>(out), Rows<float>(log_sums), Rows<T>(d_qkv), joints});
  });
}

}  // namespace phinetune
