// The inner loop that linear layers and both halves of attention share: a few rows of A times a panel of B.
//
// One accumulator per element of the result, fed in the order of k. So an element has the same bits however many
// rows or columns a tile has; only the level (which instruction multiplies) can change them.
#pragma once

#include "simd.h"

namespace headrace::HEADRACE_LEVEL {

// A step is one k in float32 and two in bfloat16; B holds, for each step, kLanes columns (of pairs, in bfloat16).
template <class T>
constexpr int kStep = sizeof(T) == 2 ? 2 : 1;

HEADRACE_INLINE Float16 multiply_step(Float16 sum, const float* a, Float16 b) { return fma(broadcast(*a), b, sum); }

#if defined(__AVX512BF16__)
HEADRACE_INLINE Float16 multiply_step(Float16 sum, const bf16* a, Int16 b) {
  int32_t pair;
  std::memcpy(&pair, a, 4);
  sum.part[0] = (NativeFloat)_mm512_dpbf16_ps((__m512)sum.part[0], (__m512bh)_mm512_set1_epi32(pair),
                                              (__m512bh)b.part[0]);
  return sum;
}
#else
HEADRACE_INLINE Float16 multiply_step(Float16 sum, const bf16* a, Int16 b) {
  const Int16 odd = broadcast(static_cast<int32_t>(0xffff0000));
  sum = fma(broadcast(to_float(a[0])), from_bits(shift_left(b, 16)), sum);
  return fma(broadcast(to_float(a[1])), from_bits(b & odd), sum);
}
#endif

HEADRACE_INLINE Float16 load_step(const float* b) { return load(b); }
HEADRACE_INLINE Int16 load_step(const bf16* b) { return load_words(b); }

// sum[r][v] += A[r][k] · B[k][v * kLanes …] over `steps` steps. A has rows `a_stride` apart; B has steps
// `b_stride` apart and its vectors of one step follow each other.
template <class T, int kRows, int kVectors>
HEADRACE_INLINE void multiply(Float16 (&sum)[kRows][kVectors], const T* a, ptrdiff_t a_stride, const T* b,
                              ptrdiff_t b_stride, int64_t steps) {
  for (int64_t step = 0; step < steps; ++step) {
    decltype(load_step(b)) column[kVectors];
    for (int v = 0; v < kVectors; ++v) column[v] = load_step(b + v * kLanes * kStep<T>);
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v)
        sum[r][v] = multiply_step(sum[r][v], a + r * a_stride, column[v]);
    a += kStep<T>;
    b += b_stride;
  }
}

// How many rows share one reading of B: as many as the registers hold two vectors of sums for.
#if defined(__AVX512F__)
constexpr int kRowTile = 12;
#elif defined(__AVX2__)
constexpr int kRowTile = 3;
#else
constexpr int kRowTile = 2;
#endif

// A number of rows as a type.
template <int kRows>
struct Rows {
  static constexpr int count = kRows;
};

template <int kRows, class Body>
HEADRACE_INLINE void last_rows(int64_t first, int64_t rows, Body& body) {
  if constexpr (kRows > 0) {
    if (rows == kRows)
      body(Rows<kRows>{}, first);
    else
      last_rows<kRows - 1>(first, rows, body);
  }
}

// Calls body(Rows<n>{}, first row) for `rows` rows in tiles of at most kTile.
template <int kTile = kRowTile, class Body>
HEADRACE_INLINE void in_row_tiles(int64_t rows, Body body) {
  int64_t first = 0;
  for (; first + kTile <= rows; first += kTile) body(Rows<kTile>{}, first);
  last_rows<kTile - 1>(first, rows - first, body);
}

}  // namespace headrace::HEADRACE_LEVEL
