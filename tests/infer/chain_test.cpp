// The chain of speculative decoding against plain sampling: on small vocabularies every outcome of every
// random number is gone through, with its weight, and the texts' distributions are equal to rounding.
#include "infer/speculate/chain.h"

#include <array>
#include <cmath>
#include <map>
#include <set>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "infer/sampling.h"
#include "src/core/splitmix64.h"
#include "tests/forwarding_backend.h"
#include "tests/infer/all_outcomes.h"

namespace fathom {
namespace {

using namespace outcomes;

/// Random numbers that are a function of what they are for.
double normal_of(std::uint64_t seed) {
  const double u = uniform(seed, 1), v = uniform(seed, 2);
  return std::sqrt(-2 * std::log(1 - u)) * std::cos(6.283185307179586 * v);
}

/// How a level's distributions come about.
struct TableOptions {
  std::uint64_t seed = 0;
  std::int64_t vocab = 3;
  double spread = 1;      // of the logits
  double own = 1;         // how far they are from the last level's
  bool rebuilds = false;  // others after each cycle
  double silent = 0;      // how often it has nothing to say
  SamplingOptions sampling;
  /// Rows are one token: the one that shared noise of this seed chooses, or at temperature 0 the likeliest.
  bool one_token = false;
  std::uint64_t noise = 0;
  bool held = false;   // rows lie in a backend's memory,
  std::size_t on = 0;  // of device(on)
};

/// Counts what comes to the host.
class CountingBackend final : public testing_support::ForwardingBackend {
 public:
  CountingBackend() : ForwardingBackend(make_cpu_backend({}, 1)) {}
  void copy_to_host(void* host, const void* source, std::size_t bytes) override {
    ++copies;
    inner().copy_to_host(host, source, bytes);
  }
  std::int64_t copies = 0;
};

struct Device {
  std::shared_ptr<CountingBackend> backend = std::make_shared<CountingBackend>();
  Context c{backend, DType::F64};
};

Device& device(std::size_t number) {
  static std::array<Device, 2> devices;
  return devices[number];
}

/// A row whose probabilities are what a backend makes of their logarithms.
Row held_row(const std::vector<double>& p, std::size_t on) {
  Context& c = device(on).c;
  const auto n = static_cast<std::int64_t>(p.size());
  std::vector<double> logits;
  for (const double x : p) logits.push_back(std::log(x));
  const Tensor there = c.empty({1, n});
  from_doubles(c.backend(), there, logits);
  Row row;
  row.held = std::make_shared<HeldRows>(c, there, n, n, 1.0);
  return row;
}

/// A level whose rows are a function of the text (and of how often it was settled).
class Table final : public Level {
 public:
  explicit Table(const TableOptions& o) : o_(o) {}
  /// For the next run.
  void restart() { settled_ = 0; }

  const Row& row(std::span<const std::int32_t> text) {
    std::uint64_t number = static_cast<std::uint64_t>(o_.rebuilds ? settled_ : 0) + 1;
    for (const std::int32_t id : text) number = number * 8 + static_cast<std::uint64_t>(id) + 1;
    const auto [found, is_new] = rows_.try_emplace(number);
    if (is_new) {
      std::vector<float> logits;
      const std::uint64_t shared = mix64(o_.seed * 31 + number % (1ULL << 40)), own = mix64(shared + 7);
      std::uint64_t text_alone = 1;
      for (const std::int32_t id : text) text_alone = text_alone * 8 + static_cast<std::uint64_t>(id) + 1;
      for (std::int64_t v = 0; v < o_.vocab; ++v) {
        const auto at = static_cast<std::uint64_t>(v);
        const double common = normal_of(mix64(o_.sampling.seed + text_alone * 64 + at));
        logits.push_back(static_cast<float>(o_.spread * (common + o_.own * normal_of(mix64(own + at)))));
      }
      Row& row = found->second;
      probabilities(logits, o_.sampling, text.size(), {{}, text}, row.p);
      if (o_.one_token) {
        row.only = gumbel_choice(row.p, o_.noise, static_cast<std::int64_t>(text.size()));
        row.sure = row.p[static_cast<std::size_t>(row.only)];
        row.p.clear();
      } else if (o_.held) {
        row = held_row(row.p, o_.on);
      }
    }
    return found->second;
  }
  bool rows(std::span<const std::int32_t> text, std::int64_t proposed, std::vector<Row>& out) override {
    if (o_.silent > 0 &&
        uniform(o_.seed + 5, text.size() * 977 + static_cast<std::uint64_t>(text.empty() ? 0 : text.back())) <
            o_.silent)
      return false;
    for (auto n = static_cast<std::int64_t>(text.size()) - proposed;
         n <= static_cast<std::int64_t>(text.size()); ++n)
      out.push_back(row(text.first(static_cast<std::size_t>(n))));
    return true;
  }
  void settle(std::span<const std::int32_t>) override { ++settled_; }

 private:
  TableOptions o_;
  std::map<std::uint64_t, Row> rows_;
  std::int64_t settled_ = 0;
};

/// Decides by all that it was ever told, and by nothing else.
class ErraticPace final : public Pace {
 public:
  ErraticPace(std::uint64_t seed, std::int64_t most) : state_(seed), most_(most) {}
  std::int64_t proposals(std::int64_t level) override {
    see(static_cast<std::uint64_t>(level));
    return static_cast<std::int64_t>(mix64(state_) % static_cast<std::uint64_t>(most_ + 1));
  }
  bool one_more(std::int64_t, std::int64_t, double sure) override {
    see(static_cast<std::uint64_t>(sure * 1e6));
    return mix64(state_) % 4 != 0;
  }
  void tested(std::int64_t level, double sure, bool accepted) override {
    see(static_cast<std::uint64_t>(level * 2) + static_cast<std::uint64_t>(sure * 1e6) * 16 +
        (accepted ? 1 : 0));
  }
  void passed(std::int64_t level, std::int64_t n, double) override {
    see(static_cast<std::uint64_t>(level * 32 + n));
  }

 private:
  void see(std::uint64_t what) { state_ = mix64(state_ * kGoldenGamma + what + 1); }
  std::uint64_t state_;
  std::int64_t most_;
};

/// The known bias: where a level between refuses, it chooses from its own distribution, not from the
/// residual.
class BiasedChain final : public Chain {
 public:
  using Chain::Chain;

 protected:
  std::int32_t choose_other(Row& p, const Row& q, const Decision& d) override {
    return d.level == 1 ? choose(p, d) : Chain::choose_other(p, q, d);
  }
};

enum class PaceKind : std::uint8_t { Fixed, Erratic, Adaptive };

struct Config {
  std::vector<TableOptions> levels;
  std::vector<std::int64_t> proposals;
  PaceKind pace = PaceKind::Fixed;
  std::uint64_t seed = 0;
  std::int64_t horizon = 3;
  std::int64_t beyond = 0;  // tokens behind the horizon that a text may have, and that do not count
  Ids stops;
};

Texts plain_texts(const Config& c) {
  Table last(c.levels.back());
  Texts open{{Ids{}, 1.0}}, ended;
  for (std::int64_t n = 0; n < c.horizon; ++n) {
    Texts longer;
    for (const auto& [text, weight] : open) {
      const std::vector<double>& p = last.row(text).p;
      for (std::size_t v = 0; v < p.size(); ++v) {
        if (p[v] <= 0) continue;
        Ids next = text;
        next.push_back(static_cast<std::int32_t>(v));
        const bool stops = std::find(c.stops.begin(), c.stops.end(), next.back()) != c.stops.end();
        (stops ? ended : longer)[next] += weight * p[v];
      }
    }
    open = std::move(longer);
  }
  ended.insert(open.begin(), open.end());
  return ended;
}

/// One that has seen some cycles.
AdaptivePace seasoned_pace(const Config& c) {
  const auto levels = static_cast<std::int64_t>(c.levels.size());
  AdaptivePace pace({.levels = levels, .most = 3, .most_between = 2});
  SplitMix64 random(c.seed);
  for (int i = 0; i < 20; ++i) {
    for (std::int64_t level = 1; level < levels; ++level) {
      const auto n = static_cast<std::int64_t>(random.below(3));
      pace.proposals(level);
      pace.passed(level, n, 1 + 0.01 * static_cast<double>(random.below(30)) * static_cast<double>(n));
      for (std::int64_t k = 0; k < n; ++k)
        pace.tested(level, uniform(c.seed, random.next()), random.below(3) != 0);
    }
    pace.passed(0, 0, 0.01 + 0.001 * static_cast<double>(random.below(50)));
  }
  return pace;
}

template <typename ChainKind>
Texts chain_texts(const Config& c, std::int64_t* runs = nullptr) {
  std::vector<Table> tables(c.levels.begin(), c.levels.end());
  AllOutcomes chance;
  Texts found;
  const AdaptivePace seasoned = seasoned_pace(c);
  do {
    FixedPace fixed(c.proposals);
    ErraticPace erratic(c.seed, 2);
    AdaptivePace adaptive = seasoned;
    Pace& pace = c.pace == PaceKind::Fixed     ? static_cast<Pace&>(fixed)
                 : c.pace == PaceKind::Erratic ? static_cast<Pace&>(erratic)
                                               : static_cast<Pace&>(adaptive);
    std::vector<Level*> levels;
    for (Table& t : tables) t.restart(), levels.push_back(&t);
    ChainKind chain(levels, chance, pace, c.stops);
    double seconds = 0;
    std::uint64_t asked = c.seed;
    chain.set_clock([&] { return seconds += 0.01 * static_cast<double>(mix64(++asked) % 7); });
    Ids text;
    const auto most = c.horizon + c.beyond;
    while (static_cast<std::int64_t>(text.size()) < c.horizon && (text.empty() || !chain.stops(text.back())))
      chain.cycle(text, most - static_cast<std::int64_t>(text.size()));
    EXPECT_LE(static_cast<std::int64_t>(text.size()), most);
    for (std::size_t i = 0; i + 1 < text.size(); ++i) EXPECT_FALSE(chain.stops(text[i])) << "behind a stop";
    if (static_cast<std::int64_t>(text.size()) > c.horizon) text.resize(static_cast<std::size_t>(c.horizon));
    found[text] += chance.weight();
    if (runs != nullptr) ++*runs;
  } while (chance.next());
  return found;
}

Config random_config(std::uint64_t seed) {
  SplitMix64 random(seed);
  const auto below = [&](std::size_t n) { return static_cast<std::int64_t>(random.below(n)); };
  Config c;
  c.seed = random.next();
  const std::int64_t vocab = 2 + below(4);
  const std::int64_t levels = below(4) == 0 ? 2 : 3;
  SamplingOptions s{.temperature = std::vector<double>{1, 1, 0.4, 2.5}[static_cast<std::size_t>(below(4))]};
  s.seed = random.next();  // the tables'
  if (below(3) == 0) s.top_p = 0.3 + 0.15 * static_cast<double>(below(5));
  if (below(5) == 0) s.top_k = 1 + below(3);
  if (below(5) == 0) s.min_p = 0.3;
  if (below(4) == 0) s.repetition_penalty = 1.5, s.frequency_penalty = 0.4, s.presence_penalty = -0.3;
  if (below(6) == 0) s.logit_bias[0] = 1.5;
  for (std::int64_t l = 0; l < levels; ++l) {
    TableOptions o{.seed = random.next(), .vocab = vocab, .sampling = s};
    o.spread = std::vector<double>{1, 0.3, 3}[static_cast<std::size_t>(below(3))];
    o.own = std::vector<double>{1, 0.2, 0, 4}[static_cast<std::size_t>(below(4))];  // 0: all levels alike
    o.rebuilds = l + 1 < levels && below(2) == 0;
    o.silent = l == 0 && below(4) == 0 ? 0.4 : 0;
    c.levels.push_back(o);
    if (l > 0) c.proposals.push_back(1 + below(l + 1 == levels ? 3 : 2));
  }
  c.pace = static_cast<PaceKind>(below(3));
  // As many outcomes as can be gone through.
  c.horizon = vocab == 2 ? 3 + below(2) : vocab == 3 ? 2 + below(2) : 2;
  c.beyond = c.horizon >= 3 ? below(2) : vocab < 5 ? 1 + below(2) : below(2);
  if (below(3) == 0) c.stops = {static_cast<std::int32_t>(vocab - 1)};
  return c;
}

std::string described(const Config& c) {
  return fmt::format(
      "vocabulary {}, {} levels, {} proposals for the last, pace {}, horizon {}, temperature {}, top_p {}",
      c.levels[0].vocab, c.levels.size(), c.proposals.back(), static_cast<int>(c.pace), c.horizon,
      c.levels[0].sampling.temperature, c.levels[0].sampling.top_p);
}

std::uint64_t configurations() {
  const char* given = std::getenv("FATHOM_CHAINS");
  return given == nullptr ? 1000 : std::strtoull(given, nullptr, 10);
}

TEST(Chain, TextsAreDistributedAsPlainSamplingHasThem) {
  std::int64_t runs = 0;
  for (std::uint64_t seed = 1; seed <= configurations(); ++seed) {
    const Config c = random_config(seed);
    const double distance = total_variation(chain_texts<Chain>(c, &runs), plain_texts(c));
    ASSERT_LT(distance, 1e-9) << "configuration " << seed << ": " << described(c);
  }
  RecordProperty("runs", std::to_string(runs));
}

/// Some levels, or all of them, have rows that lie elsewhere.
Config with_held_rows(std::uint64_t seed) {
  Config c = random_config(seed);
  for (std::size_t l = 0; l < c.levels.size(); ++l) c.levels[l].held = seed % 3 == 0 || (seed >> l) % 2 == 0;
  return c;
}

TEST(Chain, TextsByRowsThatLieElsewhereAreDistributedSoToo) {
  for (std::uint64_t seed = 1; seed <= std::min<std::uint64_t>(150, configurations()); ++seed) {
    const Config held = with_held_rows(seed);
    const double distance = total_variation(chain_texts<Chain>(held), plain_texts(random_config(seed)));
    ASSERT_LT(distance, 1e-9) << "configuration " << seed << ": " << described(held);
  }
}

/// All levels have rows that lie elsewhere, and none where its neighbours' do.
Config with_rows_apart(std::uint64_t seed) {
  Config c = random_config(seed);
  for (std::size_t l = 0; l < c.levels.size(); ++l) c.levels[l].held = true, c.levels[l].on = l % 2;
  return c;
}

TEST(Chain, TextsByRowsOfTwoDevicesAreDistributedSoToo) {
  for (std::uint64_t seed = 1; seed <= std::min<std::uint64_t>(100, configurations()); ++seed) {
    const Config apart = with_rows_apart(seed);
    const double distance = total_variation(chain_texts<Chain>(apart), plain_texts(random_config(seed)));
    ASSERT_LT(distance, 1e-9) << "configuration " << seed << ": " << described(apart);
  }
}

/// How many proposals the last level did not take in some texts, and how many rows came to the host for it.
struct Refusals {
  std::int64_t refused = 0, rows = 0;
};
Refusals refusals(std::size_t on_of_draft) {
  TableOptions draft{.seed = 1, .vocab = 5, .sampling = {.temperature = 1}, .held = true, .on = on_of_draft};
  TableOptions last = draft;
  last.seed = 2, last.on = 0;
  Table tables[] = {Table(draft), Table(last)};
  Refusals all;
  const auto copies = [] { return device(0).backend->copies + device(1).backend->copies; };
  const std::int64_t before = copies();
  for (std::uint64_t seed = 0; seed < 30; ++seed) {
    SeededChance chance(seed);
    FixedPace pace({3});
    Chain chain({&tables[0], &tables[1]}, chance, pace);
    for (std::vector<std::int32_t> text; text.size() < 8;) chain.cycle(text, 4);
    all.refused += chain.counts()[1].tested - chain.counts()[1].accepted;
  }
  all.rows = copies() - before;
  return all;
}

TEST(Chain, RowsOfOneDeviceStayThereWhereAProposalIsRefused) {
  const Refusals r = refusals(0);
  EXPECT_GT(r.refused, 20);
  EXPECT_EQ(r.rows, 0);
}

TEST(Chain, OfRowsOfTwoDevicesThoseThatAreTakenOffEachOtherComeToTheHostOnce) {
  const Refusals r = refusals(1);
  EXPECT_GT(r.refused, 20);
  EXPECT_EQ(r.rows, 2 * r.refused);
}

TEST(Chain, TheKnownBiasIsFoundInRowsThatLieElsewhere) {
  int found = 0;
  for (std::uint64_t seed = 3; seed <= 99; seed += 3) {
    if (random_config(seed).levels.size() < 3) continue;
    found += total_variation(chain_texts<BiasedChain>(with_held_rows(seed)),
                             plain_texts(random_config(seed))) > 1e-9;
  }
  EXPECT_GE(found, 3);
}

TEST(Chain, TheKnownBiasIsFound) {
  int found = 0, three_levels = 0;
  double most = 0;
  for (std::uint64_t seed = 1; seed <= 100; ++seed) {
    const Config c = random_config(seed);
    if (c.levels.size() < 3) continue;
    ++three_levels;
    const double distance = total_variation(chain_texts<BiasedChain>(c), plain_texts(c));
    most = std::max(most, distance);
    found += distance > 1e-9 ? 1 : 0;
  }
  // Others have a middle that agrees with the draft, or refuses nothing.
  EXPECT_GE(found, 10) << "of " << three_levels;
  EXPECT_GT(most, 0.01);
}

// What comes of numbers that are drawn, not gone through.
TEST(Chain, SeededTextsAreDistributedAsPlainSamplingHasThem) {
  constexpr int kDraws = 20000;
  for (const std::uint64_t seed : {3U, 8U, 12U, 21U, 30U}) {
    Config plain = random_config(seed), c = seed == 30 ? with_held_rows(seed) : plain;
    plain.horizon = c.horizon = 2;
    const Texts expected = plain_texts(plain);
    std::vector<Table> tables(c.levels.begin(), c.levels.end());
    std::map<Ids, int> counts;
    for (int i = 0; i < kDraws; ++i) {
      SeededChance chance(static_cast<std::uint64_t>(i));
      FixedPace pace(c.proposals);
      std::vector<Level*> levels;
      for (Table& t : tables) t.restart(), levels.push_back(&t);
      Chain chain(levels, chance, pace, c.stops);
      Ids text;
      while (text.size() < 2 && (text.empty() || !chain.stops(text.back())))
        chain.cycle(text, 4 - static_cast<std::int64_t>(text.size()));
      if (text.size() > 2) text.resize(2);
      ++counts[text];
    }
    double chi = 0, degrees = -1;
    for (const auto& [text, weight] : expected) {
      if (weight * kDraws < 5) continue;
      const double wanted = weight * kDraws, got = counts[text];
      chi += (got - wanted) * (got - wanted) / wanted;
      ++degrees;
    }
    EXPECT_LT(chi, degrees + 4 * std::sqrt(2 * degrees) + 5) << described(c);
  }
}

/// Texts of 40 tokens with one last level, whatever the levels before and the pace.
std::vector<Ids> texts_of_drafts(const SamplingOptions& s, std::uint64_t noise) {
  std::vector<Ids> texts;
  for (std::uint64_t draft = 0; draft < 12; ++draft) {
    const TableOptions last{.seed = 1, .vocab = 5, .sampling = s, .one_token = true, .noise = noise};
    TableOptions first = last, between = last;
    first.seed = 100 + draft, between.seed = 200 + draft;
    first.own = 0.1 * static_cast<double>(draft), between.own = 0.3;
    between.rebuilds = draft % 2 == 0;
    first.silent = draft % 3 == 0 ? 0.3 : 0;
    Table tables[] = {Table(first), Table(between), Table(last)};
    std::vector<Level*> levels{&tables[0], &tables[1], &tables[2]};
    if (draft % 4 == 1) levels.erase(levels.begin() + 1);
    if (draft == 11) levels = {&tables[2]};
    ErraticPace erratic(draft, 5);
    AdaptivePace adaptive({.levels = static_cast<std::int64_t>(levels.size())});
    Pace& pace = draft % 2 == 0 ? static_cast<Pace&>(erratic) : static_cast<Pace&>(adaptive);
    SeededChance chance(draft);
    Chain chain(levels, chance, pace);
    Ids text;
    while (text.size() < 12) chain.cycle(text, 12 - static_cast<std::int64_t>(text.size()));
    texts.push_back(text);
    EXPECT_EQ(chain.counts().back().tokens, 12);
    if (levels.size() > 1 && draft % 2 == 0) {
      EXPECT_GT(chain.counts().back().accepted, 0);
    }
  }
  return texts;
}

TEST(Chain, UnderSharedNoiseTheDraftDoesNotChangeTheText) {
  std::set<Ids> different;
  for (std::uint64_t noise = 1; noise <= 10; ++noise) {
    const std::vector<Ids> texts = texts_of_drafts({.temperature = 1}, noise);
    for (const Ids& text : texts) EXPECT_EQ(text, texts.back()) << noise;
    different.insert(texts.back());
  }
  EXPECT_GT(different.size(), 8U);
}

TEST(Chain, AtTemperatureZeroTheDraftDoesNotChangeTheText) {
  const std::vector<Ids> texts = texts_of_drafts({.temperature = 0}, 1);
  for (const Ids& text : texts) EXPECT_EQ(text, texts.back());
}

TEST(GumbelChoice, DrawsTheProbabilitiesOverSeedsAndOverPlaces) {
  const std::vector<double> p = {0.5, 0, 0.3, 0.15, 0.05};
  constexpr int kDraws = 20000;
  for (const bool over_seeds : {true, false}) {
    std::vector<double> counts(p.size());
    for (int i = 0; i < kDraws; ++i)
      counts.at(static_cast<std::size_t>(over_seeds ? gumbel_choice(p, static_cast<std::uint64_t>(i), 7)
                                                    : gumbel_choice(p, 7, i))) += 1;
    EXPECT_EQ(counts[1], 0);
    for (std::size_t v = 0; v < p.size(); ++v)
      EXPECT_NEAR(counts[v] / kDraws, p[v], 4 * std::sqrt(p[v] * (1 - p[v]) / kDraws)) << v;
  }
}

}  // namespace
}  // namespace fathom
