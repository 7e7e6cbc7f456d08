// Words that a thread has encoded, with their ids. Text repeats its words, and looking one up costs a
// fraction of running the merges again.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace fathom {

/// A thread's cache belongs to one tokenizer at a time; each tokenizer has one of these, which tells it from
/// all others of the process.
class WordCache {
 public:
  static constexpr std::size_t kMaxWord = 64;  // bytes; longer ones hardly come again

  WordCache() : owner_(++count_) {}
  WordCache(const WordCache&) = delete;
  WordCache& operator=(const WordCache&) = delete;

  /// Appends the ids of `word`: those that are known, or else what `encode(word, ids)` appends.
  template <typename Encode>
  void append(std::string_view word, std::vector<std::int32_t>& ids, Encode&& encode) const {
    if (word.size() > kMaxWord) {
      encode(word, ids);
      return;
    }
    Words& cache = words();
    cache.key.assign(word);
    auto found = cache.ids.find(cache.key);
    if (found == cache.ids.end()) {
      std::vector<std::int32_t> of_word;
      encode(word, of_word);
      found = cache.ids.emplace(cache.key, std::move(of_word)).first;
    }
    ids.insert(ids.end(), found->second.begin(), found->second.end());
  }

 private:
  static constexpr std::size_t kMaxWords = std::size_t{1} << 17;

  struct Words {
    std::uint64_t owner = 0;
    std::string key;  // keeps its memory from word to word
    std::unordered_map<std::string, std::vector<std::int32_t>> ids;
  };

  Words& words() const {
    thread_local Words cache;
    if (cache.owner != owner_ || cache.ids.size() > kMaxWords) {
      cache.ids.clear();
      cache.owner = owner_;
    }
    return cache;
  }

  static inline std::atomic<std::uint64_t> count_{0};
  std::uint64_t owner_;
};

}  // namespace fathom
