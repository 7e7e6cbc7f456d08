// Steps that are in line before those before them have been looked at: what the engine makes of them, with a
// decoder whose tokens and decisions follow from the token and the place before, so that what a text has to
// be is known.
#include <deque>
#include <map>
#include <random>
#include <set>

#include <gmock/gmock.h>

#include "infer/engine.h"
#include "tests/forwarding_backend.h"
#include "tests/infer/tiny_models.h"

namespace fathom {
namespace {

using tiny_models::kVocab;

constexpr std::int64_t kBlockBytes = 16 * 2 * 2 * 4 * 4;  // tokens, keys and values, heads, width, fp32

std::uint64_t mix(std::uint64_t a, std::uint64_t b) {
  std::uint64_t x = a * 0x9E3779B97F4A7C15ULL + b * 0xBF58476D1CE4E5B9ULL + 1;
  x ^= x >> 29;
  x *= 0x94D049BB133111EBULL;
  return x ^ x >> 32;
}
std::uint64_t state_of(std::int32_t token, std::int64_t position) {
  return mix(static_cast<std::uint64_t>(token) + 1, static_cast<std::uint64_t>(position));
}
/// What follows a token at a place.
std::int32_t token_after(std::int32_t token, std::int64_t position) {
  return static_cast<std::int32_t>(state_of(token, position) % kVocab);
}
/// Some rows' logits are not all finite as the device saw them, and it chose another token than the host
/// will.
bool misleads(std::int32_t token, std::int64_t position) { return state_of(token, position) % 11 == 3; }
std::uint8_t keeps(std::size_t layer, std::int32_t token, std::int64_t position) {
  return static_cast<std::uint8_t>(mix(state_of(token, position), layer + 77) & 1);
}

/// Holds what it is told against what it computed before.
class KnownDecoder final : public Decoder {
 public:
  struct Counts {
    std::int64_t launches = 0, ahead = 0;  // those behind a step that was not over
    std::int64_t rows = 0, waited_rows = 0;
  };
  KnownDecoder(const DecoderModel& model, std::int64_t rows, Counts& counts)
      : model_(model), most_rows_(rows), counts_(counts) {
    for (const DecoderLayer& l : model.layers) routed_ += l.routed ? 1 : 0;
    tables_.resize(static_cast<std::size_t>(model.slots),
                   std::vector<std::vector<std::int32_t>>(1 + routed_));
  }
  std::int64_t most_rows() const override { return most_rows_; }
  void set_blocks(std::int64_t slot, std::int64_t table, std::int64_t first,
                  std::span<const std::int32_t> blocks, bool /*hold_entries*/) override {
    std::vector<std::int32_t>& list =
        tables_[static_cast<std::size_t>(slot)][static_cast<std::size_t>(table)];
    ASSERT_LE(first, std::ssize(list));
    list.resize(static_cast<std::size_t>(first));
    list.insert(list.end(), blocks.begin(), blocks.end());
  }
  void launch(std::span<const DecoderRow> rows) override {
    ASSERT_FALSE(rows.empty());
    ASSERT_LE(std::ssize(rows), most_rows_);
    ASSERT_LT(under_way_.size(), 2U);
    ++counts_.launches;
    counts_.ahead += under_way_.empty() ? 0 : 1;
    counts_.rows += std::ssize(rows);
    std::vector<DecoderResult> results;
    std::vector<std::int32_t> right;
    std::set<std::pair<std::size_t, std::int32_t>> written;
    for (const DecoderRow& row : rows) {
      ASSERT_LT(row.follows, std::ssize(last_));
      const DecoderResult* const before =
          row.follows < 0 ? nullptr : &last_[static_cast<std::size_t>(row.follows)];
      const std::int32_t token = before != nullptr ? before->token : row.token;
      check_entries(row, before, written);
      DecoderResult result;
      result.token = token_after(token, row.position);
      right.push_back(result.token);
      result.finite = !misleads(token, row.position);
      if (!result.finite) result.token = (result.token + 1) % kVocab;
      for (std::size_t l = 0; l < routed_; ++l) result.kept.push_back(keeps(l, token, row.position));
      results.push_back(result);
    }
    last_ = results;
    under_way_.push_back({results, right});
  }
  std::vector<DecoderResult> wait() override {
    waited_ = under_way_.front();
    under_way_.pop_front();
    counts_.waited_rows += std::ssize(waited_.results);
    return waited_.results;
  }
  void logits(std::int64_t i, std::span<float> out) override {
    std::fill(out.begin(), out.end(), 0.0F);
    out[static_cast<std::size_t>(waited_.right.at(static_cast<std::size_t>(i)))] = 9;
  }

 private:
  struct Step {
    std::vector<DecoderResult> results;
    std::vector<std::int32_t> right;  // tokens that the logits say
  };
  /// Each entry has a block that no other row of the launch writes.
  void check_entries(const DecoderRow& row, const DecoderResult* before,
                     std::set<std::pair<std::size_t, std::int32_t>>& written) {
    const auto& tables = tables_.at(static_cast<std::size_t>(row.slot));
    const auto has = [&](std::size_t table, std::int64_t entries) {
      const auto block = static_cast<std::size_t>(entries / model_.cache.block);
      ASSERT_LT(block, tables[table].size()) << "table " << table;
      EXPECT_TRUE(written.insert({table == 0 ? 0 : 1, tables[table][block]}).second) << "table " << table;
    };
    EXPECT_EQ(row.held, row.position);
    if (routed_ < model_.layers.size()) has(0, row.held);
    for (std::size_t l = 0; l < routed_; ++l)
      has(1 + l, row.entries[l] + (before != nullptr ? before->kept[l] : 0));
  }

  DecoderModel model_;
  std::size_t routed_ = 0;
  std::int64_t most_rows_;
  Counts& counts_;
  std::vector<std::vector<std::vector<std::int32_t>>> tables_;
  std::vector<DecoderResult> last_;
  std::deque<Step> under_way_;
  Step waited_;
};

class KnownBackend final : public testing_support::ForwardingBackend {
 public:
  explicit KnownBackend(std::int64_t rows) : ForwardingBackend(make_cpu_backend({}, 1)), rows_(rows) {}
  std::unique_ptr<Decoder> make_decoder(const DecoderModel& model) override {
    return std::make_unique<KnownDecoder>(model, std::min(rows_, model.most_rows), counts);
  }
  KnownDecoder::Counts counts;

 private:
  std::int64_t rows_;
};

struct Text {
  std::vector<std::int32_t> prompt = {}, ids = {};
  std::vector<std::vector<std::uint8_t>> kept = {};
  Finish finish = Finish::None;
  std::vector<double> routed_fraction = {};
  bool cancelled = false;

  bool operator==(const Text&) const = default;
};
void PrintTo(const Text& t, std::ostream* out) {
  *out << t.prompt.size() << " and " << ::testing::PrintToString(t.ids) << ", " << name_of(t.finish);
}

/// What a run is made of; what it does follows from the seed and not from the engine's steps.
struct Setting {
  unsigned seed = 0;
  std::int64_t rows = 6, bytes = 1 << 20, max_rows = 24;
  bool launches_ahead = true, cancels = false, prefixes = false, reads_logits = false;
};

class StepsAhead : public ::testing::TestWithParam<tiny_models::Case> {
 protected:
  std::vector<Text> run(const Setting& s) {
    backend_ = std::make_shared<KnownBackend>(s.rows);
    tiny_models::Model m(backend_, DType::F32, GetParam().routing);
    EngineOptions o;
    o.cache = {.block = 16, .bytes = s.bytes};
    o.max_rows = s.max_rows;
    o.rule = m.rule;
    o.prefix_cache = s.prefixes;
    o.max_sequences = s.rows;
    o.launches_ahead = s.launches_ahead;
    Engine engine(m.c, m.model, o);
    std::mt19937 random(s.seed);
    const auto below = [&](int n) { return static_cast<std::int32_t>(random() % static_cast<unsigned>(n)); };
    std::vector<Text> texts;
    std::map<RequestId, std::size_t> text_of;
    std::vector<std::int32_t> common(40);
    for (auto& id : common) id = below(kVocab);
    const int all = 12;
    for (int steps = 0; std::ssize(texts) < all || !engine.idle(); ++steps) {
      // A new one now and then, by the tokens that there are: so that runs of either kind have the same
      // texts.
      if (std::ssize(texts) < all) {
        Request r;
        r.prompt.assign(common.begin(), common.begin() + (s.prefixes ? below(40) : 0));
        for (int n = 1 + below(20); n > 0; --n) r.prompt.push_back(below(kVocab));
        r.max_tokens = 1 + below(30);
        if (below(3) == 0) r.stop_tokens = {below(kVocab), below(kVocab), below(kVocab)};
        r.logprobs = s.reads_logits && below(3) == 0;
        r.routing = true;
        texts.push_back({.prompt = r.prompt});
        text_of[engine.submit(r)] = texts.size() - 1;
      }
      for (int passes = 1 + below(6); passes > 0; --passes) {
        for (const Event& e : engine.step()) {
          Text& t = texts[text_of.at(e.request)];
          if (e.has_token) t.ids.push_back(e.token.id);
          t.kept.insert(t.kept.end(), e.kept.begin(), e.kept.end());
          t.finish = e.finish;
          t.routed_fraction = e.routed_fraction;
          EXPECT_NE(e.finish, Finish::Error) << e.error;
        }
        if (s.cancels && below(20) == 0) {
          const auto gone = std::next(text_of.begin(), below(static_cast<int>(text_of.size())));
          if (texts[gone->second].finish == Finish::None) texts[gone->second].cancelled = true;
          engine.cancel(gone->first);
        }
      }
      if (steps > 4000) throw std::runtime_error("it does not come to an end");
    }
    EXPECT_EQ(engine.stats().free_blocks, engine.stats().blocks);
    for (const Text& t : texts) EXPECT_TRUE(t.cancelled || t.finish != Finish::None);
    return texts;
  }
  static void expect_known(const std::vector<Text>& texts) {
    for (const Text& t : texts) {
      for (std::size_t i = 1; i < t.ids.size(); ++i) {
        const auto place = static_cast<std::int64_t>(t.prompt.size() + i) - 1;
        ASSERT_EQ(t.ids[i], token_after(t.ids[i - 1], place)) << "token " << i;
        const auto computed = static_cast<std::size_t>(place);
        if (computed >= t.kept.size()) continue;
        for (std::size_t l = 0; l < t.kept[computed].size(); ++l)
          ASSERT_EQ(t.kept[computed][l], keeps(l, t.ids[i - 1], place)) << "token " << i << ", layer " << l;
      }
    }
  }
  const KnownDecoder::Counts& counts() const { return backend_->counts; }

  std::shared_ptr<KnownBackend> backend_;
};

TEST_P(StepsAhead, GiveTheSameTexts) {
  for (unsigned seed = 0; seed < 12; ++seed) {
    SCOPED_TRACE(seed);
    Setting s{.seed = seed, .reads_logits = seed % 3 == 2};
    const std::vector<Text> ahead = run(s);
    EXPECT_GT(counts().ahead, counts().launches / (s.reads_logits ? 20 : 3));
    s.launches_ahead = false;
    const std::vector<Text> one_by_one = run(s);
    EXPECT_EQ(counts().ahead, 0);
    EXPECT_EQ(counts().rows, counts().waited_rows);
    EXPECT_EQ(ahead, one_by_one);
    expect_known(ahead);
  }
}

// Of texts that go, and of those whose end was not known, a row is computed in vain; of none more than one,
// but where the device misled.
TEST_P(StepsAhead, LeaveNothingBehind) {
  for (unsigned seed = 0; seed < 12; ++seed) {
    SCOPED_TRACE(seed);
    expect_known(run({.seed = seed, .cancels = true, .prefixes = seed % 2 == 1}));
    EXPECT_GT(counts().ahead, 0);
  }
}

// Little memory: texts give their blocks away, a row of theirs under way or not.
TEST_P(StepsAhead, EndWhereTheCacheIsSmall) {
  for (unsigned seed = 0; seed < 8; ++seed) {
    SCOPED_TRACE(seed);
    run({.seed = seed, .bytes = kBlockBytes * 28, .cancels = seed % 2 == 1, .prefixes = seed % 4 > 1});
  }
}

// A text alone comes as far as without steps ahead: what these took beforehand, it gets back.
TEST_P(StepsAhead, ComeAsFarInAFullCache) {
  int full = 0;
  for (std::int64_t blocks = 8; blocks < 24; ++blocks) {
    for (unsigned seed = 0; seed < 20; ++seed) {
      SCOPED_TRACE(testing::Message() << blocks << " blocks, seed " << seed);
      std::size_t tokens[2] = {};
      Finish finish[2] = {};
      for (const bool ahead : {false, true}) {
        tiny_models::Model m(std::make_shared<KnownBackend>(1), DType::F32, GetParam().routing);
        EngineOptions o;
        o.cache = {.block = 16, .bytes = kBlockBytes * blocks};
        o.rule = m.rule;
        o.launches_ahead = ahead;
        Engine engine(m.c, m.model, o);
        engine.submit({.prompt = {static_cast<std::int32_t>(seed), 3, 5}, .max_tokens = 76});
        while (!engine.idle()) {
          for (const Event& e : engine.step()) {
            tokens[ahead] += e.has_token ? 1 : 0;
            finish[ahead] = e.finish;
          }
        }
      }
      EXPECT_GE(tokens[1], tokens[0]);
      EXPECT_TRUE(finish[1] == finish[0] || finish[1] == Finish::Length);
      full += finish[0] == Finish::Error ? 1 : 0;
    }
  }
  EXPECT_GT(full, 20);
}

// What others left in the cache gives way to a step ahead as it does to the next one.
TEST_P(StepsAhead, GoOnWhereThePoolIsFullOfBeginnings) {
  const auto backend = std::make_shared<KnownBackend>(6);
  tiny_models::Model m(backend, DType::F32, GetParam().routing);
  EngineOptions o;
  o.cache = {.block = 16, .bytes = kBlockBytes * 160};
  o.rule = m.rule;
  o.prefix_cache = true;
  o.max_sequences = 6;
  Engine engine(m.c, m.model, o);
  for (std::int32_t i = 0; i < 60; ++i)
    engine.submit({.prompt = std::vector<std::int32_t>(20, i % kVocab), .max_tokens = 55});
  while (!engine.idle()) {
    for (const Event& e : engine.step()) EXPECT_NE(e.finish, Finish::Error) << e.error;
  }
  EXPECT_GT(engine.stats().prefix_blocks, 20);
  EXPECT_GT(backend->counts.ahead, backend->counts.launches * 19 / 20);
}

INSTANTIATE_TEST_SUITE_P(Kinds, StepsAhead, ::testing::ValuesIn([] {
                           std::vector<tiny_models::Case> all = tiny_models::cases();
                           std::erase_if(all, [](const auto& c) { return c.routing.has_experts(); });
                           return all;
                         }()),
                         [](const auto& kind) { return kind.param.name; });

}  // namespace
}  // namespace fathom
