// Linear layers over int8 weights: a scale for each column of the weight, and one for each row of x, taken when it comes.
//
// Panels are [out / 32][in / 4][32][4], `in` padded with zeros to a multiple of 64; then a float32 scale and an int32
// sum of codes for each column. Codes are round(value / scale), with scale = max|value| / 127 for weights. Activations
// have a few values far out, which would leave eight bits too coarse for the rest, and a second byte of them costs no
// memory traffic: their codes reach to 127 * 256 and are cut into two rows of bytes, high * 256 + low, so
//   y = (float(sum of high * w) * 256 + float(sum of low * w)) * (x scale * w scale), then the epilogue.
// The sums are integers and exact: every level, every tile and every company of rows gives the same bits.
//
// Levels with VNNI multiply unsigned by signed bytes, so bytes of x are stored there with 128 added, and 128 times the
// column's sum comes off at the end.
#include "blocks.h"
#include "epilogue.h"
#include "product.h"
#include "tile_linear.h"

namespace headrace::HEADRACE_LEVEL {
namespace {

constexpr int kVectors = kPanel / kLanes;
constexpr int64_t kBytesPerStep = 4;  // values of k in a step
constexpr int kHalves = 2;            // rows of bytes of a row of x: high, low
constexpr float kMostWeight = 127.0f, kMostActivation = 127.0f * 256.0f;

#if defined(__AVX512VNNI__)
constexpr int32_t kOffset = 128;
#else
constexpr int32_t kOffset = 0;
#endif

HEADRACE_INLINE void store_bytes(uint8_t* to, Int16 v) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)v.part[0]));
#else
  int32_t lane[kLanes];
  std::memcpy(lane, &v, sizeof lane);
  for (int i = 0; i < kLanes; ++i) to[i] = static_cast<uint8_t>(lane[i]);
#endif
}

HEADRACE_INLINE void store_some_bytes(uint8_t* to, Int16 v, int64_t n) {
  if (n == kLanes) {
    store_bytes(to, v);
    return;
  }
  uint8_t tail[kLanes];
  store_bytes(tail, v);
  std::memcpy(to, tail, static_cast<size_t>(n));
}

// put(i, n, codes) takes the codes of a row, at most `most`. Returns their scale, which is infinite or not a number
// where a value is.
template <class T, class Put>
HEADRACE_INLINE float quantize_row(const T* from, int64_t count, float most, Put put) {
  // As bits, magnitudes are in the order of their values and what is not a number comes last.
  const Int16 magnitude = broadcast(int32_t{0x7fffffff});
  Float16 tops = broadcast(0.0f);
  over_row(count, [&](int64_t i, int64_t n) {
    const Int16 v = bits(load_lanes(from + i, n)) & magnitude;
    tops = select(bits(tops) < v, from_bits(v), tops);
  });
  int32_t lane[kLanes];
  std::memcpy(lane, &tops, sizeof lane);
  for (int i = 1; i < kLanes; ++i)
    if (lane[i] > lane[0]) lane[0] = lane[i];
  float top;
  std::memcpy(&top, lane, 4);

  constexpr float kLeast = 1e-30f;  // below it the quotient could overflow; such a row counts as zeros
  const Float16 inverse = broadcast(top >= kLeast ? most / top : 0.0f);
  const Float16 shift = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  over_row(count, [&](int64_t i, int64_t n) {
    put(i, n, bits(load_lanes(from + i, n) * inverse + shift) - bits(shift));
  });
  return top < kLeast ? 0.0f : top / most;
}

template <class T>
float quantize_activations(const T* from, int64_t count, uint8_t* high, uint8_t* low) {
  const Int16 half = broadcast(int32_t{128}), offset = broadcast(kOffset);
  return quantize_row(from, count, kMostActivation, [&](int64_t i, int64_t n, Int16 code) {
    const Int16 upper = shift_right(code + half, 8);
    store_some_bytes(high + i, upper + offset, n);
    store_some_bytes(low + i, code - shift_left(upper, 8) + offset, n);
  });
}

// What follows the panels.
HEADRACE_INLINE const float* scales_of(const void* packed, int64_t panels, int64_t inner) {
  return reinterpret_cast<const float*>(static_cast<const char*>(packed) + panels * kPanel * inner);
}
HEADRACE_INLINE const int32_t* sums_of(const void* packed, int64_t panels, int64_t inner) {
  return reinterpret_cast<const int32_t*>(scales_of(packed, panels, inner) + panels * kPanel);
}

template <class T>
void pack_panels(const PackArgs& args) {
  const int64_t inner = packed_inner(args.in, Type::int8), panels = round_up(args.out, kPanel) / kPanel;
  float* scales = const_cast<float*>(scales_of(args.packed, panels, inner));
  int32_t* sums = const_cast<int32_t*>(sums_of(args.packed, panels, inner));
  auto pack_panel = [&](int64_t panel) {
    uint8_t* codes = static_cast<uint8_t*>(scratch(Slot::tile, static_cast<size_t>(kPanel * inner)));
    std::memset(codes, 0, static_cast<size_t>(kPanel * inner));
    for (int64_t column = 0; column < kPanel; ++column) {
      const int64_t row = source_row(args, panel, column), at = panel * kPanel + column;
      scales[at] = 0.0f;
      if (row >= 0)
        scales[at] = quantize_row(static_cast<const T*>(args.weight) + row * args.stride, args.in, kMostWeight,
                                  [&](int64_t i, int64_t n, Int16 code) {
                                    store_some_bytes(codes + column * inner + i, code, n);
                                  });
      int32_t sum = 0;
      for (int64_t k = 0; k < inner; ++k) sum += static_cast<int8_t>(codes[column * inner + k]);
      sums[at] = sum;
    }
    uint8_t* to = static_cast<uint8_t*>(args.packed) + panel * inner * kPanel;
    for (int64_t k = 0; k < inner; k += kBytesPerStep)
      for (int64_t column = 0; column < kPanel; ++column, to += kBytesPerStep)
        std::memcpy(to, codes + column * inner + k, kBytesPerStep);
  };
  in_parallel(panels, pack_panel);
}

// sum[column] += the four products of x and of a column's four bytes.
HEADRACE_INLINE Int16 dot_step(Int16 sum, const uint8_t* x, Int16 w) {
#if defined(__AVX512VNNI__)
  int32_t four;
  std::memcpy(&four, x, 4);
  sum.part[0] = (NativeInt)_mm512_dpbusd_epi32((__m512i)sum.part[0], _mm512_set1_epi32(four), (__m512i)w.part[0]);
#elif defined(__AVX2__)
  int32_t four;
  std::memcpy(&four, x, 4);
  // Two products of at most 128 * 127 each fit into 16 bits.
  const __m256i codes = _mm256_set1_epi32(four), magnitude = _mm256_abs_epi8(codes), ones = _mm256_set1_epi16(1);
  HEADRACE_EACH {
    const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8((__m256i)w.part[i], codes));
    sum.part[i] = sum.part[i] + (NativeInt)_mm256_madd_epi16(pairs, ones);
  }
#else
  for (int k = 0; k < 4; ++k) {
    const Int16 byte = shift_right(shift_left(w, 24 - 8 * k), 24);
    const int32_t code = static_cast<int8_t>(x[k]);
    HEADRACE_EACH sum.part[i] = sum.part[i] + byte.part[i] * code;
  }
#endif
  return sum;
}

// A call's operands as codes.
struct Codes {
  const uint8_t* x;  // [rows, kHalves, inner]
  const float* x_scales;
  int64_t inner;
  const float* scales;
  const int32_t* sums;
};

// sums[half][vector] of one row and panel.
HEADRACE_INLINE void finish_sums(const LinearArgs& args, const Codes& codes, int64_t row, int64_t panel,
                                 const Int16 (&sums)[kHalves][kVectors]) {
  const int64_t column = panel * kPanel;
  const Float16 x_scale = broadcast(codes.x_scales[row]);
  Float16 result[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    Int16 high = sums[0][v], low = sums[1][v];
    if (kOffset != 0) {
      const Int16 excess = shift_left(load_words(codes.sums + column + v * kLanes), 7);
      high = high - excess;
      low = low - excess;
    }
    result[v] = (to_floats(high) * broadcast(256.0f) + to_floats(low)) *
                (load(codes.scales + column + v * kLanes) * x_scale);
  }
  finish_row(args, row, panel, result[0], result[1]);
}

#if !defined(__AMX_INT8__)
// How far ahead of the multiplication weights are asked for: the processor's own guesses end at a page.
constexpr int64_t kAheadBytes = 4096;

void compute(const LinearArgs& args, const Codes& codes, const Block& block) {
  in_row_tiles<(kRowTile + 1) / kHalves>(block.row_end - block.row, [&](auto rows, int64_t first) {
    constexpr int kRows = decltype(rows)::count;
    const int64_t row = block.row + first;
    for (int64_t panel = block.panel; panel < block.panel_end; ++panel) {
      Int16 sum[kRows][kHalves][kVectors];
      for (auto& halves : sum)
        for (auto& line : halves)
          for (auto& v : line) v = broadcast(int32_t{0});
      const uint8_t* x = codes.x + row * kHalves * codes.inner;
      const char* w = static_cast<const char*>(args.packed) + panel * codes.inner * kPanel;
      for (int64_t k = 0; k < codes.inner; k += kBytesPerStep, w += kBytesPerStep * kPanel) {
        Int16 column[kVectors];
        for (int v = 0; v < kVectors; ++v) __builtin_prefetch(w + kAheadBytes + v * 64);
        for (int v = 0; v < kVectors; ++v) column[v] = load_words(w + v * kLanes * kBytesPerStep);
        for (int r = 0; r < kRows; ++r)
          for (int half = 0; half < kHalves; ++half)
            for (int v = 0; v < kVectors; ++v)
              sum[r][half][v] = dot_step(sum[r][half][v], x + (r * kHalves + half) * codes.inner + k, column[v]);
      }
      for (int r = 0; r < kRows; ++r) finish_sums(args, codes, row + r, panel, sum[r]);
    }
  });
}
#else
void compute(const LinearArgs& args, const Codes& codes, const Block& block) {
  const TileOperands operands{reinterpret_cast<const char*>(codes.x), codes.inner,
                              static_cast<const char*>(args.packed), args.rows * kHalves, codes.inner};
  const Block halves{block.row * kHalves, block.row_end * kHalves, block.panel, block.panel_end};
  tile_block<int32_t>(operands, halves, [&](int64_t half, int64_t panel, int64_t count, const int32_t(*sum)[kPanel]) {
    for (int64_t i = 0; i < count; i += kHalves) {
      Int16 both[kHalves][kVectors];
      for (int j = 0; j < kHalves; ++j)
        for (int v = 0; v < kVectors; ++v) both[j][v] = load_words(sum[i + j] + v * kLanes);
      finish_sums(args, codes, (half + i) / kHalves, panel, both);
    }
  });
}
#endif

}  // namespace

void pack_int8(const PackArgs& args) {
  if (args.type == Type::bf16)
    pack_panels<bf16>(args);
  else
    pack_panels<float>(args);
}

void linear_int8(const LinearArgs& args) {
  const int64_t inner = packed_inner(args.in, Type::int8), panels = round_up(args.out, kPanel) / kPanel;
  const int64_t code_bytes = args.rows * kHalves * inner;
  char* memory = static_cast<char*>(
      scratch(Slot::input, static_cast<size_t>(code_bytes + args.rows * static_cast<int64_t>(sizeof(float)))));
  uint8_t* x = reinterpret_cast<uint8_t*>(memory);
  float* x_scales = reinterpret_cast<float*>(memory + code_bytes);
  constexpr int64_t kGrain = 32768;  // values below which a region costs more than it saves
  in_row_ranges(args.rows, kGrain / (args.in + 1) + 1, [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) {
      uint8_t *high = x + row * kHalves * inner, *low = high + inner;
      x_scales[row] =
          args.type == Type::bf16
              ? quantize_activations(static_cast<const bf16*>(args.x) + row * args.x_stride, args.in, high, low)
              : quantize_activations(static_cast<const float*>(args.x) + row * args.x_stride, args.in, high, low);
      std::memset(high + args.in, 0, static_cast<size_t>(inner - args.in));
      std::memset(low + args.in, 0, static_cast<size_t>(inner - args.in));
    }
  });
  const Codes codes{x, x_scales, inner, scales_of(args.packed, panels, inner), sums_of(args.packed, panels, inner)};
  in_blocks(args.rows, panels, inner * kPanel, [&](const Block& block) { compute(args, codes, block); });
}

}  // namespace headrace::HEADRACE_LEVEL
