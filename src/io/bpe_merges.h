// Byte-pair encoding of one word by a list of merges (Sennrich et al. 2016).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <unordered_map>
#include <utility>
#include <vector>

namespace fathom {

class BpeMerges {
 public:
  /// `left` and `right` side by side become `merged`; what is added first goes first. A pair that is added
  /// again takes its last place.
  void add(std::int32_t left, std::int32_t right, std::int32_t merged);

  /// Merges `ids`, of a word's bytes, until no two neighbours can be: always the pair that comes first in the
  /// list, of equal ones the leftmost.
  void apply(std::vector<std::int32_t>& ids) const;

 private:
  struct Merge {
    std::uint32_t rank;
    std::int32_t merged;
  };
  static std::uint64_t key(std::int32_t left, std::int32_t right) {
    return (static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32) |
           static_cast<std::uint32_t>(right);
  }
  const Merge* find(std::int32_t left, std::int32_t right) const;

  std::unordered_map<std::uint64_t, Merge> merges_;
  std::uint32_t next_rank_ = 0;
};

}  // namespace fathom
