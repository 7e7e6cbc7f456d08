#include "src/io/bpe_merges.h"

#include <algorithm>
#include <queue>

namespace fathom {

namespace {

constexpr std::size_t kNone = static_cast<std::size_t>(-1);

struct Symbol {
  std::int32_t id;  // -1: merged into the one before
  std::size_t previous, next;
};

struct Candidate {
  std::uint32_t rank;
  std::int32_t merged;
  std::size_t at;  // of its left half

  bool operator<(const Candidate& other) const {  // the largest is taken first
    return std::pair(rank, at) > std::pair(other.rank, other.at);
  }
};

}  // namespace

void BpeMerges::add(std::int32_t left, std::int32_t right, std::int32_t merged) {
  merges_[key(left, right)] = {next_rank_++, merged};
}

const BpeMerges::Merge* BpeMerges::find(std::int32_t left, std::int32_t right) const {
  const auto found = merges_.find(key(left, right));
  return found == merges_.end() ? nullptr : &found->second;
}

void BpeMerges::apply(std::vector<std::int32_t>& ids) const {
  std::vector<Symbol> symbols(ids.size());
  std::priority_queue<Candidate> queue;
  const auto consider = [&](std::size_t at) {
    const Symbol& s = symbols[at];
    if (s.next == kNone) return;
    if (const Merge* m = find(s.id, symbols[s.next].id)) queue.push({m->rank, m->merged, at});
  };
  for (std::size_t i = 0; i < ids.size(); ++i) {
    symbols[i] = {ids[i], i == 0 ? kNone : i - 1, i + 1 == ids.size() ? kNone : i + 1};
  }
  for (std::size_t i = 0; i < ids.size(); ++i) consider(i);
  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    Symbol& left = symbols[best.at];
    if (left.id < 0 || left.next == kNone) continue;
    Symbol& right = symbols[left.next];
    // One of the two may have been merged with another since.
    const Merge* m = find(left.id, right.id);
    if (m == nullptr || m->merged != best.merged) continue;
    left.id = best.merged;
    right.id = -1;
    left.next = right.next;
    if (left.next != kNone) symbols[left.next].previous = best.at;
    consider(best.at);
    if (left.previous != kNone) consider(left.previous);
  }
  ids.clear();
  for (const Symbol& s : symbols) {
    if (s.id >= 0) ids.push_back(s.id);
  }
}

}  // namespace fathom
