#include "program.h"

#include <stdexcept>
#include <string>

#include "checks.h"
#include "thread_pool.h"

namespace headrace {
namespace {

Cache with_table(Cache cache, const ProgramInputs& inputs, int group) {
  if (group < 0 || static_cast<size_t>(group) >= inputs.tables.size())
    throw std::out_of_range("the program reads block tables of group " + std::to_string(group) + "; the batch has " +
                            std::to_string(inputs.tables.size()));
  const Table& table = inputs.tables[static_cast<size_t>(group)];
  cache.table = table.entries;
  cache.table_stride = table.stride;
  cache.table_width = table.width;
  return cache;
}

}  // namespace

// Fills in a step's arguments and calls its kernel.
struct Program::Runner {
  const Program& program;
  const ProgramInputs& inputs;

  void* at(int slot) const {
    const int64_t offset = program.offsets_[static_cast<size_t>(slot)];
    if (offset == kInput) return const_cast<void*>(inputs.x);
    if (offset == kOutput) return inputs.y;
    return inputs.workspace + offset * inputs.rows;
  }

  void operator()(const Embed& step) const {
    EmbedArgs args = step.args;
    args.tokens = static_cast<const int32_t*>(inputs.x);
    args.count = inputs.rows;
    args.y = static_cast<float*>(at(step.y));
    kernels().embed(args);
  }
  void operator()(const Linear& step) const {
    LinearArgs args = step.args;
    args.x = at(step.x);
    args.y = at(step.y);
    args.rows = inputs.rows;
    kernels().linear(args);
  }
  void operator()(const Norm& step) const {
    NormArgs args = step.args;
    args.x = static_cast<const float*>(at(step.x));
    args.y = at(step.y);
    args.rows = inputs.rows;
    kernels().norm(args);
  }
  void operator()(const Cap& step) const {
    CapArgs args = step.args;
    args.x = static_cast<float*>(at(step.x));
    args.rows = inputs.rows;
    kernels().cap(args);
  }
  void operator()(const Rotate& step) const {
    RotateArgs args = step.args;
    args.qkv = at(step.qkv);
    args.q = at(step.q);
    args.sequences = inputs.sequences;
    args.cache = with_table(args.cache, inputs, step.group);
    kernels().rotate(args);
  }
  void operator()(const Attention& step) const {
    AttentionArgs args = step.args;
    args.q = at(step.q);
    args.out = at(step.out);
    args.lse = static_cast<float*>(at(step.lse));
    args.sequences = inputs.sequences;
    args.cache = with_table(args.cache, inputs, step.group);
    kernels().attention(args);
  }
};

void Program::rotate(const RotateArgs& args, int qkv, int q, int group) {
  require({group, args.cache, args.cos_sin_rows, 0});
  steps_.push_back(Rotate{args, qkv, q, group});
}

void Program::attention(const AttentionArgs& args, int q, int out, int lse, int group) {
  require({group, args.cache, 0, args.window});
  steps_.push_back(Attention{args, q, out, lse, group});
}

void Program::require(const Check& check) {
  for (const Check& known : checks_)
    if (known.group == check.group && known.cache.page_count == check.cache.page_count &&
        known.cache.block_size == check.cache.block_size && known.cos_sin_rows == check.cos_sin_rows &&
        known.window == check.window)
      return;
  checks_.push_back(check);
}

void Program::check(const ProgramInputs& inputs) const {
  if (!checks_.empty()) {
    if (inputs.sequences.tokens != inputs.rows)
      throw std::out_of_range("a batch of " + std::to_string(inputs.sequences.tokens) + " positions came with " +
                              std::to_string(inputs.rows) + " rows");
    check_sequences(inputs.sequences);
  }
  for (const Check& one : checks_) {
    const Cache cache = with_table(one.cache, inputs, one.group);
    if (one.cos_sin_rows > 0)
      check_writes(inputs.sequences, cache, one.cos_sin_rows);
    else
      check_reads(inputs.sequences, cache, one.window);
  }
  for (const auto& step : steps_)
    if (const Embed* embed = std::get_if<Embed>(&step)) {
      EmbedArgs args = embed->args;
      args.tokens = static_cast<const int32_t*>(inputs.x);
      args.count = inputs.rows;
      check_tokens(args);
    }
}

void Program::run(const ProgramInputs& inputs) const {
  if (inputs.rows == 0) return;
  check(inputs);
  const StayAwake stay_awake;
  for (const auto& step : steps_) std::visit(Runner{*this, inputs}, step);
}

}  // namespace headrace
