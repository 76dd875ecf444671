// Keyed BLAKE2b (RFC 7693) for many short messages under one key: the block that holds the key is compressed once.
#pragma once

#include <cstddef>
#include <cstdint>

namespace headrace {

class Blake2b {
 public:
  static constexpr size_t kMaxKey = 64, kMaxDigest = 64;

  // `key_size` from 0 (not keyed) to kMaxKey bytes; digests of `digest_size` bytes, from 1 to kMaxDigest.
  Blake2b(const uint8_t* key, size_t key_size, size_t digest_size);

  void digest(const uint8_t* message, size_t size, uint8_t* out) const;

 private:
  uint64_t begin_[8];  // the state after the parameters and, where there is one, the key's block
  uint64_t first_[8];  // the state after the parameters alone
  uint8_t key_block_[128] = {};
  size_t keyed_bytes_;
  size_t digest_size_;
};

}  // namespace headrace
