// The threads that kernels share: a region of numbered tasks, claimed one by one by the caller and the workers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace headrace {

using TaskFunction = void (*)(void* context, int64_t task);

// Runs function(context, 0 … tasks - 1), in any order, and returns when all have ended. A second caller at the
// same time runs its tasks alone. A task must not start a region.
void run_tasks(int64_t tasks, TaskFunction function, void* context);

// While one lives, workers wait for the next region without going to sleep.
class StayAwake {
 public:
  StayAwake();
  ~StayAwake();
  StayAwake(const StayAwake&) = delete;
  StayAwake& operator=(const StayAwake&) = delete;
};

// The number of threads that share a region, the caller included. Waits for a region in progress.
void set_threads(int count);
int threads();

// `bytes` of the calling thread's own memory, 64-byte aligned, contents undefined, valid until the same thread
// asks for the same slot again. It only grows, so a steady load allocates nothing.
enum class Slot : int { input, tile, sums, tasks, partials, count };
void* scratch(Slot slot, size_t bytes);

}  // namespace headrace
