// Moves many pieces of memory over one non-blocking socket, with a checksum of each.
//
// It knows nothing of Python, threads or event loops: `send` and `receive` work as long as bytes flow and return
// when they do not, so that whoever calls them can wait for the socket without holding a thread.
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace headrace {

class Bulk {
 public:
  // What stopped a call; a negative number is an errno of the socket.
  enum Status : int {
    kDone = 0,       // every byte has moved
    kBlocked = 1,    // nothing has moved for a moment
    kEnded = 2,      // the peer has ended its stream
    kCancelled = 3,  // `cancel` was called
    kYielded = 4,    // there is more to move at once; others may want the thread
  };

  struct Piece {
    char* memory;
    size_t size;
  };

  explicit Bulk(std::vector<Piece> pieces);

  int send(int socket);
  int receive(int socket);
  size_t fill(const char* data, size_t size);  // the first bytes, which came by another way; returns how many it took
  void cancel() { cancelled_.store(true, std::memory_order_relaxed); }
  const std::vector<uint32_t>& checksums() const { return checksums_; }

 private:
  struct Place {
    size_t piece = 0, offset = 0;
  };

  template <class Move>
  int run(int socket, short event, Move move);
  size_t gather(iovec* entries, int& count) const;
  void hash(size_t size);
  void advance(size_t size);

  std::vector<Piece> pieces_;
  std::vector<uint32_t> checksums_;
  Place moved_;
  Place hashed_;
  size_t ahead_ = 0;  // bytes between the two: hashed and not yet sent
  size_t left_ = 0;
  std::atomic<bool> cancelled_{false};
};

}  // namespace headrace
