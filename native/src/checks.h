// What a plan could get wrong, positions and pages, is checked here before a kernel reads or writes through it.
#pragma once

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace headrace {

// Positions [first, last] of a sequence must be in pages that the table names and the pool has.
inline void check_pages(const Cache& cache, int64_t sequence, int64_t first, int64_t last) {
  const int32_t* row = cache.table + sequence * cache.table_stride;
  for (int64_t j = first / cache.block_size; j <= last / cache.block_size; ++j) {
    const int64_t page = j < cache.table_width ? row[j] : -1;
    if (page < 0 || page >= cache.page_count)
      throw std::out_of_range("sequence " + std::to_string(sequence) + ": entry " + std::to_string(j) +
                              " of its block table (for positions from " + std::to_string(j * cache.block_size) +
                              ") is " + (j < cache.table_width ? std::to_string(page) : "missing") +
                              ", not one of the pool's " + std::to_string(cache.page_count) + " pages");
  }
}

inline void check_sequences(const Sequences& sequences) {
  if (sequences.query_start[0] != 0 || sequences.query_start[sequences.count] != sequences.tokens)
    throw std::out_of_range("query_start must run from 0 to the number of tokens, " + std::to_string(sequences.tokens));
  for (int64_t s = 0; s < sequences.count; ++s)
    if (sequences.query_start[s] > sequences.query_start[s + 1])
      throw std::out_of_range("query_start falls after sequence " + std::to_string(s));
}

// The least and greatest position of a sequence's tokens; false where it has none.
inline bool position_range(const Sequences& sequences, int64_t s, int64_t& least, int64_t& most) {
  const int32_t first = sequences.query_start[s], end = sequences.query_start[s + 1];
  if (first == end) return false;
  least = most = sequences.positions[first];
  for (int32_t t = first; t < end; ++t) {
    const int64_t position = sequences.positions[t];
    if (position < least) least = position;
    if (position > most) most = position;
  }
  if (least < 0) throw std::out_of_range("sequence " + std::to_string(s) + " has a negative position");
  return true;
}

// Keys and values of all tokens have a place, and rotation a row for each position.
inline void check_writes(const Sequences& rows, const Cache& cache, int64_t cos_sin_rows) {
  for (int64_t s = 0, least, most; s < rows.count; ++s) {
    if (!position_range(rows, s, least, most)) continue;
    check_pages(cache, s, least, most);
    if (most >= cos_sin_rows)
      throw std::out_of_range("sequence " + std::to_string(s) + ": position " + std::to_string(most) +
                              " is beyond the " + std::to_string(cos_sin_rows) + " rows of cos_sin");
  }
}

// What the tokens see can be read.
inline void check_reads(const Sequences& rows, const Cache& cache, int64_t window) {
  for (int64_t s = 0, least, most; s < rows.count; ++s)
    if (position_range(rows, s, least, most))
      check_pages(cache, s, window > 0 && least >= window ? least + 1 - window : 0, most);
}

inline void check_tokens(const EmbedArgs& args) {
  for (int64_t t = 0; t < args.count; ++t)
    if (args.tokens[t] < 0 || args.tokens[t] >= args.vocab)
      throw std::out_of_range("token id " + std::to_string(args.tokens[t]) + " at row " + std::to_string(t) +
                              " is not one of the vocabulary's " + std::to_string(args.vocab));
}

}  // namespace headrace
