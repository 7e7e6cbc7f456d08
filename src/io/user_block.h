// The 512 bytes in front of the HDF5 part of Fathom's files: what they are, how long, and their checksum.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace fathom {

struct UserBlock {
  std::string kind;
  std::uint64_t payload_bytes = 0;     // everything after the block
  std::uint64_t payload_checksum = 0;  // XXH3, 64 bit
};

std::array<std::byte, 512> encode_user_block(const UserBlock& block);

/// The 64-bit checksum of the `size` bytes of the file `fd` that start at `offset`. UserError when reading
/// fails.
std::uint64_t checksum_file(int fd, std::uint64_t offset, std::uint64_t size, const std::string& path);

/// The kind that the file's start claims, nothing of which is verified; empty when it is none of Fathom's.
std::string claimed_kind(const std::string& path);

/// Reads the block of the file `fd` and proves that the file is whole: magic, version, kind, length,
/// checksum. Throws the UserError that says which of them is wrong; a DamagedFile when bytes are missing or
/// changed.
UserBlock verify_file(int fd, const std::string& path, std::string_view kind);

}  // namespace fathom
