// Addresses inside a KV page; the layout is described at Cache in src/kernels.h.
#pragma once

#include "kernels.h"
#include "product.h"

namespace headrace::HEADRACE_LEVEL {

template <class T>
struct HeadLayout {
  int64_t depth;  // head size, padded
  int64_t slots;  // block size, padded
  int64_t key_stride, value_stride;

  explicit HeadLayout(const Cache& cache)
      : depth(round_up(cache.head_dim, kLanes)),
        slots(round_up(cache.block_size, kLanes)),
        key_stride(slots * kStep<T>),
        value_stride(depth * kStep<T>) {}

  T* keys(const Cache& cache, int64_t page, int64_t head) const {
    return static_cast<T*>(cache.pages) + page * cache.page_stride +
           (cache.layer * cache.kv_heads + head) * 2 * depth * slots;
  }
  T* values(const Cache& cache, int64_t page, int64_t head) const {
    return keys(cache, page, head) + depth * slots;
  }
  int64_t key_at(int64_t slot, int64_t d) const { return d / kStep<T> * key_stride + slot * kStep<T> + d % kStep<T>; }
  int64_t value_at(int64_t slot, int64_t d) const {
    return slot / kStep<T> * value_stride + d * kStep<T> + slot % kStep<T>;
  }
};

}  // namespace headrace::HEADRACE_LEVEL
