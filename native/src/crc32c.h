// CRC-32C (Castagnoli, reflected polynomial 0x82f63b78), as iSCSI and RFC 3720 define it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace headrace {

// Continue `crc` (0 at the beginning) over more bytes. Not `wide`: as a processor without AVX-512 does it.
uint32_t crc32c(uint32_t crc, const void* data, size_t size, bool wide = true);

}  // namespace headrace
