// Causal attention within trees of segments, blocks of queries against blocks of keys, with the softmax computed as the
// blocks pass (Dao et al. 2022, FlashAttention, algorithms 1 and 4). A task is one key head of one tree, with all query
// heads that share it, and runs in one thread. Where trees and key heads are few, the queries of a tree are parted.
//
// Scores are held transposed, a key's row over the block's queries. So a query's largest score, its sum and its part of
// the gradient lie in the lanes of vectors, and a mask is a range of lanes.
#pragma once

#include "products.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace phinetune {

constexpr int64_t QUERIES = 128;  // rows of a block of queries, at most; one token's shared heads may be more
constexpr int64_t KEYS = 128;  // keys of a block that every query of the block may see
constexpr int64_t DIAGONAL = 32;  // keys of a block that only some of the queries see: fewer, so that less is wasted
constexpr float NO_SCORE = -1e30f;  // stands for the largest of no scores: minus infinity minus itself would be NaN

// How qkv is divided into heads; see phinetune.engine.attention_plan.Heads.
struct Heads {
  int64_t heads, kv_heads, size, window;  // window: a query sees so many keys; 0: all before it
  float scaling;

  int64_t shared() const { return heads / kv_heads; }
  int64_t total() const { return heads + 2 * kv_heads; }
  int64_t width() const { return padded(size, 2 * TILE); }  // features with padding: whole tiles of pairs
};

// A segment's tokens, and where its keys stand in a task's memory. It sees its ancestors' tokens before its own.
struct Segment {
  int64_t start, stop, slot, parent, before;  // parent: an index in the tree, or -1; before: tokens of all ancestors

  int64_t length() const { return stop - start; }
};

// Segments of a tree in their order, and whose queries are computed: those of the tokens [start, stop).
struct Tree {
  std::vector<Segment> segments;
  int64_t start = 0, stop = 0;

  int64_t rows() const { return segments.empty() ? 0 : segments.back().slot + padded(segments.back().length()); }
  void add(Segment segment) {
    segment.slot = rows();
    segments.push_back(segment);
  }
};

// The trees in a table of start, stop and parent, shape (segments, 3). A parent stands before its children.
inline std::vector<Tree> read_trees(const Tensor& table, int64_t tokens) {
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == 3 && table.is_contiguous(), "phinetune: not a table of segments");
  check_type(table, torch::headeronly::ScalarType::Long);
  const int64_t* row = static_cast<const int64_t*>(table.data_ptr());
  std::vector<Tree> trees;
  int64_t first = 0, end = 0;
  for (int64_t i = 0; i < table.size(0); ++i, row += 3) {
    if (row[2] < 0) {
      trees.emplace_back();
      first = i;
    }
    STD_TORCH_CHECK(row[0] == end && row[1] > row[0] && row[1] <= tokens && row[2] < i, "phinetune: not a segment");
    STD_TORCH_CHECK(row[2] < 0 || row[2] >= first, "phinetune: a segment whose parent is in another tree");
    end = row[1];
    const std::vector<Segment>& known = trees.back().segments;
    const int64_t parent = row[2] < 0 ? -1 : row[2] - first;
    const int64_t before = parent < 0 ? 0 : known[parent].before + known[parent].length();
    trees.back().add({row[0], row[1], 0, parent, before});
    trees.back().start = known.front().start;
    trees.back().stop = end;
  }
  STD_TORCH_CHECK(end == tokens, "phinetune: segments that do not cover the tokens");
  return trees;
}

// Memory of a task, handed out in parts. Without a start it only counts what would be taken.
class Memory {
 public:
  Memory() = default;
  explicit Memory(int64_t bytes)
      : bytes_(bytes), start_(static_cast<char*>(std::aligned_alloc(LINE, padded(bytes, LINE)))) {
    STD_TORCH_CHECK(start_, "phinetune: no memory for attention");
  }
  template <typename T>
  T* take(int64_t count) {
    char* part = start_ ? start_.get() + used_ : nullptr;
    used_ += padded(count * static_cast<int64_t>(sizeof(T)), LINE);
    STD_TORCH_CHECK(!start_ || used_ <= bytes_, "phinetune: a task of attention takes more than was counted");
    return reinterpret_cast<T*>(part);
  }
  void clear() { used_ = 0; }
  int64_t used() const { return used_; }

 private:
  static constexpr int64_t LINE = 64;  // bytes of a line of the processor's caches
  struct Free {
    void operator()(char* start) const { std::free(start); }
  };
  int64_t bytes_ = 0, used_ = 0;
  std::unique_ptr<char, Free> start_;
};

// Which queries of a block see a key: those in the rows [low, high). The rows behind the last query count as seeing: their
// queries are zeros, and what they take is not read.
struct Seen {
  int64_t low, high;

  bool all(int64_t from, int64_t count) const { return low <= from && high >= count; }

  // `value` in the lanes from row `at` on, where they see; `otherwise` elsewhere.
  Vec only(const Vec& value, int64_t at, float otherwise) const {
    if (at >= low && at + LANES <= high) {
      return value;
    }
    const Vec place = Vec::arange(static_cast<float>(at), 1.0f);
    const Vec inside = (place >= Vec(static_cast<float>(low))) & (place < Vec(static_cast<float>(high)));
    return Vec::blendv(Vec(otherwise), value, inside);
  }
};

// Neighbouring tokens' queries of one key head, of one segment: `rows` of them, padded to `count`.
struct QueryBlock {
  const Heads& heads;
  const Segment& segment;
  int64_t kv_head, start, rows, count;

  int64_t stride() const { return count + TILE; }  // of scores: no power of two, so that they share the cache's sets
  int64_t token(int64_t row) const { return start + row / heads.shared(); }
  int64_t head(int64_t row) const { return kv_head * heads.shared() + row % heads.shared(); }
  // `place`: a key's among all that the segment may see.
  Seen sees(int64_t place) const {
    const int64_t after = place - (segment.before + start - segment.start);  // of the block's first token
    const int64_t low = std::max<int64_t>(0, after) * heads.shared();
    const int64_t high = heads.window ? std::max<int64_t>(0, after + heads.window) * heads.shared() : rows;
    return {std::min(low, rows), high < rows ? high : count};
  }
};

// Keys that a block of queries sees.
struct KeyBlock {
  int64_t slot, place, keys;  // where they stand in the task's memory, and among all that the segment may see
  int64_t from;  // the first of the block's rows that is computed

  int64_t count() const { return padded(keys); }
  Seen seen(const QueryBlock& block, int64_t key) const {
    return key < keys ? block.sees(place + key) : Seen{0, 0};  // no query sees padding
  }
};

// Calls f(KeyBlock) for all keys that a block of queries sees: its ancestors', then its own up to its last token.
template <typename F>
inline void each_key_block(const Tree& tree, const QueryBlock& block, const F& f) {
  const Segment& own = block.segment;
  const auto along_keys = [&](const Segment& of, int64_t from, int64_t to, int64_t step) {  // tokens of the segment
    for (int64_t at = from; at < to; at += step) {
      const int64_t keys = std::min(step, to - at), place = of.before + at;
      const Seen first = block.sees(place), last = block.sees(place + keys - 1);
      if (last.high > 0) {  // else the window has passed all of them
        f(KeyBlock{of.slot + at, place, keys, first.low / TILE * TILE});
      }
    }
  };
  std::vector<const Segment*> path;
  for (int64_t i = own.parent; i >= 0; i = tree.segments[i].parent) {
    path.push_back(&tree.segments[i]);
  }
  for (auto each = path.rbegin(); each != path.rend(); ++each) {
    along_keys(**each, 0, (*each)->length(), KEYS);
  }
  const int64_t first = block.start - own.start, last = block.token(block.rows - 1) - own.start;
  along_keys(own, 0, first / TILE * TILE, KEYS);
  along_keys(own, first / TILE * TILE, last + 1, DIAGONAL);
}

// Tokens whose queries make a block: whole tiles of rows, where some tokens fill QUERIES rows.
inline int64_t block_tokens(const Heads& heads) {
  const int64_t tokens = QUERIES / heads.shared();
  return tokens >= TILE ? tokens / TILE * TILE : std::max<int64_t>(1, tokens);
}

// Calls f(segment, first token, one past the last) for all blocks of neighbouring tokens of a tree.
template <typename F>
inline void each_token_block(const Tree& tree, const Heads& heads, const F& f) {
  const int64_t tokens = block_tokens(heads);
  for (const Segment& segment : tree.segments) {
    for (int64_t start = std::max(segment.start, tree.start); start < segment.stop; start += tokens) {
      f(segment, start, std::min(start + tokens, segment.stop));
    }
  }
}

// Calls f(QueryBlock) for all queries of a tree that share a key head.
template <typename F>
inline void each_query_block(const Tree& tree, const Heads& heads, int64_t kv_head, const F& f) {
  each_token_block(tree, heads, [&](const Segment& segment, int64_t start, int64_t stop) {
    const int64_t rows = (stop - start) * heads.shared();
    f(QueryBlock{heads, segment, kv_head, start, rows, padded(rows)});
  });
}

// What the queries of the tokens [start, stop) see of a tree.
inline Tree part_of(const Tree& tree, int64_t start, int64_t stop) {
  std::vector<int64_t> place(tree.segments.size(), -1);
  for (int64_t i = static_cast<int64_t>(tree.segments.size()) - 1; i >= 0; --i) {
    const Segment& segment = tree.segments[i];
    if (segment.start < stop && segment.stop > start) {
      place[i] = 0;
    }
    if (place[i] == 0 && segment.parent >= 0) {
      place[segment.parent] = 0;
    }
  }
  Tree part{{}, start, stop};
  for (size_t i = 0; i < place.size(); ++i) {
    if (place[i] == 0) {
      place[i] = static_cast<int64_t>(part.segments.size());
      Segment segment = tree.segments[i];
      segment.stop = std::min(segment.stop, stop);
      segment.parent = segment.parent < 0 ? -1 : place[segment.parent];
      part.add(segment);
    }
  }
  return part;
}

// A tree in `count` parts of about the same work, or fewer.
inline std::vector<Tree> parts_of(const Tree& tree, const Heads& heads, int64_t count) {
  const auto work = [&](const Segment& segment, int64_t start, int64_t stop) {
    const int64_t seen = segment.before + stop - segment.start;
    return (stop - start) * (heads.window ? std::min(heads.window + stop - start, seen) : seen);
  };
  int64_t all = 0, done = 0, first = tree.start;
  each_token_block(tree, heads, [&](const Segment& segment, int64_t start, int64_t stop) {
    all += work(segment, start, stop);
  });
  std::vector<Tree> parts;
  each_token_block(tree, heads, [&](const Segment& segment, int64_t start, int64_t stop) {
    done += work(segment, start, stop);
    if (done * count >= all * (static_cast<int64_t>(parts.size()) + 1)) {
      parts.push_back(part_of(tree, first, stop));
      first = stop;
    }
  });
  return parts;
}

constexpr int64_t AHEAD = 12;  // rows that are fetched before they are read: they lie far apart, one in each token

// Tells the processor that a row will be read.
template <typename T>
inline void fetch(const T* row, int64_t size) {
  for (int64_t at = 0; at < size; at += 64 / static_cast<int64_t>(sizeof(T))) {
    __builtin_prefetch(row + at);
  }
}

// Copies rows(i), each `size` long, for i < used, into `to`; rows up to `count` and features up to `width` are zeros.
template <typename T, typename F>
inline void copy_rows(const F& rows, int64_t used, int64_t count, int64_t size, int64_t width, T* to) {
  for (int64_t i = 0; i < used; ++i, to += width) {
    fetch(rows(std::min(i + AHEAD, used - 1)), size);
    std::memcpy(to, rows(i), size * sizeof(T));
    std::memset(to + size, 0, (width - size) * sizeof(T));
  }
  std::memset(to, 0, (count - used) * width * sizeof(T));
}

// Brings the keys (which: 0) or the values (which: 1) of a tree to their slots in `to`.
template <typename T>
inline void copy_keys(const Rows<T>& qkv, const Tree& tree, const Heads& heads, int64_t kv_head, int64_t which, T* to) {
  const int64_t column = (heads.heads + which * heads.kv_heads + kv_head) * heads.size;
  for (const Segment& of : tree.segments) {
    const auto row = [&](int64_t i) { return qkv[of.start + i] + column; };
    copy_rows<T>(row, of.length(), padded(of.length()), heads.size, heads.width(), to + of.slot * heads.width());
  }
}

// Brings a block's queries, or what lies as they do, out of `from`.
template <typename T>
inline void copy_queries(const Rows<T>& from, const QueryBlock& block, T* to) {
  const auto row = [&](int64_t i) { return from[block.token(i)] + block.head(i) * block.heads.size; };
  copy_rows<T>(row, block.rows, block.count, block.heads.size, block.heads.width(), to);
}

// Writes the transposed `from`, shape (width, count), as a block's rows. `spare` holds as many numbers as `from`.
template <typename T>
inline void store_queries(const float* from, float factor, const QueryBlock& block, float* spare, const Rows<T>& to) {
  const int64_t width = block.heads.width();
  transpose(from, block.count, width, block.count, spare, width);
  for (int64_t i = 0; i < block.rows; ++i, spare += width) {
    T* row = to[block.token(i)] + block.head(i) * block.heads.size;
    along(block.heads.size, [&](int64_t at, auto n) { store(load(spare + at, n) * Vec(factor), row + at, n); });
  }
}

inline int64_t most_rows(const Heads& heads) {
  return padded(std::max(QUERIES, heads.shared()));
}

// A part of a tree: its number among the tree's `parts`, and the tree's number.
struct Part {
  Tree tree;
  int64_t number, parts, of;
};

// All trees in parts, those with the most rows first. There are so many that threads seldom wait for each other.
inline std::vector<Part> share_out(const std::vector<Tree>& trees, const Heads& heads) {
  const int64_t wanted = 2 * torch::stable::get_num_threads();
  const int64_t tasks = std::max<int64_t>(1, trees.size() * heads.kv_heads);
  const int64_t count = tasks >= wanted ? 1 : (wanted + tasks - 1) / tasks;
  std::vector<Part> all;
  for (size_t of = 0; of < trees.size(); ++of) {
    std::vector<Tree> parts = parts_of(trees[of], heads, count);
    for (size_t i = 0; i < parts.size(); ++i) {
      all.push_back({std::move(parts[i]), static_cast<int64_t>(i), static_cast<int64_t>(parts.size()),
                     static_cast<int64_t>(of)});
    }
  }
  std::stable_sort(all.begin(), all.end(), [](const Part& a, const Part& b) { return a.tree.rows() > b.tree.rows(); });
  return all;
}

// Runs Task(memory, heads, part).run(tensors, key head) for all parts and key heads. Each of torch's threads takes the
// next task when it is done with one.
template <typename Task>
inline void each_task(const std::vector<Part>& parts, const Heads& heads, const typename Task::Tensors& tensors) {
  int64_t bytes = 0;  // of the task that takes most: a tree that is whole takes more than a part of a larger one
  for (const Part& part : parts) {
    Memory counted;
    Task(counted, heads, part);
    bytes = std::max(bytes, counted.used());
  }
  const int64_t count = static_cast<int64_t>(parts.size()) * heads.kv_heads;
  std::atomic<int64_t> next = 0;
  torch::stable::parallel_for(0, std::min<int64_t>(count, torch::stable::get_num_threads()), 1, [&](int64_t, int64_t) {
    Memory memory(bytes);
    for (int64_t task = next++; task < count; task = next++) {
      memory.clear();
      Task(memory, heads, parts[task / heads.kv_heads]).run(tensors, task % heads.kv_heads);
    }
    at::native::cpublas::brgemm_release();
  });
}

inline Heads read_heads(const Tensor& qkv, int64_t heads, int64_t kv_heads, int64_t size, double scaling, int64_t window) {
  const Heads found{heads, kv_heads, size, window, static_cast<float>(scaling)};
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0 && size > 0 && scaling > 0, "phinetune: heads that do not fit");
  check_rows(qkv, qkv.size(0), found.total() * size);
  return found;
}

}  // namespace phinetune
