#include "infer/speculate/chain.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "infer/sampling.h"
#include "kernels/error.h"

namespace fathom {

namespace {

std::vector<double> on_host(const Row& row) {
  return row.held != nullptr ? row.held->on_host(row.number) : row.p;
}

// What a token is drawn by: p, or the residual. Where p and q are as good as one, this may be all zeros: then
// a refusal was a rounding, and p's own is as good as any.
std::vector<double> weights_of(const Row& p, const Row* q) {
  std::vector<double> weights = on_host(p);
  if (q == nullptr) return weights;
  double sum = 0;
  if (q->certain >= 0) {
    weights[static_cast<std::size_t>(q->certain)] = 0;
    for (const double w : weights) sum += w;
  } else {
    const std::vector<double> held = q->held != nullptr ? on_host(*q) : std::vector<double>();
    const std::vector<double>& taken_off = q->held != nullptr ? held : q->p;
    for (std::size_t i = 0; i < weights.size(); ++i)
      sum += weights[i] = std::max(0.0, weights[i] - taken_off[i]);
  }
  return sum > 0 ? weights : on_host(p);
}

}  // namespace

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
  if (!ask(level, text, static_cast<std::int64_t>(proposed), Purpose::Token, p)) {
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
  passed(level, static_cast<std::int64_t>(proposed));
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
      if (!ask(0, text, 0, Purpose::Proposal, one)) return;
      text.push_back(choose(one[0], {static_cast<std::int64_t>(text.size()), Purpose::Proposal, 0, passes_}));
      passed(0, 0);
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
                Purpose purpose, std::vector<Row>& rows) {
  rows.clear();
  ++passes_;
  LevelCounts& count = counts_[static_cast<std::size_t>(level)];
  began_ = clock_();
  bool said = levels_[static_cast<std::size_t>(level)]->rows(text, proposed, rows);
  if (said && std::ssize(rows) != proposed + 1)
    throw InternalError("[chain] a level has another number of rows");
  said = said && look(level, text, proposed, purpose, rows);
  if (!said) count.seconds += clock_() - began_;
  return said;
}

// Of a pass, behind the choice of its last token: of rows that are held that is a question to the device,
// too.
void Chain::passed(std::int64_t level, std::int64_t proposed) {
  LevelCounts& count = counts_[static_cast<std::size_t>(level)];
  const double seconds = clock_() - began_;
  count.seconds += seconds;
  ++count.passes;
  if (proposed == 0 && count.passes > 1) ++count.plain_passes, count.plain_seconds += seconds;
  pace_.passed(level, proposed, seconds);
}

// Of rows that are held the host asks once what it has to know of all: what each has of the token that was
// proposed there, and of a row alone, from which a token is drawn for certain, the token. False: a row is not
// finite, which is an error of the last level alone.
bool Chain::look(std::int64_t level, std::span<const std::int32_t> text, std::int64_t proposed,
                 Purpose purpose, std::vector<Row>& rows) {
  if (rows.front().held == nullptr) return true;
  const std::size_t first = text.size() - static_cast<std::size_t>(proposed);
  std::vector<ShareQuestion> questions(rows.size());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    questions[i].p = rows[i].held->row(rows[i].number);
    if (first + i < text.size()) questions[i].id = text[first + i];
  }
  if (proposed == 0)
    questions[0].uniform = chance_.share([&] { return weights_of(rows[0], nullptr); },
                                         {static_cast<std::int64_t>(first), purpose, level, passes_});
  rows.front().held->ask(questions);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    if (!questions[i].finite) {
      if (level + 1 == std::ssize(levels_)) fail_not_finite(first + i);
      rows.clear();
      return false;
    }
    rows[i].share = questions[i].share;
    rows[i].drawn = questions[i].token;
  }
  return true;
}

bool Chain::takes(std::int32_t id, const Row& p, const Row& q, const Decision& d) {
  if (p.only >= 0) return p.only == id;
  const double of_q = probability(q, id), of_p = probability(p, id);
  if (of_p >= of_q) return true;
  return of_p > 0 && chance_.happens(of_p / of_q, d);
}

std::int32_t Chain::choose(Row& p, const Decision& d) {
  if (p.only >= 0) return p.only;
  if (p.certain >= 0) return p.certain;
  if (p.drawn >= 0) return p.drawn;
  if (p.held != nullptr) return draw_held(p, nullptr, d);
  return static_cast<std::int32_t>(chance_.pick(p.p, d));
}

std::int32_t Chain::choose_other(Row& p, const Row& q, const Decision& d) {
  if (p.only >= 0) return p.only;
  if (p.certain >= 0) return p.certain;
  const bool both_held =
      q.certain >= 0 || (q.held != nullptr && p.held != nullptr && p.held->goes_with(*q.held));
  if (p.held != nullptr && both_held) return draw_held(p, &q, d);
  const auto id = static_cast<std::int32_t>(chance_.pick(weights_of(p, &q), d));
  if (p.held != nullptr) {
    ShareQuestion question;
    question.p = p.held->row(p.number);
    question.id = id;
    p.held->ask({&question, 1});
    p.share = question.share;
  }
  return id;
}

// A token of the row p, or of what q leaves of it, drawn where they are.
std::int32_t Chain::draw_held(Row& p, const Row* q, const Decision& d) {
  ShareQuestion question;
  question.p = p.held->row(p.number);
  if (q != nullptr && q->held != nullptr) question.q = q->held->row(q->number);
  if (q != nullptr) question.certain = q->certain;
  question.uniform = chance_.share([&] { return weights_of(p, q); }, d);
  p.held->ask({&question, 1});
  p.share = question.share;
  return question.token;
}

double Chain::probability(const Row& row, std::int32_t id) {
  if (row.certain >= 0) return row.certain == id ? 1 : 0;
  return row.held != nullptr ? row.share : row.p[static_cast<std::size_t>(id)];
}

double Chain::sureness(const Row& row, std::int32_t id) {
  if (row.sure >= 0) return row.sure;
  return row.only >= 0 ? 1 : probability(row, id);
}

}  // namespace fathom
