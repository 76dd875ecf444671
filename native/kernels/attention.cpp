// Causal grouped-query attention over paged keys and values, in float32 sums.
//
// A sequence's keys are cut by absolute position into partitions of 512, and those into runs of 16 (one vector of
// lanes). A partition is worked off whole: scores, their maximum, exponentials, weighted sum of values; a query's
// partitions are then merged in ascending order (the online softmax of Milakov and Gimelshein, 2018, with
// a step of 512 keys). What a query may not see has weight 0 and changes no bit. So the arithmetic for a query
// depends on its position and window alone: not on how many queries share a tile, nor on which thread computed
// which partition, nor on the block size. There is no separate path for decode.
//
// A tile is up to 32 rows, a row being one query head at one token; all query heads of a kv head are
// rows of the same tile, so its keys and values are read once for all of them.
#include "attention_tile.h"

namespace headrace::HEADRACE_LEVEL {
namespace {

template <class T>
void work_off(const AttentionArgs& args, const Task& task) {
  Tile<T> tile(args, task);
  const int64_t depth = tile.layout.depth, size = sums_size(task.rows, depth);
  float* memory = static_cast<float*>(scratch(Slot::sums, static_cast<size_t>(2 * size) * sizeof(float)));
  const Sums whole = sums_at(memory), part = sums_at(memory + size);
  if (!task.partials) {
    tile.clear(whole);
    for (int64_t number = task.first; number < task.end; ++number) {
      tile.partition(number, part);
      tile.merge(part, whole);
    }
    tile.finish(whole);
  } else {
    const auto left = [&](int64_t number) {
      return sums_at(task.partials + (number - task.tile_first) * size);
    };
    for (int64_t number = task.first; number < task.end; ++number) tile.partition(number, left(number));
    if (__atomic_sub_fetch(task.unfinished, 1, __ATOMIC_ACQ_REL) == 0) {
      tile.clear(whole);
      for (int64_t number = task.tile_first; number < task.tile_end; ++number) tile.merge(left(number), whole);
      tile.finish(whole);
    }
  }
#if defined(__AMX_BF16__)
  if (sizeof(T) == 2) release_tiles();
#endif
}

// The tiles of a call; visit(sequence, kv_head, row, rows, first partition, end partition). A head's tiles follow each
// other: its keys and values fit a core's cache where those of all heads of a long sequence would not.
template <class Visit>
void over_tiles(const AttentionArgs& args, Visit visit) {
  const int64_t group = args.heads / args.cache.kv_heads;
  for (int64_t s = 0; s < args.sequences.count; ++s) {
    const int32_t start = args.sequences.query_start[s];
    const int64_t rows_of_sequence = (args.sequences.query_start[s + 1] - start) * group;
    for (int64_t head = 0; head < args.cache.kv_heads; ++head) {
      for (int64_t row = 0; row < rows_of_sequence; row += kTileRows) {
        const int64_t rows = rows_of_sequence - row < kTileRows ? rows_of_sequence - row : kTileRows;
        int64_t first = INT64_MAX, last = 0;
        for (int64_t t = start + row / group; t <= start + (row + rows - 1) / group; ++t) {
          const int64_t position = args.sequences.positions[t];
          const int64_t begin = args.window > 0 && position >= args.window ? position + 1 - args.window : 0;
          if (begin < first) first = begin;
          if (position > last) last = position;
        }
        visit(s, head, row, rows, first / kPartition, last / kPartition + 1);
      }
    }
  }
}

template <class T>
void run(const AttentionArgs& args) {
  const int64_t depth = round_up(args.cache.head_dim, kLanes);
  int64_t tiles = 0, partitions = 0;
  over_tiles(args, [&](int64_t, int64_t, int64_t, int64_t, int64_t first, int64_t end) {
    tiles += 1;
    partitions += end - first;
  });
  // Tiles with more partitions than `share` are shared out.
  int64_t share = (partitions + 8 * threads() - 1) / (8 * threads());
  if (threads() == 1) share = partitions;
  int64_t tasks = 0, partial_floats = 0;
  over_tiles(args, [&](int64_t, int64_t, int64_t, int64_t rows, int64_t first, int64_t end) {
    tasks += (end - first + share - 1) / share;
    if (end - first > share) partial_floats += (end - first) * sums_size(rows, depth);
  });
  char* memory = static_cast<char*>(
      scratch(Slot::tasks, static_cast<size_t>(tasks) * sizeof(Task) + static_cast<size_t>(tiles) * sizeof(int32_t)));
  Task* list = reinterpret_cast<Task*>(memory);
  int32_t* unfinished = reinterpret_cast<int32_t*>(memory + static_cast<size_t>(tasks) * sizeof(Task));
  float* partials = static_cast<float*>(scratch(Slot::partials, static_cast<size_t>(partial_floats) * sizeof(float)));
  Task* next = list;
  over_tiles(args, [&](int64_t s, int64_t head, int64_t row, int64_t rows, int64_t first, int64_t end) {
    const bool shared = end - first > share;
    *unfinished = static_cast<int32_t>((end - first + share - 1) / share);
    for (int64_t from = first; from < end; from += share)
      *next++ = Task{s,     head, row, rows, from, from + share < end ? from + share : end, first, end,
                     shared ? partials : nullptr, unfinished};
    if (shared) partials += (end - first) * sums_size(rows, depth);
    ++unfinished;
  });
  auto work = [&](int64_t task) { work_off<T>(args, list[task]); };
  in_parallel(tasks, work);
}

}  // namespace

void attention(const AttentionArgs& args) {
  if (args.sequences.tokens == 0) return;
  if (args.type == Type::bf16)
    run<bf16>(args);
  else
    run<float>(args);
}

}  // namespace headrace::HEADRACE_LEVEL
