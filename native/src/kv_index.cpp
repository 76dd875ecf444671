// Linear probing with backward-shift deletion over at most two thirds of the places (Knuth, TAOCP volume 3, section
// 6.4, algorithm R). Entries lie densely in chunks that never move: the last one fills the gap of one that goes.
#include "kv_index.h"

#include <algorithm>

namespace headrace {
namespace {

constexpr size_t kAhead = 8;  // identities whose memory is asked for together

uint32_t tag_of(const KVIndex::Identity& identity) { return static_cast<uint32_t>(identity.low); }

}  // namespace

void KVIndex::widen(size_t count) {
  size_t words = words_;
  while (words * 64 < count) words *= 2;
  if (words != words_) {
    for (auto& chunk : chunks_) {
      std::unique_ptr<uint64_t[]> wider(new uint64_t[kChunk * (2 + words)]());
      for (size_t i = 0; i < kChunk; ++i)
        std::copy_n(chunk.get() + i * stride(), stride(), wider.get() + i * (2 + words));
      chunk = std::move(wider);
    }
    words_ = words;
  }
  if (count > blocks_.size()) blocks_.resize(count, 0);
}

void KVIndex::store(size_t holder, const std::vector<Identity>& identities) {
  const size_t word = 2 + holder / 64;
  const uint64_t bit = uint64_t{1} << holder % 64;
  for (size_t i = 0; i < identities.size(); ++i) {
    if (i + kAhead < identities.size()) prefetch(identities[i + kAhead]);
    const size_t place = place_of(identities[i]);
    const size_t number = place == kNowhere ? add(identities[i]) : places_[place].entry - 1;
    uint64_t& set = entry(number)[word];
    if (!(set & bit)) ++blocks_[holder];
    set |= bit;
  }
}

void KVIndex::remove(size_t holder, const std::vector<Identity>& identities) {
  const size_t word = 2 + holder / 64;
  const uint64_t bit = uint64_t{1} << holder % 64;
  for (size_t i = 0; i < identities.size(); ++i) {
    if (i + kAhead < identities.size()) prefetch(identities[i + kAhead]);
    const size_t place = place_of(identities[i]);
    if (place == kNowhere) continue;
    uint64_t* found = entry(places_[place].entry - 1);
    if (!(found[word] & bit)) continue;
    found[word] &= ~bit;
    --blocks_[holder];
    if (empty(found)) drop(place);
  }
}

void KVIndex::clear(size_t holder) {
  const size_t word = 2 + holder / 64;
  const uint64_t bit = uint64_t{1} << holder % 64;
  // Backwards: what fills a gap has been looked at.
  for (size_t number = size_; number-- > 0 && blocks_[holder];) {
    uint64_t* found = entry(number);
    if (!(found[word] & bit)) continue;
    found[word] &= ~bit;
    --blocks_[holder];
    if (empty(found)) drop(place_of({found[0], found[1]}));
  }
}

void KVIndex::match(const std::vector<Identity>& chain, int32_t* out) const {
  std::fill_n(out, blocks_.size(), 0);
  std::vector<uint64_t> alive(words_, ~uint64_t{0});
  const auto end = [&](size_t word, uint64_t holders, size_t depth) {
    for (; holders; holders &= holders - 1)
      out[word * 64 + static_cast<size_t>(__builtin_ctzll(holders))] = static_cast<int32_t>(depth);
  };
  const uint64_t* entries[kAhead];
  for (size_t begin = 0; begin < chain.size(); begin += kAhead) {
    // A look-up waits for memory twice, for its place and for its entry; so several go through each wait together.
    const size_t count = std::min(kAhead, chain.size() - begin);
    for (size_t i = 0; i < count; ++i) prefetch(chain[begin + i]);
    for (size_t i = 0; i < count; ++i) {
      const size_t place = place_of(chain[begin + i]);
      entries[i] = place == kNowhere ? nullptr : entry(places_[place].entry - 1) + 2;
    }
    for (size_t i = 0; i < count; ++i) {
      const size_t depth = begin + i;
      uint64_t left = 0;
      for (size_t word = 0; word < words_; ++word) {
        const uint64_t both = entries[i] ? alive[word] & entries[i][word] : 0;
        if (depth) end(word, alive[word] & ~both, depth);
        left |= alive[word] = both;
      }
      if (!left) return;
    }
  }
  if (chain.empty()) return;
  for (size_t word = 0; word < words_; ++word) end(word, alive[word], chain.size());
}

size_t KVIndex::memory_bytes() const {
  return places_.capacity() * sizeof(Place) + chunks_.size() * kChunk * stride() * sizeof(uint64_t);
}

size_t KVIndex::place_of(const Identity& identity) const {
  if (places_.empty()) return kNowhere;
  const uint32_t tag = tag_of(identity);
  for (size_t place = tag & mask_;; place = (place + 1) & mask_) {
    const Place& there = places_[place];
    if (!there.entry) return kNowhere;
    if (there.tag != tag) continue;
    const uint64_t* found = entry(there.entry - 1);
    if (identity == Identity{found[0], found[1]}) return place;
  }
}

// The number of a new entry that nobody holds yet.
size_t KVIndex::add(const Identity& identity) {
  if (size_ * 3 >= places_.size() * 2) grow();
  if (size_ == chunks_.size() * kChunk) chunks_.emplace_back(new uint64_t[kChunk * stride()]);
  uint64_t* made = entry(size_);
  made[0] = identity.low;
  made[1] = identity.high;
  std::fill_n(made + 2, words_, 0);
  size_t place = tag_of(identity) & mask_;
  while (places_[place].entry) place = (place + 1) & mask_;
  places_[place] = {tag_of(identity), static_cast<uint32_t>(size_ + 1)};
  return size_++;
}

void KVIndex::drop(size_t place) {
  const size_t gone = places_[place].entry - 1, last = --size_;
  if (gone != last) {
    const uint64_t* moved = entry(last);
    places_[place_of({moved[0], moved[1]})].entry = static_cast<uint32_t>(gone + 1);
    std::copy_n(moved, stride(), entry(gone));
  }
  // One spare chunk stays, so that a single block at the border does not come and go with 4,096.
  if (size_ + 2 * kChunk <= chunks_.size() * kChunk) chunks_.pop_back();
  for (size_t next = place;;) {
    next = (next + 1) & mask_;
    if (!places_[next].entry) break;
    // What probing would have found at or before the gap moves into it.
    if (((next - places_[next].tag) & mask_) >= ((next - place) & mask_)) {
      places_[place] = places_[next];
      place = next;
    }
  }
  places_[place].entry = 0;
}

void KVIndex::grow() {
  std::vector<Place> before(std::max<size_t>(1024, places_.size() * 2));
  before.swap(places_);
  mask_ = places_.size() - 1;
  for (const Place& old : before) {
    if (!old.entry) continue;
    size_t place = old.tag & mask_;
    while (places_[place].entry) place = (place + 1) & mask_;
    places_[place] = old;
  }
}

bool KVIndex::empty(const uint64_t* entry) const {
  return std::all_of(entry + 2, entry + stride(), [](uint64_t word) { return word == 0; });
}

}  // namespace headrace
