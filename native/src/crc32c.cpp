// CRC-32C by carry-less products where the processor has wide ones, with its CRC instruction where it has that, byte
// by byte from a table elsewhere.
//
// Four registers of 64 bytes hold a remainder in a form that is not reduced: the bytes so far, modulo the polynomial,
// are those 256 bytes. Moving them by 256 bytes multiplies each 128-bit lane's halves by powers of x (V. Gopal et al.,
// "Fast CRC computation for generic polynomials using PCLMULQDQ", Intel 2009); the instruction reduces them at the end.
//
// The instruction takes one operand per cycle but answers three cycles later, so three neighbouring stretches are
// worked on at once. Their remainders are put together by shifting: appending zero bytes is linear over GF(2), so
// what a stretch of zeros does to a remainder is the XOR of what it does to each of its four bytes.
#include "crc32c.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#define HEADRACE_CRC32C_HARDWARE __attribute__((target("sse4.2")))
#elif defined(__aarch64__) && defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#define HEADRACE_CRC32C_HARDWARE
#endif

namespace headrace {
namespace {

struct ByteTable {
  uint32_t entries[256];
  ByteTable() {
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t crc = i;
      for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? 0x82f63b78u : 0);
      entries[i] = crc;
    }
  }
};

const ByteTable& byte_table() {
  static const ByteTable table;
  return table;
}

uint32_t update_table(uint32_t crc, const uint8_t* data, size_t size) {
  const uint32_t* entries = byte_table().entries;
  while (size--) crc = (crc >> 8) ^ entries[(crc ^ *data++) & 0xff];
  return crc;
}

#ifdef HEADRACE_CRC32C_HARDWARE

constexpr size_t kLong = 4096, kShort = 256;  // bytes of one of three stretches

// What `bytes` zero bytes do to a remainder.
struct Shift {
  uint32_t entries[4][256];
  explicit Shift(size_t bytes) {
    uint32_t of_bit[32];
    const uint32_t* table = byte_table().entries;
    for (int bit = 0; bit < 32; ++bit) {
      uint32_t crc = uint32_t{1} << bit;
      for (size_t i = 0; i < bytes; ++i) crc = (crc >> 8) ^ table[crc & 0xff];
      of_bit[bit] = crc;
    }
    for (int byte = 0; byte < 4; ++byte)
      for (uint32_t value = 0; value < 256; ++value) {
        uint32_t crc = 0;
        for (int bit = 0; bit < 8; ++bit)
          if (value >> bit & 1) crc ^= of_bit[8 * byte + bit];
        entries[byte][value] = crc;
      }
  }
  uint32_t operator()(uint32_t crc) const {
    return entries[0][crc & 0xff] ^ entries[1][crc >> 8 & 0xff] ^ entries[2][crc >> 16 & 0xff] ^ entries[3][crc >> 24];
  }
};

uint64_t word(const uint8_t* data) {
  uint64_t value;
  std::memcpy(&value, data, sizeof value);
  return value;
}

HEADRACE_CRC32C_HARDWARE inline uint64_t step(uint64_t crc, uint64_t value) {
#if defined(__x86_64__)
  return _mm_crc32_u64(crc, value);
#else
  return __crc32cd(static_cast<uint32_t>(crc), value);
#endif
}

HEADRACE_CRC32C_HARDWARE uint64_t three(uint64_t crc, const uint8_t*& data, size_t& size, size_t stretch,
                                        const Shift& shift) {
  while (size >= 3 * stretch) {
    uint64_t first = crc, second = 0, third = 0;
    for (const uint8_t* end = data + stretch; data < end;) {
      // The next three stretches come from memory meanwhile; left alone, prefetchers stop at every page.
      for (size_t i = 0; i < 3; ++i) __builtin_prefetch(data + (3 + i) * stretch);
      for (const uint8_t* line = data + 64; data < line; data += 8) {
        first = step(first, word(data));
        second = step(second, word(data + stretch));
        third = step(third, word(data + 2 * stretch));
      }
    }
    crc = shift(shift(static_cast<uint32_t>(first)) ^ static_cast<uint32_t>(second)) ^ static_cast<uint32_t>(third);
    data += 2 * stretch;
    size -= 3 * stretch;
  }
  return crc;
}

HEADRACE_CRC32C_HARDWARE uint32_t update_hardware(uint32_t start, const uint8_t* data, size_t size) {
  static const Shift of_long(kLong), of_short(kShort);
  uint64_t crc = three(start, data, size, kLong, of_long);
  crc = three(crc, data, size, kShort, of_short);
  for (; size >= 8; data += 8, size -= 8) crc = step(crc, word(data));
  return update_table(static_cast<uint32_t>(crc), data, size);
}

#if defined(__x86_64__)

constexpr size_t kFolded = 256;  // bytes of the four registers

// x to the power of n modulo the polynomial, as a factor of a carry-less product of reflected operands.
long long power(int n) {
  uint32_t value = 0x80000000u;
  while (n--) value = (value >> 1) ^ ((value & 1) ? 0x82f63b78u : 0);
  return static_cast<long long>(uint64_t{value} << 1);
}

__attribute__((target("avx512f,vpclmulqdq,sse4.2"))) uint32_t update_folded(uint32_t crc, const uint8_t* data,
                                                                            size_t size) {
  static const long long low = power(8 * kFolded + 32), high = power(8 * kFolded - 32);
  const __m512i by = _mm512_set_epi64(high, low, high, low, high, low, high, low);
  __m512i held[4];
  for (int i = 0; i < 4; ++i) held[i] = _mm512_loadu_si512(data + 64 * i);
  held[0] = _mm512_xor_si512(held[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(crc))));
  for (data += kFolded, size -= kFolded; size >= kFolded; data += kFolded, size -= kFolded)
    for (int i = 0; i < 4; ++i) {
      __builtin_prefetch(data + 8 * kFolded + 64 * i);  // prefetchers stop at every page
      const __m512i first = _mm512_clmulepi64_epi128(held[i], by, 0x00);
      const __m512i second = _mm512_clmulepi64_epi128(held[i], by, 0x11);
      held[i] = _mm512_ternarylogic_epi64(first, second, _mm512_loadu_si512(data + 64 * i), 0x96);  // XOR of all
    }
  alignas(64) uint8_t left[kFolded];
  for (int i = 0; i < 4; ++i) _mm512_store_si512(left + 64 * i, held[i]);
  return update_hardware(update_hardware(0, left, kFolded), data, size);
}

bool has_folding() {
  static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq");
  return has;
}

#endif

bool has_hardware() {
#if defined(__x86_64__)
  static const bool has = __builtin_cpu_supports("sse4.2");
  return has;
#else
  return true;
#endif
}

#endif

}  // namespace

uint32_t crc32c(uint32_t crc, const void* data, size_t size, bool wide) {
  const uint8_t* bytes = static_cast<const uint8_t*>(data);
#ifdef HEADRACE_CRC32C_HARDWARE
#if defined(__x86_64__)
  if (wide && size >= 2 * kFolded && has_hardware() && has_folding()) return ~update_folded(~crc, bytes, size);
#endif
  if (has_hardware()) return ~update_hardware(~crc, bytes, size);
#endif
  return ~update_table(~crc, bytes, size);
}

}  // namespace headrace
