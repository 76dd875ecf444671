// One tile of attention (see attention.cpp) and its way through a partition of keys: find the pages, score, turn scores
// into weights, sum the values. The two products have a form in matrix tiles and one in vectors.
#pragma once

#include "amx.h"
#include "cache.h"
#include "functions.h"
#include "parallel.h"

namespace headrace::HEADRACE_LEVEL {
namespace {

constexpr int64_t kPartition = 512;
constexpr int64_t kRuns = kPartition / kLanes;
constexpr int64_t kTileRows = 32;
// A little more than a partition, so that rows do not fall on the same cache sets.
constexpr int64_t kScoreStride = kPartition + 16;
constexpr int64_t kWeightStride = kPartition + 32;

const float kMinusInfinity = -__builtin_inff();

// Rows [row, row + rows) of one sequence and kv head (row = token * group + head in group), over the partitions
// [first, end). Where a tile's partitions are shared out, `partials` is where all of them leave their results
// and `unfinished` counts the tasks still at work; the last one merges.
struct Task {
  int64_t sequence, kv_head, row, rows;
  int64_t first, end, tile_first, tile_end;
  float* partials;
  int32_t* unfinished;
};

// Scores are scaled by log2 e once more than the model asks, so that weights are powers of two.
constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// Per row: maximum score [kTileRows], sum of exponentials [kTileRows], weighted sum of values [rows, depth].
struct Sums {
  float *maximum, *total, *values;
};

Sums sums_at(float* memory) { return {memory, memory + kTileRows, memory + 2 * kTileRows}; }
int64_t sums_size(int64_t rows, int64_t depth) { return 2 * kTileRows + rows * depth; }

template <class T>
struct Tile {
  const AttentionArgs& args;
  const HeadLayout<T> layout;
  const Task& task;
  const int64_t group;                     // query heads per kv head
  int64_t place[kTileRows];                  // of each row, in [tokens * heads]
  int64_t begin[kTileRows], end[kTileRows];  // keys that each row sees
  int64_t key_begin, key_end;              // keys that any row sees
  T* q;                                    // [kTileRows, depth]
  float* scores;                           // [kTileRows, kScoreStride]
  T* weights;                              // [kTileRows, kWeightStride]
  T *spare_keys, *spare_values;            // a partition's, for runs that cannot be read in place
  const T *keys[kRuns], *values[kRuns];
  int64_t key_stride;

  Tile(const AttentionArgs& args, const Task& task)
      : args(args), layout(args.cache), task(task), group(args.heads / args.cache.kv_heads) {
    const int64_t depth = layout.depth;
    const size_t sizes[] = {kTileRows * depth * sizeof(T), kTileRows * kScoreStride * sizeof(float),
                            kTileRows * kWeightStride * sizeof(T), kPartition * depth * sizeof(T),
                            kPartition * depth * sizeof(T)};
    size_t total = 0;
    for (size_t size : sizes) total += size;
    char* memory = static_cast<char*>(scratch(Slot::tile, total));
    const auto take = [&](int i) {
      char* part = memory;
      memory += sizes[i];
      return part;
    };
    q = reinterpret_cast<T*>(take(0));
    scores = reinterpret_cast<float*>(take(1));
    weights = reinterpret_cast<T*>(take(2));
    spare_keys = reinterpret_cast<T*>(take(3));
    spare_values = reinterpret_cast<T*>(take(4));
    key_stride = args.cache.block_size % kLanes == 0 ? layout.key_stride : kLanes * kStep<T>;

    const int64_t size = args.cache.head_dim;
    int64_t t = args.sequences.query_start[task.sequence] + task.row / group, head = task.row % group;
    for (int64_t r = 0; r < task.rows; ++r) {
      place[r] = t * args.heads + task.kv_head * group + head;
      const T* from = static_cast<const T*>(args.q) + place[r] * size;
      for (int64_t d = 0; d + kLanes <= size; d += kLanes) std::memcpy(q + r * depth + d, from + d, kLanes * sizeof(T));
      if (depth != size) {
        const int64_t whole = size - size % kLanes;
        std::memset(q + r * depth + whole, 0, kLanes * sizeof(T));
        std::memcpy(q + r * depth + whole, from + whole, static_cast<size_t>(size - whole) * sizeof(T));
      }
      end[r] = args.sequences.positions[t] + int64_t{1};
      begin[r] = args.window > 0 && end[r] > args.window ? end[r] - args.window : 0;
      key_begin = r == 0 || begin[r] < key_begin ? begin[r] : key_begin;
      key_end = r == 0 || end[r] > key_end ? end[r] : key_end;
      if (++head == group) {
        head = 0;
        ++t;
      }
    }
  }

  // Finds the keys and values of a run. Those outside of [key_begin, key_end) may be another request's, or
  // nothing: their scores are masked, but a value times 0 must be 0, so such a run's values are copied with zeros.
  void locate(int64_t run, int64_t first_key) {
    const Cache& cache = args.cache;
    const int32_t* table = cache.table + task.sequence * cache.table_stride;
    const int64_t depth = layout.depth;
    const int64_t from = first_key > key_begin ? first_key : key_begin;
    const int64_t to = first_key + kLanes < key_end ? first_key + kLanes : key_end;
    const bool whole = to - from == kLanes, in_one_page = cache.block_size % kLanes == 0;
    if (in_one_page) {
      const int64_t page = table[first_key / cache.block_size], slot = first_key % cache.block_size;
      keys[run] = layout.keys(cache, page, task.kv_head) + layout.key_at(slot, 0);
      values[run] = layout.values(cache, page, task.kv_head) + layout.value_at(slot, 0);
      if (whole) return;
    }
    T* own_values = spare_values + run * kLanes * depth;
    T* own_keys = spare_keys + run * kLanes * depth;
    std::memset(own_values, 0, static_cast<size_t>(kLanes * depth) * sizeof(T));
    for (int64_t key = from; key < to; ++key) {
      const int64_t page = table[key / cache.block_size], slot = key % cache.block_size, lane = key - first_key;
      const T* value = layout.values(cache, page, task.kv_head) + layout.value_at(slot, 0);
      T* value_copy = own_values + layout.value_at(lane, 0);
      for (int64_t d = 0; d < depth; ++d) value_copy[d * kStep<T>] = value[d * kStep<T>];
      if (in_one_page) continue;
      const T* source = layout.keys(cache, page, task.kv_head) + layout.key_at(slot, 0);
      for (int64_t d = 0; d < depth; d += kStep<T>)
        std::memcpy(own_keys + d * kLanes + lane * kStep<T>, source + d / kStep<T> * layout.key_stride,
                    kStep<T> * sizeof(T));
    }
    values[run] = own_values;
    if (!in_one_page) keys[run] = own_keys;
  }

  void score(int64_t first_run, int64_t end_run);
  void weigh(int64_t first_run, int64_t end_run, float* out);

  // Scores to weights: scaled, capped, masked, exponentials under the row's maximum.
  void soften(int64_t base, int64_t first_run, int64_t end_run, Sums out) {
    const bool capped = args.softcap > 0;
    const float scale_of_scores = capped ? kLog2E : args.scale * kLog2E;
    const Float16 scale = broadcast(scale_of_scores);
    for (int64_t r = 0; r < task.rows; ++r) {
      float* row = scores + r * kScoreStride;
      T* to = weights + r * kWeightStride;
      // The keys that this row sees, and the runs they are in.
      const int64_t from = begin[r] > base ? begin[r] - base : 0;
      const int64_t until = end[r] - base < kPartition ? end[r] - base : kPartition;
      const int64_t first = from < until ? from / kLanes : first_run;
      const int64_t last = from < until ? (until + kLanes - 1) / kLanes : first_run;
      for (int64_t run = first_run; run < first; ++run) store(to + run * kLanes, broadcast(0.0f));
      for (int64_t run = last; run < end_run; ++run) store(to + run * kLanes, broadcast(0.0f));
      if (capped) cap_scores(row, first, last);
      if (first < last) {
        hide(row + first * kLanes, from - first * kLanes, kLanes);
        hide(row + (last - 1) * kLanes, 0, until - (last - 1) * kLanes);
      }
      Float16 highest = broadcast(kMinusInfinity), other = highest;  // two chains: one would wait for itself
      int64_t run = first;
      for (; run + 2 <= last; run += 2) {
        highest = max(load(row + run * kLanes), highest);
        other = max(load(row + (run + 1) * kLanes), other);
      }
      if (run < last) highest = max(load(row + run * kLanes), highest);
      out.maximum[r] = horizontal_max(max(other, highest)) * scale_of_scores;
      // A row that sees nothing here, or only minus infinities, would subtract infinity from infinity.
      const Float16 top = broadcast(out.maximum[r] > kMinusInfinity ? -out.maximum[r] : 0.0f);
      Float16 total = broadcast(0.0f);
      const auto weight = [&](int64_t run) {
        const Float16 w = exp2_of_nonpositive(fma(load(row + run * kLanes), scale, top));
        total = total + w;
        return w;
      };
      for (run = first; run + 2 <= last; run += 2) {
        const Float16 even = weight(run), odd = weight(run + 1);
        store_pair(to + run * kLanes, even, odd);
      }
      if (run < last) store(to + run * kLanes, weight(run));
      out.total[r] = horizontal_sum(total);
    }
  }

  void cap_scores(float* row, int64_t first, int64_t last) const {
    const Float16 scale = broadcast(args.scale / args.softcap), cap = broadcast(args.softcap);
    for (int64_t run = first; run < last; ++run)
      store(row + run * kLanes, cap * tanh(load(row + run * kLanes) * scale));
  }

  // Minus infinity in the lanes of a run outside of [from, until).
  static void hide(float* run, int64_t from, int64_t until) {
    if (from == 0 && until == kLanes) return;
    const Int16 lane = lane_indices();
    const Int16 seen = (lane >= broadcast(static_cast<int32_t>(from))) & (lane < broadcast(static_cast<int32_t>(until)));
    store(run, select(seen, load(run), broadcast(kMinusInfinity)));
  }

  void partition(int64_t number, Sums out) {
    const int64_t base = number * kPartition;
    const int64_t first_run = key_begin > base ? (key_begin - base) / kLanes : 0;
    const int64_t last = key_end - base < kPartition ? key_end - base : kPartition;
    const int64_t end_run = (last + kLanes - 1) / kLanes;
    for (int64_t run = first_run; run < end_run; ++run) locate(run, base + run * kLanes);
    score(first_run, end_run);
    soften(base, first_run, end_run, out);
    weigh(first_run, end_run, out.values);
  }

  void merge(Sums part, Sums whole) const {
    alignas(64) float factors[2][kTileRows];
    for (int64_t r = 0; r < task.rows; r += kLanes) {
      const Float16 old_top = load(whole.maximum + r), new_top = load(part.maximum + r);
      const Float16 top = max(new_top, old_top);
      // Where neither has seen a key, both factors are 0 rather than undefined.
      const Float16 finite = max(top, broadcast(-3.4e38f));
      const Float16 old_factor = exp2_of_nonpositive(old_top - finite);
      const Float16 new_factor = exp2_of_nonpositive(new_top - finite);
      store(factors[0] + r, old_factor);
      store(factors[1] + r, new_factor);
      store(whole.total + r, fma(load(part.total + r), new_factor, load(whole.total + r) * old_factor));
      store(whole.maximum + r, top);
    }
    for (int64_t r = 0; r < task.rows; ++r) {
      if (part.maximum[r] == kMinusInfinity) continue;
      const Float16 old_factor = broadcast(factors[0][r]), new_factor = broadcast(factors[1][r]);
      float* to = whole.values + r * layout.depth;
      const float* from = part.values + r * layout.depth;
      for (int64_t d = 0; d < layout.depth; d += kLanes)
        store(to + d, fma(load(from + d), new_factor, load(to + d) * old_factor));
    }
  }

  void clear(Sums whole) const {
    for (int64_t r = 0; r < kTileRows; ++r) {
      whole.maximum[r] = kMinusInfinity;
      whole.total[r] = 0;
    }
    std::memset(whole.values, 0, static_cast<size_t>(task.rows * layout.depth) * sizeof(float));
  }

  void finish(Sums whole) const {
    const int64_t size = args.cache.head_dim;
    alignas(64) float inverse[kTileRows], lse[kTileRows];
    for (int64_t r = 0; r < task.rows; r += kLanes) {
      const Float16 total = load(whole.total + r);
      store(inverse + r, broadcast(1.0f) / total);
      store(lse + r, fma(load(whole.maximum + r), broadcast(kLn2), log(total)));
    }
    for (int64_t r = 0; r < task.rows; ++r) {
      args.lse[place[r]] = lse[r];
      const Float16 factor = broadcast(inverse[r]);
      T* to = static_cast<T*>(args.out) + place[r] * size;
      over_row(size, [&](int64_t d, int64_t n) {
        store_lanes(to + d, load(whole.values + r * layout.depth + d) * factor, n);
      });
    }
  }
};

#if defined(__AMX_BF16__)
// An instruction takes 32 dimensions of a score, or 16 where the head is no multiple of that, and 16 keys of a sum of
// values, for a run of keys is 16. It waits for the last one on its tile of sums, so four of these are at work at any
// time: two blocks of rows by two of columns, or one by four.

// One step of k for the sums in tiles 0 to 3: A's rows from `a`, B's columns from b[0] and on.
template <bool kTwoBlocks>
HEADRACE_INLINE void tile_step(const bf16* a, int64_t a_stride, const bf16* const* b, int64_t b_offset, int64_t b_stride,
                               int columns) {
  const auto from = [&](int i) { return b[i] + b_offset; };
  _tile_loadd(4, a, a_stride * 2);
  _tile_loadd(6, from(0), b_stride * 2);
  _tile_dpbf16ps(0, 4, 6);
  if (columns > 1) {
    _tile_loadd(7, from(1), b_stride * 2);
    _tile_dpbf16ps(1, 4, 7);
  }
  if (kTwoBlocks) {
    _tile_loadd(5, a + 16 * a_stride, a_stride * 2);
    _tile_dpbf16ps(2, 5, 6);
    if (columns > 1) _tile_dpbf16ps(3, 5, 7);
  } else {
    if (columns > 2) {
      _tile_loadd(6, from(2), b_stride * 2);
      _tile_dpbf16ps(2, 4, 6);
    }
    if (columns > 3) {
      _tile_loadd(7, from(3), b_stride * 2);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
}

// The sums, `columns` blocks of 16 side by side.
template <bool kTwoBlocks>
HEADRACE_INLINE void store_tiles(float* to, int64_t stride, int columns) {
  _tile_stored(0, to, stride * 4);
  if (columns > 1) _tile_stored(1, to + 16, stride * 4);
  if (kTwoBlocks) {
    _tile_stored(2, to + 16 * stride, stride * 4);
    if (columns > 1) _tile_stored(3, to + 16 * stride + 16, stride * 4);
  } else {
    if (columns > 2) _tile_stored(2, to + 32, stride * 4);
    if (columns > 3) _tile_stored(3, to + 48, stride * 4);
  }
}

HEADRACE_INLINE void clear_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

template <bool kTwoBlocks>
void score_in_tiles(Tile<bf16>& tile, int64_t first_run, int64_t end_run) {
  constexpr int kColumns = kTwoBlocks ? 2 : 4;
  const int64_t depth = tile.layout.depth;
  const int step = depth % 32 == 0 ? 32 : 16;
  configure_tiles(tile.task.rows, step);
  for (int64_t run = first_run; run < end_run; run += kColumns) {
    const int columns = static_cast<int>(end_run - run < kColumns ? end_run - run : kColumns);
    clear_tiles();
    for (int64_t d = 0; d < depth; d += step)
      tile_step<kTwoBlocks>(tile.q + d, depth, tile.keys + run, d / 2 * tile.key_stride, tile.key_stride, columns);
    store_tiles<kTwoBlocks>(tile.scores + run * kLanes, kScoreStride, columns);
  }
}

template <bool kTwoBlocks>
void weigh_in_tiles(Tile<bf16>& tile, int64_t first_run, int64_t end_run, float* out) {
  constexpr int kColumns = kTwoBlocks ? 2 : 4;
  const int64_t depth = tile.layout.depth;
  configure_tiles(tile.task.rows, kLanes);
  for (int64_t d = 0; d < depth; d += kColumns * kLanes) {
    const int64_t left = (depth - d) / kLanes;
    const int columns = static_cast<int>(left < kColumns ? left : kColumns);
    clear_tiles();
    for (int64_t run = first_run; run < end_run; ++run) {
      const bf16* v = tile.values[run] + d * 2;
      const bf16* const blocks[] = {v, v + 32, v + 64, v + 96};
      tile_step<kTwoBlocks>(tile.weights + run * kLanes, kWeightStride, blocks, 0, depth * 2, columns);
    }
    store_tiles<kTwoBlocks>(out + d, depth, columns);
  }
}

template <>
void Tile<bf16>::score(int64_t first_run, int64_t end_run) {
  if (task.rows > 16)
    score_in_tiles<true>(*this, first_run, end_run);
  else
    score_in_tiles<false>(*this, first_run, end_run);
}

template <>
void Tile<bf16>::weigh(int64_t first_run, int64_t end_run, float* out) {
  if (task.rows > 16)
    weigh_in_tiles<true>(*this, first_run, end_run, out);
  else
    weigh_in_tiles<false>(*this, first_run, end_run, out);
}
#endif

template <class T>
void Tile<T>::score(int64_t first_run, int64_t end_run) {
  const int64_t depth = layout.depth;
  in_row_tiles(task.rows, [&](auto rows, int64_t first) {
    constexpr int kRows = decltype(rows)::count;
    for (int64_t run = first_run; run < end_run; ++run) {
      Float16 sum[kRows][1];
      for (auto& line : sum) line[0] = broadcast(0.0f);
      multiply<T, kRows, 1>(sum, q + first * depth, depth, keys[run], key_stride, depth / kStep<T>);
      for (int r = 0; r < kRows; ++r) store(scores + (first + r) * kScoreStride + run * kLanes, sum[r][0]);
    }
  });
}

template <class T>
void Tile<T>::weigh(int64_t first_run, int64_t end_run, float* out) {
  const int64_t depth = layout.depth;
  const auto columns = [&](auto vectors, int64_t d) {
    constexpr int kVectors = decltype(vectors)::count;
    in_row_tiles(task.rows, [&](auto rows, int64_t first) {
      constexpr int kRows = decltype(rows)::count;
      Float16 sum[kRows][kVectors];
      for (auto& line : sum)
        for (auto& v : line) v = broadcast(0.0f);
      for (int64_t run = first_run; run < end_run; ++run)
        multiply<T, kRows, kVectors>(sum, weights + first * kWeightStride + run * kLanes, kWeightStride,
                                     values[run] + d * kStep<T>, layout.value_stride, kLanes / kStep<T>);
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) store(out + (first + r) * depth + d + v * kLanes, sum[r][v]);
    });
  };
  int64_t d = 0;
  for (; d + 2 * kLanes <= depth; d += 2 * kLanes) columns(Rows<2>{}, d);
  if (d < depth) columns(Rows<1>{}, d);
}

}  // namespace
}  // namespace headrace::HEADRACE_LEVEL
