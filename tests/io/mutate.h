// A seeded mutator of bytes, for fuzz tests: the same seed gives the same mutants on every machine.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "src/core/splitmix64.h"

namespace fathom::testing {

/// The number of inputs a fuzz test tries: FATHOM_FUZZ_INPUTS, or `otherwise`.
inline std::int64_t fuzz_inputs(std::int64_t otherwise) {
  const char* given = std::getenv("FATHOM_FUZZ_INPUTS");
  return given == nullptr ? otherwise : std::strtoll(given, nullptr, 10);
}

class Mutator : public SplitMix64 {
 public:
  using SplitMix64::SplitMix64;

  /// An integer of a kind that breaks things: near zero, near a power of two, negative, anything.
  std::int64_t integer() {
    switch (below(4)) {
      case 0:
        return static_cast<std::int64_t>(below(5)) - 2;
      case 1:
        return (std::int64_t{1} << below(63)) + static_cast<std::int64_t>(below(3)) - 1;
      case 2:
        return -(std::int64_t{1} << below(63));
      default:
        return static_cast<std::int64_t>(next());
    }
  }

  /// `bytes` after one to four changes: bits flipped, bytes replaced, removed, inserted, repeated, the end
  /// cut off. It may be equal to `bytes`.
  std::string mutate(std::string bytes) {
    const std::size_t changes = 1 + below(4);
    for (std::size_t i = 0; i < changes; ++i) change(bytes);
    return bytes;
  }

 private:
  // Half of the changes fall on the first kilobyte, where headers are.
  std::size_t place(const std::string& bytes) {
    const std::size_t limit = below(2) == 0 ? std::min<std::size_t>(bytes.size(), 1024) : bytes.size();
    return below(limit);
  }

  void change(std::string& bytes) {
    if (bytes.empty()) {
      bytes = std::string(1 + below(8), static_cast<char>(next()));
      return;
    }
    const std::size_t at = place(bytes);
    const std::size_t length = 1 + below(std::min<std::size_t>(bytes.size() - at, 16));
    switch (below(8)) {
      case 0:
      case 1:
      case 2:
        bytes[at] = static_cast<char>(bytes[at] ^ (1 << below(8)));
        break;
      case 3:
        bytes[at] = static_cast<char>(next());
        break;
      case 4:
        bytes.erase(at, length);
        break;
      case 5:
        bytes.insert(at, std::string(length, static_cast<char>(next())));
        break;
      case 6:
        bytes.insert(at, bytes.substr(place(bytes), length));
        break;
      default:
        bytes.resize(at);
        break;
    }
  }
};

}  // namespace fathom::testing
