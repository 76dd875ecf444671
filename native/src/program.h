// A program: a fixed sequence of kernel calls, recorded once and run for every step with other rows.
//
// Activations are [rows, columns] and live in slots: one is the caller's input, one the caller's output, the others
// lie in the caller's workspace, each at its offset times the number of rows. So what a step of few rows touches is
// small and lies together. Addresses of weights, tables and pages are part of the program, and who
// records it keeps them alive. No Python here: a whole run needs no interpreter.
#pragma once

#include <cstdint>
#include <variant>
#include <vector>

#include "kernels.h"

namespace headrace {

// One KV group's block tables in a run, [sequences, width].
struct Table {
  const int32_t* entries;
  int64_t stride, width;
};

struct ProgramInputs {
  const void* x;
  int64_t rows;
  void* y;
  char* workspace;  // workspace_bytes(rows), 64-byte aligned
  Sequences sequences;
  std::vector<Table> tables;
};

class Program {
 public:
  // Each records one call; what depends on the run (rows, sequences, tables, addresses of slots) is filled in then.
  void embed(const EmbedArgs& args, int y) { steps_.push_back(Embed{args, y}); }  // of the input
  void linear(const LinearArgs& args, int x, int y) { steps_.push_back(Linear{args, x, y}); }
  void norm(const NormArgs& args, int x, int y) { steps_.push_back(Norm{args, x, y}); }
  void cap(const CapArgs& args, int x) { steps_.push_back(Cap{args, x}); }
  void rotate(const RotateArgs& args, int qkv, int q, int group);
  void attention(const AttentionArgs& args, int q, int out, int lse, int group);

  // Where the slots are, in bytes for each row and multiples of 64, or one of these.
  static constexpr int64_t kInput = -1, kOutput = -2;
  void place(std::vector<int64_t> offsets) { offsets_ = std::move(offsets); }

  // Throws std::out_of_range before anything is written where tokens, positions or pages are not what they can be.
  void run(const ProgramInputs& inputs) const;

 private:
  struct Embed {
    EmbedArgs args;
    int y;
  };
  struct Linear {
    LinearArgs args;
    int x, y;
  };
  struct Norm {
    NormArgs args;
    int x, y;
  };
  struct Cap {
    CapArgs args;
    int x;
  };
  struct Rotate {
    RotateArgs args;
    int qkv, q, group;
  };
  struct Attention {
    AttentionArgs args;
    int q, out, lse, group;
  };
  // What is checked once for all layers that ask the same of a group's tables.
  struct Check {
    int group;
    Cache cache;
    int64_t cos_sin_rows;  // 0: of reading
    int64_t window;
  };
  struct Runner;

  void require(const Check& check);
  void check(const ProgramInputs& inputs) const;

  std::vector<std::variant<Embed, Linear, Norm, Cap, Rotate, Attention>> steps_;
  std::vector<Check> checks_;
  std::vector<int64_t> offsets_;
};

}  // namespace headrace
