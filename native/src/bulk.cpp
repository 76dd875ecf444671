#include "bulk.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>

#include "crc32c.h"

namespace headrace {
namespace {

constexpr size_t kPieceBytes = 512 * 1024;  // what one system call moves stays in the second-level cache
constexpr size_t kWakeBytes = 256 * 1024;   // a receiver that waits is woken by so many
constexpr int kEntries = 64;
constexpr int kPatienceMs = 5;  // also how late a cancellation may be noticed
constexpr auto kSlice = std::chrono::milliseconds(50);

#ifdef MSG_NOSIGNAL
constexpr int kSendFlags = MSG_NOSIGNAL | MSG_DONTWAIT;
#else
constexpr int kSendFlags = MSG_DONTWAIT;
#endif

// Have a wait for `socket` end when so many bytes are there, or its stream has ended. A system that cannot do that
// wakes earlier.
void wake_at(int socket, size_t bytes) {
  const int low = static_cast<int>(bytes);
  setsockopt(socket, SOL_SOCKET, SO_RCVLOWAT, &low, sizeof low);
}

}  // namespace

Bulk::Bulk(std::vector<Piece> pieces) : pieces_(std::move(pieces)), checksums_(pieces_.size(), 0) {
  for (const Piece& piece : pieces_) left_ += piece.size;
}

// The memory from where the next byte moves, at most kPieceBytes of it.
size_t Bulk::gather(iovec* entries, int& count) const {
  size_t total = 0, offset = moved_.offset;
  count = 0;
  for (size_t i = moved_.piece; i < pieces_.size() && count < kEntries && total < kPieceBytes; ++i, offset = 0) {
    const size_t size = std::min(pieces_[i].size - offset, kPieceBytes - total);
    if (!size) continue;
    entries[count++] = {pieces_[i].memory + offset, size};
    total += size;
  }
  return total;
}

void Bulk::hash(size_t size) {
  ahead_ += size;
  while (size) {
    const Piece& piece = pieces_[hashed_.piece];
    const size_t part = std::min(size, piece.size - hashed_.offset);
    uint32_t& checksum = checksums_[hashed_.piece];
    checksum = crc32c(checksum, piece.memory + hashed_.offset, part);
    hashed_.offset += part;
    size -= part;
    if (hashed_.offset == piece.size) hashed_ = {hashed_.piece + 1, 0};
  }
}

void Bulk::advance(size_t size) {
  left_ -= size;
  ahead_ -= size;
  while (size) {
    const size_t part = std::min(size, pieces_[moved_.piece].size - moved_.offset);
    moved_.offset += part;
    size -= part;
    if (moved_.offset == pieces_[moved_.piece].size) moved_ = {moved_.piece + 1, 0};
  }
}

template <class Move>
int Bulk::run(int socket, short event, Move move) {
  const auto end = std::chrono::steady_clock::now() + kSlice;
  while (left_) {
    if (cancelled_.load(std::memory_order_relaxed)) return kCancelled;
    const ssize_t size = move();
    if (size > 0) {
      if (left_ && std::chrono::steady_clock::now() > end) return kYielded;
    } else if (size == 0) {
      return kEnded;
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      pollfd waiting{socket, event, 0};
      const int ready = poll(&waiting, 1, kPatienceMs);
      if (ready == 0) return cancelled_.load(std::memory_order_relaxed) ? kCancelled : kBlocked;
      if (ready < 0 && errno != EINTR) return -errno;
    } else if (errno != EINTR) {
      return -errno;
    }
  }
  return kDone;
}

int Bulk::send(int socket) {
  return run(socket, POLLOUT, [&]() -> ssize_t {
    iovec entries[kEntries];
    int count;
    const size_t total = gather(entries, count);
    // A checksum is of what is sent, so it is taken first; what a full socket then refused is not taken again.
    if (total > ahead_) hash(total - ahead_);
    msghdr message{};
    message.msg_iov = entries;
    message.msg_iovlen = static_cast<decltype(message.msg_iovlen)>(count);
    const ssize_t size = sendmsg(socket, &message, kSendFlags);
    if (size > 0) advance(static_cast<size_t>(size));
    return size;
  });
}

int Bulk::receive(int socket) {
  // Being woken for every segment costs more than copying it. Whoever waits for this socket otherwise wants any byte.
  size_t wake = kWakeBytes;
  wake_at(socket, wake);
  const int status = run(socket, POLLIN, [&]() -> ssize_t {
    if (left_ < wake) wake_at(socket, wake = left_);
    iovec entries[kEntries];
    int count;
    gather(entries, count);
    msghdr message{};
    message.msg_iov = entries;
    message.msg_iovlen = static_cast<decltype(message.msg_iovlen)>(count);
    const ssize_t size = recvmsg(socket, &message, MSG_DONTWAIT);
    if (size > 0) {
      hash(static_cast<size_t>(size));
      advance(static_cast<size_t>(size));
    }
    return size;
  });
  wake_at(socket, 1);
  return status;
}

size_t Bulk::fill(const char* data, size_t size) {
  size_t taken = 0;
  while (taken < size && left_) {
    iovec entries[kEntries];
    int count;
    gather(entries, count);
    for (int i = 0; i < count && taken < size; ++i) {
      const size_t part = std::min(entries[i].iov_len, size - taken);
      std::memcpy(entries[i].iov_base, data + taken, part);
      hash(part);
      advance(part);
      taken += part;
    }
  }
  return taken;
}

}  // namespace headrace
