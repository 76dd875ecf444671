// exp, log and tanh on sixteen lanes, within 2 units in the last place.
//
// exp: Cody and Waite's reduction by ln 2 in two parts, a polynomial on [-ln 2 / 2, ln 2 / 2], and the power of
// two multiplied in as bits. tanh: a polynomial near zero, where the quotient of exponentials would cancel. Both
// polynomials are fits at Chebyshev nodes; their own error is below 2e-8. That of 2^x is of least largest error,
// 8e-8, and its result within 3 units.
#pragma once

#include "simd.h"

namespace headrace::HEADRACE_LEVEL {

// exp(0) is exactly 1. Below -87.336, where the result would not be a normal number, it is 0; above 88.37, infinity.
HEADRACE_INLINE Float16 exp(Float16 x) {
  const Float16 low = broadcast(-87.336f), high = broadcast(88.37f);
  const Float16 within = select(x < low, low, select(x > high, high, x));
  const Float16 shift = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Float16 shifted = fma(within, broadcast(1.44269504088896341f), shift);
  const Float16 n = shifted - shift;
  Float16 r = fma(n, broadcast(-0.693359375f), within);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Float16 p = broadcast(1.3933652080595493e-3f);
  p = fma(p, r, broadcast(8.363181725144386e-3f));
  p = fma(p, r, broadcast(4.166646674275398e-2f));
  p = fma(p, r, broadcast(1.6666576266288757e-1f));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r * r, r) + broadcast(1.0f);
  const Float16 power = from_bits(shift_left(bits(shifted) - bits(shift) + broadcast(int32_t{127}), 23));
  return select(x < low, broadcast(0.0f), select(x > high, broadcast(__builtin_inff()), p * power));
}

// 2^x for x of at most 1, the bulk of attention's arithmetic, so in the fewest instructions: 2^floor(x) times a
// polynomial of the rest in [0, 1). Exactly 1 at 0, and 0 where the result would not be a normal number.
HEADRACE_INLINE Float16 exp2_of_nonpositive(Float16 x) {
#if defined(__AVX512F__)
  Float16 r;
  r.part[0] = (NativeFloat)_mm512_reduce_ps((__m512)x.part[0], _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
  const Float16 low = broadcast(-126.0f), shift = broadcast(12582912.0f);
  const Float16 within = select(x < low, low, x);
  const Float16 shifted = (within - broadcast(0.5f)) + shift;
  const Float16 r = within - (shifted - shift);
#endif
  Float16 p = broadcast(1.8671301659196615e-3f);
  p = fma(p, r, broadcast(9.017029777169228e-3f));
  p = fma(p, r, broadcast(5.579991266131401e-2f));
  p = fma(p, r, broadcast(2.4016444385051727e-1f));
  p = fma(p, r, broadcast(6.931512951850891e-1f));
  p = fma(p, r, broadcast(1.0f));
#if defined(__AVX512F__)
  // What is not a normal number costs the processor some hundred cycles, and masked keys are many.
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x.part[0], _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  p.part[0] = (NativeFloat)_mm512_maskz_scalef_ps(normal, (__m512)p.part[0], (__m512)x.part[0]);
  return p;
#else
  const Float16 power = from_bits(shift_left(bits(shifted) - bits(shift) + broadcast(int32_t{127}), 23));
  return select(x < low, broadcast(0.0f), p * power);
#endif
}

// Of positive normal numbers: x = 2^e m with m in [sqrt(1/2), sqrt(2)), log m = 2 artanh((m - 1) / (m + 1)).
HEADRACE_INLINE Float16 log(Float16 x) {
  const Int16 root = broadcast(int32_t{0x3f3504f3});  // sqrt(1/2)
  const Int16 e = shift_right(bits(x) - root, 23);
  const Float16 f = from_bits(bits(x) - shift_left(e, 23)) - broadcast(1.0f);
  const Float16 s = f / (f + broadcast(2.0f)), z = s * s;
  Float16 p = broadcast(1.0f / 9);
  p = fma(p, z, broadcast(1.0f / 7));
  p = fma(p, z, broadcast(1.0f / 5));
  p = fma(p, z, broadcast(1.0f / 3));
  // log m = 2 s + 2 s^3 p, and 2 s = f - s f.
  const Float16 tail = broadcast(2.0f) * s * z * p - s * f;
  const Float16 exponent = to_floats(e);
  return fma(exponent, broadcast(0.693359375f), f + fma(exponent, broadcast(-2.12194440e-4f), tail));
}

HEADRACE_INLINE Float16 tanh(Float16 x) {
  const Float16 z = x * x;
  Float16 p = broadcast(-6.104945670813322e-3f);
  p = fma(p, z, broadcast(2.1003639325499535e-2f));
  p = fma(p, z, broadcast(-5.385249853134155e-2f));
  p = fma(p, z, broadcast(1.3332782685756683e-1f));
  p = fma(p, z, broadcast(-3.33333283662796e-1f));
  const Float16 near = fma(p, z * x, x);
  const Float16 far = broadcast(1.0f) - broadcast(2.0f) / (exp(x + x) + broadcast(1.0f));
  return select(z < broadcast(0.390625f), near, far);
}

HEADRACE_INLINE Float16 silu(Float16 x) { return x / (broadcast(1.0f) + exp(broadcast(0.0f) - x)); }

// 0.5 x (1 + tanh(y)) is x / (1 + exp(-2 y)), with y = sqrt(2 / pi) (x + 0.044715 x^3).
HEADRACE_INLINE Float16 gelu_tanh(Float16 x) {
  const Float16 y = x * fma(x * x, broadcast(0.044715f), broadcast(1.0f));
  return x / (broadcast(1.0f) + exp(y * broadcast(-1.5957691216057308f)));
}

}  // namespace headrace::HEADRACE_LEVEL
