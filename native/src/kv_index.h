// Which of many holders has which KV blocks: a hash table from a block's identity to a set of small integers.
//
// It knows nothing of Python or of what a holder is. Identities are 16 bytes of a cryptographic hash, so any of their
// bits serve as the table's own hash. Nothing that is added moves what is there, except when holders need wider sets.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace headrace {

class KVIndex {
 public:
  static constexpr size_t kIdentity = 16;  // bytes

  struct Identity {
    uint64_t low, high;
    bool operator==(const Identity& other) const { return low == other.low && high == other.high; }
  };

  KVIndex() = default;
  KVIndex(const KVIndex&) = delete;

  // Holders are those below `count` from now on; there can be more later, never fewer.
  void widen(size_t count);
  size_t holders() const { return blocks_.size(); }

  // `holder` is below `holders()`. What it has or lacks already changes nothing.
  void store(size_t holder, const std::vector<Identity>& identities);
  void remove(size_t holder, const std::vector<Identity>& identities);
  void clear(size_t holder);

  // `out` has a place for each holder: how many identities, from the first on, it has without a gap.
  void match(const std::vector<Identity>& chain, int32_t* out) const;

  size_t blocks(size_t holder) const { return blocks_[holder]; }
  size_t size() const { return size_; }  // identities that somebody has
  size_t memory_bytes() const;

 private:
  // A place of the open-addressed table: 32 bits of the identity, which also say where it belongs, and the number of
  // its entry plus one; 0 is an empty place. So a look-up reads an entry only where it will match.
  struct Place {
    uint32_t tag, entry;
  };
  static constexpr size_t kNowhere = ~size_t{0};
  static constexpr size_t kChunkBits = 12, kChunk = size_t{1} << kChunkBits;  // entries

  uint64_t* entry(size_t number) { return chunks_[number >> kChunkBits].get() + (number & (kChunk - 1)) * stride(); }
  const uint64_t* entry(size_t number) const { return const_cast<KVIndex*>(this)->entry(number); }
  size_t stride() const { return 2 + words_; }  // an identity and the set of its holders
  size_t place_of(const Identity& identity) const;
  size_t add(const Identity& identity);
  void drop(size_t place);
  void grow();
  bool empty(const uint64_t* entry) const;
  void prefetch(const Identity& identity) const {
    if (!places_.empty()) __builtin_prefetch(&places_[static_cast<uint32_t>(identity.low) & mask_]);
  }

  size_t words_ = 1;  // of 64 holders each
  size_t size_ = 0;
  size_t mask_ = 0;  // places less one, a power of two less one
  std::vector<Place> places_;
  std::vector<std::unique_ptr<uint64_t[]>> chunks_;
  std::vector<size_t> blocks_;
};

}  // namespace headrace
