// The noise of one token, from a counter. Every operation rounds once, and loops over these are plain so that the
// compiler vectorizes them: all levels, lanes and tails give the same bits.
#pragma once

#include "simd.h"

namespace headrace::HEADRACE_LEVEL {

// The finalizer of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014, in the
// variant 13 of Stafford's constants), applied to the token's place in the stream.
HEADRACE_INLINE double uniform_of(uint64_t stream, uint32_t token) {
  uint64_t z = stream + (uint64_t{token} + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z = z ^ (z >> 31);
  // An odd multiple of 2^-53: never 0, never 1, exact.
  return static_cast<double>(static_cast<int64_t>((z >> 12) * 2 + 1)) * 0x1p-53;
}

// log of a positive normal number: x = 2^e m with m in [sqrt(1/2), sqrt(2)), log m = 2 artanh((m - 1) / (m + 1))
// by its series, ln 2 in two parts. Within 2 units in the last place.
HEADRACE_INLINE double log_of(double x) {
  uint64_t word;
  std::memcpy(&word, &x, 8);
  const uint64_t shifted = word - 0x3fe6a09e667f3bcdu;  // sqrt(1/2)
  const int64_t e = static_cast<int64_t>(shifted) >> 52;
  word -= static_cast<uint64_t>(e) << 52;
  double m;
  std::memcpy(&m, &word, 8);
  const double f = m - 1.0;
  const double s = f / (m + 1.0);
  const double z = s * s;
  double p = 1.0 / 23.0;
  p = p * z + 1.0 / 21.0;
  p = p * z + 1.0 / 19.0;
  p = p * z + 1.0 / 17.0;
  p = p * z + 1.0 / 15.0;
  p = p * z + 1.0 / 13.0;
  p = p * z + 1.0 / 11.0;
  p = p * z + 1.0 / 9.0;
  p = p * z + 1.0 / 7.0;
  p = p * z + 1.0 / 5.0;
  p = p * z + 1.0 / 3.0;
  // log m = 2 s + 2 s^3 p, and 2 s = f - s f: the large part is exact.
  const double tail = 2.0 * s * z * p - s * f;
  // e fits 11 bits: this conversion, unlike that of any 64-bit integer, is vectorized everywhere.
  const double exponent = static_cast<double>(static_cast<int32_t>(e));
  return exponent * 6.93147180369123816490e-01 + (f + (tail + exponent * 1.90821492927058770002e-10));
}

}  // namespace headrace::HEADRACE_LEVEL
