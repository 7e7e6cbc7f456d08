#include "infer/speculate/ngram_level.h"

#include "kernels/error.h"

namespace fathom {

namespace {

constexpr std::size_t kLeast = 2, kMost = 16;  // tokens that agree

}  // namespace

// Of the places that agree in most tokens the latest. What was searched once is searched again: a text of
// 10^5 tokens takes some 10^-4 seconds.
bool NgramLevel::rows(std::span<const std::int32_t> text, std::int64_t proposed, std::vector<Row>& rows) {
  if (proposed != 0) throw InternalError("[ngram] nothing is proposed to the first draft");
  const std::size_t n = text.size();
  if (n < kLeast + 1) return false;
  std::size_t longest = 0, next = 0;
  for (std::size_t end = n - 1; end-- > 0 && longest < kMost;) {  // a place ends with text[end]
    std::size_t length = 0;
    while (length < kMost && length <= end && text[end - length] == text[n - 1 - length]) ++length;
    if (length > longest) longest = length, next = end + 1;
  }
  if (longest < kLeast) return false;
  const auto agree = static_cast<double>(longest);
  rows.push_back(rule_.certainly(text[next], agree / (agree + 1)));
  return true;
}

}  // namespace fathom
