// A seeded mutation fuzzer of the config reader. Whatever the bytes, it gives a valid config or a UserError,
// soon.
//
// FATHOM_FUZZ_INPUTS sets how many inputs are tried (2000), FATHOM_FUZZ_SEED which (1).
#include <algorithm>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "kernels/error.h"
#include "src/config/keys.h"
#include "src/config/parse.h"
#include "src/config/print.h"
#include "src/config/resolve.h"
#include "src/flops/flops.h"

namespace fathom {
namespace {

std::uint64_t setting(const char* name, std::uint64_t fallback) {
  const char* text = std::getenv(name);
  return text ? std::strtoull(text, nullptr, 10) : fallback;
}

// Of this process: what a reader takes, however busy the machine is.
double cpu_seconds() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }

class Mutator {
 public:
  explicit Mutator(std::uint64_t seed) : random_(seed) {
    for (const auto& entry : std::filesystem::directory_iterator(FATHOM_SOURCE_DIR "/configs")) {
      std::stringstream text;
      text << std::ifstream(entry.path(), std::ios::binary).rdbuf();
      seeds_.push_back(text.str());
    }
    std::sort(seeds_.begin(), seeds_.end());  // the folder's order is not the same everywhere
    Config full;
    full.train.steps = 3;
    seeds_.push_back(to_yaml(full));
    for (const Key& key : config_keys()) words_.push_back(fmt::format("{}: ", key.leaf()));
    for (const char* word : {"0",
                             "-1",
                             "1e9",
                             "1e18",
                             "1e308",
                             "-1e-400",
                             "nan",
                             ".inf",
                             "0x7f",
                             "99999999999999999999",
                             "true",
                             "null",
                             "~",
                             "[",
                             "]",
                             "{",
                             "}",
                             "[0.9, 0.95]",
                             "&a ",
                             "*a",
                             "<<: *a",
                             "!!int ",
                             "!",
                             "- ",
                             "? ",
                             ": ",
                             "#",
                             "|\n",
                             ">\n",
                             "\"",
                             "'",
                             "\\",
                             "%YAML 1.2\n",
                             "---\n",
                             "...\n",
                             "\n",
                             "\t",
                             "\r",
                             "\r\n",
                             "  ",
                             "\xff",
                             "\xc3",
                             "\xef\xbb\xbf",
                             "model:\n",
                             "experts:\n",
                             "train.steps: 3\n",
                             "\n  steps: 1\n",
                             "@",
                             "`",
                             ",",
                             "\x01"}) {
      words_.emplace_back(word);
    }
  }

  std::string next() {
    std::string text = seeds_[below(seeds_.size())];
    for (std::size_t n = 1 + below(3); n > 0; --n) mutate(text);
    return text;
  }

  const std::vector<std::string>& words() const { return words_; }

  std::string next_override() {
    const auto keys = config_keys();
    std::string text = fmt::format("{}={}", keys[below(keys.size())].path, words_[below(words_.size())]);
    if (below(3) == 0) mutate(text);
    return text;
  }

 private:
  std::size_t below(std::size_t n) { return n == 0 ? 0 : random_() % n; }

  void mutate(std::string& text) {
    const std::size_t at = below(text.size() + 1);
    const std::size_t length = below(std::min<std::size_t>(text.size() - at, 40) + 1);
    switch (below(9)) {
      case 0:
        text.erase(at, length);
        break;
      case 1:
        text.insert(at, words_[below(words_.size())]);
        break;
      case 2:
        text.replace(at, length, words_[below(words_.size())]);
        break;
      case 3:
        text.insert(below(text.size() + 1), text.substr(at, length));
        break;
      case 4: {
        const std::string& other = seeds_[below(seeds_.size())];
        text = text.substr(0, at) + other.substr(below(other.size()));
        break;
      }
      case 5:
        if (at < text.size()) text[at] = static_cast<char>(below(256));
        break;
      case 6:
        if (at < text.size()) text[at] = static_cast<char>(text[at] ^ (1 << below(8)));
        break;
      case 7: {
        // The same piece again and again: nesting and long lines.
        const std::string piece = words_[below(words_.size())];
        std::string many;
        for (std::size_t n = below(200); n > 0; --n) many += piece;
        text.insert(at, many);
        break;
      }
      default:
        text.resize(at);
        break;
    }
  }

  std::mt19937_64 random_;
  std::vector<std::string> seeds_, words_;
};

TEST(Fuzz, AnyBytesAreAValidConfigOrAUserError) {
  const std::uint64_t inputs = setting("FATHOM_FUZZ_INPUTS", 2000);
  Mutator mutator(setting("FATHOM_FUZZ_SEED", 1));
  std::uint64_t accepted = 0, refused = 0;
  double slowest = 0;
  for (std::uint64_t i = 0; i < inputs; ++i) {
    const std::string text = mutator.next();
    std::vector<std::string> overrides;
    if (i % 4 == 0) overrides.push_back(mutator.next_override());
    const double start = cpu_seconds();
    try {
      const Config c = parse_config(text, "fuzz.yaml", overrides);
      const Config r = resolve(c, 256);
      ASSERT_EQ(parse_config(to_yaml(c), "printed", {}), c) << text;
      ASSERT_EQ(parse_config(to_yaml(r), "printed", {}), r) << text;
      plan_horizon(r);
      estimate_memory(r);
      ++accepted;
    } catch (const UserError& e) {
      const std::string message = e.what();
      ASSERT_FALSE(message.empty());
      ASSERT_EQ(message.find('\n'), std::string::npos) << message;
      ASSERT_LT(message.size(), 1500u) << message;
      ++refused;
    } catch (const std::exception& e) {
      FAIL() << "input " << i << " threw " << e.what() << "\n" << text;
    }
    slowest = std::max(slowest, cpu_seconds() - start);
  }
  RecordProperty("accepted", static_cast<int>(accepted));
  RecordProperty("refused", static_cast<int>(refused));
  fmt::print("{} accepted, {} refused, the slowest took {:.1f} ms\n", accepted, refused, 1e3 * slowest);
  // A fuzzer whose every input is refused at the door tests nothing.
  EXPECT_GT(accepted, inputs / 20);
  EXPECT_GT(refused, inputs / 10);
  EXPECT_LT(slowest, 5);
}

// The largest file of nothing but one piece again and again: no parser may take quadratic time or recurse for
// it.
TEST(Fuzz, AMebibyteOfTheSamePieceEndsSoon) {
  std::vector<std::string> pieces = Mutator(1).words();
  for (const char* piece :
       {"a: 1\n", "a: [", "{a: ", "- - ", "a: b: ", "? a\n", "\"a\": ", "# a\n", "[{", "a:\n- "})
    pieces.emplace_back(piece);
  for (const std::string& piece : pieces) {
    for (const std::string before : {"", "train:\n  betas: [", "data:\n  train: "}) {
      std::string text = before;
      while (text.size() + piece.size() <= (std::size_t{1} << 20)) text += piece;
      const double start = cpu_seconds();
      EXPECT_THROW(parse_config(text, "fuzz.yaml"), UserError) << piece;
      EXPECT_LT(cpu_seconds() - start, 10) << "of " << before << " and " << piece;
    }
  }
}

}  // namespace
}  // namespace fathom
