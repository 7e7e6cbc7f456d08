#include "train/data_loader.h"

#include <algorithm>
#include <utility>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/core/splitmix64.h"

namespace fathom {

namespace {

std::uint64_t key_of(std::uint64_t seed, std::int64_t epoch) {
  return mix64(seed * kGoldenGamma + static_cast<std::uint64_t>(epoch) + 1);
}

}  // namespace

std::int64_t permuted(std::int64_t index, std::int64_t n, std::uint64_t key) {
  // Four rounds over 2^(2h) >= n, walking the cycle until the image is inside [0, n).
  int half = 1;
  while ((std::int64_t{1} << (2 * half)) < n) ++half;
  const std::uint64_t mask = (std::uint64_t{1} << half) - 1;
  auto x = static_cast<std::uint64_t>(index);
  do {
    std::uint64_t left = x >> half;
    std::uint64_t right = x & mask;
    for (std::uint64_t round = 0; round < 4; ++round) {
      const std::uint64_t next = left ^ (mix64(right + key + round * kGoldenGamma) & mask);
      left = right;
      right = next;
    }
    x = (left << half) | right;
  } while (x >= static_cast<std::uint64_t>(n));
  return static_cast<std::int64_t>(x);
}

DataLoader::DataLoader(std::shared_ptr<const TokenStore> store, std::int64_t seq_len, bool document_mask)
    : store_(std::move(store)),
      seq_len_(seq_len),
      sequences_((store_->num_tokens() - 1) / seq_len),
      document_mask_(document_mask) {
  if (sequences_ < 1) {
    throw UserError(
        fmt::format("{} holds {} tokens, fewer than one sequence and its last target (train.seq_len + 1 = "
                    "{}).",
                    store_->path(), store_->num_tokens(), seq_len + 1),
        "Prepare more text, or lower train.seq_len.");
  }
}

HostBatch DataLoader::shuffled(std::uint64_t seed, std::int64_t first, std::int64_t count) const {
  std::vector<std::int64_t> windows;
  for (std::int64_t i = first; i < first + count; ++i) {
    windows.push_back(permuted(i % sequences_, sequences_, key_of(seed, i / sequences_)));
  }
  return batch(windows);
}

Batch DataLoader::in_order(Context& c, std::int64_t first, std::int64_t count) const {
  std::vector<std::int64_t> windows;
  for (std::int64_t i = first; i < first + count; ++i) windows.push_back(i);
  return upload(c, batch(windows));
}

HostBatch DataLoader::batch(const std::vector<std::int64_t>& windows) const {
  const auto seq = static_cast<std::size_t>(seq_len_);
  std::vector<std::int32_t> tokens(windows.size() * seq);
  std::vector<std::int32_t> targets(tokens.size());
  std::vector<std::int32_t> documents;
  std::vector<std::int32_t> window(seq + 1);
  for (std::size_t i = 0; i < windows.size(); ++i) {
    const std::int64_t begin = windows[i] * seq_len_;
    store_->read(begin, window);
    std::copy_n(window.begin(), seq, tokens.begin() + static_cast<std::ptrdiff_t>(i * seq));
    std::copy_n(window.begin() + 1, seq, targets.begin() + static_cast<std::ptrdiff_t>(i * seq));
    if (!document_mask_) continue;
    const auto starts = store_->document_starts();
    auto next = std::upper_bound(starts.begin(), starts.end(), begin);
    for (std::int64_t t = begin; t < begin + seq_len_; ++t) {
      while (next != starts.end() && *next <= t) ++next;
      documents.push_back(static_cast<std::int32_t>(next - starts.begin()));
    }
  }
  return make_host_batch(static_cast<std::int64_t>(windows.size()), seq_len_, std::move(tokens),
                         std::move(targets), documents);
}

}  // namespace fathom
