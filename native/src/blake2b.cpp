// BLAKE2b as RFC 7693 defines it; the names v, m, G and sigma are its own.
//
// The sixteen words of `v` are local variables and the rounds are unrolled, so that they stay in registers and the
// places of message words are constants.
#include "blake2b.h"

#include <cstring>

namespace headrace {
namespace {

constexpr size_t kBlock = 128;

constexpr uint64_t kInitial[8] = {0x6a09e667f3bcc908u, 0xbb67ae8584caa73bu, 0x3c6ef372fe94f82bu, 0xa54ff53a5f1d36f1u,
                                  0x510e527fade682d1u, 0x9b05688c2b3e6c1fu, 0x1f83d9abfb41bd6bu, 0x5be0cd19137e2179u};

inline uint64_t rotate_right(uint64_t word, int bits) { return word >> bits | word << (64 - bits); }

inline uint64_t word_at(const uint8_t* bytes) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  uint64_t word;
  std::memcpy(&word, bytes, sizeof word);
  return word;
#else
  uint64_t word = 0;
  for (int i = 7; i >= 0; --i) word = word << 8 | bytes[i];
  return word;
#endif
}

inline void mix(uint64_t& a, uint64_t& b, uint64_t& c, uint64_t& d, uint64_t x, uint64_t y) {
  a += b + x;
  d = rotate_right(d ^ a, 32);
  c += d;
  b = rotate_right(b ^ c, 24);
  a += b + y;
  d = rotate_right(d ^ a, 16);
  c += d;
  b = rotate_right(b ^ c, 63);
}

// Mix one block into `h`. `total` counts the bytes up to its end, without padding.
void compress(uint64_t h[8], const uint8_t* block, uint64_t total, bool last) {
  uint64_t m[16];
  for (int i = 0; i < 16; ++i) m[i] = word_at(block + 8 * i);
  uint64_t v0 = h[0], v1 = h[1], v2 = h[2], v3 = h[3], v4 = h[4], v5 = h[5], v6 = h[6], v7 = h[7];
  uint64_t v8 = kInitial[0], v9 = kInitial[1], v10 = kInitial[2], v11 = kInitial[3];
  uint64_t v12 = kInitial[4] ^ total, v13 = kInitial[5];
  uint64_t v14 = last ? ~kInitial[6] : kInitial[6], v15 = kInitial[7];

#define HEADRACE_ROUND(s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15) \
  mix(v0, v4, v8, v12, m[s0], m[s1]);                                                        \
  mix(v1, v5, v9, v13, m[s2], m[s3]);                                                        \
  mix(v2, v6, v10, v14, m[s4], m[s5]);                                                       \
  mix(v3, v7, v11, v15, m[s6], m[s7]);                                                       \
  mix(v0, v5, v10, v15, m[s8], m[s9]);                                                       \
  mix(v1, v6, v11, v12, m[s10], m[s11]);                                                     \
  mix(v2, v7, v8, v13, m[s12], m[s13]);                                                      \
  mix(v3, v4, v9, v14, m[s14], m[s15])

  // The rows of sigma; rounds 10 and 11 take rows 0 and 1 again.
  HEADRACE_ROUND(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  HEADRACE_ROUND(14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3);
  HEADRACE_ROUND(11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4);
  HEADRACE_ROUND(7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8);
  HEADRACE_ROUND(9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13);
  HEADRACE_ROUND(2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9);
  HEADRACE_ROUND(12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11);
  HEADRACE_ROUND(13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10);
  HEADRACE_ROUND(6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5);
  HEADRACE_ROUND(10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0);
  HEADRACE_ROUND(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  HEADRACE_ROUND(14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3);
#undef HEADRACE_ROUND

  h[0] ^= v0 ^ v8;
  h[1] ^= v1 ^ v9;
  h[2] ^= v2 ^ v10;
  h[3] ^= v3 ^ v11;
  h[4] ^= v4 ^ v12;
  h[5] ^= v5 ^ v13;
  h[6] ^= v6 ^ v14;
  h[7] ^= v7 ^ v15;
}

}  // namespace

Blake2b::Blake2b(const uint8_t* key, size_t key_size, size_t digest_size)
    : keyed_bytes_(key_size ? kBlock : 0), digest_size_(digest_size) {
  std::memcpy(first_, kInitial, sizeof first_);
  first_[0] ^= 0x01010000u ^ (uint64_t{key_size} << 8) ^ digest_size;
  std::memcpy(begin_, first_, sizeof begin_);
  if (key_size) {
    std::memcpy(key_block_, key, key_size);
    compress(begin_, key_block_, kBlock, false);
  }
}

void Blake2b::digest(const uint8_t* message, size_t size, uint8_t* out) const {
  uint64_t h[8];
  uint8_t padded[kBlock];
  if (!size && keyed_bytes_) {  // the key's block is the last one, so it is not what `begin_` holds
    std::memcpy(h, first_, sizeof h);
    compress(h, key_block_, kBlock, true);
  } else {
    std::memcpy(h, begin_, sizeof h);
    uint64_t total = keyed_bytes_;
    for (; size > kBlock; message += kBlock, size -= kBlock) compress(h, message, total += kBlock, false);
    const uint8_t* block = message;
    if (size < kBlock) {
      if (size) std::memcpy(padded, message, size);
      std::memset(padded + size, 0, kBlock - size);
      block = padded;
    }
    compress(h, block, total + size, true);
  }
  for (size_t i = 0; i < digest_size_; ++i) out[i] = static_cast<uint8_t>(h[i / 8] >> (8 * (i % 8)));
}

}  // namespace headrace
