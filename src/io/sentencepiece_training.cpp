#include <algorithm>
#include <queue>
#include <random>
#include <unordered_map>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <sentencepiece_trainer.h>

#include "kernels/error.h"
#include "src/io/sentencepiece_seal.h"
#include "src/io/sentencepiece_tokenizer.h"
#include "src/io/utf8.h"

namespace fathom {

namespace {

constexpr std::size_t kMaxLine = std::size_t{1} << 14;  // bytes; longer lines are cut
// 256 bytes, the unknown token, the end of a document and the line end come before anything is learned.
constexpr std::int64_t kFixedPieces = 259;

// Lines with the lowest random keys, as many as fit: every line has the same chance, whatever the length of
// the text.
class LineSample {
 public:
  LineSample(std::int64_t budget, std::uint64_t seed) : budget_(budget), random_(seed) {}

  void add(std::string_view line) {
    const Key key{random_(), count_++};
    if (bytes_ + size_of(line) > budget_ && !lines_.empty() && key > lines_.top().first) return;
    lines_.emplace(key, std::string(line));
    bytes_ += size_of(line);
    while (bytes_ > budget_ && lines_.size() > 1) {
      bytes_ -= size_of(lines_.top().second);
      lines_.pop();
    }
  }

  // In the order of the text.
  std::vector<std::string> take() {
    std::vector<std::pair<std::uint64_t, std::string>> in_order;
    while (!lines_.empty()) {
      in_order.emplace_back(lines_.top().first.second, lines_.top().second);
      lines_.pop();
    }
    std::sort(in_order.begin(), in_order.end());
    std::vector<std::string> lines;
    lines.reserve(in_order.size());
    for (auto& entry : in_order) lines.push_back(std::move(entry.second));
    return lines;
  }

 private:
  using Key = std::pair<std::uint64_t, std::uint64_t>;  // random, then the line's number
  static std::int64_t size_of(std::string_view line) { return static_cast<std::int64_t>(line.size()) + 1; }

  std::int64_t budget_;
  std::mt19937_64 random_;
  std::uint64_t count_ = 0;
  std::int64_t bytes_ = 0;
  std::priority_queue<std::pair<Key, std::string>> lines_;
};

class LineIterator final : public sentencepiece::SentenceIterator {
 public:
  explicit LineIterator(const std::vector<std::string>& lines) : lines_(lines) {}
  bool done() const override { return next_ == lines_.size(); }
  void Next() override { ++next_; }
  const std::string& value() const override { return lines_[next_]; }
  sentencepiece::util::Status status() const override { return {}; }

 private:
  const std::vector<std::string>& lines_;
  std::size_t next_ = 0;
};

std::vector<std::string> sample_lines(const std::function<bool(std::string&)>& next,
                                      const SentencePieceTraining& settings) {
  LineSample sample(settings.sample_bytes, settings.seed);
  std::string document;
  std::int64_t bytes = 0;
  while (next(document)) {
    bytes += static_cast<std::int64_t>(document.size());
    std::string_view rest = document;
    while (!rest.empty()) {
      const std::size_t end = std::min(rest.find('\n'), rest.size());
      const std::size_t length = end <= kMaxLine ? end : utf8_boundary(rest, kMaxLine);
      if (length > 0) sample.add(rest.substr(0, length));
      rest.remove_prefix(std::min(rest.size(), length + (length == end ? 1 : 0)));
    }
    if (settings.on_text) settings.on_text(bytes);
  }
  return sample.take();
}

// The library names its source lines and its own flags: the two failures that users meet are said in our
// words.
[[noreturn]] void fail_training(std::int64_t vocab_size, const std::string& message) {
  const auto says = [&](const char* words) { return message.find(words) != std::string::npos; };
  if (says("smaller than required_chars")) {
    throw UserError(
        fmt::format("cannot train a tokenizer of {} tokens: the text has more different characters than "
                    "fit beside {} bytes and special tokens.",
                    vocab_size, kFixedPieces),
        "Give a larger --vocab.");
  }
  if (says("too high")) {
    throw UserError(
        fmt::format("cannot train a tokenizer of {} tokens: the text has too little variety for so many.",
                    vocab_size),
        "Give more text or a smaller --vocab.");
  }
  throw UserError(fmt::format("cannot train a tokenizer of {} tokens on this text: {}.", vocab_size, message),
                  "Give other text or another --vocab.");
}

}  // namespace

std::string train_sentencepiece(const std::function<bool(std::string&)>& next,
                                const SentencePieceTraining& settings) {
  if (settings.vocab_size <= kFixedPieces || settings.vocab_size > 1000000) {
    throw UsageError(
        fmt::format("a vocabulary of {} tokens cannot be trained.", settings.vocab_size),
        fmt::format("Give {} to 1000000: {} are bytes and special tokens.", kFixedPieces + 1, kFixedPieces));
  }
  if (settings.sample_bytes < 1) {
    throw UsageError(fmt::format("a sample of {} bytes cannot be trained on.", settings.sample_bytes),
                     "Give a positive size.");
  }
  const std::vector<std::string> lines = sample_lines(next, settings);
  if (lines.empty()) throw UserError("cannot train a tokenizer: the text is empty.", "Give some text.");
  if (settings.on_train) settings.on_train();
  LineIterator iterator(lines);
  std::string model;
  const std::unordered_map<std::string, std::string> options = {
      {"model_type", "bpe"},
      {"vocab_size", std::to_string(settings.vocab_size)},
      {"byte_fallback", "true"},
      {"normalization_rule_name", "identity"},
      {"remove_extra_whitespaces", "false"},
      {"add_dummy_prefix", "false"},
      {"allow_whitespace_only_pieces", "true"},
      {"split_digits", "true"},
      {"character_coverage", "0.9995"},
      {"user_defined_symbols", "\n"},
      {"max_sentence_length", std::to_string(kMaxLine + 1)},
      {"unk_id", "0"},
      {"eos_id", "1"},
      {"bos_id", "-1"},
      {"pad_id", "-1"},
      {"eos_piece", "<|endoftext|>"},
      {"num_threads", "2"},
      {"minloglevel", "2"},
  };
  const auto status = sentencepiece::SentencePieceTrainer::Train(options, &iterator, &model);
  if (!status.ok()) fail_training(settings.vocab_size, std::string(status.message()));
  return seal_model(model);
}

}  // namespace fathom
