// The kernels as plain C structs and function pointers: what the bindings fill in, what every instruction
// set implements. No Python and no torch here; addresses, sizes and strides (in elements) only.
#pragma once

#include <cstddef>
#include <cstdint>

namespace headrace {

enum class Type : int { f32 = 0, bf16 = 1, int8 = 2 };

// What becomes of a float32 result: stored, rounded and stored, or added to a float32 already there.
enum class Output : int { f32 = 0, bf16 = 1, add = 2 };

// A gated layer's weight holds gate and up, and act(gate) * up is what it gives.
enum class Gate : int { none = 0, silu = 1, gelu_tanh = 2 };

// Columns of a packed weight come in panels of 32, those of a gated layer as 16 of gate and the same 16 of up.
constexpr int64_t kPanel = 32;
constexpr int64_t kGatedPanel = kPanel / 2;

struct PackArgs {
  const void* weight;  // [out, in] of `type`, rows `stride` elements apart; gated: first gate, then up
  int64_t out, in, stride;
  Type type;
  Type packed_type;  // `type` itself, or int8
  bool gated;
  void* packed;  // packed_bytes(out, in, packed_type)
};

struct LinearArgs {
  const void* x;  // [rows, in] of `type`
  int64_t rows, x_stride;
  const void* packed;
  const float* bias;  // [out rounded up to kPanel] in the panels' order, or null
  int64_t out, in;
  Type type;
  Type packed_type;
  Gate gate;
  void* y;  // [rows, out], or gated [rows, out / 2]
  int64_t y_stride;
  Output output;  // not `add` where gated
};

struct NormArgs {
  const float* x;  // [rows, columns]
  const float* weight;
  int64_t rows, columns;
  float eps;
  void* y;
  Output output;
};

// Where a layer's keys and values lie. A page holds, for each of its layers and each kv head, with D the head
// size rounded up to 16 and B the block size rounded up to 16:
//   bf16:  keys [D / 2][B][2], values [B / 2][D][2]     f32:  keys [D][B], values [B][D]
// so that 16 keys, or 16 dimensions of a value, fill the lanes of a vector.
struct Cache {
  void* pages;
  int64_t page_count, page_stride;  // in elements
  int64_t layer;
  int64_t kv_heads, head_dim, block_size;
  const int32_t* table;  // [sequences, ...], rows `table_stride` apart
  int64_t table_stride, table_width;
};

struct Sequences {
  const int32_t* query_start;  // [count + 1]
  const int32_t* positions;    // [tokens]
  int64_t count, tokens;
};

// Rows of a table as float32, times a scale.
struct EmbedArgs {
  const int32_t* tokens;
  int64_t count;
  const void* table;  // [vocab, columns] of `type`
  int64_t vocab, columns;
  Type type;
  float scale;
  float* y;  // [count, columns]
};

// x becomes cap * tanh(x / cap).
struct CapArgs {
  float* x;  // [rows, columns]
  int64_t rows, columns;
  float cap;
};

struct RotateArgs {
  const void* qkv;  // [tokens, (heads + 2 * kv_heads) * head_dim]
  Type type;
  int64_t heads;
  Sequences sequences;
  Cache cache;
  const float* cos_sin;  // [positions, head_dim]
  int64_t cos_sin_rows;
  const float *q_norm, *k_norm;  // [head_dim] or null
  float eps;
  void* q;  // [tokens, heads * head_dim]
};

struct AttentionArgs {
  const void* q;  // [tokens, heads * head_dim]
  Type type;
  int64_t heads;
  Sequences sequences;
  Cache cache;
  float scale;
  int64_t window;  // 0: none
  float softcap;   // 0: none
  void* out;       // as q
  float* lse;      // [tokens, heads]
};

struct GumbelArgs {
  uint64_t stream;  // from gumbel_stream(seed, position)
  const uint32_t* tokens;
  int64_t count;
  double* out;
};

struct ChooseRow {
  const float* logits;  // [columns]
  float temperature;    // 0: the largest, without noise
  uint64_t stream;      // as in GumbelArgs
};

struct ChooseArgs {
  const ChooseRow* rows;
  int64_t count, columns;
  int64_t* tokens;  // [count]; -1 where a row has no finite maximum, or holds what is not a number
};

struct ReadArgs {
  const void* memory;  // 64-byte aligned
  int64_t bytes;
};

struct KernelTable {
  const char* level;
  void (*pack)(const PackArgs&);
  void (*linear)(const LinearArgs&);
  void (*norm)(const NormArgs&);
  void (*embed)(const EmbedArgs&);
  void (*cap)(const CapArgs&);
  void (*rotate)(const RotateArgs&);
  void (*attention)(const AttentionArgs&);
  void (*gumbel)(const GumbelArgs&);
  void (*uniform)(const GumbelArgs&);
  void (*choose)(const ChooseArgs&);
  uint64_t (*read)(const ReadArgs&);
};

// Static, so that each level keeps its own copy (see CMakeLists.txt).
static inline constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// The inner dimension is padded to a whole matrix tile where there are such: to 64 bytes.
static inline constexpr int64_t packed_inner(int64_t in, Type type) {
  return type == Type::bf16 ? round_up(in, 32) : type == Type::int8 ? round_up(in, 64) : in;
}

// In int8, a float32 scale and an int32 sum of each column follow the panels.
static inline constexpr int64_t packed_bytes(int64_t out, int64_t in, Type type) {
  const int64_t element = type == Type::bf16 ? 2 : type == Type::int8 ? 1 : 4;
  return round_up(out, kPanel) * (packed_inner(in, type) * element + (type == Type::int8 ? 8 : 0));
}

static inline constexpr int64_t page_elements(int64_t layers, int64_t kv_heads, int64_t head_dim, int64_t block_size) {
  return layers * kv_heads * 2 * round_up(head_dim, 16) * round_up(block_size, 16);
}

// The kernels of the level in use; see dispatch.cpp.
const KernelTable& kernels();

}  // namespace headrace
