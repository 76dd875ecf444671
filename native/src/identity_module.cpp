// Identities of KV blocks for Python: a chain of keyed hashes over a sequence of token ids, and the index of holders.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "blake2b.h"
#include "kv_index.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace headrace {
namespace {

constexpr size_t kIdentity = KVIndex::kIdentity;

std::string size_of(nb::handle bytes) { return std::to_string(PyBytes_GET_SIZE(bytes.ptr())); }

// The items of a list or tuple, or of a list made of any other sequence.
class Items {
 public:
  explicit Items(nb::handle sequence)
      : items_(nb::steal(PySequence_Fast(sequence.ptr(), "expected a sequence"))) {
    if (!items_.is_valid()) throw nb::python_error();
  }
  size_t size() const { return static_cast<size_t>(PySequence_Fast_GET_SIZE(items_.ptr())); }
  // Borrowed. Code that another item ran may have made the list shorter.
  PyObject* operator[](size_t i) const {
    if (i >= size()) throw std::invalid_argument("the sequence became shorter while it was read");
    return PySequence_Fast_GET_ITEM(items_.ptr(), static_cast<Py_ssize_t>(i));
  }

 private:
  nb::object items_;
};

uint32_t token_at(const Items& tokens, size_t i) {
  PyObject* item = tokens[i];
  nb::object index;
  if (!PyLong_Check(item)) {  // an integer of another library
    const nb::object held = nb::borrow(item);
    index = nb::steal(PyNumber_Index(item));
    if (!index.is_valid()) throw nb::python_error();
    item = index.ptr();
  }
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(item, &overflow);
  if (overflow || value < 0 || value > 0xffffffffLL)
    throw std::invalid_argument("token " + std::to_string(i) + " is " + nb::str(nb::handle(item)).c_str() +
                                "; token ids are from 0 to 4294967295");
  return static_cast<uint32_t>(value);
}

class BlockHasher {
 public:
  BlockHasher(nb::bytes key, int64_t block_size)
      : hash_(reinterpret_cast<const uint8_t*>(key.c_str()), checked_key(key), kIdentity) {
    if (block_size < 1)
      throw std::invalid_argument("block_size must be at least 1 position, got " + std::to_string(block_size));
    block_size_ = static_cast<size_t>(block_size);
  }

  nb::object chain(nb::bytes parent, nb::handle tokens, bool rest) const {
    if (parent.size() != kIdentity)
      throw std::invalid_argument("the parent of a block is an identity of 16 bytes, not of " + size_of(parent));
    const Items items(tokens);
    const size_t length = items.size();
    const size_t blocks = rest ? (length + block_size_ - 1) / block_size_ : length / block_size_;
    nb::object chain = nb::steal(PyList_New(static_cast<Py_ssize_t>(blocks)));
    if (!chain.is_valid()) throw nb::python_error();
    std::vector<uint8_t> message(kIdentity + 4 * std::min(block_size_, length));
    std::memcpy(message.data(), parent.c_str(), kIdentity);
    for (size_t block = 0, i = 0; block < blocks; ++block) {
      const size_t end = std::min(i + block_size_, length);
      uint8_t* to = message.data() + kIdentity;
      for (; i < end; ++i, to += 4) {
        const uint32_t token = token_at(items, i);
        for (int byte = 0; byte < 4; ++byte) to[byte] = static_cast<uint8_t>(token >> 8 * byte);
      }
      PyObject* identity = PyBytes_FromStringAndSize(nullptr, kIdentity);
      if (!identity) throw nb::python_error();
      auto* digest = reinterpret_cast<uint8_t*>(PyBytes_AS_STRING(identity));
      hash_.digest(message.data(), static_cast<size_t>(to - message.data()), digest);
      std::memcpy(message.data(), digest, kIdentity);
      PyList_SET_ITEM(chain.ptr(), static_cast<Py_ssize_t>(block), identity);
    }
    return chain;
  }

 private:
  static size_t checked_key(const nb::bytes& key) {
    if (key.size() > Blake2b::kMaxKey)
      throw std::invalid_argument("a key of block identities has at most 64 bytes, not " + size_of(key));
    return key.size();
  }

  Blake2b hash_;
  size_t block_size_;
};

std::vector<KVIndex::Identity> identities_of(nb::handle sequence) {
  const Items items(sequence);
  std::vector<KVIndex::Identity> identities(items.size());
  for (size_t i = 0; i < identities.size(); ++i) {
    PyObject* item = items[i];
    if (!PyBytes_Check(item))
      throw nb::type_error(
          ("identity " + std::to_string(i) + " is of type " + Py_TYPE(item)->tp_name + ", not bytes").c_str());
    if (PyBytes_GET_SIZE(item) != kIdentity)
      throw std::invalid_argument("identity " + std::to_string(i) + " has " + size_of(item) + " bytes, not 16");
    std::memcpy(&identities[i], PyBytes_AS_STRING(item), kIdentity);
  }
  return identities;
}

size_t holder_of(const KVIndex& index, int64_t holder) {
  if (holder < 0 || static_cast<size_t>(holder) >= index.holders())
    throw std::invalid_argument("holder " + std::to_string(holder) + " is not one of " + std::to_string(index.holders()));
  return static_cast<size_t>(holder);
}

// Writes to the memory of `out`, an array of 4-byte integers.
void match(const KVIndex& index, nb::handle chain, nb::handle out) {
  const std::vector<KVIndex::Identity> identities = identities_of(chain);
  Py_buffer view;
  if (PyObject_GetBuffer(out.ptr(), &view, PyBUF_WRITABLE)) throw nb::python_error();
  const bool fits = static_cast<size_t>(view.len) == index.holders() * sizeof(int32_t);
  if (fits) index.match(identities, static_cast<int32_t*>(view.buf));
  PyBuffer_Release(&view);
  if (!fits)
    throw std::invalid_argument("the array for a match needs 4 bytes for each of " + std::to_string(index.holders()) +
                                " holders");
}

}  // namespace

void bind_identity(nb::module_& m) {
  nb::class_<BlockHasher>(m, "BlockHasher")
      .def(nb::init<nb::bytes, int64_t>(), "key"_a, "block_size"_a)
      .def("chain", &BlockHasher::chain, "parent"_a, "tokens"_a, "rest"_a = false);
  nb::class_<KVIndex>(m, "KVIndex")
      .def(nb::init<>())
      .def("widen",
           [](KVIndex& index, int64_t count) {
             if (count < 0 || count > 1 << 20)
               throw std::invalid_argument("there can be 0 to 1048576 holders, not " + std::to_string(count));
             index.widen(static_cast<size_t>(count));
           })
      .def("store", [](KVIndex& index, int64_t holder,
                       nb::handle identities) { index.store(holder_of(index, holder), identities_of(identities)); })
      .def("remove", [](KVIndex& index, int64_t holder,
                        nb::handle identities) { index.remove(holder_of(index, holder), identities_of(identities)); })
      .def("replace",
           [](KVIndex& index, int64_t holder, nb::handle identities) {
             const auto all = identities_of(identities);  // before anything is changed
             index.clear(holder_of(index, holder));
             index.store(holder_of(index, holder), all);
           })
      .def("clear", [](KVIndex& index, int64_t holder) { index.clear(holder_of(index, holder)); })
      .def("blocks", [](const KVIndex& index, int64_t holder) { return index.blocks(holder_of(index, holder)); })
      .def("match", &match, "chain"_a, "out"_a)
      .def("memory_bytes", &KVIndex::memory_bytes)
      .def("__len__", &KVIndex::size);
}

}  // namespace headrace
