// How a linear layer is shared out: blocks of rows and panels, each a task of the thread pool.
#pragma once

#include "kernels.h"
#include "parallel.h"

namespace headrace::HEADRACE_LEVEL {

// Rows [row, row_end) of panels [panel, panel_end).
struct Block {
  int64_t row, row_end, panel, panel_end;
};

// Calls body(Block) for blocks that together are all of `rows` and `panels`, of `panel_bytes` each. A block's panels
// stay in the second cache level while its rows pass by; a few blocks for each thread even out.
template <class Body>
HEADRACE_INLINE void in_blocks(int64_t rows, int64_t panels, int64_t panel_bytes, Body body) {
  constexpr int64_t kBlockRows = 256;
  constexpr int64_t kBlockBytes = 512 << 10;
  const int64_t row_blocks = (rows + kBlockRows - 1) / kBlockRows;
  int64_t block_panels = kBlockBytes / panel_bytes;
  const int64_t fair = (panels * row_blocks + 4 * threads() - 1) / (4 * threads());
  if (block_panels > fair) block_panels = fair;
  if (block_panels < 1) block_panels = 1;
  const int64_t panel_blocks = (panels + block_panels - 1) / block_panels;
  auto block = [&](int64_t task) {
    const int64_t row = task / panel_blocks * kBlockRows, panel = task % panel_blocks * block_panels;
    const int64_t row_end = row + kBlockRows, panel_end = panel + block_panels;
    body(Block{row, row_end < rows ? row_end : rows, panel, panel_end < panels ? panel_end : panels});
  };
  in_parallel(row_blocks * panel_blocks, block);
}

// Which row of the weight is a panel's column, or -1 beyond the last.
HEADRACE_INLINE int64_t source_row(const PackArgs& args, int64_t panel, int64_t column) {
  if (!args.gated) {
    const int64_t row = panel * kPanel + column;
    return row < args.out ? row : -1;
  }
  const int64_t width = args.out / 2, row = panel * kGatedPanel + column % kGatedPanel;
  return row >= width ? -1 : column < kGatedPanel ? row : width + row;
}

}  // namespace headrace::HEADRACE_LEVEL
