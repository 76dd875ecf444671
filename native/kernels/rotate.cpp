// After the fused projection: optional RMS norm of each query and key head, rotation, and the way into the pages.
#include "cache.h"
#include "parallel.h"

namespace headrace::HEADRACE_LEVEL {
namespace {

constexpr int64_t kGrain = 8;  // tokens

// One head, [head_dim] of T, normed and rotated into `to`.
template <class T>
void turn(const T* from, int64_t head_dim, const float* weight, float eps, const float* cos_sin, T* to) {
  const int64_t half = head_dim / 2;
  Float16 scale = broadcast(1.0f);
  if (weight) {
    Float16 squares = broadcast(0.0f);
    over_row(head_dim, [&](int64_t i, int64_t n) {
      const Float16 v = load_lanes(from + i, n);
      squares = fma(v, v, squares);
    });
    const float mean = horizontal_sum(squares) / static_cast<float>(head_dim);
    scale = broadcast(1.0f / __builtin_sqrtf(mean + eps));
  }
  over_row(half, [&](int64_t i, int64_t n) {
    Float16 a = load_lanes(from + i, n), b = load_lanes(from + half + i, n);
    if (weight) {
      a = a * scale * load_lanes(weight + i, n);
      b = b * scale * load_lanes(weight + half + i, n);
    }
    const Float16 cosine = load_lanes(cos_sin + i, n), sine = load_lanes(cos_sin + half + i, n);
    store_lanes(to + i, a * cosine - b * sine, n);
    store_lanes(to + half + i, b * cosine + a * sine, n);
  });
}

template <class T>
void rotate_tokens(const RotateArgs& args, int64_t first, int64_t end) {
  const Cache& cache = args.cache;
  const HeadLayout<T> layout(cache);
  const int64_t size = cache.head_dim;
  T* key = static_cast<T*>(scratch(Slot::tile, static_cast<size_t>(size) * sizeof(T)));
  int64_t sequence = 0;
  for (int64_t token = first; token < end; ++token) {
    while (args.sequences.query_start[sequence + 1] <= token) ++sequence;
    const int64_t position = args.sequences.positions[token];
    const int64_t slot = position % cache.block_size;
    const int64_t page = cache.table[sequence * cache.table_stride + position / cache.block_size];
    const float* cos_sin = args.cos_sin + position * size;
    const T* from = static_cast<const T*>(args.qkv) + token * (args.heads + 2 * cache.kv_heads) * size;
    T* q = static_cast<T*>(args.q) + token * args.heads * size;
    for (int64_t head = 0; head < args.heads; ++head)
      turn(from + head * size, size, args.q_norm, args.eps, cos_sin, q + head * size);
    for (int64_t head = 0; head < cache.kv_heads; ++head) {
      turn(from + (args.heads + head) * size, size, args.k_norm, args.eps, cos_sin, key);
      T* keys = layout.keys(cache, page, head) + layout.key_at(slot, 0);
      for (int64_t d = 0; d < size; d += kStep<T>)
        std::memcpy(keys + d / kStep<T> * layout.key_stride, key + d, kStep<T> * sizeof(T));
      const T* value = from + (args.heads + cache.kv_heads + head) * size;
      T* values = layout.values(cache, page, head) + layout.value_at(slot, 0);
      for (int64_t d = 0; d < size; ++d) values[d * kStep<T>] = value[d];
    }
  }
}

}  // namespace

void rotate(const RotateArgs& args) {
  in_row_ranges(args.sequences.tokens, kGrain, [&](int64_t first, int64_t end) {
    if (args.type == Type::bf16)
      rotate_tokens<bf16>(args, first, end);
    else
      rotate_tokens<float>(args, first, end);
  });
}

}  // namespace headrace::HEADRACE_LEVEL
