#include "infer/speculate/chain.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "kernels/error.h"

namespace fathom {

Chain::Chain(std::vector<Level*> levels, Chance& chance, Pace& pace, std::vector<std::int32_t> stops)
    : levels_(std::move(levels)),
      chance_(chance),
      pace_(pace),
      stops_(std::move(stops)),
      counts_(levels_.size()),
      clock_([] {
        return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
      }) {
  if (levels_.empty()) throw InternalError("[chain] no level");
}

bool Chain::stops(std::int32_t id) const {
  return std::find(stops_.begin(), stops_.end(), id) != stops_.end();
}

std::int64_t Chain::cycle(std::vector<std::int32_t>& text, std::int64_t most) {
  if (most < 1) throw InternalError("[chain] a cycle adds at least one token");
  const std::size_t before = text.size();
  if (!extend(static_cast<std::int64_t>(levels_.size()) - 1, text, most, nullptr))
    throw InternalError("[chain] the last level has nothing to say");
  settle_level(levels_.size() - 1, text);
  behind_ = true;
  return static_cast<std::int64_t>(text.size() - before);
}

void Chain::settle(std::span<const std::int32_t> text) {
  for (std::size_t level = levels_.size(); level-- > 0;) settle_level(level, text);
  behind_ = false;
}

double Chain::settle_level(std::size_t level, std::span<const std::int32_t> text) {
  const double began = clock_();
  levels_[level]->settle(text);
  const double seconds = clock_() - began;
  counts_[level].seconds += seconds;
  counts_[level].settle_seconds += seconds;
  return seconds;
}

// While the text goes on plainly nobody asks the levels before, and what they would copy costs nothing.
void Chain::catch_up(std::span<const std::int32_t> text) {
  if (!std::exchange(behind_, false)) return;
  double seconds = 0;
  for (std::size_t level = levels_.size() - 1; level-- > 0;) seconds += settle_level(level, text);
  if (!std::exchange(is_far_behind_, false)) pace_.settled(seconds);
}

// One pass of a level: what the level before proposes, tested, and one token more. At most `most` tokens,
// with their rows of this level to those `handed_on`. False: the level has nothing to say, and the text is as
// it was.
bool Chain::extend(std::int64_t level, std::vector<std::int32_t>& text, std::int64_t most,
                   std::vector<Row>* handed_on) {
  const std::size_t start = text.size();
  std::vector<Row> q, p;
  if (level > 0) {
    const std::int64_t wanted = std::min(pace_.proposals(level), most - 1);
    if (wanted > 0 && level == static_cast<std::int64_t>(levels_.size()) - 1) catch_up(text);
    if (wanted > 0) propose(level - 1, text, wanted, most - 1, q);
    if (!q.empty()) levels_[static_cast<std::size_t>(level - 1)]->handed_on(text);
  }
  const std::size_t proposed = text.size() - start;
  if (!ask(level, text, static_cast<std::int64_t>(proposed), p)) {
    text.resize(start);
    return false;
  }
  LevelCounts& count = counts_[static_cast<std::size_t>(level)];
  const auto decision = [&](std::size_t i, Purpose purpose) {
    return Decision{static_cast<std::int64_t>(start + i), purpose, level, passes_};
  };
  std::size_t taken = 0;
  bool refused = false;
  while (taken < proposed && !refused) {
    const std::int32_t id = text[start + taken];
    refused = !takes(id, p[taken], q[taken], decision(taken, Purpose::Acceptance));
    pace_.tested(level, sureness(q[taken], id), !refused);
    ++count.tested;
    taken += refused ? 0 : 1;
  }
  count.proposed += static_cast<std::int64_t>(proposed);
  count.accepted += static_cast<std::int64_t>(taken);
  text.resize(start + taken);
  if (refused) {
    text.push_back(choose_other(p[taken], q[taken], decision(taken, Purpose::Token)));
  } else if (taken == 0 || !stops(text.back())) {
    text.push_back(choose(p[taken], decision(taken, Purpose::Token)));
  }
  count.tokens += static_cast<std::int64_t>(text.size() - start);
  if (handed_on != nullptr)
    std::move(p.begin(), p.begin() + static_cast<std::ptrdiff_t>(text.size() - start),
              std::back_inserter(*handed_on));
  return true;
}

// About `wanted` tokens distributed as the level has it, and their rows: a pass of a level between may bring
// more, up to `most`. Fewer behind a stop, where the pace says so, and where the level has no more to say.
void Chain::propose(std::int64_t level, std::vector<std::int32_t>& text, std::int64_t wanted,
                    std::int64_t most, std::vector<Row>& rows) {
  std::vector<Row> one;
  while (static_cast<std::int64_t>(rows.size()) < wanted) {
    if (level == 0) {
      if (!ask(0, text, 0, one)) return;
      text.push_back(choose(one[0], {static_cast<std::int64_t>(text.size()), Purpose::Proposal, 0, passes_}));
      rows.push_back(std::move(one[0]));
      ++counts_[0].tokens;
    } else if (!extend(level, text, most - static_cast<std::int64_t>(rows.size()), &rows)) {
      return;
    }
    if (stops(text.back()) || !pace_.one_more(level + 1, static_cast<std::int64_t>(rows.size()),
                                              sureness(rows.back(), text.back())))
      return;
  }
}

bool Chain::ask(std::int64_t level, std::span<const std::int32_t> text, std::int64_t proposed,
                std::vector<Row>& rows) {
  rows.clear();
  ++passes_;
  LevelCounts& count = counts_[static_cast<std::size_t>(level)];
  const double began = clock_();
  const bool said = levels_[static_cast<std::size_t>(level)]->rows(text, proposed, rows);
  const double seconds = clock_() - began;
  count.seconds += seconds;
  if (!said) return false;
  if (static_cast<std::int64_t>(rows.size()) != proposed + 1)
    throw InternalError("[chain] a level has another number of rows");
  ++count.passes;
  if (proposed == 0 && count.passes > 1) ++count.plain_passes, count.plain_seconds += seconds;
  pace_.passed(level, proposed, seconds);
  return true;
}

bool Chain::takes(std::int32_t id, const Row& p, const Row& q, const Decision& d) {
  if (p.only >= 0) return p.only == id;
  const auto i = static_cast<std::size_t>(id);
  const double of_q = q.p[i], of_p = p.p[i];
  if (of_p >= of_q) return true;
  return of_p > 0 && chance_.happens(of_p / of_q, d);
}

std::int32_t Chain::choose(const Row& p, const Decision& d) {
  return p.only >= 0 ? p.only : static_cast<std::int32_t>(chance_.pick(p.p, d));
}

// Where p and q are as good as one, the residual may be all zeros: then a refusal was a rounding, and p's own
// is as good as any.
std::int32_t Chain::choose_other(const Row& p, const Row& q, const Decision& d) {
  if (p.only >= 0) return p.only;
  std::vector<double> residual(p.p.size());
  double sum = 0;
  for (std::size_t i = 0; i < residual.size(); ++i) sum += residual[i] = std::max(0.0, p.p[i] - q.p[i]);
  return static_cast<std::int32_t>(chance_.pick(sum > 0 ? residual : p.p, d));
}

double Chain::sureness(const Row& row, std::int32_t id) {
  if (row.sure >= 0) return row.sure;
  return row.only >= 0 ? 1 : row.p[static_cast<std::size_t>(id)];
}

}  // namespace fathom
