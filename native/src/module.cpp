// The Python module headrace._native: addresses, sizes and strides in, nothing out but errors.
//
// Callers (headrace.kernels.native) vouch for shapes and types; what a plan could get wrong, the pages
// and positions, is checked here before a kernel reads or writes through it. Every call that works releases the
// interpreter lock.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>

#include "checks.h"
#include "kernels.h"
#include "program.h"
#include "thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace headrace {

void bind_bulk(nb::module_& m);  // bulk_module.cpp
void bind_identity(nb::module_& m);  // identity_module.cpp

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Cache cache_of(uintptr_t pages, int64_t page_count, int64_t page_stride, int64_t layer, int64_t kv_heads,
               int64_t head_dim, int64_t block_size, uintptr_t table, int64_t table_stride, int64_t table_width) {
  if ((layer + 1) * page_elements(1, kv_heads, head_dim, block_size) > page_stride)
    throw std::out_of_range("layer " + std::to_string(layer) + " lies outside of a page of " +
                            std::to_string(page_stride) + " elements");
  return {at<void>(pages), page_count, page_stride, layer, kv_heads, head_dim, block_size,
          at<const int32_t>(table), table_stride, table_width};
}

std::atomic<int64_t> busy_ns{0};

// What a call that computes needs while it does: the interpreter lock released, and a clock.
struct Kernel {
  nb::gil_scoped_release unlocked;
  std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();
  ~Kernel() {
    const auto spent = std::chrono::steady_clock::now() - start;
    busy_ns.fetch_add(std::chrono::duration_cast<std::chrono::nanoseconds>(spent).count(), std::memory_order_relaxed);
  }
};

uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// The state of the SplitMix64 stream whose outputs are the tokens' noise.
uint64_t gumbel_stream(uint64_t seed, uint32_t position) {
  return mix(mix(seed + 0x9e3779b97f4a7c15u) ^ (uint64_t{position} + 1) * 0xd1342543de82ef95u);
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "CPU kernels of Headrace; see headrace.kernels.native.";
  kernels();
  m.attr("PANEL") = kPanel;

  const auto kernel = nb::call_guard<Kernel>();

  m.def("level", [] { return std::string(kernels().level); }, "The instruction set in use.");
  m.def("threads", &threads);
  m.def(
      "set_threads",
      [](int count) {
        if (count < 1 || count > 1024)
          throw std::invalid_argument("threads must be from 1 to 1024, not " + std::to_string(count));
        set_threads(count);
      },
      "count"_a, nb::call_guard<nb::gil_scoped_release>());

  m.def("busy_s", [] { return static_cast<double>(busy_ns.load(std::memory_order_relaxed)) * 1e-9; });

  m.def("packed_bytes", [](int64_t out, int64_t in, int type) { return packed_bytes(out, in, Type(type)); });
  m.def("page_elements", &page_elements, "layers"_a, "kv_heads"_a, "head_dim"_a, "block_size"_a);

  m.def(
      "pack",
      [](uintptr_t weight, int64_t out, int64_t in, int64_t stride, int type, int packed_type, bool gated,
         uintptr_t packed) {
        kernels().pack({at<const void>(weight), out, in, stride, Type(type), Type(packed_type), gated,
                        at<void>(packed)});
      },
      kernel);

  m.def(
      "linear",
      [](uintptr_t x, int64_t rows, int64_t x_stride, uintptr_t packed, uintptr_t bias, int64_t out, int64_t in,
         int type, int packed_type, int gate, uintptr_t y, int64_t y_stride, int output) {
        kernels().linear({at<const void>(x), rows, x_stride, at<const void>(packed), at<const float>(bias), out, in,
                          Type(type), Type(packed_type), Gate(gate), at<void>(y), y_stride, Output(output)});
      },
      kernel);

  m.def(
      "rms_norm",
      [](uintptr_t x, uintptr_t weight, int64_t rows, int64_t columns, float eps, uintptr_t y, int output) {
        kernels().norm({at<const float>(x), at<const float>(weight), rows, columns, eps, at<void>(y), Output(output)});
      },
      kernel);

  m.def(
      "embed",
      [](uintptr_t tokens, int64_t count, uintptr_t table, int64_t vocab, int64_t columns, int type, float scale,
         uintptr_t y) {
        const EmbedArgs args{at<const int32_t>(tokens), count, at<const void>(table), vocab, columns, Type(type), scale,
                             at<float>(y)};
        check_tokens(args);
        kernels().embed(args);
      },
      kernel);

  m.def(
      "soft_cap",
      [](uintptr_t x, int64_t rows, int64_t columns, float cap) { kernels().cap({at<float>(x), rows, columns, cap}); },
      kernel);

  m.def(
      "rotate_and_store",
      [](uintptr_t qkv, int type, int64_t heads, uintptr_t query_start, uintptr_t positions, int64_t sequences,
         int64_t tokens, uintptr_t pages, int64_t page_count, int64_t page_stride, int64_t layer, int64_t kv_heads,
         int64_t head_dim, int64_t block_size, uintptr_t table, int64_t table_stride, int64_t table_width,
         uintptr_t cos_sin, int64_t cos_sin_rows, uintptr_t q_norm, uintptr_t k_norm, float eps, uintptr_t q) {
        const Sequences rows{at<const int32_t>(query_start), at<const int32_t>(positions), sequences, tokens};
        const Cache cache = cache_of(pages, page_count, page_stride, layer, kv_heads, head_dim, block_size, table,
                                     table_stride, table_width);
        check_sequences(rows);
        check_writes(rows, cache, cos_sin_rows);
        kernels().rotate({at<const void>(qkv), Type(type), heads, rows, cache, at<const float>(cos_sin), cos_sin_rows,
                          at<const float>(q_norm), at<const float>(k_norm), eps, at<void>(q)});
      },
      kernel);

  m.def(
      "attention",
      [](uintptr_t q, int type, int64_t heads, uintptr_t query_start, uintptr_t positions, int64_t sequences,
         int64_t tokens, uintptr_t pages, int64_t page_count, int64_t page_stride, int64_t layer, int64_t kv_heads,
         int64_t head_dim, int64_t block_size, uintptr_t table, int64_t table_stride, int64_t table_width, float scale,
         int64_t window, float softcap, uintptr_t out, uintptr_t lse) {
        const Sequences rows{at<const int32_t>(query_start), at<const int32_t>(positions), sequences, tokens};
        const Cache cache = cache_of(pages, page_count, page_stride, layer, kv_heads, head_dim, block_size, table,
                                     table_stride, table_width);
        check_sequences(rows);
        check_reads(rows, cache, window);
        kernels().attention({at<const void>(q), Type(type), heads, rows, cache, scale, window, softcap, at<void>(out),
                             at<float>(lse)});
      },
      kernel);

  // What is recorded comes as in the functions above, with a slot's number in place of an activation's address and a
  // KV group's in place of its tables.
  nb::class_<Program>(m, "Program")
      .def(nb::init<>())
      .def("embed",
           [](Program& program, uintptr_t table, int64_t vocab, int64_t columns, int type, float scale, int y) {
             program.embed({nullptr, 0, at<const void>(table), vocab, columns, Type(type), scale, nullptr}, y);
           })
      .def("linear",
           [](Program& program, int x, uintptr_t packed, uintptr_t bias, int64_t out, int64_t in, int type,
              int packed_type, int gate, int y, int64_t y_stride, int output) {
             program.linear({nullptr, 0, in, at<const void>(packed), at<const float>(bias), out, in, Type(type),
                             Type(packed_type), Gate(gate), nullptr, y_stride, Output(output)},
                            x, y);
           })
      .def("rms_norm",
           [](Program& program, int x, uintptr_t weight, int64_t columns, float eps, int y, int output) {
             program.norm({nullptr, at<const float>(weight), 0, columns, eps, nullptr, Output(output)}, x, y);
           })
      .def("soft_cap",
           [](Program& program, int x, int64_t columns, float cap) { program.cap({nullptr, 0, columns, cap}, x); })
      .def("rotate_and_store",
           [](Program& program, int qkv, int type, int64_t heads, int group, uintptr_t pages, int64_t page_count,
              int64_t page_stride, int64_t layer, int64_t kv_heads, int64_t head_dim, int64_t block_size,
              uintptr_t cos_sin, int64_t cos_sin_rows, uintptr_t q_norm, uintptr_t k_norm, float eps, int q) {
             const Cache cache = cache_of(pages, page_count, page_stride, layer, kv_heads, head_dim, block_size, 0, 0, 0);
             program.rotate({nullptr, Type(type), heads, {}, cache, at<const float>(cos_sin), cos_sin_rows,
                             at<const float>(q_norm), at<const float>(k_norm), eps, nullptr},
                            qkv, q, group);
           })
      .def("attention",
           [](Program& program, int q, int type, int64_t heads, int group, uintptr_t pages, int64_t page_count,
              int64_t page_stride, int64_t layer, int64_t kv_heads, int64_t head_dim, int64_t block_size, float scale,
              int64_t window, float softcap, int out, int lse) {
             const Cache cache = cache_of(pages, page_count, page_stride, layer, kv_heads, head_dim, block_size, 0, 0, 0);
             program.attention({nullptr, Type(type), heads, {}, cache, scale, window, softcap, nullptr, nullptr}, q, out,
                               lse, group);
           })
      .def("place", &Program::place)
      .def(
          "run",
          [](const Program& program, uintptr_t x, int64_t rows, uintptr_t y, uintptr_t workspace, uintptr_t query_start,
             uintptr_t positions, int64_t sequences, int64_t tokens,
             const std::vector<std::tuple<uintptr_t, int64_t, int64_t>>& tables) {
            ProgramInputs inputs{at<const void>(x), rows, at<void>(y), at<char>(workspace),
                                 {at<const int32_t>(query_start), at<const int32_t>(positions), sequences, tokens}, {}};
            for (const auto& [entries, stride, width] : tables)
              inputs.tables.push_back({at<const int32_t>(entries), stride, width});
            program.run(inputs);
          },
          kernel);

  m.def(
      "read", [](uintptr_t memory, int64_t bytes) { return kernels().read({at<const void>(memory), bytes}); }, kernel);

  m.def(
      "gumbel",
      [](uint64_t seed, uint32_t position, uintptr_t tokens, int64_t count, uintptr_t out) {
        kernels().gumbel({gumbel_stream(seed, position), at<const uint32_t>(tokens), count, at<double>(out)});
      },
      kernel);
  m.def(
      "choose",
      [](uintptr_t logits, uintptr_t temperatures, uintptr_t seeds, uintptr_t positions, int64_t count, int64_t columns,
         uintptr_t tokens) {
        std::vector<ChooseRow> rows(static_cast<size_t>(count));
        for (int64_t i = 0; i < count; ++i)
          rows[static_cast<size_t>(i)] = {at<const float>(at<const uint64_t>(logits)[i]), at<const float>(temperatures)[i],
                                          gumbel_stream(at<const uint64_t>(seeds)[i], at<const uint32_t>(positions)[i])};
        kernels().choose({rows.data(), count, columns, at<int64_t>(tokens)});
      },
      kernel);
  m.def(
      "uniform",
      [](uint64_t seed, uint32_t position, uintptr_t tokens, int64_t count, uintptr_t out) {
        kernels().uniform({gumbel_stream(seed, position), at<const uint32_t>(tokens), count, at<double>(out)});
      },
      kernel);

  bind_bulk(m);
  bind_identity(m);
}

}  // namespace headrace
