// Linear layers over weights packed in panels of 32 columns:
//   bf16: [out / 32][in / 2][32][2], `in` padded with zeros to a multiple of 32     f32: [out / 32][in][32]
// and int8 as linear_int8.cpp says. A panel is one contiguous run that is read from front to back, once for every tile
// of rows. Every element of the result is one sum over k in ascending order, so a row has the same bits in any company.
#include "blocks.h"
#include "epilogue.h"
#include "product.h"
#include "tile_linear.h"

namespace headrace::HEADRACE_LEVEL {

void pack_int8(const PackArgs&);
void linear_int8(const LinearArgs&);

namespace {

constexpr int kVectors = kPanel / kLanes;

template <class T>
void pack_panels(const PackArgs& args) {
  const int64_t inner = packed_inner(args.in, args.type);
  auto pack_panel = [&](int64_t panel) {
    T* to = static_cast<T*>(args.packed) + panel * inner * kPanel;
    int64_t row[kPanel];
    for (int64_t column = 0; column < kPanel; ++column) row[column] = source_row(args, panel, column);
    for (int64_t step = 0; step < inner / kStep<T>; ++step)
      for (int64_t column = 0; column < kPanel; ++column)
        for (int64_t part = 0; part < kStep<T>; ++part) {
          const int64_t k = step * kStep<T> + part;
          *to++ = row[column] >= 0 && k < args.in ? static_cast<const T*>(args.weight)[row[column] * args.stride + k]
                                                  : T{};
        }
  };
  in_parallel(round_up(args.out, kPanel) / kPanel, pack_panel);
}

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
template <>
void compute<bf16>(const LinearArgs& args, const Block& block) {
  const int64_t inner = packed_inner(args.in, args.type);
  const TileOperands operands{static_cast<const char*>(args.x), args.x_stride * 2,
                              static_cast<const char*>(args.packed), args.rows, inner * 2};
  tile_block<float>(operands, block, [&](int64_t row, int64_t panel, int64_t count, const float(*sum)[kPanel]) {
    if (args.output == Output::bf16 && !args.bias && args.gate == Gate::none && (panel + 1) * kPanel <= args.out) {
      bf16* y = static_cast<bf16*>(args.y) + row * args.y_stride + panel * kPanel;
      for (int64_t r = 0; r < count; ++r, y += args.y_stride) store_pair(y, load(sum[r]), load(sum[r] + kLanes));
    } else {
      for (int64_t r = 0; r < count; ++r) finish_row(args, row + r, panel, load(sum[r]), load(sum[r] + kLanes));
    }
  });
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
  in_blocks(args.rows, panels, inner * kPanel * static_cast<int64_t>(sizeof(T)),
            [&](const Block& block) { compute<T>(padded, block); });
}

}  // namespace

void pack(const PackArgs& args) {
  if (args.packed_type == Type::int8)
    pack_int8(args);
  else if (args.type == Type::bf16)
    pack_panels<bf16>(args);
  else
    pack_panels<float>(args);
}

void linear(const LinearArgs& args) {
  if (args.rows == 0) return;
  if (args.packed_type == Type::int8)
    linear_int8(args);
  else if (args.type == Type::bf16)
    run<bf16>(args);
  else
    run<float>(args);
}

}  // namespace headrace::HEADRACE_LEVEL
