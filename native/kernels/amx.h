// Matrix tiles (AMX), where the level has them: bfloat16 rows of A times pairs of B, 32 by 32 at a time.
//
// Tiles 0-3 are sums (two blocks of rows times two of columns), 4 and 5 hold A, 6 and 7 hold B. An element's sum
// takes A and B in order of k, a tile's depth per instruction, however many rows are in the tile.
#pragma once

#include "simd.h"

#if defined(__AMX_BF16__)

namespace headrace::HEADRACE_LEVEL {

// The layout that LDTILECFG reads (Intel SDM, volume 2).
struct alignas(64) TileConfig {
  uint8_t palette, start_row;
  uint8_t reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// The compiler does not see what a tile instruction reads: ordinary stores before it must be done.
HEADRACE_INLINE void fence() { asm volatile("" ::: "memory"); }

// Sets the shape of the tiles for `rows` (1 … 32) rows of A and `depth` values of k (even, at most 32).
HEADRACE_INLINE void configure_tiles(int64_t rows, int depth) {
  TileConfig config;
  std::memset(&config, 0, sizeof config);
  config.palette = 1;
  const int64_t upper = rows < 16 ? rows : 16;
  const int64_t lower = rows > 16 ? rows - 16 : upper;
  const auto set = [&](int tile, int64_t count, int bytes) {
    config.rows[tile] = static_cast<uint8_t>(count);
    config.row_bytes[tile] = static_cast<uint16_t>(bytes);
  };
  set(0, upper, 64);
  set(1, upper, 64);
  set(2, lower, 64);
  set(3, lower, 64);
  set(4, upper, depth * 2);
  set(5, lower, depth * 2);
  set(6, depth / 2, 64);
  set(7, depth / 2, 64);
  fence();
  _tile_loadconfig(&config);
}

HEADRACE_INLINE void release_tiles() { _tile_release(); }

}  // namespace headrace::HEADRACE_LEVEL

#endif
