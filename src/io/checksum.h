// XXH3 checksums and hashes (xxhash), for files and for the identity of texts and tokenizers.
//
// They detect damage and tell contents apart; they are no protection against someone who forges a file on
// purpose.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

namespace fathom {

/// XXH3, 64 bit, of `bytes`.
std::uint64_t checksum64(std::span<const std::byte> bytes);
std::uint64_t checksum64(std::string_view bytes);

/// XXH3, 128 bit, of `bytes`, as 32 lower-case hexadecimal digits.
std::string hash_hex(std::string_view bytes);

/// 16 lower-case hexadecimal digits.
std::string to_hex(std::uint64_t value);

/// XXH3 of bytes that come in pieces.
class StreamingHash {
 public:
  StreamingHash();
  ~StreamingHash();
  StreamingHash(StreamingHash&&) noexcept;
  StreamingHash& operator=(StreamingHash&&) noexcept;

  void update(std::span<const std::byte> bytes);
  void update(std::string_view bytes);
  /// The 64-bit checksum of everything so far: equal to checksum64 of the whole.
  std::uint64_t digest64() const;
  /// The 128-bit hash of everything so far, as in hash_hex.
  std::string digest_hex() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace fathom
