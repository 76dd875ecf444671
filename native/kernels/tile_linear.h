// Linear layers on matrix tiles: rows of x times panels of 32 columns, in bfloat16 (float32 sums) or in unsigned times
// signed bytes (int32 sums). A step is 64 bytes of a row of x and 64 bytes of each column in both.
#pragma once

#include "amx.h"
#include "blocks.h"

#if defined(__AMX_BF16__)

namespace headrace::HEADRACE_LEVEL {

struct TileOperands {
  const char* x;
  int64_t x_bytes;  // from row to row
  const char* packed;
  int64_t rows;
  int64_t inner_bytes;  // of a row that is multiplied: a multiple of 64
};

// The sums of one tile and panel, finished a few rows at a time between the next tile's instructions, which take
// so long that this costs next to nothing.
template <class Sum>
struct Pending {
  alignas(64) Sum sum[2][32][kPanel];
  int64_t row = 0, panel = 0, done = 0, rows = 0;
  int buffer = 0;
};

template <class Sum, class Finish>
HEADRACE_INLINE void finish_pending(Pending<Sum>& p, int64_t end, Finish& finish) {
  if (end > p.rows) end = p.rows;
  if (end > p.done) finish(p.row + p.done, p.panel, end - p.done, p.sum[p.buffer] + p.done);
  p.done = end;
}

HEADRACE_INLINE void multiply_upper(const float*) {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
}
HEADRACE_INLINE void multiply_lower(const float*) {
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}
HEADRACE_INLINE void multiply_upper(const int32_t*) {
  _tile_dpbusd(0, 4, 6);
  _tile_dpbusd(1, 4, 7);
}
HEADRACE_INLINE void multiply_lower(const int32_t*) {
  _tile_dpbusd(2, 5, 6);
  _tile_dpbusd(3, 5, 7);
}

constexpr int64_t kTileBytes = 64;  // of x, in a step

// What is still to be asked for of a block's panels, which lie one behind the other.
struct Ahead {
  const char *next, *end;

  inline __attribute__((always_inline)) void ask(int64_t lines) {
    const int64_t left = (end - next) / 64;
    if (lines > left) lines = left;
    for (int64_t line = 0; line < lines; ++line, next += 64) _mm_prefetch(next, _MM_HINT_T1);
  }
};

// How far weights are asked for before they are used: some three times what memory sends during one wait for it.
constexpr int64_t kAheadLines = 160;

// Rows [row, row + rows) of one panel, in the shape the tiles are configured for; the first `skip` of them are done
// already. While it computes it asks for `lines` cache lines a step.
template <bool kTwoBlocks, class Sum, class Finish>
HEADRACE_INLINE void tile_panel(const TileOperands& operands, int64_t row, int64_t rows, int64_t skip, int64_t panel,
                                Pending<Sum>& pending, Finish& finish, Ahead& ahead, int64_t lines) {
  const char* x = operands.x + row * operands.x_bytes;
  const char* w = operands.packed + panel * operands.inner_bytes * kPanel;
  // Even, since two rows of bytes can be one row of the result.
  const int64_t rows_per_step =
      round_up((pending.rows * kTileBytes + operands.inner_bytes - 1) / operands.inner_bytes, 2);
  _tile_zero(0);
  _tile_zero(1);
  if (kTwoBlocks) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < operands.inner_bytes; k += kTileBytes) {
    ahead.ask(lines);
    _tile_loadd(6, w, 128);
    _tile_loadd(7, w + 64, 128);
    _tile_loadd(4, x + k, operands.x_bytes);
    multiply_upper(static_cast<const Sum*>(nullptr));
    if (kTwoBlocks) {
      _tile_loadd(5, x + 16 * operands.x_bytes + k, operands.x_bytes);
      multiply_lower(static_cast<const Sum*>(nullptr));
    }
    w += kTileBytes * kPanel;
    finish_pending(pending, pending.done + rows_per_step, finish);
  }
  finish_pending(pending, pending.rows, finish);
  pending.buffer ^= 1;
  Sum(*sum)[kPanel] = pending.sum[pending.buffer];
  _tile_stored(0, &sum[0][0], kPanel * 4);
  _tile_stored(1, &sum[0][kLanes], kPanel * 4);
  if (kTwoBlocks) {
    _tile_stored(2, &sum[16][0], kPanel * 4);
    _tile_stored(3, &sum[16][kLanes], kPanel * 4);
  }
  pending.row = row;
  pending.panel = panel;
  pending.rows = rows;
  pending.done = skip;
}

// finish(row, panel, count, sums) takes the sums, [count][kPanel], of rows from `row`. A panel meets all rows of the
// block before the next, whose beginning is on its way to the second cache level meanwhile: the weights are read from
// memory once for each block of rows, behind the multiplication. Nothing beyond the block is asked for: that is for
// another thread.
template <class Sum, class Finish>
HEADRACE_INLINE void tile_block(const TileOperands& operands, const Block& block, Finish finish) {
  Pending<Sum> pending;
  const int64_t tile_rows = operands.rows < 32 ? operands.rows : 32;
  const int64_t tiles = (block.row_end - block.row + 31) / 32;
  const int64_t lines = (kPanel + tiles - 1) / tiles;  // a step of a panel is kPanel lines
  const int64_t panel_bytes = operands.inner_bytes * kPanel;
  Ahead ahead{operands.packed + block.panel * panel_bytes, operands.packed + block.panel_end * panel_bytes};
  ahead.ask(kAheadLines);
  configure_tiles(tile_rows, kTileBytes / 2);
  for (int64_t panel = block.panel; panel < block.panel_end; ++panel) {
    for (int64_t row = block.row; row < block.row_end; row += 32) {
      // The last tile starts early enough to be whole.
      const int64_t start = row + tile_rows <= operands.rows ? row : operands.rows - tile_rows;
      const int64_t end = row + 32 < block.row_end ? row + 32 : block.row_end;
      if (tile_rows > 16)
        tile_panel<true>(operands, start, end - start, row - start, panel, pending, finish, ahead, lines);
      else
        tile_panel<false>(operands, start, end - start, row - start, panel, pending, finish, ahead, lines);
    }
  }
  finish_pending(pending, pending.rows, finish);
  release_tiles();
}

}  // namespace headrace::HEADRACE_LEVEL

#endif
