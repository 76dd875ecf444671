// Linear layers over weights packed in panels of 32 columns:
//   bf16: [out / 32][in / 2][32][2], `in` padded with zeros to a multiple of 32     f32: [out / 32][in][32]
// A panel is one contiguous run that is read from front to back, once for every tile of rows. Every element of the
// result is one sum over k in ascending order, so a row has the same bits in any company.
#include "amx.h"
#include "kernels.h"
#include "parallel.h"
#include "product.h"

namespace headrace::HEADRACE_LEVEL {
namespace {

constexpr int kVectors = kPanel / kLanes;

template <class T>
void pack_panels(const PackArgs& args) {
  const int64_t inner = packed_inner(args.in, args.type);
  auto pack_panel = [&](int64_t panel) {
    T* to = static_cast<T*>(args.packed) + panel * inner * kPanel;
    for (int64_t step = 0; step < inner / kStep<T>; ++step)
      for (int64_t column = 0; column < kPanel; ++column)
        for (int64_t part = 0; part < kStep<T>; ++part) {
          const int64_t k = step * kStep<T> + part, n = panel * kPanel + column;
          *to++ = n < args.out && k < args.in ? static_cast<const T*>(args.weight)[n * args.stride + k] : T{};
        }
  };
  in_parallel(round_up(args.out, kPanel) / kPanel, pack_panel);
}

// One row of a panel's sums: bias, then rounded, stored or added, at most to the last column.
HEADRACE_INLINE void finish_row(const LinearArgs& args, int64_t row, int64_t panel, Float16 first, Float16 second) {
  const int64_t column = panel * kPanel;
  if (args.bias) {
    first = first + load(args.bias + column);
    second = second + load(args.bias + column + kLanes);
  }
  const int64_t at = row * args.y_stride + column;
  const int64_t left = args.out - column;
  if (args.output == Output::bf16) {
    bf16* y = static_cast<bf16*>(args.y) + at;
    if (left >= kPanel) {
      store_pair(y, first, second);
    } else {
      store_some(y, first, left < kLanes ? left : kLanes);
      if (left > kLanes) store_some(y + kLanes, second, left - kLanes);
    }
    return;
  }
  float* y = static_cast<float*>(args.y) + at;
  const bool add = args.output == Output::add;
  if (left >= kPanel) {
    store(y, add ? load(y) + first : first);
    store(y + kLanes, add ? load(y + kLanes) + second : second);
  } else {
    const int64_t n = left < kLanes ? left : kLanes;
    store_some(y, add ? load_some(y, n) + first : first, n);
    if (left > kLanes) {
      const int64_t m = left - kLanes;
      store_some(y + kLanes, add ? load_some(y + kLanes, m) + second : second, m);
    }
  }
}

// What one task computes: rows [row, row_end) of panels [panel, panel_end).
struct Block {
  int64_t row, row_end, panel, panel_end;
};

template <class T>
void compute(const LinearArgs& args, const Block& block) {
  const int64_t inner = packed_inner(args.in, args.type);
  const T* x = static_cast<const T*>(args.x);
  in_row_tiles(block.row_end - block.row, [&](auto rows, int64_t first) {
    constexpr int kRows = decltype(rows)::count;
    const int64_t row = block.row + first;
    for (int64_t panel = block.panel; panel < block.panel_end; ++panel) {
      Float16 sum[kRows][kVectors];
      for (auto& line : sum)
        for (auto& v : line) v = broadcast(0.0f);
      multiply<T, kRows, kVectors>(sum, x + row * args.x_stride, args.x_stride,
                                   static_cast<const T*>(args.packed) + panel * inner * kPanel,
                                   kPanel * kStep<T>, inner / kStep<T>);
      for (int r = 0; r < kRows; ++r) finish_row(args, row + r, panel, sum[r][0], sum[r][1]);
    }
  });
}

#if defined(__AMX_BF16__)
constexpr int kDepth = 32;  // values of k in a tile

// The sums of one tile and panel, finished a few rows at a time between the next tile's instructions, which take
// so long that this costs next to nothing.
struct Pending {
  alignas(64) float sum[2][32][kPanel];
  int64_t row = 0, panel = 0, done = 0, rows = 0;
  int buffer = 0;

  HEADRACE_INLINE void finish(Pending& p, const LinearArgs& args, int64_t end) {
    if (end > p.rows) end = p.rows;
    const float(*sum)[kPanel] = p.sum[p.buffer];
    int64_t r = p.done;
    if (args.output == Output::bf16 && !args.bias && (p.panel + 1) * kPanel <= args.out) {
      bf16* y = static_cast<bf16*>(args.y) + (p.row + r) * args.y_stride + p.panel * kPanel;
      for (; r < end; ++r, y += args.y_stride) store_pair(y, load(sum[r]), load(sum[r] + kLanes));
    } else {
      for (; r < end; ++r) finish_row(args, p.row + r, p.panel, load(sum[r]), load(sum[r] + kLanes));
    }
    p.done = r;
  }
};

// Rows [row, row + rows) of one panel, in the shape the tiles are configured for; the first `skip` of them are done
// already. While it computes it asks for `lines` cache lines a step from `ahead`, and moves that on.
template <bool kTwoBlocks>
HEADRACE_INLINE void tile_panel(const LinearArgs& args, int64_t row, int64_t rows, int64_t skip, int64_t panel,
                                Pending& pending, const char*& ahead, int64_t lines) {
  const int64_t inner = packed_inner(args.in, args.type);
  const bf16* x = static_cast<const bf16*>(args.x) + row * args.x_stride;
  const bf16* w = static_cast<const bf16*>(args.packed) + panel * inner * kPanel;
  const int64_t x_bytes = args.x_stride * 2;
  const int64_t rows_per_step = (pending.rows * kDepth + inner - 1) / inner;
  _tile_zero(0);
  _tile_zero(1);
  if (kTwoBlocks) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < inner; k += kDepth) {
    for (int64_t line = 0; line < lines; ++line, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
    _tile_loadd(6, w, 128);
    _tile_loadd(7, w + kLanes * 2, 128);
    _tile_loadd(4, x + k, x_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (kTwoBlocks) {
      _tile_loadd(5, x + 16 * args.x_stride + k, x_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    w += kDepth * kPanel;
    Pending::finish(pending, args, pending.done + rows_per_step);
  }
  Pending::finish(pending, args, pending.rows);
  pending.buffer ^= 1;
  float(*sum)[kPanel] = pending.sum[pending.buffer];
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

// A panel meets all rows of the block before the next, which is on its way to the second cache level meanwhile: the
// weights are read from memory once for each block of rows, behind the multiplication.
template <>
void compute<bf16>(const LinearArgs& args, const Block& block) {
  Pending pending;
  const int64_t inner = packed_inner(args.in, args.type);
  const int64_t tile_rows = args.rows < 32 ? args.rows : 32;
  const int64_t tiles = (block.row_end - block.row + 31) / 32;
  const int64_t lines = (kDepth + tiles - 1) / tiles;  // a panel has `inner` lines
  configure_tiles(tile_rows, kDepth);
  for (int64_t panel = block.panel; panel < block.panel_end; ++panel) {
    const char* ahead = static_cast<const char*>(args.packed) + (panel + 1) * inner * kPanel * 2;
    for (int64_t row = block.row; row < block.row_end; row += 32) {
      // The last tile starts early enough to be whole.
      const int64_t start = row + tile_rows <= args.rows ? row : args.rows - tile_rows;
      const int64_t end = row + 32 < block.row_end ? row + 32 : block.row_end;
      if (tile_rows > 16)
        tile_panel<true>(args, start, end - start, row - start, panel, pending, ahead, lines);
      else
        tile_panel<false>(args, start, end - start, row - start, panel, pending, ahead, lines);
    }
  }
  Pending::finish(pending, args, pending.rows);
  release_tiles();
}
#endif

template <class T>
void run(const LinearArgs& args) {
  const int64_t inner = packed_inner(args.in, args.type);
  const int64_t panels = round_up(args.out, kPanel) / kPanel;
  LinearArgs padded = args;
  if (inner != args.in) {
    T* copy = static_cast<T*>(scratch(Slot::input, static_cast<size_t>(args.rows * inner) * sizeof(T)));
    for (int64_t row = 0; row < args.rows; ++row) {
      std::memcpy(copy + row * inner, static_cast<const T*>(args.x) + row * args.x_stride,
                  static_cast<size_t>(args.in) * sizeof(T));
      std::memset(copy + row * inner + args.in, 0, static_cast<size_t>(inner - args.in) * sizeof(T));
    }
    padded.x = copy;
    padded.x_stride = inner;
  }
  // A block's panels stay in the second cache level while its rows pass by; a few blocks for each thread even out.
  constexpr int64_t kBlockRows = 256;
  constexpr int64_t kBlockBytes = 512 << 10;
  const int64_t panel_bytes = inner * kPanel * static_cast<int64_t>(sizeof(T));
  const int64_t row_blocks = (args.rows + kBlockRows - 1) / kBlockRows;
  int64_t block_panels = kBlockBytes / panel_bytes;
  const int64_t fair = (panels * row_blocks + 4 * threads() - 1) / (4 * threads());
  if (block_panels > fair) block_panels = fair;
  if (block_panels < 1) block_panels = 1;
  const int64_t panel_blocks = (panels + block_panels - 1) / block_panels;
  auto block = [&](int64_t task) {
    const int64_t row = task / panel_blocks * kBlockRows, panel = task % panel_blocks * block_panels;
    const int64_t row_end = row + kBlockRows, panel_end = panel + block_panels;
    compute<T>(padded, Block{row, row_end < args.rows ? row_end : args.rows, panel,
                             panel_end < panels ? panel_end : panels});
  };
  in_parallel(row_blocks * panel_blocks, block);
}

}  // namespace

void pack(const PackArgs& args) {
  if (args.type == Type::bf16)
    pack_panels<bf16>(args);
  else
    pack_panels<float>(args);
}

void linear(const LinearArgs& args) {
  if (args.rows == 0) return;
  if (args.type == Type::bf16)
    run<bf16>(args);
  else
    run<float>(args);
}

}  // namespace headrace::HEADRACE_LEVEL
