// Sixteen float32 lanes on any processor: one vector of AVX512, two of AVX2, four of 128 bits elsewhere.
//
// Every operation is lane by lane and rounds once, so a sum over lanes or rows is the same whichever loop, tile or
// tail computes it. fma() is one rounding where the level has the instruction and two where it has not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define HEADRACE_INLINE static inline __attribute__((always_inline))

namespace headrace::HEADRACE_LEVEL {

#if defined(__AVX512F__)
constexpr int kNativeLanes = 16;
#elif defined(__AVX2__)
constexpr int kNativeLanes = 8;
#else
constexpr int kNativeLanes = 4;
#endif
constexpr int kLanes = 16;
constexpr int kParts = kLanes / kNativeLanes;

typedef float NativeFloat __attribute__((vector_size(kNativeLanes * 4)));
typedef int32_t NativeInt __attribute__((vector_size(kNativeLanes * 4)));
typedef float NativeFloatAt __attribute__((vector_size(kNativeLanes * 4), aligned(4), may_alias));
typedef int32_t NativeIntAt __attribute__((vector_size(kNativeLanes * 4), aligned(4), may_alias));
typedef uint16_t NativeHalf __attribute__((vector_size(kNativeLanes * 2)));
typedef uint16_t NativeHalfAt __attribute__((vector_size(kNativeLanes * 2), aligned(2), may_alias));
typedef uint32_t NativeUnsigned __attribute__((vector_size(kNativeLanes * 4)));

// bfloat16, as bits.
typedef uint16_t bf16;

struct Float16 {
  NativeFloat part[kParts];
};
struct Int16 {
  NativeInt part[kParts];
};

#define HEADRACE_EACH for (int i = 0; i < kParts; ++i)

HEADRACE_INLINE Float16 broadcast(float value) {
  Float16 r;
  HEADRACE_EACH r.part[i] = value - NativeFloat{};  // not "+": that would turn -0 into 0, and cost an addition
  return r;
}
HEADRACE_INLINE Int16 broadcast(int32_t value) {
  Int16 r;
  HEADRACE_EACH r.part[i] = NativeInt{} + value;
  return r;
}
HEADRACE_INLINE Float16 load(const float* from) {
  Float16 r;
  HEADRACE_EACH r.part[i] = *reinterpret_cast<const NativeFloatAt*>(from + i * kNativeLanes);
  return r;
}
HEADRACE_INLINE void store(float* to, Float16 v) {
  HEADRACE_EACH *reinterpret_cast<NativeFloatAt*>(to + i * kNativeLanes) = v.part[i];
}
HEADRACE_INLINE Int16 load_words(const void* from) {
  Int16 r;
  HEADRACE_EACH r.part[i] = *(reinterpret_cast<const NativeIntAt*>(from) + i);
  return r;
}

#define HEADRACE_BINARY(op)                                  \
  HEADRACE_INLINE Float16 operator op(Float16 a, Float16 b) { \
    HEADRACE_EACH a.part[i] = a.part[i] op b.part[i];        \
    return a;                                                \
  }
HEADRACE_BINARY(+)
HEADRACE_BINARY(-)
HEADRACE_BINARY(*)
HEADRACE_BINARY(/)
#undef HEADRACE_BINARY

#define HEADRACE_INT_BINARY(op)                         \
  HEADRACE_INLINE Int16 operator op(Int16 a, Int16 b) { \
    HEADRACE_EACH a.part[i] = a.part[i] op b.part[i];   \
    return a;                                           \
  }
HEADRACE_INT_BINARY(+)
HEADRACE_INT_BINARY(-)
HEADRACE_INT_BINARY(&)
HEADRACE_INT_BINARY(|)
#undef HEADRACE_INT_BINARY

// Comparisons give lanes of all ones or all zeros.
#define HEADRACE_COMPARE(type, op)                               \
  HEADRACE_INLINE Int16 operator op(type a, type b) {            \
    Int16 r;                                                     \
    HEADRACE_EACH r.part[i] = (NativeInt)(a.part[i] op b.part[i]); \
    return r;                                                    \
  }
HEADRACE_COMPARE(Float16, <)
HEADRACE_COMPARE(Float16, >)
HEADRACE_COMPARE(Int16, <)
HEADRACE_COMPARE(Int16, >=)
#undef HEADRACE_COMPARE

HEADRACE_INLINE Float16 select(Int16 mask, Float16 yes, Float16 no) {
  HEADRACE_EACH yes.part[i] = mask.part[i] ? yes.part[i] : no.part[i];
  return yes;
}
HEADRACE_INLINE Int16 bits(Float16 v) {
  Int16 r;
  HEADRACE_EACH r.part[i] = (NativeInt)v.part[i];
  return r;
}
HEADRACE_INLINE Float16 from_bits(Int16 v) {
  Float16 r;
  HEADRACE_EACH r.part[i] = (NativeFloat)v.part[i];
  return r;
}
HEADRACE_INLINE Int16 shift_left(Int16 v, int count) {
  HEADRACE_EACH v.part[i] = v.part[i] << count;
  return v;
}
// Arithmetic: the sign comes in.
HEADRACE_INLINE Int16 shift_right(Int16 v, int count) {
  HEADRACE_EACH v.part[i] = v.part[i] >> count;
  return v;
}
HEADRACE_INLINE Float16 to_floats(Int16 v) {
  Float16 r;
  HEADRACE_EACH r.part[i] = __builtin_convertvector(v.part[i], NativeFloat);
  return r;
}
// a where a > b, else b: the second where either is not a number.
HEADRACE_INLINE Float16 max(Float16 a, Float16 b) {
#if defined(__AVX512F__)
  a.part[0] = (NativeFloat)_mm512_max_ps((__m512)a.part[0], (__m512)b.part[0]);
  return a;
#else
  return select(a > b, a, b);
#endif
}

HEADRACE_INLINE Float16 fma(Float16 a, Float16 b, Float16 c) {
#if defined(__AVX512F__)
  c.part[0] = (NativeFloat)_mm512_fmadd_ps((__m512)a.part[0], (__m512)b.part[0], (__m512)c.part[0]);
#elif defined(__AVX2__)
  HEADRACE_EACH c.part[i] = (NativeFloat)_mm256_fmadd_ps((__m256)a.part[i], (__m256)b.part[i], (__m256)c.part[i]);
#elif defined(__aarch64__)
  HEADRACE_EACH c.part[i] = (NativeFloat)vfmaq_f32((float32x4_t)c.part[i], (float32x4_t)a.part[i], (float32x4_t)b.part[i]);
#else
  HEADRACE_EACH c.part[i] = a.part[i] * b.part[i] + c.part[i];
#endif
  return c;
}

HEADRACE_INLINE Float16 load(const bf16* from) {
  Float16 r;
  HEADRACE_EACH {
    const NativeHalf half = *reinterpret_cast<const NativeHalfAt*>(from + i * kNativeLanes);
    r.part[i] = (NativeFloat)(__builtin_convertvector(half, NativeUnsigned) << 16);
  }
  return r;
}

// Rounds to nearest, ties to even; what is not a number stays so.
HEADRACE_INLINE void store(bf16* to, Float16 v) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)v.part[0]));
#else
  HEADRACE_EACH {
    const NativeUnsigned word = (NativeUnsigned)v.part[i];
    const NativeUnsigned rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
    const NativeUnsigned quiet = (word >> 16) | 0x40u;
    const NativeUnsigned chosen = (NativeInt)(v.part[i] == v.part[i]) ? rounded : quiet;
    *reinterpret_cast<NativeHalfAt*>(to + i * kNativeLanes) = __builtin_convertvector(chosen, NativeHalf);
  }
#endif
}

// Two vectors that follow each other in memory.
HEADRACE_INLINE void store_pair(float* to, Float16 first, Float16 second) {
  store(to, first);
  store(to + kLanes, second);
}
HEADRACE_INLINE void store_pair(bf16* to, Float16 first, Float16 second) {
#if defined(__AVX512BF16__)
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)second.part[0], (__m512)first.part[0]));
#else
  store(to, first);
  store(to + kLanes, second);
#endif
}

HEADRACE_INLINE float to_float(bf16 value) {
  const uint32_t word = static_cast<uint32_t>(value) << 16;
  float r;
  std::memcpy(&r, &word, 4);
  return r;
}
HEADRACE_INLINE float to_float(float value) { return value; }

// The lanes are halved four times, in one order at every level.
HEADRACE_INLINE float horizontal_sum(Float16 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v.part[0]);
#else
  float lane[kLanes];
  store(lane, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = lane[i] + lane[i + width];
  return lane[0];
#endif
}
HEADRACE_INLINE float horizontal_max(Float16 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v.part[0]);
#else
  float lane[kLanes];
  store(lane, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  return lane[0];
#endif
}

// The first `count` lanes from memory, zeros in the rest; and back. For tails, which then take the same path.
template <class T>
HEADRACE_INLINE Float16 load_some(const T* from, int64_t count) {
  T lane[kLanes] = {};
  std::memcpy(lane, from, static_cast<size_t>(count) * sizeof(T));
  return load(lane);
}
template <class T>
HEADRACE_INLINE void store_some(T* to, Float16 v, int64_t count) {
  T lane[kLanes];
  store(lane, v);
  std::memcpy(to, lane, static_cast<size_t>(count) * sizeof(T));
}

// visit(i, n): lanes i … i + n - 1 of a row; n is kLanes but for the tail.
template <class Visit>
HEADRACE_INLINE void over_row(int64_t columns, Visit visit) {
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) visit(i, int64_t{kLanes});
  if (i < columns) visit(i, columns - i);
}

template <class T>
HEADRACE_INLINE Float16 load_lanes(const T* from, int64_t n) {
  return n == kLanes ? load(from) : load_some(from, n);
}
template <class T>
HEADRACE_INLINE void store_lanes(T* to, Float16 v, int64_t n) {
  if (n == kLanes)
    store(to, v);
  else
    store_some(to, v, n);
}

HEADRACE_INLINE Int16 lane_indices() {
  static const int32_t index[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load_words(index);
}

}  // namespace headrace::HEADRACE_LEVEL
