#include "infer/speculate/gathered_level.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "infer/pieces.h"

namespace fathom {

namespace {

// Falling acceptance: of so many tokens soon after a gathering, and by so much.
constexpr std::int64_t kJudged = 64;
constexpr double kFall = 0.15;
constexpr double kForget = 0.98;
// The latest tokens are always among those that are retrieved.
constexpr std::int64_t kLatest = 64;

Causal skipping(Causal rule) {
  rule.blocks = Causal::Blocks::Skipped;
  return rule;
}

}  // namespace

GatheredLevel::GatheredLevel(const TargetLevel& target, const Causal& rule, const RowRule& rows,
                             bool wants_sureness)
    : target_(target), m_(target.cached()), rule_(rows), wants_sureness_(wants_sureness) {
  if (rule.blocks != m_.rule.blocks) {
    if (m_.skipping == nullptr) own_passes_ = ShortPasses::open(m_.c, m_.model, rule, m_.cache);
    m_.passes = m_.skipping != nullptr ? m_.skipping : own_passes_.get();
  }
  m_.rule = rule;
  m_.counts = nullptr;
}

std::int64_t GatheredLevel::target_needs() const {
  return m_.cache.missing_groups(target_.sequence(), m_.cache.tokens(target_.sequence()) + kMostVerified,
                                 kMostVerified);
}

void GatheredLevel::release() {
  sequence_.release();
  offered_.clear();
  drafted_.clear();
  waits_ = true;
}

bool GatheredLevel::rows(std::span<const std::int32_t> text, std::int64_t proposed, std::vector<Row>& rows) {
  if (!sequence_.exists()) return false;
  const auto settled = static_cast<std::size_t>(settled_);
  const std::size_t first = text.size() - 1 - static_cast<std::size_t>(proposed);
  const std::size_t kept = std::min(settled + common_prefix(drafted_, text.subspan(settled)), first);
  drafted_.resize(kept - settled);
  m_.cache.truncate(sequence_.id(), base_ + static_cast<std::int64_t>(kept - settled));
  const auto more = static_cast<std::int64_t>(text.size() - kept);
  if (!m_.cache.has_room(sequence_.id(), more, more, target_needs())) return false;
  const PassRows told = m_.add(sequence_.id(), text.subspan(kept), static_cast<std::int64_t>(kept),
                               proposed + 1, rule_.wanted(wants_sureness_));
  drafted_.assign(text.begin() + settled_, text.end());
  return rule_.proposals(told, text, first + 1, static_cast<std::size_t>(proposed) + 1, wants_sureness_,
                         rows);
}

void GatheredLevel::handed_on(std::span<const std::int32_t> text) {
  offered_.assign(text.begin() + settled_, text.end());
}

// The first is a token that the target chose; those behind are its own, those that it refused itself left
// out.
void GatheredLevel::judge(std::span<const std::int32_t> text) {
  const std::size_t stayed = common_prefix(offered_, text.subspan(static_cast<std::size_t>(settled_)));
  for (std::size_t i = 1; i < offered_.size() && i <= stayed; ++i) {
    const double x = i < stayed ? 1 : 0;
    ++judged_;
    recent_ = judged_ == 1 ? x : recent_ * kForget + x * (1 - kForget);
    if (judged_ <= kJudged) fresh_ += (x - fresh_) / static_cast<double>(judged_);
  }
  offered_.clear();
}

// By more than chance has it: both shares are of some dozens of tokens.
bool GatheredLevel::has_fallen() const {
  constexpr double kRecent = (1 + kForget) / (1 - kForget);  // so many tokens is the recent share worth
  const double error = std::sqrt(fresh_ * (1 - fresh_) * (1.0 / kJudged + 1 / kRecent));
  return judged_ >= 2 * kJudged && recent_ < fresh_ - kFall - 2 * error;
}

void GatheredLevel::settle(std::span<const std::int32_t> text) {
  const auto tokens = static_cast<std::int64_t>(text.size()) - 1;
  if (sequence_.exists()) {
    judge(text);
  } else if (waits_ && tokens - gathered_ <= most_tail()) {
    settled_ = tokens;  // there was no room a short while ago
    return;
  }
  const bool fell = ages() && has_fallen();
  const std::int64_t fresh = tokens - settled_;
  if (!sequence_.exists() || fell || tokens - gathered_ > most_tail() ||
      !m_.cache.has_room(sequence_.id(), fresh, fresh, target_needs())) {
    gather_anew(tokens);
    return;
  }
  m_.cache.truncate(sequence_.id(), base_);
  drafted_.clear();
  m_.cache.append_tokens(m_.c, sequence_.id(), target_.sequence(), settled_, tokens, layers());
  base_ += fresh;
  settled_ = tokens;
}

void GatheredLevel::gather_anew(std::int64_t tokens) {
  release();
  sequence_ = OwnSequence(m_.cache);
  ++gatherings_;
  judged_ = 0;
  fresh_ = recent_ = 0;
  settled_ = gathered_ = tokens;
  if (!gather(sequence_.id(), tokens)) {
    sequence_.release();
    return;
  }
  base_ = m_.cache.tokens(sequence_.id());
}

RetrievalLevel::RetrievalLevel(const TargetLevel& target, const RowRule& rows, bool wants_sureness,
                               const Options& options)
    : GatheredLevel(target, target.cached().rule, rows, wants_sureness), options_(options) {}

std::int64_t RetrievalLevel::most_tail() const {
  return std::max<std::int64_t>(kLatest, options_.budget / 8);
}

bool RetrievalLevel::gather(SequenceId into, std::int64_t tokens) {
  const CachedModel& m = cached();
  std::vector<KvCache::Chosen> chosen;
  std::int64_t of_dense = tokens, most = 0;
  for (std::int64_t layer = 0; layer < m.model.config().depth; ++layer) {
    chosen.push_back(choose(layer, m.cache.entries_of(target(), layer, tokens)));
    const std::int64_t n = static_cast<std::int64_t>(chosen.back().size()) / m.model.config().kv_heads;
    most = std::max(most, n);
    if (!m.model.routing().routes(layer)) of_dense = n;
  }
  if (!m.cache.has_room(into, of_dense, most, target_needs())) return false;
  m.cache.append_chosen(m.c, into, target(), of_dense, chosen);
  return true;
}

// The heads' chunks are put in order by all threads of the host: long texts have tens of thousands.
KvCache::Chosen RetrievalLevel::choose(std::int64_t layer, std::int64_t entries) const {
  const CachedModel& m = cached();
  const std::int64_t heads = m.model.config().kv_heads, chunk = options_.chunk;
  const std::int64_t chunks = entries / chunk, wanted = options_.budget / chunk;
  if (chunks <= wanted) {
    KvCache::Chosen all(static_cast<std::size_t>(heads * entries));
    for (std::int64_t g = 0; g < heads; ++g)
      std::iota(all.begin() + g * entries, all.begin() + (g + 1) * entries, 0);
    return all;
  }
  const std::int64_t latest = std::clamp<std::int64_t>(kLatest / chunk, 1, wanted / 2);
  const std::int64_t first_of_latest = chunks - latest;
  const std::int64_t best = std::min(wanted - 1 - latest, first_of_latest - 1);
  const std::int64_t each = chunk + best * chunk + entries - first_of_latest * chunk;
  const std::vector<float> scores = m.cache.chunk_scores(m.c, target(), layer, chunks, chunk);
  KvCache::Chosen chosen(static_cast<std::size_t>(heads * each));
  std::vector<std::vector<std::int64_t>> orders(
      static_cast<std::size_t>(heads),
      std::vector<std::int64_t>(static_cast<std::size_t>(first_of_latest - 1)));
  for_pieces(heads, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t g = begin; g < end; ++g) {
      std::vector<std::int64_t>& order = orders[static_cast<std::size_t>(g)];
      std::iota(order.begin(), order.end(), 1);
      // Without a query the later ones.
      const auto score = [&](std::int64_t c) {
        return scores.empty() ? static_cast<float>(c) : scores[static_cast<std::size_t>(g * chunks + c)];
      };
      const auto middle = order.begin() + best;
      std::nth_element(order.begin(), middle, order.end(), [&](std::int64_t a, std::int64_t b) {
        return score(a) > score(b) || (score(a) == score(b) && a < b);
      });
      std::sort(order.begin(), middle);
      auto to = chosen.begin() + g * each;
      const auto take = [&](std::int64_t from, std::int64_t n) {
        std::iota(to, to + n, static_cast<std::int32_t>(from));
        to += n;
      };
      take(0, chunk);
      for (auto c = order.begin(); c != middle; ++c) take(*c * chunk, chunk);
      take(first_of_latest * chunk, entries - first_of_latest * chunk);
    }
  });
  return chosen;
}

SelfSkipLevel::SelfSkipLevel(const TargetLevel& target, const RowRule& rows, bool wants_sureness,
                             const Window& window)
    : GatheredLevel(target, skipping(target.cached().rule), rows, wants_sureness), window_(window) {}

bool SelfSkipLevel::gather(SequenceId into, std::int64_t tokens) {
  const CachedModel& m = cached();
  const std::int64_t sinks = std::min(window_.sinks, tokens);
  const std::int64_t first = std::max(sinks, tokens - window_.recent);
  if (!m.cache.has_room(into, sinks + tokens - first, 0, target_needs())) return false;
  m.cache.append_tokens(m.c, into, target(), 0, sinks, layers());
  m.cache.append_tokens(m.c, into, target(), first, tokens, layers());
  return true;
}

}  // namespace fathom
