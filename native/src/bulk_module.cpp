// Bulk and CRC-32C for Python: objects with the buffer protocol in, whose memory stays pinned until `finish`.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <vector>

#include "bulk.h"
#include "crc32c.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace headrace {
namespace {

// Holds the memory of Python objects; made and destroyed with the interpreter lock held.
class Pinned {
 public:
  Pinned() = default;
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;
  ~Pinned() { release(); }

  Bulk::Piece add(nb::handle object, bool writable) {
    Py_buffer view;
    if (PyObject_GetBuffer(object.ptr(), &view, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE)) throw nb::python_error();
    views_.push_back(view);
    return {static_cast<char*>(view.buf), static_cast<size_t>(view.len)};
  }

  void release() {
    for (Py_buffer& view : views_) PyBuffer_Release(&view);
    views_.clear();
  }

 private:
  std::vector<Py_buffer> views_;
};

class PinnedBulk {
 public:
  PinnedBulk(nb::sequence buffers, bool writable) {
    std::vector<Bulk::Piece> pieces;
    for (nb::handle buffer : buffers) pieces.push_back(memory_.add(buffer, writable));
    bulk_ = std::make_unique<Bulk>(std::move(pieces));
  }
  Bulk& operator*() { return *bulk_; }
  std::vector<uint32_t> finish() {
    bulk_->cancel();
    memory_.release();
    return bulk_->checksums();
  }

 private:
  Pinned memory_;
  std::unique_ptr<Bulk> bulk_;
};

}  // namespace

void bind_bulk(nb::module_& m) {
  m.attr("BULK_DONE") = int{Bulk::kDone};
  m.attr("BULK_BLOCKED") = int{Bulk::kBlocked};
  m.attr("BULK_ENDED") = int{Bulk::kEnded};
  m.attr("BULK_CANCELLED") = int{Bulk::kCancelled};
  m.attr("BULK_YIELDED") = int{Bulk::kYielded};
  nb::class_<PinnedBulk>(m, "Bulk")
      .def(nb::init<nb::sequence, bool>(), "buffers"_a, "writable"_a)
      .def("send", [](PinnedBulk& bulk, int socket) { return (*bulk).send(socket); },
           nb::call_guard<nb::gil_scoped_release>())
      .def("receive", [](PinnedBulk& bulk, int socket) { return (*bulk).receive(socket); },
           nb::call_guard<nb::gil_scoped_release>())
      .def("fill",
           [](PinnedBulk& bulk, nb::bytes data) {
             return (*bulk).fill(static_cast<const char*>(data.data()), data.size());
           })
      .def("cancel", [](PinnedBulk& bulk) { (*bulk).cancel(); })
      .def("finish", &PinnedBulk::finish);
  m.def(
      "crc32c",
      [](nb::handle data, uint32_t crc, bool wide) {
        Pinned memory;
        const Bulk::Piece piece = memory.add(data, false);
        nb::gil_scoped_release unlocked;
        return crc32c(crc, piece.memory, piece.size, wide);
      },
      "data"_a, "crc"_a = 0, "wide"_a = true);
}

}  // namespace headrace
