// Regions of the thread pool from a lambda, without the standard library (see CMakeLists.txt).
#pragma once

#include "simd.h"
#include "thread_pool.h"

namespace headrace::HEADRACE_LEVEL {

template <class Body>
static void in_parallel(int64_t tasks, Body& body) {
  run_tasks(
      tasks, [](void* context, int64_t task) { (*static_cast<Body*>(context))(task); }, &body);
}

// Rows [0, rows) in about even runs, each worth `grain` rows or more; body(first, end).
template <class Body>
static void in_row_ranges(int64_t rows, int64_t grain, Body body) {
  int64_t tasks = rows / (grain > 0 ? grain : 1);
  const int64_t most = threads() * int64_t{4};
  if (tasks > most) tasks = most;
  if (tasks <= 1) {
    body(int64_t{0}, rows);
    return;
  }
  auto run = [&](int64_t task) { body(rows * task / tasks, rows * (task + 1) / tasks); };
  in_parallel(tasks, run);
}

}  // namespace headrace::HEADRACE_LEVEL
